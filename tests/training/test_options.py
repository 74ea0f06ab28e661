"""One dataclass is the command line, its checks and its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from training.config import FitConfig
from training.errors import UserError
from training.evaluate import EvaluateOptions
from training.options import BELOW_ONE, COUNT, Options, option, parsed
from training.recover import RecoverConfig
from training.sample import SampleOptions
from training.score import ScoreConfig
from training.stages import StagesConfig


@dataclass(frozen=True)
class Drawing(Options):
    steps: int = option("how many", 30, COUNT)


@dataclass(frozen=True)
class Toy(Options):
    model: str = option("a file")
    kind: Literal["soft", "hard"] = option("of the gates", "soft")
    shape: str = option("of the noise", "round", choices=("round", "flat"))
    shares: tuple[float, ...] = option("such as 30%", (0.3, 0.5), BELOW_ONE)
    limit: int | None = option("at most", None, COUNT)
    quiet: bool = option("say nothing", False)
    drawing: Drawing = field(default_factory=Drawing)
    untyped: int = field(default=2, metadata={"bound": COUNT})


def toy(*argv: str) -> Toy:
    return parsed(Toy, argv, "toy", "A toy.", demo=("model",))


def test_what_was_typed_becomes_the_dataclass_and_the_rest_is_its_default() -> None:
    assert toy("--model", "m") == Toy("m")
    typed = [
        "--kind",
        "hard",
        "--shape",
        "flat",
        "--shares",
        "0.1",
        "0.2",
        "--limit",
        "3",
        "--quiet",
        "--steps",
        "5",
    ]
    expected = Toy("m", "hard", "flat", (0.1, 0.2), 3, True, Drawing(5))
    assert toy("--model", "m", *typed) == expected
    assert toy("--demo").model.endswith("pipeline") and toy("--demo", "--model", "m") == Toy("m")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--model missing; or try --demo"),
        (["--model", "m", "--kind", "loud"], "invalid choice: 'loud'"),
        (["--model", "m", "--steps", "x"], "invalid int value: 'x'"),
        (["--model", "m", "--untyped", "3"], "unrecognized arguments: --untyped 3"),
    ],
)
def test_what_is_no_command_line_ends_the_program(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        toy(*argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "loud"}, "--kind is 'loud'.\n  Expected: one of soft, hard"),
        ({"shape": "square"}, "--shape is 'square'.\n  Expected: one of round, flat"),
        ({"shares": (0.1, 1.0)}, "--shares is 1.0.\n  Expected: from 0 up to 1"),
        ({"limit": 0}, "--limit is 0.\n  Expected: 1 or more"),
        ({"untyped": 0}, "--untyped is 0."),
    ],
)
def test_what_an_option_does_not_take_is_refused_however_it_is_given(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        Toy("m", **settings)  # type: ignore[arg-type]
    assert message in str(refused.value)
    with pytest.raises(UserError, match="--steps is 0"):
        toy("--model", "m", "--steps", "0")


def test_all_commands_choose_their_device_alike() -> None:
    commands = (FitConfig, ScoreConfig, RecoverConfig, StagesConfig, SampleOptions, EvaluateOptions)
    assert {command.device for command in commands} == {"auto"}


def test_the_help_says_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        toy("--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "--kind {soft,hard} of the gates (default soft)" in said
    assert "such as 30% (default 0.3 0.5)" in said and "how many (default 30)" in said
    assert "at most --quiet say nothing --steps" in said
