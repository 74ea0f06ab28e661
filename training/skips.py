"""What the skip connections bring to the up path: sums that no gate changes.

A ResBlock of the up path sees the output of its predecessor and a skip connection side by side. The
down path being what it was, so is all that the skip connection adds to the block's first
convolution and to its shortcut: GroupNorm keeps to its groups of channels, and a convolution is a
sum over its input channels. So these sums are computed once per problem, and the block then runs on
the other channels alone, which spares half of its first convolution, and half of that one's
gradient. The result is that of the whole block up to the order of summation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from training.gating import DiffusersResBlock
from training.kernels import bound_by_weight


class SkipShare(NamedTuple):
    """What a ResBlock owes to its skip connection, and to its timestep and its biases.

    ``hidden`` and ``shortcut`` [B, C, h, w] are part of the outputs of its two convolutions.
    """

    hidden: Tensor
    shortcut: Tensor


def changing_channels(
    unet: UNet2DConditionModel, before: Iterable[str], gated: Iterable[str]
) -> dict[str, int]:
    """Name of a ResBlock of the up path -> how many of its leading input channels gates change.

    These are the predecessor's and what shares a group with them. Of blocks without gates of their
    own, outside the parts ``before`` the first gate; none where the down path holds gates.
    """
    before, gated = set(before), set(gated)
    if not before >= {"conv_in", *(f"down_blocks.{i}" for i in range(len(unet.down_blocks)))}:
        return {}
    found: dict[str, int] = {}
    width = unet.mid_block.resnets[-1].out_channels
    for name, block in _up_path(unet):
        group = block.in_channels // block.norm1.num_groups
        changing = -(-width // group) * group
        alone = name in gated or name.rpartition(".resnets.")[0] in before
        if not alone and changing < block.in_channels and block.conv_shortcut is not None:
            found[name] = changing
        width = block.out_channels
    return found


def splitting(
    unet: UNet2DConditionModel, name: str, changing: int, outputs: dict[str, Any]
) -> Callable[..., Tensor]:
    """A forward of the named ResBlock that leaves its `SkipShare` in ``outputs``.

    Not where a smaller input would make its convolution no faster.
    """
    block = DiffusersResBlock(name, unet.get_submodule(name))
    whole = block.block.forward
    conv1, shortcut = block.block.conv1, block.block.conv_shortcut

    def forward(x: Tensor, temb: Tensor, *arguments: Any, **options: Any) -> Tensor:
        if bound_by_weight(conv1, x):
            return whole(x, temb, *arguments, **options)
        skip, channels = x[:, changing:], slice(changing, None)
        hidden = _convolved(conv1, _normalized(block.block, skip, channels), channels, conv1.bias)
        outputs[name] = share = SkipShare(
            hidden + block.embed(temb)[:, :, None, None],
            _convolved(shortcut, skip, channels, shortcut.bias),
        )
        return _completed(block, x[:, :changing], share)

    return forward


def completing(unet: UNet2DConditionModel, name: str, share: SkipShare) -> Callable[..., Tensor]:
    """A forward of the named ResBlock for the channels that change, given the others' share."""
    block = DiffusersResBlock(name, unet.get_submodule(name))
    return lambda x, *arguments, **options: _completed(block, x, share)


def cut_skips(
    unet: UNet2DConditionModel, changing: Mapping[str, int], outputs: dict[str, Any]
) -> None:
    """Leave of the skip connections in ``outputs`` only what their blocks still read."""
    changing = {name: width for name, width in changing.items() if name in outputs}
    if not changing:
        return
    readers = reversed(_up_path(unet))  # what came first is read last

    def cut(skip: Tensor) -> Tensor:
        name, block = next(readers)
        if name not in changing:
            return skip
        return skip[:, : skip.shape[1] - block.in_channels + changing[name]].clone()

    outputs["conv_in"] = cut(outputs["conv_in"])
    for i in range(len(unet.down_blocks)):
        hidden, skips = outputs[f"down_blocks.{i}"]
        skips = tuple(cut(skip) for skip in skips)
        last = i + 1 == len(unet.down_blocks)  # only its output is still read, by the mid block
        outputs[f"down_blocks.{i}"] = (hidden if last else skips[-1], skips)


def _up_path(unet: UNet2DConditionModel) -> list[tuple[str, Any]]:
    """Names and ResBlocks of the up path, in order."""
    return [
        (f"up_blocks.{i}.resnets.{j}", block)
        for i, part in enumerate(unet.up_blocks)
        for j, block in enumerate(part.resnets)
    ]


def _completed(block: DiffusersResBlock, x: Tensor, share: SkipShare) -> Tensor:
    channels = slice(0, x.shape[1])
    module = block.block
    hidden = _convolved(module.conv1, _normalized(module, x, channels), channels) + share.hidden
    conv2 = block.weights()[1]
    hidden = block.conv2(block.norm2(hidden), conv2.weight, conv2.bias)
    return _convolved(module.conv_shortcut, x, channels) + share.shortcut + hidden


def _normalized(block: nn.Module, x: Tensor, channels: slice) -> Tensor:
    """The block's first norm and activation of some of its channels: whole groups."""
    norm = block.norm1
    groups = x.shape[1] * norm.num_groups // norm.num_channels
    scaled = F.group_norm(x, groups, norm.weight[channels], norm.bias[channels], norm.eps)
    return block.nonlinearity(scaled)


def _convolved(conv: nn.Conv2d, x: Tensor, channels: slice, bias: Tensor | None = None) -> Tensor:
    """What some of its input channels add to a convolution."""
    return conv._conv_forward(x, conv.weight[:, channels], bias)
