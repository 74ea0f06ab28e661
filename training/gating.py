"""Gates on a diffusers U-Net: put in, measured, and taken out again.

A gated block (a ResBlock or a feed-forward) gets an instance-level ``forward`` for the time of one
evaluation; the modules and their weights stay what they are, and afterwards nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from ldcp_core import (
    SUFFIXES,
    Calibration,
    CompactFeedForward,
    CompactResBlock,
    ConvWeights,
    FeedForwardGate,
    LinearWeights,
    Padding,
    Site,
    SoftGate,
    Topology,
    block_gates,
    block_of,
    blocks_of,
    column_norms,
    masked_feed_forward,
    masked_forward,
    sites_of,
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
        self._affine = block.norm2.weight.float(), block.norm2.bias.float()

    def norm1(self, x: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm1(x))

    def norm2(self, h: Tensor) -> Tensor:
        return self.block.nonlinearity(self.block.norm2(h))

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine

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


class DiffusersFeedForward:
    """The weights of a diffusers FeedForward with GEGLU."""

    def __init__(self, name: str, block: FeedForward) -> None:
        if not isinstance(block.net[0], GEGLU) or len(block.net) != 3:
            raise UserError(f"{name} is not a feed-forward of the SD1.5 kind.", "GEGLU, linear")
        self._proj, self._out = block.net[0].proj, block.net[2]

    def weights(self) -> tuple[LinearWeights, LinearWeights]:
        proj, out = self._proj, self._out
        return LinearWeights(proj.weight, proj.bias), LinearWeights(out.weight, out.bias)


def _adapter(name: str, block: Any) -> DiffusersResBlock | DiffusersFeedForward:
    if isinstance(block, FeedForward):
        return DiffusersFeedForward(name, block)
    return DiffusersResBlock(name, block)


CompactBlock = CompactResBlock | CompactFeedForward
#: the forward of a block of the U-Net, in its own signature
BlockForward = Callable[..., Tensor]


@contextmanager
def replaced(
    functions: Iterable[tuple[torch.nn.Module, str, Callable[..., Any]]],
) -> Iterator[None]:
    """Give modules methods of their own within the context. Afterwards each has what it had before.

    That is its class's method, or one of its own.
    """
    before: list[tuple[torch.nn.Module, str, Any]] = []
    try:
        for module, name, function in functions:
            before.append((module, name, module.__dict__.get(name)))
            module.__dict__[name] = function
        yield
    finally:
        for module, name, own in reversed(before):
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own


def overridden(unet: UNet2DConditionModel, forwards: Mapping[str, BlockForward]) -> Any:
    """Context in which the named blocks run through ``forwards[name]``."""
    blocks = [(unet.get_submodule(name), "forward", forwards[name]) for name in forwards]
    return replaced(blocks)


def masked(unet: UNet2DConditionModel, gates: Mapping[str, SoftGate], padding: Padding) -> Any:
    """Context in which the U-Net runs the masked reference of ``gates`` (site name -> gate)."""

    def forward_of(name: str) -> BlockForward:
        block = _adapter(name, unet.get_submodule(name))
        found = [gates.get(site) for site in sites_of(name)]
        if isinstance(block, DiffusersFeedForward):
            return lambda x: masked_feed_forward(x, *block.weights(), *found)

        def forward(x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return masked_forward(block, x, block.embed(temb), *block.weights(), *found, padding)

        return forward

    return overridden(unet, {name: forward_of(name) for name in blocks_of(gates)})


def compact_blocks(
    unet: UNet2DConditionModel,
    keep_sets: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    padding: Padding,
    dtype: torch.dtype | None = None,
) -> dict[str, CompactBlock]:
    """Block name -> its kept rows and columns; `running` runs the U-Net through them.

    Blocks that lose nothing are left out. Constants are folded in ``dtype``, by default that of the
    weights.
    """

    def cast(values: Tensor | None) -> Tensor | None:
        return values if values is None or dtype is None else values.to(dtype)

    found: dict[str, CompactBlock] = {}
    pruned = {site: keep for site, keep in keep_sets.items() if not bool(keep.all())}
    for name, gate in block_gates(pruned, constants, padding).items():
        layers = _adapter(name, unet.get_submodule(name)).weights()
        weights = [replace(w, weight=cast(w.weight), bias=cast(w.bias)) for w in layers]
        kind = CompactFeedForward if isinstance(gate, FeedForwardGate) else CompactResBlock
        found[name] = kind(gate, *weights)
    return found


def running(unet: UNet2DConditionModel, blocks: Mapping[str, CompactBlock]) -> Any:
    """Context in which the U-Net runs through compact blocks."""

    def forward_of(name: str, compact: CompactBlock) -> BlockForward:
        ops = _adapter(name, unet.get_submodule(name))
        if isinstance(ops, DiffusersFeedForward):
            return compact
        return lambda x, temb, *args, **kwargs: compact(ops, x, ops.embed(temb))

    return overridden(unet, {name: forward_of(name, block) for name, block in blocks.items()})


def compacted(
    unet: UNet2DConditionModel,
    keep_sets: Mapping[str, Tensor],
    constants: Mapping[str, Tensor],
    padding: Padding,
) -> Any:
    """Context in which the U-Net computes only the kept channels; equal to `masked`."""
    return running(unet, compact_blocks(unet, keep_sets, constants, padding))


def gated_layers(unet: UNet2DConditionModel, blocks: Iterable[str]) -> list[torch.nn.Module]:
    """The layers of the named blocks that pruning takes rows or columns from."""
    found: list[torch.nn.Module] = []
    for name in blocks:
        block = unet.get_submodule(name)
        feed_forward = isinstance(block, FeedForward)
        found += [block.net[0].proj, block.net[2]] if feed_forward else [block.conv1, block.conv2]
    return found


def hard_gates(
    keep_sets: Mapping[str, Tensor], constants: Mapping[str, Tensor]
) -> dict[str, SoftGate]:
    """Keep-sets as masks for `masked`; sites without constants use zero."""
    return {
        site: SoftGate(keep.float(), constants.get(site, torch.zeros(keep.numel())))
        for site, keep in keep_sets.items()
    }


class ChannelMeans:
    """Mean output of the gated layers per channel, over all evaluations within the context.

    The mean is what stands in for a pruned channel: of all constants it has the least squared
    error at the layer's output.
    """

    def __init__(self, unet: UNet2DConditionModel, sites: Sequence[Site]) -> None:
        self._modules = {site.name: unet.get_submodule(site.name) for site in sites}
        self._sums = {site.name: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
        self._axis = {site.name: -1 if site.kind == "hidden" else 1 for site in sites}
        self._count = {site.name: torch.zeros((), dtype=torch.float64) for site in sites}

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
            rows = output.detach().float().movedim(self._axis[site], 0).flatten(1)
            self._sums[site] += rows.sum(1).double().cpu()
            self._count[site] += rows.shape[1]

        return add

    def totals(self) -> list[Tensor]:
        """Sums and counts, for several processes to add up in place."""
        return [*self._sums.values(), *self._count.values()]

    def constants(self) -> dict[str, Tensor]:
        """Site name -> mean per channel, float32 [C]."""
        return {site: (total / self._count[site]).float() for site, total in self._sums.items()}


@contextmanager
def watched(unet: UNet2DConditionModel, sites: Iterable[str]) -> Iterator[Calibration]:
    """What the channels of the sites do in all evaluations within the context."""
    seen = Calibration()

    def output_of(site: str, channels: int) -> Callable[..., None]:
        return lambda module, inputs, output: seen.saw_output(site, output, channels)

    def input_of(site: str, channels: int) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.saw_input(site, inputs[0], channels)
            seen.read_with(site, column_norms(module.weight))

        return see

    hooks = []
    try:
        for site in sites:
            block = block_of(site)
            hidden = site == block + SUFFIXES["hidden"]
            channels = -1 if hidden else 1
            output = output_of(site, channels)
            hooks.append(unet.get_submodule(site).register_forward_hook(output))
            if site != block + SUFFIXES["residual"]:
                reader = unet.get_submodule(f"{block}.net.2" if hidden else f"{block}.conv2")
                hooks.append(reader.register_forward_hook(input_of(site, channels)))
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def deviation(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error in float32, a scalar."""
    return F.mse_loss(output.float(), reference.float())
