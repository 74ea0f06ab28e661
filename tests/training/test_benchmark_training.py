"""The loops that the training benchmark compares, on the small pipeline, and what it prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.benchmarking import training as benchmark
from training.benchmarking.training import LOOPS, WARM_UP, _median, measure, render
from training.config import FitConfig
from training.learning.loop import Learning
from training.step.reuse import WINDOW


@pytest.mark.parametrize("loop", LOOPS)
def test_each_loop_runs(loop: str, pipeline: Path, images: Path) -> None:
    config = FitConfig(
        model=str(pipeline), data=str(images), output="", batch_size=2, gradient_accumulation=1
    )
    result = measure(loop, config, 1)
    assert result["wall"] > 0 and result["cpu"] > 0
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


def test_the_table() -> None:
    found = {
        "ours": {"cpu": 2.0, "wall": 4.0, "peak": 2**30},
        "original": {"cpu": 6.0, "wall": 12.0, "peak": 2**31},
    }
    text = render(found)
    assert "| ours | 4.000 | 1.00 | 2.000 | 1.00 | 1,024 MiB |" in text
    assert "| original | 12.000 | 3.00 | 6.000 | 3.00 | 2,048 MiB |" in text


def test_a_loops_result_is_its_median_round_with_the_highest_peak() -> None:
    rounds = [{"cpu": cpu, "wall": 1.0, "peak": int(cpu)} for cpu in (3.0, 1.0, 2.0)]
    assert _median(rounds) == {"cpu": 2.0, "wall": 1.0, "peak": 3}


def test_the_word_training_chooses_this_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.benchmark import main

    seen: list[list[str]] = []
    monkeypatch.setattr(benchmark, "main", lambda argv: seen.append(list(argv)) or 7)
    assert main(["training", "--steps", "2"]) == 7
    assert seen == [["--steps", "2"]]
