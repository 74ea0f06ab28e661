"""Gates on a diffusers U-Net: put in, measured, and taken out again.

A gated ResBlock gets an instance-level ``forward`` for the time of one evaluation; the modules and
their weights stay what they are, and afterwards nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ldcp_core import (
    Calibration,
    CompactResBlock,
    ConvWeights,
    Padding,
    Site,
    SoftGate,
    Topology,
    block_gates,
    blocks_of,
    column_norms,
    masked_forward,
)
from training.errors import UserError


def topology_of(unet: UNet2DConditionModel) -> Topology:
    """The topology of a diffusers U-Net of the SD1.5 family."""
    config = unet.config
    return Topology(
        widths=tuple(config.block_out_channels),
        attention=tuple("CrossAttn" in name for name in config.down_block_types),
        layers_per_block=config.layers_per_block,
        context_width=config.cross_attention_dim,
        in_channels=config.in_channels,
        out_channels=config.out_channels,
    )


class DiffusersResBlock:
    """`ldcp_core.ResBlockOps` of a diffusers ResnetBlock2D."""

    folds = True

    def __init__(self, name: str, block: ResnetBlock2D) -> None:
        plain = (
            block.time_embedding_norm == "default"
            and block.upsample is None
            and block.downsample is None
            and block.time_emb_proj is not None
            and block.output_scale_factor == 1.0
            and block.conv2.padding_mode == "zeros"
        )
        if not plain:
            raise UserError(f"{name} is not a ResBlock of the SD1.5 kind.", "a plain ResBlock")
        self.block = block
        self.groups: int = block.norm2.num_groups
        self.eps: float = block.norm2.eps

    def norm1(self, x: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm1(x))

    def norm2(self, h: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm2(h))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self.block.norm2.weight, self.block.norm2.bias

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.block.conv1._conv_forward(x, weight, bias)

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.block.conv2._conv_forward(x, weight, bias)

    def skip(self, x: Tensor) -> Tensor:
        return x if self.block.conv_shortcut is None else self.block.conv_shortcut(x)

    def embed(self, temb: Tensor) -> Tensor:
        return self.block.time_emb_proj(self.block.nonlinearity(temb))

    def weights(self) -> tuple[ConvWeights, ConvWeights]:
        conv1, conv2 = self.block.conv1, self.block.conv2
        return ConvWeights(conv1.weight, conv1.bias), ConvWeights(conv2.weight, conv2.bias)


BlockForward = Callable[[DiffusersResBlock, Tensor, Tensor], Tensor]


@contextmanager
def overridden(unet: UNet2DConditionModel, forwards: Mapping[str, BlockForward]) -> Iterator[None]:
    """Run the named ResBlocks through ``forwards[name](ops, x, emb)`` within the context."""
    blocks: dict[str, Any] = {name: unet.get_submodule(name) for name in forwards}

    def bind(ops: DiffusersResBlock, forward: BlockForward) -> Callable[..., Tensor]:
        def run(x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return forward(ops, x, ops.embed(temb))

        return run

    try:
        for name, block in blocks.items():
            block.forward = bind(DiffusersResBlock(name, block), forwards[name])
        yield
    finally:
        for block in blocks.values():
            block.__dict__.pop("forward", None)


def masked(unet: UNet2DConditionModel, gates: Mapping[str, SoftGate], padding: Padding) -> Any:
    """Context in which the U-Net runs the masked reference of ``gates`` (site name -> gate)."""

    def forward_of(block: str) -> BlockForward:
        inner, residual = gates.get(f"{block}.conv1"), gates.get(f"{block}.conv2")

        def forward(ops: DiffusersResBlock, x: Tensor, emb: Tensor) -> Tensor:
            return masked_forward(ops, x, emb, *ops.weights(), inner, residual, padding)

        return forward

    return overridden(unet, {block: forward_of(block) for block in blocks_of(gates)})


def compact_blocks(
    unet: UNet2DConditionModel,
    keep_sets: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    padding: Padding,
) -> dict[str, CompactResBlock]:
    """Block name -> its kept rows and columns; `overridden` runs the U-Net through them."""
    return {
        name: CompactResBlock(gate, *DiffusersResBlock(name, unet.get_submodule(name)).weights())
        for name, gate in block_gates(keep_sets, constants, padding).items()
    }


def compacted(
    unet: UNet2DConditionModel,
    keep_sets: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    padding: Padding,
) -> Any:
    """Context in which the U-Net computes only the kept channels; equal to `masked`."""
    return overridden(unet, compact_blocks(unet, keep_sets, constants, padding))


def hard_gates(
    keep_sets: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> dict[str, SoftGate]:
    """Keep-sets as masks for `masked`; sites without constants use zero."""
    return {
        site: SoftGate(keep.float(), constants.get(site, torch.zeros(keep.numel())))
        for site, keep in keep_sets.items()
    }


class ChannelMeans:
    """Mean output of the gated convolutions per channel, over all evaluations within the context.

    The mean is what stands in for a pruned channel: of all constants it has the least squared
    error at the convolution's output.
    """

    def __init__(self, unet: UNet2DConditionModel, sites: Sequence[Site]) -> None:
        self._modules = {site.name: unet.get_submodule(site.name) for site in sites}
        self._sums = {site.name: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
        self._count = dict.fromkeys(self._sums, 0)

    def __enter__(self) -> ChannelMeans:
        self._hooks = [
            module.register_forward_hook(self._hook(site)) for site, module in self._modules.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _hook(self, site: str) -> Callable[[Any, Any, Tensor], None]:
        def add(module: Any, inputs: Any, output: Tensor) -> None:
            self._sums[site] += output.detach().float().sum((0, 2, 3)).double().cpu()
            self._count[site] += output.numel() // output.shape[1]

        return add

    def constants(self) -> dict[str, Tensor]:
        """Site name -> mean per channel, float32 [C]."""
        return {site: (total / self._count[site]).float() for site, total in self._sums.items()}


@contextmanager
def watched(unet: UNet2DConditionModel, sites: Iterable[str]) -> Iterator[Calibration]:
    """What the channels of the sites do in all evaluations within the context."""
    seen = Calibration()

    def output_of(site: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.saw_output(site, output)

    def input_of(site: str) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.saw_input(site, inputs[0])
            seen.read_with(site, column_norms(module.weight))

        return see

    hooks = []
    try:
        for site in sites:
            block, conv = site.rsplit(".", 1)
            hooks.append(unet.get_submodule(site).register_forward_hook(output_of(site)))
            if conv == "conv1":
                reader = unet.get_submodule(f"{block}.conv2")
                hooks.append(reader.register_forward_hook(input_of(site)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def deviation(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error in float32, a scalar."""
    return F.mse_loss(output.float(), reference.float())
