"""Errors that a user can put right are told without a traceback; defects keep theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ldcp_core import GateFileError
from training import benchmark, compare, evaluate, sample, score, sweep
from training.console import explaining
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


def test_a_defect_keeps_its_traceback() -> None:
    @explaining
    def main() -> int:
        raise TypeError("a defect")

    with pytest.raises(TypeError, match="a defect"):
        main()


OPTIONS: dict[Callable[[list[str]], int], list[str]] = {
    score.main: ["--criterion", "random", "--seed"],
    sample.main: ["--seeds"],
    evaluate.main: ["--precision", "fp32", "int8", "--seed"],
    sweep.main: ["--seed"],
    compare.main: ["none.safetensors", "--seeds"],
    benchmark.main: ["--seed"],
}


@pytest.mark.parametrize("main", OPTIONS, ids=lambda main: main.__module__)
def test_a_seed_beyond_every_generator_is_told(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = [] if main is benchmark.main else ["--demo"]
    output = [] if main is compare.main else ["--output", str(tmp_path / "a.safetensors")]
    assert main([*demo, *output, *OPTIONS[main], str(2**70)]) == 1
    assert str(2**70) in capsys.readouterr().err


@pytest.mark.parametrize("main", [score.main, sample.main, evaluate.main])
def test_a_device_that_is_none_is_told(
    main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--demo", "--output", str(tmp_path / "a.safetensors"), "--device", "nonsense"]
    assert main([*output, *OPTIONS[main][:-1]]) == 1
    assert "--device nonsense can't be used" in capsys.readouterr().err
