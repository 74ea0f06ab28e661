"""The loops that the training benchmark compares, on the small pipeline, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from training import denoising, kernels
from training.benchmarking import training as benchmark
from training.benchmarking.training import LOOPS, WARM_UP, _median, measure, render
from training.config import FitConfig
from training.loop import Learning
from training.reuse import WINDOW


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
    assert 0 < sum(result["parts"].values()) <= result["cpu"]
    assert result["wall"] > 0
    forwards = {"dense forward", "gated forward", "backward"}
    assert forwards <= result["parts"].keys()
    original = loop.startswith("original")
    assert ("VAE" in result["parts"]) == ("text encoder" in result["parts"]) == original
    assert result["peak"] is None or result["peak"] > 2**20


def test_all_problems_of_a_window_are_met_equally_often(
    pipeline: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FitConfig(
        model=str(pipeline),
        data=str(images),
        output="",
        batch_size=2,
        gradient_accumulation=1,
        reuse=2,
    )
    taken: list[int] = []
    advance = Learning.advance
    monkeypatch.setattr(Learning, "advance", lambda learning: taken.append(1) or advance(learning))
    measure("ours", config, 3)
    assert len(taken) == WARM_UP + 2 * WINDOW


def test_the_original_evaluates_the_u_net_as_pytorch_does(
    pipeline: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the original is timed with what is ours")

    monkeypatch.setattr(kernels, "fast_layers", refuse)
    monkeypatch.setattr(denoising, "fast_layers", refuse)
    config = FitConfig(model=str(pipeline), data=str(images), output="", batch_size=2)
    with pytest.raises(AssertionError):
        measure("ours", config, 1)
    measure("original", config, 1)


def test_the_tables() -> None:
    def made(cpu: float, parts: dict[str, float], peak: int) -> dict[str, object]:
        return {"cpu": cpu, "wall": 2 * cpu, "parts": parts, "peak": peak}

    text = render(
        {
            "ours": made(2.0, {"backward": 1.0}, 2**30),
            "original": made(6.0, {"VAE": 3.0, "backward": 1.5}, 2**31),
        },
        batch=4,
    )
    assert "| ours | 1.00 | 4.000 | 1.00 | 2.000 | 1.00 | 1,024 MiB |" in text
    assert "| original | 0.33 | 12.000 | 3.00 | 6.000 | 3.00 | 2,048 MiB |" in text
    assert "| ours | 1.000 | 0.000 | 1.000 |" in text
    assert "| original | 1.500 | 3.000 | 1.500 |" in text


def test_a_loops_result_is_its_median_round_with_the_highest_peak() -> None:
    rounds = [{"cpu": cpu, "wall": 1.0, "parts": {}, "peak": int(cpu)} for cpu in (3.0, 1.0, 2.0)]
    assert _median(rounds) == {"cpu": 2.0, "wall": 1.0, "parts": {}, "peak": 3}


def test_the_word_training_chooses_this_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.benchmark import main

    seen: list[list[str]] = []
    monkeypatch.setattr(benchmark, "main", lambda argv: seen.append(list(argv)) or 7)
    assert main(["training", "--steps", "2"]) == 7
    assert seen == [["--steps", "2"]]
