"""What commands open alike: the frozen model, the size of its images, the sites in scope."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ldcp_core import Site, Topology, least_kept
from training.data.images import ImageData
from training.data.streaming import StreamedImages
from training.errors import UserError
from training.learning.budget import Budget
from training.model.load import DTYPES, DiffusionModel, check_resolution, load_model


def frozen_model(source: str, precision: str, device: str | torch.device) -> DiffusionModel:
    """`load_model` with the U-Net in ``precision``."""
    return load_model(source, dtype=DTYPES[precision], device=device)


def fit_to(model: DiffusionModel, data: ImageData | StreamedImages, resolution: int | None) -> int:
    """Set the side of the images, in pixels (None: the model's own); returns that of a latent.

    Raises UserError for a side that the model can't take.
    """
    data.resolution = resolution or model.resolution
    check_resolution(data.resolution, model.vae_scale_factor)
    return data.resolution // model.vae_scale_factor


def sites_in(topology: Topology, scope: str) -> list[Site]:
    """The sites that ``--scope`` names; raises UserError for a scope that there is not."""
    try:
        return topology.sites(scope)
    except ValueError as error:
        raise UserError(f"--scope is {scope!r}: {error}.", "", "change --scope") from error


def check_target(
    target: float, floor: float, budget: Budget, sites: Sequence[Site], scope: str
) -> None:
    """The target must leave every site its floor (and rule ``zero`` its pruned columns)."""
    most = budget.most({s.name: least_kept(s.channels, floor, s.multiple) for s in sites})
    if target > most:
        raise UserError(
            f"--target-sparsity is {target:g}, but with --floor {floor:g} at most {most:.1%} of "
            f"the {budget.kind} of scope {scope!r} can be pruned.",
            f"a target up to {math.floor(100 * most) / 100:g}",
            "lower --target-sparsity or --floor",
        )
