"""Errors that a user can put right are told without a traceback; defects keep theirs."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldcp_core import GateFileError
from training import benchmark, console, evaluate, sample, score, sweep
from training.console import explaining, progress
from training.errors import UserError


@pytest.mark.parametrize(
    "error",
    [UserError("Nothing there."), GateFileError("Nothing there."), OSError("Nothing there.")],
)
def test_what_a_user_can_put_right_is_told(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    @explaining
    def main(argv: list[str]) -> int:
        raise error

    assert main([]) == 1
    assert capsys.readouterr().err == "error: Nothing there.\n"


def test_too_little_memory_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    @explaining
    def main() -> int:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    assert main() == 1
    told = capsys.readouterr().err
    assert told.startswith("error: CUDA out of memory. Tried to allocate 9 GiB\n")
    assert "--device cpu" in told and "and more" not in told


def test_ctrl_c_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    @explaining
    def main() -> int:
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_keeps_its_traceback() -> None:
    @explaining
    def main() -> int:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        main()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_a_bar_on_a_terminal_and_seldom_a_line_elsewhere(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = {}
    for file in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", file)
        assert list(progress(range(5000), "counting")) == list(range(5000))
        found[file.isatty()] = file.getvalue()
    assert "\rcounting: 100%" in found[True]
    first, *_, last = lines = found[False].splitlines()
    assert first.startswith("counting: 0/5000") and last.startswith("counting: 5000/5000")
    assert len(lines) <= 3 and "\r" not in found[False]


def test_progress_goes_on_line_by_line_while_it_lasts(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(console, "LINE_EVERY", 0.0)
    with progress(None, "counting", 3) as bar:
        for _ in range(3):
            bar.update()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" [")[0] for line in lines] == [f"counting: {n}/3" for n in range(4)]


def test_progress_is_silent_where_the_log_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress(range(3), "counting")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


OPTIONS: dict[Callable[[list[str]], int], list[str]] = {
    score.main: ["--criterion", "random", "--seed"],
    sample.main: ["--seeds"],
    evaluate.main: ["--precision", "fp32", "int8", "--seed"],
    sweep.main: ["--seed"],
    benchmark.main: ["--seed"],
}


@pytest.mark.parametrize("main", OPTIONS, ids=lambda main: main.__module__)
def test_a_seed_beyond_every_generator_is_told(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = [] if main is benchmark.main else ["--demo"]
    output = ["--output", str(tmp_path / "a.safetensors")]
    assert main([*demo, *output, *OPTIONS[main], str(2**70)]) == 1
    assert str(2**70) in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps=0", "--batch-size=0", "--guidance=inf"])
def test_images_that_cannot_be_drawn_are_told_before_the_model_loads(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(sample, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert sample.main(["--demo", "--output", str(tmp_path / "a"), option]) == 1
    assert option.replace("=", " is ") in capsys.readouterr().err


@pytest.mark.parametrize("main", [score.main, sample.main, evaluate.main])
def test_a_device_that_is_none_is_told(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--demo", "--output", str(tmp_path / "a.safetensors"), "--device", "nonsense"]
    assert main([*output, *OPTIONS[main][:-1]]) == 1
    assert "--device nonsense can't be used" in capsys.readouterr().err
