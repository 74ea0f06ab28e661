"""The throughput benchmark: it builds, learns, and divides rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.benchmark import main
from training.benchmarking.throughput import measure, render
from training.config import FitConfig
from training.errors import UserError


def test_a_build_and_a_few_steps_are_measured(pipeline: Path, images: Path, tmp_path: Path) -> None:
    config = FitConfig(
        model=str(pipeline), data=str(images), output="", batch_size=3, gradient_accumulation=1
    )
    found = measure(config, 7, 2, tmp_path)
    assert found["build"]["images"] == 7 and found["steps"]["images"] == 6
    assert found["build"]["cpu"] > 0 and found["steps"]["wall"] > 0
    # 4 x 16 x 16 float32 latents of seven images, and more
    assert found["cache"] > 7 * 4 * 16 * 16 * 4
    with pytest.raises(UserError, match="--images is 21, and .* holds 20"):
        measure(config, 21, 1, tmp_path)


def test_the_table() -> None:
    part = {"cpu": 2.0, "wall": 4.0, "peak": 2**30, "own": 2**29}
    result = {"build": {**part, "images": 100}, "steps": {**part, "images": 8}, "cache": 2**21}
    row = "| 100 | 4.0 | 50.0 | 1,024 MiB | 2.0 MiB | 4.00 | 1,024 MiB | 512 MiB |"
    assert render({100: result}).splitlines()[-1] == row


def test_the_word_throughput_chooses_this_benchmark(
    images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.benchmarking import throughput

    monkeypatch.setattr(throughput, "main", lambda argv: len(argv))
    assert main(["throughput", "--data", "x"]) == 2
