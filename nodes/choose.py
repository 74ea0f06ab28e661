"""Gates of a model as it is connected: from its weights, or from watching it sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..ldcp_core import (
    DEFAULT_FLOOR,
    MAGNITUDES,
    Calibration,
    Gates,
    Padding,
    Ranking,
    groups_of,
    magnitude,
    scores_at,
    sites_of,
)
from .correct import corrected
from .host.blocks import HostBlock
from .host.identity import own_fingerprint
from .host.model import (
    LEAVE_OUT,
    ModelError,
    find_blocks,
    model_topology,
    refuse_quantised,
)
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

    def check(self, criteria: Iterable[str]) -> None:
        """Raises ValueError where a widget has a value that it does not offer."""
        check_offered("criterion", self.criterion, criteria)
        check_how_to_prune(self.sparsity, self.ranking, self.padding, self.scope)

    def gates(self, model: Any, importances: Mapping[str, Tensor]) -> Gates:
        """Gates of the ModelPatcher ``model`` by these importances [C] of its sites."""
        topology = model_topology(model.model)
        sites = [site for site in topology.all_sites() if site.name in importances]
        shared = {site.name: site.shared(importances[site.name]) for site in sites}
        scores = scores_at(shared, self.sparsity, self.ranking, DEFAULT_FLOOR, groups_of(sites))
        made = Gates(scores, {}, self.padding, topology, floor=DEFAULT_FLOOR)
        info = {
            "criterion": self.criterion,
            "ranking": self.ranking,
            "scope": self.scope,
            "target_sparsity": self.sparsity,
            "achieved_sparsity": made.sparsity,
        }
        base = own_fingerprint(model, made)
        if base is not None:
            info["fingerprint"] = base
        return replace(made, info=info)


def estimate(model: Any, choice: Choice) -> Gates:
    """Gates of the ModelPatcher ``model`` from its weights as it would run, LoRA included.

    The model is loaded as for sampling, since LoRA are merged only then. Raises ModelError when it
    is none that can be pruned, ValueError for a choice that is not offered or weights that are not
    finite.
    """
    import comfy.model_management

    choice.check(MAGNITUDES)
    topology = model_topology(model.model)
    sites = topology.sites(choice.scope)
    ungated = Gates({site.name: torch.ones(site.channels) for site in sites}, topology=topology)
    blocks = find_blocks(model.model, ungated)
    refuse_quantised(blocks)
    comfy.model_management.load_models_gpu([model])
    importances: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    try:
        for site, weight, constant in _gated_layers(model, blocks):
            if site in ungated.scores:
                importances[site] = magnitude(weight, choice.criterion)
                constants[site] = constant
    except NotCaptured as error:
        raise ModelError(f"LDCP: the model has {error}; {LEAVE_OUT}") from error
    gates = choice.gates(model, importances)
    return replace(gates, constants=constants, info={**gates.info, "calibrated": "data-free"})


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
    corrections: bool = False,
) -> tuple[Gates, dict[str, Any], Calibration]:
    """Sample with the ModelPatcher ``model``; gates, the latent sampled, and what was seen.

    ``sampling`` are the arguments of the host's ``common_ksampler``. With ``given`` gates their
    scores stay, and their constants become the means seen. ``earlier`` adds what another run has
    seen. With ``corrections`` all that was seen is sampled once more (see `corrected`); without,
    those of ``given`` are left out. Raises ModelError when the model is none that can be pruned or
    its layers can't be watched, ValueError for a choice that is not offered or an ``earlier`` of
    other layers.
    """
    from nodes import common_ksampler  # ComfyUI's own nodes.py

    choice.check(CRITERIA)  # before minutes of sampling
    topology = model_topology(model.model)
    if given is not None:
        find_blocks(model.model, given)
        sites = [site for site in topology.all_sites() if site.name in given.scores]
    else:
        sites = topology.sites(choice.scope)
    watched, observer = observed(model, sites, topology)
    (latent,) = common_ksampler(watched, **sampling)
    observer.check()
    observer.seen.runs.append(sampling)
    seen = observer.seen if earlier is None else earlier + observer.seen
    if given is not None:
        gates = given
    elif choice.criterion == "flap":
        found = seen.importances()
        gates = choice.gates(model, {site.name: found[site.name] for site in sites})
    else:
        gates = estimate(model, choice)
    info = {
        **gates.info,
        "calibrated": "activations",
        "calibration_evaluations": seen.evaluations,
    }
    means = seen.constants()
    constants = {site.name: means[site.name] for site in sites}
    # corrections are of the difference from the constants there were
    made = replace(gates, constants=constants, info=info, corrections={})
    return (corrected(model, made, seen.runs) if corrections else made), latent, seen
