"""Gates of a model as it is connected: from its weights, or from watching it sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..ldcp_core import (
    DEFAULT_FLOOR,
    MAGNITUDES,
    Calibration,
    Gates,
    Magnitude,
    Padding,
    Ranking,
    magnitude,
    scores_at,
    sites_of,
)
from .host.blocks import HostBlock
from .host.identity import own_fingerprint
from .host.model import LEAVE_OUT, ModelError, find_blocks, model_topology
from .host.observe import observed
from .host.weights import NotCaptured
from .inputs import check_how_to_prune, check_offered

Criterion = Literal["flap", "l1", "l2"]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)


@dataclass(frozen=True)
class Choice:
    """How gates are chosen from what was seen."""

    criterion: Criterion
    sparsity: float
    ranking: Ranking
    padding: Padding
    scope: str


def estimate(
    model: Any,
    criterion: Magnitude,
    sparsity: float,
    ranking: Ranking,
    padding: Padding,
    scope: str,
) -> Gates:
    """Gates of the ModelPatcher ``model`` from its weights as it would run, LoRA included.

    The model is loaded as for sampling, since LoRA are merged only then. Raises ModelError when it
    is not of SD1.5's family, ValueError for a choice that is not offered or weights that are not
    finite.
    """
    import comfy.model_management

    check_offered("criterion", criterion, MAGNITUDES)
    check_how_to_prune(sparsity, ranking, padding, scope)
    topology = model_topology(model.model)
    sites = topology.sites(scope)
    ungated = Gates({site.name: torch.ones(site.channels) for site in sites}, topology=topology)
    blocks = find_blocks(model.model, ungated)
    comfy.model_management.load_models_gpu([model])
    importances: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    try:
        for site, weight, constant in _gated_layers(model, blocks):
            if site in ungated.scores:
                importances[site] = magnitude(weight, criterion)
                constants[site] = constant
    except NotCaptured as error:
        raise ModelError(f"LDCP: the model has {error}; {LEAVE_OUT}") from error
    scores = scores_at(importances, sparsity, ranking, DEFAULT_FLOOR)
    info = {
        "criterion": criterion,
        "ranking": ranking,
        "scope": scope,
        "target_sparsity": sparsity,
        "floor": DEFAULT_FLOOR,
        "achieved_sparsity": Gates(scores).sparsity,
        "calibrated": "data-free",
    }
    base = own_fingerprint(model, ungated)
    if base is not None:
        info["fingerprint"] = base
    return Gates(scores, constants, padding, topology, info)


def _gated_layers(model: Any, blocks: dict[str, HostBlock]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Site, what each of its channels has [C, ...] and constants [C], one site at a time."""
    host = (model.load_device, model.model.manual_cast_dtype or model.model.get_dtype())
    for name, block in blocks.items():
        for site, (weight, constant) in zip(sites_of(name), block.estimates(*host), strict=True):
            yield site, weight, constant


def calibrate(
    model: Any,
    choice: Choice,
    sampling: dict[str, Any],
    given: Gates | None = None,
    earlier: Calibration | None = None,
) -> tuple[Gates, dict[str, Any], Calibration]:
    """Sample once with the ModelPatcher ``model``; gates, the latent sampled, and what was seen.

    ``sampling`` are the arguments of the host's ``common_ksampler``. With ``given`` gates their
    scores stay, and their constants become the means seen. ``earlier`` adds what another run has
    seen. Raises ModelError when the model is not of SD1.5's family or its layers can't be watched,
    ValueError for a choice that is not offered or an ``earlier`` of other layers.
    """
    from nodes import common_ksampler  # ComfyUI's own nodes.py

    check_offered("criterion", choice.criterion, CRITERIA)  # before minutes of sampling
    check_how_to_prune(choice.sparsity, choice.ranking, choice.padding, choice.scope)
    topology = model_topology(model.model)
    if given is not None:
        find_blocks(model.model, given)
        sites = [site for site in topology.all_sites() if site.name in given.scores]
    else:
        sites = topology.sites(choice.scope)
    watched, observer = observed(model, sites, topology)
    (latent,) = common_ksampler(watched, **sampling)
    observer.check()
    seen = observer.seen if earlier is None else earlier + observer.seen
    if given is not None:
        gates = given
    elif choice.criterion == "flap":
        gates = fluctuation_gates(model, choice, seen, [site.name for site in sites])
    else:
        gates = estimate(model, **vars(choice))
    info = {
        **gates.info,
        "calibrated": "activations",
        "calibration_evaluations": seen.evaluations,
    }
    means = seen.constants()
    constants = {site.name: means[site.name] for site in sites}
    return replace(gates, constants=constants, info=info), latent, seen


def fluctuation_gates(model: Any, choice: Choice, seen: Calibration, sites: Sequence[str]) -> Gates:
    """Gates that prune the channels whose mean says most about them."""
    importances = seen.importances()
    ordered = {site: importances[site] for site in sites}
    scores = scores_at(ordered, choice.sparsity, choice.ranking, DEFAULT_FLOOR)
    gates = Gates(scores, padding=choice.padding, topology=model_topology(model.model))
    info = {
        "criterion": choice.criterion,
        "ranking": choice.ranking,
        "scope": choice.scope,
        "target_sparsity": choice.sparsity,
        "floor": DEFAULT_FLOOR,
        "achieved_sparsity": gates.sparsity,
    }
    base = own_fingerprint(model, gates)
    if base is not None:
        info["fingerprint"] = base
    return replace(gates, info=info)
