"""Every setting of a fit in one place; the same record travels inside the gate file."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ldcp_core import DEFAULT_FLOOR, DEFAULT_SCOPE, SCOPES, Padding
from training.errors import UserError
from training.learning.budget import BudgetKind
from training.options import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    WITHIN_ONE,
    Options,
    Precision,
    correction_rank,
    device,
    option,
)

Constant = Literal["mean", "zero"]
Reconstruction = Literal["teacher", "noise"]


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
        "threads that decode images for the cache (default: one per core, 8 at most)", None, COUNT
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
        "share of the budget to prune; 'none' leaves λ fixed and prunes what that does: at 0.01 "
        "far less than 30%, 12.5% of the demo's",
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
    correction_rank: int = correction_rank()
    recover: bool = option("train constants and corrections afterwards", False)
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
    device: str = device()
    validation_fraction: float = option("share of images held out", 0.1, BELOW_ONE)
    #: held-out images × timesteps of one validation pass
    validation_samples: int = field(default=64, metadata={"bound": COUNT})
    calibration_batches: int = field(default=16, metadata={"bound": COUNT})
    #: images × timesteps that corrections are computed from
    correction_samples: int = field(default=128, metadata={"bound": COUNT})
    seed: int = option("of everything random", 0, SEED)
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        cache, stream = self.run.cache, self.streaming and "--streaming"
        for name, given, other, why in (
            ("--epochs", self.epochs, stream, "nobody knows how many images a stream has"),
            ("--cache", cache, stream, "a stream is encoded as it comes"),
            ("--cache", cache, self.run.no_cache and "--no-cache", "that keeps none"),
        ):
            if other and given is not None:
                raise UserError(
                    f"{name} {given} and {other} were given, but {why}.",
                    "one of the two",
                    f"leave out {name}" + (" and use --max-steps" if name == "--epochs" else ""),
                )

    def to_json(self) -> dict[str, Any]:
        """Everything that decides what is learned."""
        settings = asdict(self)
        del settings["run"]
        return settings
