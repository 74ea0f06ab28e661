"""The loops that the training benchmark compares, on the small pipeline, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training.benchmarking import training as benchmark
from training.benchmarking.training import LOOPS, measure, render
from training.config import FitConfig


@pytest.mark.parametrize("loop", LOOPS)
def test_each_loop_runs_and_its_parts_fit_into_its_time(
    loop: str, pipeline: Path, images: Path
) -> None:
    config = FitConfig(
        model=str(pipeline), data=str(images), output="", batch_size=2, gradient_accumulation=1
    )
    backward = torch.Tensor.backward
    result = measure(loop, config, 3)
    assert torch.Tensor.backward is backward
    assert len(result["seconds"]) == 3
    assert 0 < sum(result["parts"].values()) <= sum(result["seconds"])
    forwards = {"dense forward", "gated forward", "backward"}
    assert forwards <= result["parts"].keys()
    assert ("VAE" in result["parts"]) == ("text encoder" in result["parts"]) == (loop != "ours")
    assert result["peak"] is None or result["peak"] > 2**20


def test_the_tables() -> None:
    def made(seconds: list[float], parts: dict[str, float], peak: int) -> dict[str, object]:
        return {"seconds": seconds, "parts": parts, "peak": peak}

    text = render(
        {
            "ours": made([1.0, 2.0, 3.0], {"backward": 3.0}, 2**30),
            "original": made([6.0, 6.0, 6.0], {"VAE": 9.0, "backward": 4.5}, 2**31),
        },
        batch=4,
    )
    # medians 2 and 6 seconds for 4 images; 3 of 6 and 4.5 of 18 seconds in backward, 9 in the VAE
    assert "| ours | 2.00 | 2.000 | 1.00 | 1,024 MiB |" in text
    assert "| original | 0.67 | 6.000 | 3.00 | 2,048 MiB |" in text
    assert "| ours | 50.0% | 0.0% | 50.0% |" in text
    assert "| original | 25.0% | 50.0% | 25.0% |" in text


def test_the_word_training_chooses_this_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.benchmark import main

    seen: list[list[str]] = []
    monkeypatch.setattr(benchmark, "main", lambda argv: seen.append(list(argv)) or 7)
    assert main(["training", "--steps", "2"]) == 7
    assert seen == [["--steps", "2"]]
