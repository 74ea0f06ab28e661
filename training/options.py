"""The settings of a command as one dataclass: each option, its default and its help are said once.

`option` declares a field. From the fields follow the command line (`parser_of`, `built`), what is
refused (`Options`), and what a gate file stores of a fit (`FitConfig.to_json`).
"""

from __future__ import annotations

import argparse
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ldcp_core import DEFAULT_FLOOR, DEFAULT_SCOPE, SCOPES, Padding
from training.errors import UserError
from training.learning.budget import BudgetKind

Constant = Literal["mean", "zero"]
Reconstruction = Literal["teacher", "noise"]
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


@dataclass(frozen=True)
class Options:
    """A dataclass of options; raises UserError for a value that its option doesn't take."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):
            value, bound = getattr(self, f.name), f.metadata.get("bound")
            many = value if isinstance(value, tuple) else () if value is None else (value,)
            for one in many:
                if choices := _kind(hints[f.name])[1]:
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
    parser.add_argument("--demo", action="store_true", help="the embedded demo model and faces")


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


# --- a fit ----------------------------------------------------------------------------------------


def _sparsity(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share nor 'none'") from None


@dataclass(frozen=True)
class RunOptions(Options):
    """How a run is kept and watched. Nothing here changes what is learned."""

    resume: bool = option("go on with the unfinished run of this --output", False)
    checkpoint_every: int = option(
        "save so often beside the output; 0: only when stopped", 50, NOT_NEGATIVE, metavar="STEPS"
    )
    keep_checkpoints: int = option("how many stay while it runs", 2, COUNT, metavar="COUNT")
    cache: str | None = option(
        "of latents and prompt embeddings (default: the user's cache)", None, metavar="FOLDER"
    )
    no_cache: bool = option("keep latents and prompt embeddings in memory", False)
    workers: int | None = option(
        "threads that decode images for the cache (default: one per core)", None, COUNT
    )
    sample_every: int = option(
        "draw images so often, dense and pruned, from fixed seeds; 0: never",
        0,
        NOT_NEGATIVE,
        metavar="STEPS",
    )
    tensorboard: bool = option("write for TensorBoard (must be installed)", False)
    gradient_checkpointing: bool = option(
        "less memory, more time: evaluate blocks again for the gradient", False
    )


@dataclass(frozen=True)
class FitConfig(Options):
    """What to learn, from what, and how long. The same record travels inside the gate file."""

    model: str = option("hub id, diffusers folder, or single-file checkpoint of SD1.5, SD2 or SDXL")
    data: str = option("folder of images (FFHQ in any layout), or a hub data set")
    output: str = option("the gate file to write (.safetensors)")
    scope: str = option(
        f"which layers: {', '.join(SCOPES)}, or site names separated by commas, in which * stands "
        "for anything",
        DEFAULT_SCOPE,
    )
    target_sparsity: float | None = option(
        "share of channels to prune; 'none' leaves λ fixed and prunes what that does: at 0.01 far "
        "less than 30%, 12.5% of the demo's",
        0.3,
        WITHIN_ONE,
        type=_sparsity,
    )
    budget: BudgetKind = option("what the target is a share of", "channels")
    floor: float = option("share of each layer that stays", DEFAULT_FLOOR, BELOW_ONE)
    sparsity_weight: float = option(
        "λ of the L1 penalty; with a target, where its controller starts", 0.01, NOT_NEGATIVE
    )
    padding: Padding = option("how constants meet the border", "zero")
    constant: Constant = option("stand-in of a pruned channel", "mean")
    reconstruction: Reconstruction = option(
        "MSE against the dense output, or the true noise", "teacher"
    )
    resolution: int | None = option("pixels (default: the model's own)", None, COUNT)
    batch_size: int = option("images per forward", 2, COUNT)
    gradient_accumulation: int = option("batches per step", 4, COUNT)
    reuse: int = option("steps that meet the same images, noise and timesteps", 4, COUNT)
    learning_rate: float | None = option(
        "of the logits, Adam (default: by the number of steps)", None, POSITIVE
    )
    epochs: float | None = option("end after so many passes over the images", None, POSITIVE)
    max_steps: int = option("end after so many optimizer steps", 1000, COUNT)
    precision: Precision = option("of the frozen U-Net", "fp32")
    streaming: bool = option(
        "read a hub data set, or tables, as they come, without keeping them or a cache", False
    )
    device: str = option("auto, cpu, cuda, mps", "auto")
    validation_fraction: float = option("share of images held out", 0.1, BELOW_ONE)
    #: held-out images × timesteps of one validation pass
    validation_samples: int = field(default=64, metadata={"bound": COUNT})
    calibration_batches: int = field(default=16, metadata={"bound": COUNT})
    seed: int = option("of everything random", 0, SEED)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given, why in (
            ("--epochs", self.epochs, "nobody knows how many images a stream has"),
            ("--cache", self.run.cache, "a stream is encoded as it comes"),
        ):
            if self.streaming and given is not None:
                raise UserError(
                    f"{name} {given} and --streaming were given, but {why}.",
                    "one of the two",
                    f"leave out {name}" + (" and use --max-steps" if name == "--epochs" else ""),
                )

    def to_json(self) -> dict[str, Any]:
        """Everything that decides what is learned."""
        settings = asdict(self)
        del settings["run"]
        return settings
