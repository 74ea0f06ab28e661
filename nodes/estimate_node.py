"""Gates made of a model's own weights: pruning to try at once, without training and data."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ..ldcp_core import (
    DEFAULT_SCOPE,
    MAGNITUDES,
    PADDINGS,
    RANKINGS,
    SCOPES,
    ConvWeights,
    Gates,
    Magnitude,
    Padding,
    Ranking,
    expected_output,
    magnitude,
    scores_at,
)
from .apply_node import show_on_node
from .blocks import captured, norm_affine
from .identity import own_fingerprint
from .io_types import CATEGORY, GatesType
from .schema import schema
from .sites import find_blocks, model_topology

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
    is not of SD1.5's family, ValueError for a sparsity outside [0, 1] or weights that are not
    finite.
    """
    import comfy.model_management

    topology = model_topology(model.model)
    sites = topology.sites(scope)
    ungated = Gates({site.name: torch.ones(site.channels) for site in sites}, topology=topology)
    blocks = find_blocks(model.model, ungated)
    comfy.model_management.load_models_gpu([model])
    importances: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for name, conv, affine in _gated_convolutions(model, blocks):
        if name in ungated.scores:
            importances[name] = magnitude(conv.weight, criterion)
            constants[name] = expected_output(conv, *affine)
    scores = scores_at(importances, sparsity, ranking)
    info = {
        "criterion": criterion,
        "ranking": ranking,
        "scope": scope,
        "target_sparsity": sparsity,
        "achieved_sparsity": Gates(scores).sparsity,
        "calibrated": "data-free",
    }
    base = own_fingerprint(model, ungated)
    if base is not None:
        info["fingerprint"] = base
    return Gates(scores, constants, padding, topology, info)


def _gated_convolutions(
    model: Any, blocks: dict[str, nn.Module]
) -> Iterator[tuple[str, ConvWeights, tuple[Tensor, Tensor]]]:
    """Site, weights and the weight and bias of the norm before it, one convolution at a time."""
    host = (model.load_device, model.model.manual_cast_dtype or model.model.get_dtype())
    for name, block in blocks.items():
        for part, layers in (("conv1", block.in_layers), ("conv2", block.out_layers)):
            yield f"{name}.{part}", captured(layers[-1], *host), norm_affine(layers[0], *host)


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
                io.Float.Input(
                    "sparsity",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the channels to prune, the least important first; counts "
                    "per layer are rounded to multiples of 8, and the node shows what came out.",
                ),
                io.Combo.Input(
                    "ranking",
                    options=list(RANKINGS),
                    default="per layer",
                    tooltip="per layer: every layer loses the same share. global: the channels of "
                    "all layers compete, each measured against the mean of its layer.",
                ),
                io.Combo.Input(
                    "padding",
                    options=list(PADDINGS),
                    default="zero",
                    tooltip="What lies past the border of a pruned channel. zero: zeros, as in the "
                    "original model. extend: its constant goes on, which saves more memory and "
                    "changes the image more.",
                ),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default=DEFAULT_SCOPE,
                    tooltip="Which layers are gated. mid: the four 3x3 convolutions of the middle "
                    "block.",
                ),
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
