"""Gates made of a model's own weights: pruning to try at once, without training and data."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..ldcp_core import MAGNITUDES, Gates, Magnitude, Padding, Ranking
from .choose import Choice, estimate
from .inputs import how_to_prune
from .shared import CATEGORY, GatesType, schema, show_on_node

log = logging.getLogger("ldcp")


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
            description="Makes pruning gates from the size of a Stable Diffusion model's own "
            "weights: no training, no data. A first try; learned gates are much better.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="A Stable Diffusion model (1.5, 2 or XL) or fine-tune. LoRA connected "
                    "before this "
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
        gates = estimate(model, Choice(criterion, sparsity, ranking, padding, scope))
        lines = status(gates)
        log.info("LDCP: gates estimated: %s", ", ".join(lines))
        show_on_node("\n".join(lines), cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(gates)
