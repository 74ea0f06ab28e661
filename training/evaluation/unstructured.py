"""Single weights set to zero, for comparison: magnitude pruning without structure.

The weights of all linear layers and convolutions of the U-Net, by `torch.nn.utils.prune`:

- ``l1``: the share ``amount`` of smallest absolute value over all layers together (Han et al. 2015,
  arXiv:1506.02626).
- ``sensitivity``: |w| < s·σ of the layer's weights (the same, §3), s = ``amount``.
- ``percentage``: the ``amount`` percent of smallest absolute value of each layer.

Zeros are stored and computed with like any other weight, so nothing of this is written as gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.utils import prune

from training.errors import UserError
from training.model.precision import STORING, in_precision, storage_of

#: kind -> the amounts that are measured unless others are asked for
AMOUNTS: dict[str, tuple[float, ...]] = {
    "l1": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
    "sensitivity": (0.25, 0.5, 0.75, 1.0, 1.25),
    "percentage": (10, 20, 30, 40, 50, 60),
}
#: kind -> what an amount must stay below
LIMITS = {"l1": 1.0, "sensitivity": float("inf"), "percentage": 100.0}


@dataclass(frozen=True)
class Unstructured:
    """A U-Net with single weights at zero, then in a precision; beside `sample.Candidate`."""

    kind: str
    amount: float
    precision: str = "fp32"
    gates: ClassVar[None] = None

    @property
    def name(self) -> str:
        """
        >>> Unstructured("l1", 0.3).name
        'unstructured-l1-0.3'
        """
        return f"unstructured-{self.kind}-{self.amount:g}"

    @contextmanager
    def running(self, unet: UNet2DConditionModel) -> Iterator[int]:
        """Context in which the U-Net is this one; yields its bytes (`in_precision`)."""
        with zeroed(unet, self.kind, self.amount):
            with in_precision(unet, self.precision, {}) as size:
                yield size

    def stamp(self) -> str:
        """What tells its images from those of another."""
        return f"{self.name} {self.precision}"

    def described(self) -> dict[str, Any]:
        """What a row of a comparison says of it."""
        return {
            "precision": self.precision,
            "criterion": f"unstructured {self.kind}",
            "scope": "",
            "target": self.amount,
            "channels_pruned": 0.0,
            "zeroed": True,
            "beside": "",
        }

    def counted(self, parameters: int, side: int) -> dict[str, float]:
        """Shares left of a U-Net's parameters and FLOPs: all of them."""
        return {"parameters_left": 1.0, "flops_left": 1.0}

    def layers(self, unet: UNet2DConditionModel) -> list[dict[str, Any]]:
        """Layer, type, weights, those that are not zero, and sparsity; while it is running."""
        back = storage_of(self.precision, unet.device).back
        found = []
        for name, layer in layers_of(unet).items():
            count = layer.weight.numel()
            nonzero = int((back(layer.weight) != 0).sum())
            found.append(
                {
                    "layer": name,
                    "type": type(layer).__name__,
                    "parameters": count,
                    "nonzero": nonzero,
                    "sparsity": 1 - nonzero / count,
                }
            )
        return found


def unstructured_of(texts: Sequence[str], precision: str) -> dict[str, Unstructured]:
    """What ``--unstructured`` asks for, by name: kinds, or kinds with amounts.

    >>> list(unstructured_of(["l1=0.1,0.35"], "fp32"))
    ['unstructured-l1-0.1', 'unstructured-l1-0.35']

    Raises UserError for unknown kinds and amounts that can't be.
    """
    found = []
    for text in texts:
        kind, _, amounts = text.partition("=")
        if kind not in AMOUNTS:
            raise UserError(
                f"--unstructured is {text!r}.",
                f"{', '.join(AMOUNTS)}, or one with amounts, such as l1=0.1,0.35",
                "change --unstructured",
            )
        try:
            values = [float(value) for value in amounts.split(",")] if amounts else AMOUNTS[kind]
        except ValueError:
            values = [0.0]
        if not all(0 < value < LIMITS[kind] for value in values):
            raise UserError(
                f"--unstructured is {text!r}.",
                f"amounts of {kind} above 0 and below {LIMITS[kind]:g}, with commas between",
                f"such as {kind}={','.join(f'{value:g}' for value in AMOUNTS[kind][:3])}",
            )
        found += [Unstructured(kind, value, precision) for value in values]
    return {one.name: one for one in found}


def layers_of(unet: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions by name."""
    return {name: module for name, module in unet.named_modules() if isinstance(module, STORING)}


@contextmanager
def zeroed(unet: nn.Module, kind: str, amount: float) -> Iterator[None]:
    """Weights of the U-Net at zero; afterwards it holds the same objects as before."""
    layers = list(layers_of(unet).values())
    kept = [layer.weight for layer in layers]
    pruned = _pruned([weight.detach() for weight in kept], kind, amount)
    try:
        for layer, values in zip(layers, pruned, strict=True):
            layer.weight = nn.Parameter(values, requires_grad=False)
        yield
    finally:
        for layer, weight in zip(layers, kept, strict=True):
            layer.weight = weight


def _pruned(weights: Sequence[Tensor], kind: str, amount: float) -> list[Tensor]:
    """Copies of the weights of all layers, some of them zero."""
    if kind == "sensitivity":
        return [w * (w.abs() >= amount * w.std(correction=0)) for w in weights]
    if kind == "percentage":
        return [_without_smallest(w, amount / 100) for w in weights]
    together = _without_smallest(torch.cat([w.flatten() for w in weights]), amount)
    parts = together.split([w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


def _without_smallest(values: Tensor, share: float) -> Tensor:
    return values * prune.L1Unstructured(share).compute_mask(values, torch.ones_like(values))
