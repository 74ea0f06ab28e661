"""Gates made of a model's own weights: pruning to try at once, without training and data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..ldcp_core import (
    DEFAULT_FLOOR,
    MAGNITUDES,
    Gates,
    Magnitude,
    Padding,
    Ranking,
    magnitude,
    scores_at,
    sites_of,
)
from .blocks import HostBlock
from .choice import check_how_to_prune, check_offered, how_to_prune
from .display import show_on_node
from .identity import own_fingerprint
from .io_types import CATEGORY, GatesType
from .schema import schema
from .sites import LEAVE_OUT, ModelError, find_blocks, model_topology
from .weights import NotCaptured

log = logging.getLogger("ldcp")


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


def status(gates: Gates) -> list[str]:
    """Sites and the share of channels pruned; how they were chosen."""
    info, sites = gates.info, len(gates.scores)
    return [
        f"{sites} site{'s' * (sites != 1)}, {gates.sparsity:.1%} pruned "
        f"({info['target_sparsity']:.1%} requested)",
        f"{info['criterion']}, {info['ranking']}, rule '{gates.padding}'",
    ]


class LDCPEstimateGates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPEstimateGates",
            display_name="Estimate Gates from Model",
            category=CATEGORY,
            description="Makes pruning gates from the size of a Stable Diffusion 1.5 model's own "
            "weights: no training, no data. A first try; learned gates are much better.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion 1.5 model or fine-tune. LoRA connected before this "
                    "node are taken into account.",
                ),
                io.Combo.Input(
                    "criterion",
                    options=list(MAGNITUDES),
                    default="l1",
                    tooltip="What makes a channel important. l1: the sum of the absolute values of "
                    "its weights. l2: the root of the sum of their squares, where single large "
                    "weights count more.",
                ),
                *how_to_prune("per layer"),
            ],
            outputs=[
                GatesType.Output(
                    display_name="gates",
                    tooltip="Which channels to prune, for Apply Dynamic Pruning or Save Gates.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        criterion: Magnitude,
        sparsity: float,
        ranking: Ranking,
        padding: Padding,
        scope: str,
    ) -> io.NodeOutput:
        gates = estimate(model, criterion, sparsity, ranking, padding, scope)
        lines = status(gates)
        log.info("LDCP: gates estimated: %s", ", ".join(lines))
        show_on_node("\n".join(lines), cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(gates)
