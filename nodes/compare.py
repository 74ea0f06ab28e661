"""The same seed sampled by the full model and pruned in several ways, with what each took and lost.

All are sampled by the host's own KSampler before any is decoded, so that the U-Net and the VAE take
turns on the compute device once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..ldcp_core import ALWAYS, Gates
from ..ldcp_core.report import run_line, show_saved
from .host.identity import DIFFERS, differs_from_training
from .host.observe import COMPILED
from .host.patch import attach, attached, detached
from .host.record import RunRecord
from .host.run import Layer
from .variants import Variant

EXPLAINED = [
    "pruned   share of the gated channels, in steps that prune",
    "seconds  of sampling, one run each, measured",
    "weights  of the gated layers on the compute device while pruned, against in full, measured",
    "RMSE     of the images against those of the full model, in levels from 0 to 255, measured",
]


@dataclass(frozen=True)
class Rendered:
    """What one model made: images float [B, H, W, 3] in [0, 1], and what they took and lost.

    ``seconds`` are those of sampling, also as a ratio ``of_full``. ``rmse`` is of each image [B]
    against the full model's, in levels from 0 to 255. ``variant``, ``pruned`` (the share that came
    out) and ``record`` are those of a pruned model.
    """

    images: Tensor
    seconds: float
    of_full: float
    rmse: Tensor
    variant: Variant | None = None
    pruned: float = 0.0
    record: RunRecord | None = None

    @property
    def name(self) -> str:
        return "full model" if self.variant is None else str(self.variant)

    @property
    def schedule(self) -> str:
        return "" if self.variant is None else str(self.variant.schedule)

    @property
    def total_rmse(self) -> float:
        """Over all images of the batch."""
        return float(self.rmse.square().mean().sqrt())

    @property
    def saved(self) -> str:
        """Measured bytes of the gated layers' weights; empty where nothing was pruned."""
        if self.record is None or not self.record.pruned_evaluations:
            return ""
        return show_saved(self.record.saved_bytes)

    def figures(self, rmse: float) -> list[str]:
        """What a caption says, a line each, ``rmse`` being that of the image above it."""
        if self.variant is None:
            return [f"{self.seconds:.1f} s"]
        return [
            f"{self.pruned:.1%} of channels pruned",
            f"{self.seconds:.1f} s, {self.of_full:.2f} of full",
            f"weights: {self.saved}" if self.saved else "nothing ran pruned",
            f"RMSE {rmse:.1f} of 255",
        ]

    def notes(self) -> Iterator[str]:
        """What the user should know about the run."""
        if self.record is None:
            return
        where = f"{self.name}, {self.schedule}: "
        if not self.record.pruned_evaluations:
            yield where + run_line(self.record)
        yield from (where + note for note in self.record.notes)
        if self.record.kept_full:
            yield f"full weights stayed: {self.record.kept_full}"


def compare(
    model: Any,
    gates: Gates,
    variants: Sequence[Variant],
    sampling: Mapping[str, Any],
    vae: Any,
    show: Callable[[str], None] = lambda text: None,
) -> list[Rendered]:
    """The full model's images, then those of every variant.

    ``sampling`` are the arguments of the host's ``common_ksampler``. Pruning that the ModelPatcher
    ``model`` brings along is left out. ``show`` is told what is going on. Raises ModelError for
    gates that do not fit and ValueError without a VAE, both before anything is sampled.
    """
    if vae is None:
        raise ValueError(
            "LDCP: there is no VAE, so no image can be decoded; this checkpoint has none: connect "
            "Load VAE"
        )
    full = detached(model)
    layers = [layers_of(gates, variant) for variant in variants]
    models = [full, *(attach(full, *of_one) for of_one in layers)]
    show("loading the model")
    few = {**sampling, "steps": min(2, sampling["steps"])}  # some schedulers have no single step
    for each in (full, *first_uses(full, variants, layers)):
        sample(each, few)
    runs = []
    names = ["in full", *(f"{variant}, {variant.schedule}" for variant in variants)]
    for number, (each, name) in enumerate(zip(models, names, strict=True), 1):
        show(f"sampling {number} of {len(models)}: {name}")
        runs.append(sample(each, sampling))
    show("decoding")
    images = [decode(vae, latent) for latent, _ in runs]

    def rendered(place: int, *pruned: Any) -> Rendered:
        took, moved = runs[place][1], difference(images[place], images[0])
        return Rendered(images[place], took, took / runs[0][1], moved, *pruned)

    return [
        rendered(0),
        *(
            rendered(place, variant, share_of(of_one), attached(models[place]).record)
            for place, (variant, of_one) in enumerate(zip(variants, layers, strict=True), 1)
        ),
    ]


def first_uses(
    full: Any, variants: Sequence[Variant], layers: Sequence[Sequence[Layer]]
) -> Iterator[Any]:
    """The ModelPatcher ``full`` pruned in every step, as often as something is compiled for it.

    What only a first use takes is not timed. The kernels of a pruned model are compiled once, a
    compiled U-Net for each share.
    """
    from comfy.patcher_extension import WrappersMP

    shares = {variant.share: of_one for variant, of_one in zip(variants, layers, strict=True)}
    found = [replace(layer, schedule=ALWAYS) for of_one in shares.values() for layer in of_one]
    compiled = full.get_wrappers(WrappersMP.APPLY_MODEL, COMPILED)
    return (attach(full, layer) for layer in (found if compiled else found[:1]))


def layers_of(gates: Gates, variant: Variant) -> list[Layer]:
    """What Apply Dynamic Pruning would add for a variant."""
    chosen = gates.by_stage(variant.share)
    return [Layer(gates, kept, variant.schedule.during(stage)) for stage, kept in chosen]


def share_of(layers: Sequence[Layer]) -> float:
    """How much of the gated channels is pruned in [0, 1], in the mean over the schedule."""
    found = 0.0
    for layer in layers:
        kept = sum(int(keep.sum()) for keep in layer.keep_sets.values())
        stage = layer.schedule.stage
        found += (1 - kept / layer.gates.channels) * (stage.end - stage.start if stage else 1.0)
    return found


def sample(model: Any, sampling: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """The latent that the host's KSampler makes, on the CPU, and the seconds until it was there."""
    from nodes import common_ksampler  # ComfyUI's own nodes.py

    start = time.perf_counter()
    (latent,) = common_ksampler(model, **sampling)
    latent = {**latent, "samples": latent["samples"].cpu()}  # waits for the compute device
    return latent, time.perf_counter() - start


def decode(vae: Any, latent: dict[str, Any]) -> Tensor:
    """Images float [B, H, W, 3] on the CPU, by the host's VAE Decode."""
    from comfy.model_management import throw_exception_if_processing_interrupted

    from nodes import VAEDecode

    throw_exception_if_processing_interrupted()  # decoding does not look by itself
    return VAEDecode().decode(vae, latent)[0].cpu()


def difference(images: Tensor, full: Tensor) -> Tensor:
    """RMSE [B] of images [B, H, W, 3] in [0, 1] against others, in levels from 0 to 255."""
    return (images.float() - full.float()).square().mean((1, 2, 3)).sqrt() * 255


def remarks(model: Any, gates: Gates, rendered: Sequence[Rendered]) -> list[str]:
    """What the user should know about the gates and the runs, each once."""
    found = [DIFFERS] if differs_from_training(model, gates) else []
    return list(dict.fromkeys([*found, *(note for each in rendered for note in each.notes())]))


def summary(rendered: Sequence[Rendered]) -> list[str]:
    """A line per image, for the node."""
    return [
        ", ".join(
            [f"{each.name}{'' if each.schedule in ('', str(ALWAYS)) else f' in {each.schedule}'}"]
            + each.figures(each.total_rmse)
        )
        for each in rendered
    ]


def table(rendered: Sequence[Rendered], remarks: Sequence[str]) -> str:
    """All figures as plain text."""
    head = (
        f"{'':<12} {'pruned':>7} {'seconds':>8} {'of full':>8} {'weights':>18} {'RMSE':>6}  steps"
    )
    rows = [
        f"{each.name:<12} {each.pruned:>7.1%} {each.seconds:>8.2f} {each.of_full:>8.2f} "
        f"{each.saved:>18} {each.total_rmse:>6.1f}  {each.schedule}".rstrip()
        for each in rendered
    ]
    notes = [f"note     {remark}" for remark in remarks]
    return "\n".join([head, "-" * len(head), *rows, "", *EXPLAINED, *notes])
