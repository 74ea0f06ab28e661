"""The inputs that all nodes share which choose channels, and the check of what comes in by them.

ComfyUI does not check a value that another node brings over a link, and ComfyUI 0.3.64 none of a
dropdown in an API prompt either; a node that takes it as it comes runs as something else.
"""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any

from comfy_api.latest import io

from ..ldcp_core import DEFAULT_SCOPE, PADDINGS, RANKINGS, SCOPES, Ranking
from ..ldcp_core.text import quoted


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
            "feed-forward layers of the transformers there; +heads: also the heads of their "
            "attention.",
        ),
    ]


def how_to_sample(seed: str, steps: str, cfg: str, sampler: str, scheduler: str) -> list[Any]:
    """KSampler's widgets up to the scheduler, each with the tooltip that is given for it."""
    from comfy.samplers import KSampler

    return [
        io.Int.Input(
            "seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,
            tooltip=seed,
        ),
        io.Int.Input("steps", default=20, min=1, max=10000, tooltip=steps),
        io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip=cfg),
        io.Combo.Input("sampler_name", options=KSampler.SAMPLERS, tooltip=sampler),
        io.Combo.Input("scheduler", options=KSampler.SCHEDULERS, tooltip=scheduler),
    ]


def denoise() -> Any:
    """KSampler's last widget."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="1.0 samples from pure noise; lower values start from the latent.",
    )


def check_how_to_prune(sparsity: Any, ranking: Any, padding: Any, scope: Any) -> None:
    """Raises ValueError where one of these widgets has a value that it does not offer."""
    check_share("sparsity", sparsity)
    check_offered("ranking", ranking, RANKINGS)
    check_offered("padding", padding, PADDINGS)
    check_text("scope", scope)  # any scope can be meant, not only those of the menu


def check_offered(name: str, value: Any, offered: Iterable[str]) -> None:
    """Raises ValueError for what a dropdown does not offer."""
    known = list(offered)
    if value not in known:
        raise ValueError(f"LDCP: {name} is {quoted(value)}; choose one of {', '.join(known)}")


def check_text(name: str, value: Any) -> None:
    """Raises ValueError for anything but a text."""
    if not isinstance(value, str):
        raise ValueError(f"LDCP: {name} is {quoted(value)}; connect or write a text")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError for anything but a number from 0 to 1; NaN is none."""
    if not (isinstance(value, Real) and 0.0 <= value <= 1.0):
        raise ValueError(f"LDCP: {name} {quoted(value)} is outside 0.0 to 1.0")
