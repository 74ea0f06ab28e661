"""Every setting of a fit in one place; the same record travels inside the gate file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import inf
from typing import Any, Literal, get_args

from ldcp_core import DEFAULT_FLOOR, DEFAULT_SCOPE, PADDINGS, Padding
from training.errors import UserError
from training.learning.budget import BudgetKind

Constant = Literal["mean", "zero"]
Reconstruction = Literal["teacher", "noise"]
Precision = Literal["fp32", "bf16", "fp16"]

#: the original project's two settings: target sparsity and λ
PRESETS: dict[str, dict[str, float]] = {
    "quality": {"target_sparsity": 0.1, "sparsity_weight": 0.003},
    "balanced": {"target_sparsity": 0.3, "sparsity_weight": 0.01},
}
#: what every generator takes as a seed, also with a little added
SEEDS = range(2**63)
#: how many there can be of anything: images, steps, pixels
COUNTS = range(1, 2**31)
A_COUNT = "1 or more, below 2**31"


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raises UserError about the option of the setting ``name`` unless ``holds``."""
    if not holds:
        option = "--" + name.replace("_", "-")
        raise UserError(f"{option} is {value!r}.", expected, f"change {option}")


@dataclass(frozen=True)
class RunOptions:
    """How a run is kept and watched. Nothing here changes what is learned."""

    resume: bool = False  # go on from the last checkpoint
    checkpoint_every: int = 50  # optimizer steps; 0: only when stopped
    keep_checkpoints: int = 2
    cache: str | None = None  # folder of latents and prompt embeddings; None: see `default_cache`
    no_cache: bool = False  # keep them in memory
    workers: int | None = None  # threads that decode images for the cache; None: one per core
    sample_every: int = 0  # steps between sample images; 0: none
    tensorboard: bool = False
    gradient_checkpointing: bool = False  # less memory, more time: blocks are evaluated again

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        require(every >= 0, "checkpoint_every", every, "0 or more")
        keep = self.keep_checkpoints
        require(keep in COUNTS, "keep_checkpoints", keep, A_COUNT)
        require(self.workers is None or self.workers in COUNTS, "workers", self.workers, A_COUNT)
        require(self.sample_every >= 0, "sample_every", self.sample_every, "0 or more")


@dataclass(frozen=True)
class FitConfig:
    """What to learn, from what, and how long. Defaults are those of the command line."""

    model: str
    data: str
    output: str
    scope: str = DEFAULT_SCOPE  # which sites: see `Topology.sites`
    target_sparsity: float | None = 0.3  # None: λ stays fixed and the sparsity is what comes out
    budget: BudgetKind = "channels"  # what the target sparsity is a share of
    floor: float = DEFAULT_FLOOR  # share of every site's channels that stays
    sparsity_weight: float = 0.01  # the seed's λ; with a target, where its controller starts
    padding: Padding = "zero"
    constant: Constant = "mean"
    reconstruction: Reconstruction = "teacher"  # MSE against the dense output, or the true noise
    resolution: int | None = None  # pixels; None: the model's own
    batch_size: int = 2
    gradient_accumulation: int = 4
    reuse: int = (
        4  # steps that meet the same images, noise and timesteps: see `training.step.reuse`
    )
    learning_rate: float | None = None  # of the logits (Adam); None: by the number of steps
    epochs: float | None = None  # no limit by default: max_steps ends the fit
    max_steps: int = 1000  # optimizer steps
    precision: Precision = "fp32"
    streaming: bool = False  # read tables as they come: see `training.data.streaming`
    device: str = "auto"
    validation_fraction: float = 0.1
    validation_samples: int = 64  # held-out images × timesteps of one validation pass
    calibration_batches: int = 16
    seed: int = 0
    run: RunOptions = field(default_factory=RunOptions)

    def __post_init__(self) -> None:
        budgets = get_args(BudgetKind)
        self._require(self.budget in budgets, "budget", f"one of {', '.join(budgets)}")
        self._require(0 <= self.floor < 1, "floor", "from 0 up to 1")
        self._require(self.padding in PADDINGS, "padding", f"one of {', '.join(PADDINGS)}")
        target = self.target_sparsity
        self._require(target is None or 0 < target < 1, "target_sparsity", "between 0 and 1")
        self._require(0 <= self.sparsity_weight < inf, "sparsity_weight", "0 or more")
        self._require(0 <= self.validation_fraction < 1, "validation_fraction", "from 0 up to 1")
        rate = self.learning_rate
        self._require(rate is None or 0 < rate < inf, "learning_rate", "more than 0")
        epochs = self.epochs
        self._require(epochs is None or 0 < epochs < inf, "epochs", "more than 0")
        self._require(self.seed in SEEDS, "seed", "from 0 up to 2**63")
        self._require(self.resolution is None or self.resolution in COUNTS, "resolution", A_COUNT)
        for name in (
            "batch_size",
            "gradient_accumulation",
            "reuse",
            "max_steps",
            "validation_samples",
            "calibration_batches",
        ):
            self._require(getattr(self, name) in COUNTS, name, A_COUNT)
        if self.streaming:
            self._check_streaming()

    def _check_streaming(self) -> None:
        for name, given, why in (
            ("--epochs", self.epochs, "nobody knows how many images a stream has"),
            ("--cache", self.run.cache, "a stream is encoded as it comes"),
        ):
            if given is not None:
                raise UserError(
                    f"{name} {given} and --streaming were given, but {why}.",
                    "one of the two",
                    f"leave out {name}" + (" and use --max-steps" if name == "--epochs" else ""),
                )

    def _require(self, holds: bool, name: str, expected: str) -> None:
        require(holds, name, getattr(self, name), expected)

    def to_json(self) -> dict[str, Any]:
        """Everything that decides what is learned."""
        settings = asdict(self)
        del settings["run"]
        return settings
