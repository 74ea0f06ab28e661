"""Patching a model with gates, and telling the user what that does."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..ldcp_core import ALWAYS, Gates, Schedule, savings
from .identity import differs_from_training
from .io_types import CATEGORY, GatesType, ScheduleType
from .parking import FULL_WEIGHTS, FullWeights
from .patch import attach
from .run import Layer
from .schema import schema
from .sites import model_topology

AS_LEARNED = -1.0
log = logging.getLogger("ldcp")


def chosen_keep_sets(gates: Gates, sparsity: float, sites: str = "") -> dict[str, Tensor]:
    """The learned keep-sets, or those of the override, of the ``sites`` of a scope (empty: all).

    Raises ValueError for a sparsity between -1 and 0, an unknown scope, or one without gates.
    """
    problem = sparsity_problem(sparsity)
    if problem:
        raise ValueError(f"LDCP: {problem}")
    if sites.strip():
        gates = within(gates, sites)
    return gates.keep_sets() if sparsity == AS_LEARNED else gates.keep_sets_at(sparsity)


def within(gates: Gates, sites: str) -> Gates:
    """The part of ``gates`` that lies in a scope; raises ValueError where there is none."""
    try:
        named = {site.name for site in gates.topology.sites(sites)}
    except ValueError as error:
        raise ValueError(f"LDCP: {error}") from error
    scores = {site: score for site, score in gates.scores.items() if site in named}
    if not scores:
        parts = ", ".join(dict.fromkeys(site.split(".")[0] for site in gates.scores))
        raise ValueError(
            f"LDCP: these gates have no site in {sites!r}, only in {parts}; leave 'sites' empty to "
            "prune all that they have, or load gates of a larger scope"
        )
    return replace(gates, scores=scores)


def sparsity_problem(sparsity: float) -> str | None:
    if sparsity == AS_LEARNED or 0.0 <= sparsity <= 1.0:
        return None
    return (
        f"sparsity {sparsity:g} has no meaning: -1 prunes as learned, a value from 0.0 (nothing) "
        "to 1.0 (every gated channel) prunes this share instead"
    )


def status(model: Any, layer: Layer, sparsity: float) -> list[str]:
    """Sites and share of channels pruned; bytes that a pruned step does not use; when.

    Lines of their own, because the canvas breaks what is longer than a node inside a word.
    """
    counts = {site: int(keep.sum()) for site, keep in layer.keep_sets.items()}
    saved = savings(model_topology(model.model), counts, layer.gates.padding)
    requested = "" if sparsity == AS_LEARNED else f" ({sparsity:.1%} requested)"
    megabytes = saved.saved_bytes(model.model.get_dtype().itemsize) / 2**20
    return [
        f"{len(counts)} site{'s' * (len(counts) != 1)}, {saved.sparsity:.1%} pruned{requested}",
        f"{megabytes:,.1f} MiB of weights left out (counted)",
        str(layer.schedule),
    ]


def show_on_node(text: str, node_id: str | None) -> None:
    """Show some lines on the running node; outside of a server there is nobody to show it to."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None and node_id is not None:
        server.send_progress_text(text, node_id, server.client_id)


class LDCPApplyDynamicPruning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPApplyDynamicPruning",
            display_name="Apply Dynamic Pruning",
            category=CATEGORY,
            description="Prunes channels of a Stable Diffusion 1.5 model while it samples: what "
            "the gates prune is not computed. Several in a row add up; where two name the same "
            "layer in the same step, the later one wins.",
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.5 model, LoRA included."),
                GatesType.Input("gates", tooltip="Which channels to prune: Load Pruning Gates."),
                io.Float.Input(
                    "sparsity",
                    default=AS_LEARNED,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="-1: prune the channels as learned. 0.0 to 1.0: prune this share of "
                    "the gated channels instead, the least important first; counts per layer are "
                    "rounded to multiples of 8, and the node shows what came out.",
                ),
                ScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="The steps to prune in: Pruning Step Schedule. Unconnected: all steps.",
                ),
                io.Combo.Input(
                    "full_weights",
                    options=list(FULL_WEIGHTS),
                    default="auto",
                    optional=True,
                    tooltip="Where the full weights of pruned layers stay while sampling. auto: "
                    "they leave the GPU when every step prunes, and stay when some steps don't. "
                    "offload: they always leave; steps that don't prune fetch them from main "
                    "memory each time, which is slower. keep: they stay, and the pruned copies "
                    "take extra memory. The image is the same; on a CPU nothing can leave.",
                ),
                io.String.Input(
                    "sites",
                    default="",
                    optional=True,
                    tooltip="Prune only this part of what the gates have: mid, up, down, all, ff "
                    "(the feed-forward layers), several joined by +, or site names such as "
                    "mid_block.resnets.0.conv1 separated by commas. Empty: everything. With two "
                    "Apply nodes in a row, each part can have its own schedule.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The model, pruned while it samples.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, sparsity: float | None) -> bool | str:
        problem = None if sparsity is None else sparsity_problem(sparsity)
        return problem or True

    @classmethod
    def execute(
        cls,
        model: Any,
        gates: Gates,
        sparsity: float,
        schedule: Schedule | None = None,
        full_weights: FullWeights = "auto",
        sites: str = "",
    ) -> io.NodeOutput:
        keep_sets = chosen_keep_sets(gates, sparsity, sites)
        layer = Layer(gates, keep_sets, ALWAYS if schedule is None else schedule, full_weights)
        patched = attach(model, layer)
        if differs_from_training(model, gates):
            log.warning(
                "LDCP: these gates were trained on other base weights than this model's; that "
                "works for fine-tunes and merges, but compare some images with pruning off"
            )
        lines = status(model, layer, sparsity)
        log.info("LDCP: %s", ", ".join(lines))
        show_on_node("\n".join(lines), cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput(patched)
