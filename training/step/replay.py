"""Nothing computed twice in a step: what no gate changes is computed once and replayed.

That is what lies before the first gate, and what later sees timestep or prompt alone: the same for
the dense teacher and for the gated model, and for every further choice of channels. Outputs and
gradients stay as they were to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel

from training.model.gating import overridden


def stages_before(unet: UNet2DConditionModel, blocks: Sequence[str]) -> list[str]:
    """The top-level parts of the U-Net that run before the first of the named blocks, in order."""
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    mid = [] if unet.mid_block is None else ["mid_block"]
    stages = ["conv_in", *down, *mid, *up]
    gated = {stage for stage in stages for block in blocks if block.startswith(stage + ".")}
    first = min((stages.index(stage) for stage in gated), default=len(stages))
    return stages[:first]


def _beside_gates(unet: UNet2DConditionModel, stages: Iterable[str]) -> list[str]:
    """The parts after ``stages`` that see timestep, sizes or prompt alone: no gate changes them."""
    before = tuple(stage + "." for stage in stages)
    ends = ("time_embedding", "add_embedding", ".time_emb_proj", ".attn2.to_k", ".attn2.to_v")
    return [
        name
        for name, _ in unet.named_modules()
        if name.endswith(ends) and not name.startswith(before)
    ]


@contextmanager
def recording(unet: UNet2DConditionModel, gated: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run the U-Net as it is, and keep what gates in the blocks ``gated`` don't change.

    Name of a part -> its output; complete after the context.
    """
    stages = stages_before(unet, gated)
    outputs: dict[str, Any] = {}

    def forward_of(name: str) -> Any:
        plain = unet.get_submodule(name).forward

        def forward(*arguments: Any, **options: Any) -> Any:
            outputs[name] = plain(*arguments, **options)
            return outputs[name]

        return forward

    forwards = {name: forward_of(name) for name in [*stages, *_beside_gates(unet, stages)]}
    with overridden(unet, forwards):
        yield outputs


def replaying(unet: UNet2DConditionModel, outputs: dict[str, Any]) -> Any:
    """Context in which parts give what `recording` kept instead of computing it.

    Valid for the very inputs of the recording.
    """

    def forward_of(name: str) -> Any:
        return lambda *arguments, **options: outputs[name]

    return overridden(unet, {name: forward_of(name) for name in outputs})
