"""Nothing computed twice in a step: what no gate changes is computed once and replayed.

That is what lies before the first gate, what later sees timestep or prompt alone, and what skip
connections bring (`training.skips`): the same for the dense teacher and for the gated model, and
for every further choice of channels. Outputs and gradients stay as they were to the bit, where skip
connections are split up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import UNet2DConditionModel

from training.gating import overridden
from training.skips import SkipShare, changing_channels, completing, cut_skips, splitting


def stages_before(unet: UNet2DConditionModel, blocks: Iterable[str]) -> list[str]:
    """The top-level parts of the U-Net that run before the first of the named blocks, in order."""
    down = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    up = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    stages = ["conv_in", *down, "mid_block", *up]
    gated = {stage for stage in stages for block in blocks if block.startswith(stage + ".")}
    first = min((stages.index(stage) for stage in gated), default=len(stages))
    return stages[:first]


def _beside_gates(unet: UNet2DConditionModel, stages: Iterable[str]) -> list[str]:
    """The parts after ``stages`` that see timestep or prompt alone, which no gate changes."""
    before = tuple(stage + "." for stage in stages)
    ends = ("time_embedding", ".time_emb_proj", ".attn2.to_k", ".attn2.to_v")
    return [
        name
        for name, _ in unet.named_modules()
        if name.endswith(ends) and not name.startswith(before)
    ]


@contextmanager
def recording(unet: UNet2DConditionModel, gated: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Run the U-Net as it is, and keep what gates in the blocks ``gated`` don't change.

    Name of a part -> its output, or the `SkipShare` of a ResBlock; complete after the context.
    """
    gated = list(gated)
    stages = stages_before(unet, gated)
    changing = changing_channels(unet, stages, gated)
    outputs: dict[str, Any] = {}

    def forward_of(name: str) -> Any:
        plain = unet.get_submodule(name).forward

        def forward(*arguments: Any, **options: Any) -> Any:
            outputs[name] = plain(*arguments, **options)
            return outputs[name]

        return forward

    forwards = {name: forward_of(name) for name in [*stages, *_beside_gates(unet, stages)]}
    forwards |= {name: splitting(unet, name, changing[name], outputs) for name in changing}
    with overridden(unet, forwards):
        yield outputs
    cut_skips(unet, changing, outputs)


def replaying(unet: UNet2DConditionModel, outputs: dict[str, Any]) -> Any:
    """Context in which parts give what `recording` kept instead of computing it.

    Valid for the very inputs of the recording.
    """

    def forward_of(name: str) -> Any:
        if isinstance(outputs[name], SkipShare):
            return completing(unet, name, outputs[name])
        return lambda *arguments, **options: outputs[name]

    return overridden(unet, {name: forward_of(name) for name in outputs})
