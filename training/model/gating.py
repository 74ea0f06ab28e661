"""Gates on a diffusers U-Net: put in, measured, and taken out again.

A gated block (a ResBlock or a feed-forward) gets an instance-level ``forward`` for the time of one
evaluation; the modules and their weights stay what they are, and afterwards nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ldcp_core import (
    Calibration,
    Padding,
    Pruned,
    Site,
    SoftGate,
    blocks_of,
    column_norms,
    sites_of,
)
from ldcp_core.diffusers import (
    BlockForward,
    CompactBlock,
    adapter,
    compact_blocks,
    compact_forwards,
    replaced,
)


def overridden(unet: UNet2DConditionModel, forwards: Mapping[str, BlockForward]) -> Any:
    """Context in which the named blocks run through ``forwards[name]``."""
    blocks = [(unet.get_submodule(name), "forward", forwards[name]) for name in forwards]
    return replaced(blocks)


def masked(unet: UNet2DConditionModel, gates: Mapping[str, SoftGate], padding: Padding) -> Any:
    """Context in which the U-Net runs the masked reference of ``gates`` (site name -> gate)."""

    return overridden(
        unet,
        {
            name: adapter(unet, name).masked([gates.get(site) for site in sites_of(name)], padding)
            for name in blocks_of(gates)
        },
    )


def running(unet: UNet2DConditionModel, blocks: Mapping[str, CompactBlock]) -> Any:
    """Context in which the U-Net runs through compact blocks."""
    return overridden(unet, compact_forwards(unet, blocks))


def compacted(unet: UNet2DConditionModel, pruned: Pruned) -> Any:
    """Context in which the U-Net computes only the kept channels; equal to `masked`."""
    return running(unet, compact_blocks(unet, pruned))


def hard_gates(pruned: Pruned) -> dict[str, SoftGate]:
    """Keep-sets as masks for `masked`; sites without constants use zero."""
    return {name: SoftGate.of(site) for name, site in pruned.items()}


def replaced_seen(
    unet: UNet2DConditionModel, site: Site, see: Callable[[Tensor], None]
) -> RemovableHandle:
    """Hook that calls ``see`` with what a constant of the site would replace."""
    if site.kind.replaces_output:
        layer = unet.get_submodule(site.name)
        return layer.register_forward_hook(lambda module, inputs, output: see(output))
    assert site.reader is not None
    reader = unet.get_submodule(site.reader)
    return reader.register_forward_pre_hook(lambda module, inputs: see(*inputs))


class ChannelMeans:
    """Mean output of the gated layers per channel, over all evaluations within the context.

    The mean is what stands in for a pruned channel: of all constants it has the least squared
    error at the layer's output.
    """

    def __init__(self, unet: UNet2DConditionModel, sites: Sequence[Site]) -> None:
        self._unet, self._sites = unet, sites
        self._sums = {site.name: torch.zeros(site.channels, dtype=torch.float64) for site in sites}
        self._count = {site.name: torch.zeros((), dtype=torch.float64) for site in sites}

    def __enter__(self) -> ChannelMeans:
        self._hooks = [replaced_seen(self._unet, site, self._adding(site)) for site in self._sites]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _adding(self, site: Site) -> Callable[[Tensor], None]:
        def add(output: Tensor) -> None:
            rows = output.detach().float().movedim(site.kind.axis, 0).flatten(1)
            self._sums[site.name] += rows.sum(1).cpu().double()  # mps knows no float64
            self._count[site.name] += rows.shape[1]

        return add

    def totals(self) -> list[Tensor]:
        """Sums and counts, for several processes to add up in place."""
        return [*self._sums.values(), *self._count.values()]

    def constants(self) -> dict[str, Tensor]:
        """Site name -> mean per channel, float32 [C]."""
        return {site: (total / self._count[site]).float() for site, total in self._sums.items()}


@contextmanager
def watched(unet: UNet2DConditionModel, sites: Iterable[Site]) -> Iterator[Calibration]:
    """What the channels of the sites do in all evaluations within the context."""
    seen = Calibration()

    def output_of(site: Site) -> Callable[[Tensor], None]:
        return lambda output: seen.saw_output(site.name, output, site.kind.axis)

    def input_of(site: Site) -> Callable[..., None]:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen.saw_input(site.name, inputs[0], site.kind.axis)
            seen.read_with(site.name, column_norms(module.weight))

        return see

    with ExitStack() as hooks:
        for site in sites:
            hooks.enter_context(replaced_seen(unet, site, output_of(site)))
            if site.reader is not None:
                reader = unet.get_submodule(site.reader)
                hooks.enter_context(reader.register_forward_hook(input_of(site)))
        yield seen


def deviation(output: Tensor, reference: Tensor) -> Tensor:
    """Mean squared error in float32, a scalar."""
    return F.mse_loss(output.float(), reference.float())
