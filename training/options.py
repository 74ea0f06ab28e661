"""The settings of a command as one dataclass: each option, its default and its help are said once.

`option` declares a field. From the fields follow the command line (`parser_of`, `built`) and what
is refused (`Options`).
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldcp_core import MAX_RANK, RANK
from training.errors import UserError

Precision = Literal["fp32", "bf16", "fp16"]
T = TypeVar("T", bound="Options")


# --- what an option takes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """The values that an option takes, as a test and in words."""

    holds: Callable[[Any], bool]
    words: str


#: how many there can be of anything: images, steps, pixels
COUNT = Bound(range(1, 2**31).__contains__, "1 or more, below 2**31")
#: what every generator takes as a seed, also with a little added
SEED = Bound(range(2**63).__contains__, "from 0 up to 2**63")
NOT_NEGATIVE = Bound(lambda value: 0 <= value < inf, "0 or more")
POSITIVE = Bound(lambda value: 0 < value < inf, "more than 0")
FINITE = Bound(isfinite, "a finite number")
BELOW_ONE = Bound(lambda value: 0 <= value < 1, "from 0 up to 1")
WITHIN_ONE = Bound(lambda value: 0 < value < 1, "between 0 and 1")


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises UserError about the option of the setting ``name`` unless ``holds``."""
    if not holds:
        option = _flag(name)
        raise UserError(f"{option} is {value!r}.", expected, f"change {option}")


def option(help: str, default: Any = MISSING, bound: Bound | None = None, **parsing: Any) -> Any:
    """A field that can be given on the command line; ``parsing`` goes to `add_argument`."""
    return field(default=default, metadata={"help": help, "bound": bound, "parsing": parsing})


def device() -> Any:
    """The option of the commands that run the model (see `training.model.load.usable_device`)."""
    return option("cpu, cuda, mps; auto: a GPU where there is one", "auto")


def correction_rank() -> Any:
    """The option of the commands that write corrections."""
    help = "of the corrections of layers that read pruned channels; 0: none"
    return option(help, RANK, Bound(range(MAX_RANK + 1).__contains__, f"0 to {MAX_RANK}"))


@dataclass(frozen=True)
class Options:
    """A dataclass of options; raises UserError for a value that its option doesn't take."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, bound = getattr(self, f.name), f.metadata.get("bound")
            many = value if isinstance(value, tuple) else () if value is None else (value,)
            for one in many:
                parsing = f.metadata.get("parsing", {})
                if choices := _kind(hints[f.name])[1] or parsing.get("choices"):
                    require(one in choices, f.name, one, f"one of {', '.join(choices)}")
                if bound is not None:
                    require(bound.holds(one), f.name, one, bound.words)


# --- command lines --------------------------------------------------------------------------------


def parser_of(
    options: type[Options], command: str, text: str | None, **more: Any
) -> argparse.ArgumentParser:
    """The command line of ``python -m training.<command>``; ``text`` says what it does."""
    parser = argparse.ArgumentParser(
        prog=f"python -m training.{command}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        **more,
    )
    _add(parser, options)
    return parser


def _add(parser: argparse.ArgumentParser, options: type[Options]) -> None:
    hints = get_type_hints(options)
    for f in fields(options):
        kind, choices, many = _kind(hints[f.name])
        if isinstance(kind, type) and issubclass(kind, Options):
            _add(parser, kind)
        elif "help" in f.metadata:
            more: dict[str, Any] = {"nargs": "+"} if many else {}
            more |= {"action": "store_true"} if kind is bool else {"type": kind}
            more |= {"choices": choices} if choices else {}
            more |= f.metadata["parsing"]
            positional = more.pop("positional", False)
            shown = f.name if positional else _flag(f.name)
            parser.add_argument(shown, help=_help(f.metadata["help"], f.default), **more)


def built(parser: argparse.ArgumentParser, options: type[T], given: Mapping[str, Any]) -> T:
    """The options that were given, by name; ends the program where one is missing."""
    settings, missing, hints = dict(given), [], get_type_hints(options)
    for f in fields(options):
        kind = _kind(hints[f.name])[0]
        if isinstance(kind, type) and issubclass(kind, Options):
            names = {part.name for part in fields(kind)}
            settings[f.name] = kind(**{k: settings.pop(k) for k in names & settings.keys()})
        elif isinstance(settings.get(f.name), list):
            settings[f.name] = tuple(settings[f.name])
        elif f.name not in settings and f.default is MISSING:
            missing.append(_flag(f.name))
    if missing:
        demo = "; or try --demo" if "--model" in missing else ""
        parser.error(f"{', '.join(missing)} missing{demo}")
    return options(**settings)


def _kind(kind: Any) -> tuple[Any, tuple[str, ...], bool]:
    """Of a field: the type of a value, the values there are (all: none named), whether several."""
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = get_args(kind)[0]
    many = get_origin(kind) is tuple
    if many:
        kind = get_args(kind)[0]
    return (str, get_args(kind), many) if get_origin(kind) is Literal else (kind, (), many)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(text: str, default: Any) -> str:
    if not any(default is no for no in (MISSING, None, False, ())):
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{text} (default {shown})"
    return text.replace("%", "%%")


# --- the demo -------------------------------------------------------------------------------------

DEMO = Path(__file__).parent / "demo"
#: what --demo stands for; every option can still be given
DEMO_SETTINGS: dict[str, Any] = {
    "model": str(DEMO / "pipeline"),
    "data": str(DEMO / "images"),
    "output": "gates.safetensors",
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_steps": 150,
}


def add_demo(parser: argparse.ArgumentParser) -> None:
    help = "the embedded demo model and faces, and in a fit 4 images per step and 150 steps"
    parser.add_argument("--demo", action="store_true", help=help)


def with_demo(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """What was given, over those of ``names`` that --demo stands for if that was given."""
    demo = DEMO_SETTINGS if given.pop("demo", False) else {}
    return {name: demo[name] for name in names if name in demo} | given


def parsed(
    options: type[T],
    argv: Sequence[str] | None,
    command: str,
    text: str | None,
    demo: Sequence[str] = (),
) -> T:
    """The options of a command line; --demo stands for those in ``demo`` that were not given."""
    parser = parser_of(options, command, text)
    if demo:
        add_demo(parser)
    return built(parser, options, with_demo(vars(parser.parse_args(argv)), *demo))
