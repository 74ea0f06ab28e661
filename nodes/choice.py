"""The inputs that all nodes share which choose channels."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ldcp_core import DEFAULT_SCOPE, PADDINGS, RANKINGS, SCOPES, Ranking


def how_to_prune(ranking: Ranking) -> list[Any]:
    """How much is pruned, and where: sparsity, ranking (with its default), padding and scope."""
    return [
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
            default=ranking,
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
            "block; up, down, all: those of these parts of the U-Net; +ff: also the "
            "feed-forward layers of the transformers there.",
        ),
    ]
