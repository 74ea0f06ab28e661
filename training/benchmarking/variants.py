"""The ways to run one U-Net that are worth comparing, all on the same weights and inputs.

"off" deserves a word. When a gate's context is left, nothing at all remains on a diffusers U-Net,
so timing that would time dense twice. What a sampler step outside the schedule does pay is the
switching: here the overrides are put in and taken out again on the clock, the compact copies stay
in memory, and then the untouched U-Net runs.

"mask-only" is how the original student project pruned: everything is computed, then the output of
each gated convolution is multiplied by zeros and ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from ldcp_core import Padding, PrunedSite, Site, aligned_counts, blocks_of, top_channels
from ldcp_core.diffusers import CompactBlock, compact_blocks, gated_layers
from training.benchmarking.timing import DENSE, Variant
from training.model.configs import config_of
from training.model.encode import added_conditions, pooled_width
from training.model.gating import running

TEXT_TOKENS = 77
PIXELS_PER_LATENT = 8
TIMESTEP = 500
#: the ResBlock that is also timed by itself
BLOCK = "mid_block.resnets.0"


def meta_unet(dtype: torch.dtype, family: str = "sd15") -> UNet2DConditionModel:
    """A family's U-Net without weights."""
    config = UNet2DConditionModel.load_config(config_of(family, "unet"), local_files_only=True)
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    torch.nn.Module.to(unet, dtype)  # diffusers' own warns about weights that are not there
    return unet.requires_grad_(False).eval()


def random_unet(
    seed: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> UNet2DConditionModel:
    """SD1.5's U-Net with random weights: norms near one, the rest scaled by fan-in.

    Activations stay finite in half precision and nowhere near denormal numbers, which would slow
    a CPU down. Filled from one block of noise, since 860 million fresh normal values take longer
    than the measurements; its odd length keeps rows from repeating in step.
    """
    unet = meta_unet(dtype).to_empty(device=device)
    fill_(unet, seed)
    return unet


@torch.no_grad()
def fill_(unet: UNet2DConditionModel, seed: int) -> None:
    """Overwrite all parameters with cheap random values, in place."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1_000_003, generator=generator).to(unet.device)
    for name, parameter in unet.named_parameters():
        if parameter.dim() == 1:
            scale, offset = 0.02, float(name.endswith("weight"))
        else:
            scale, offset = 0.8 * parameter[0].numel() ** -0.5, 0.0
        for part in parameter.view(-1).split(noise.numel()):
            torch.mul(noise[: part.numel()], scale, out=part)
            if offset:
                part += offset


@dataclass(frozen=True)
class Inputs:
    """Latents [B, 4, H, W], one timestep for all (a scalar), and text states [B, 77, D].

    ``added`` is what `added_conditions` gives.
    """

    latents: Tensor
    timestep: Tensor
    context: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def random(cls, unet: UNet2DConditionModel, batch: int, latent_side: int, seed: int) -> Inputs:
        """Standard normal inputs in the U-Net's precision and on its device."""
        generator = torch.Generator().manual_seed(seed)
        config = unet.config
        latents = torch.randn(
            batch, config.in_channels, latent_side, latent_side, generator=generator
        )
        context = torch.randn(batch, TEXT_TOKENS, config.cross_attention_dim, generator=generator)
        to = dict(device=unet.device, dtype=unet.dtype)
        timestep = torch.tensor(TIMESTEP, device=unet.device)
        pooled = torch.randn(batch, pooled_width(config), generator=generator).to(**to)
        sizes = torch.zeros(batch, 6, **to)
        added = added_conditions(pooled, sizes)
        return cls(latents.to(**to), timestep, context.to(**to), added)

    @torch.no_grad()
    def run(self, unet: UNet2DConditionModel) -> Tensor:
        """The U-Net's prediction, of the latents' shape."""
        return unet(
            self.latents,
            self.timestep,
            encoder_hidden_states=self.context,
            added_cond_kwargs=self.added,
        ).sample


@dataclass(frozen=True)
class Pruning:
    """What is kept, site -> bool [C], what stands in for the rest, and how a table calls it."""

    label: str
    keep_sets: Mapping[str, Tensor]
    constants: Mapping[str, Tensor]

    def pruned(self, padding: Padding) -> dict[str, PrunedSite]:
        """The same for the core, under a padding rule."""
        return {
            site: PrunedSite(keep, self.constants.get(site), padding)
            for site, keep in self.keep_sets.items()
        }

    @property
    def counts(self) -> str:
        """Pruned of all channels, for people."""
        pruned = sum(int((~keep).sum()) for keep in self.keep_sets.values())
        return f"{pruned:,} of {sum(k.numel() for k in self.keep_sets.values()):,} channels"

    @property
    def kept(self) -> dict[str, int]:
        """Kept channels per site."""
        return {site: int(keep.sum()) for site, keep in self.keep_sets.items()}

    @property
    def blocks(self) -> list[str]:
        """The blocks these sites lie in."""
        return blocks_of(self.keep_sets)


def random_pruning(sites: Sequence[Site], sparsity: float, seed: int) -> Pruning:
    """Random keep-sets with aligned counts, the same share at each site; constants are zero."""
    generator = torch.Generator().manual_seed(seed)
    widths = [site.channels for site in sites]
    wanted = [round((1 - sparsity) * width) for width in widths]
    counts = aligned_counts(wanted, widths, sum(wanted), [site.multiple for site in sites])
    keep_sets = {
        site.name: top_channels(site.shared(torch.rand(site.channels, generator=generator)), count)
        for site, count in zip(sites, counts, strict=True)
    }
    return Pruning(f"{sparsity:.0%}", keep_sets, {})


def layer_bytes(unet: UNet2DConditionModel, blocks: Sequence[str]) -> int:
    """Bytes of the layers of the named blocks that can be pruned, counted from their tensors."""
    return sum(p.nbytes for layer in gated_layers(unet, blocks) for p in layer.parameters())


def unet_bytes(unet: UNet2DConditionModel) -> int:
    """Bytes of all parameters and buffers, counted from the tensors."""
    return sum(t.nbytes for t in [*unet.parameters(), *unet.buffers()])


def unet_variants(
    unet: UNet2DConditionModel,
    inputs: Inputs,
    prunings: Sequence[Pruning],
    paddings: Sequence[Padding],
) -> list[Variant]:
    """dense, off and mask-only (of the first pruning), and on for each pruning and padding rule."""

    def run() -> Tensor:
        return inputs.run(unet)

    first = prunings[0]
    full = layer_bytes(unet, first.blocks)
    compact = compact_blocks(unet, first.pruned(paddings[0]))

    def off() -> Tensor:
        with running(unet, compact):
            pass
        return run()

    return [
        Variant(DENSE, "nothing", run, weight_bytes=full),
        Variant(
            "pruned off",
            "nothing; switched on and off again on the clock, compact copies kept in memory",
            off,
            weight_bytes=full + _own_bytes(unet, compact),
        ),
        Variant(
            f"mask-only {first.label}",
            f"{first.counts} computed, then multiplied by 0",
            run,
            lambda: mask_only(unet, first.keep_sets),
            weight_bytes=full,
        ),
        *pruned_variants(unet, run, prunings, paddings),
    ]


def pruned_name(pruning: Pruning, padding: Padding) -> str:
    """How tables call the U-Net under this pruning."""
    return f"pruned on {pruning.label}, {padding}"


def pruned_variants(
    unet: UNet2DConditionModel,
    run: Callable[[], Any],
    prunings: Sequence[Pruning],
    paddings: Sequence[Padding],
) -> list[Variant]:
    """``run`` with the compact blocks in place, for each pruning and padding rule."""

    def variant(pruning: Pruning, padding: Padding) -> Variant:
        blocks = compact_blocks(unet, pruning.pruned(padding))
        return Variant(
            pruned_name(pruning, padding),
            f"{pruning.counts} replaced by constants",
            run,
            lambda: running(unet, blocks),
            lambda: parked(unet, blocks),
            weight_bytes=sum(t.nbytes for block in blocks.values() for t in block.tensors()),
        )

    return [variant(pruning, padding) for pruning in prunings for padding in paddings]


@contextmanager
def mask_only(unet: UNet2DConditionModel, keep_sets: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the output of each site's layer by its keep-set, as zeros and ones."""

    def hook(keep: Tensor) -> Callable[..., Tensor]:
        mask = keep.to(unet.device, unet.dtype)
        planes = mask[:, None, None]  # a convolution's output is [B, C, H, W], a GEGLU's [B, N, C]
        return lambda module, inputs, output: output * (planes if output.dim() == 4 else mask)

    with ExitStack() as hooks:
        for site, keep in keep_sets.items():
            hooks.enter_context(unet.get_submodule(site).register_forward_hook(hook(keep)))
        yield


def _own_bytes(unet: UNet2DConditionModel, blocks: Mapping[str, CompactBlock]) -> int:
    """Bytes of the compact copies, without what they share with the U-Net."""
    shared = {id(p) for p in unet.parameters()}
    tensors = [t for block in blocks.values() for t in block.tensors()]
    return sum(t.nbytes for t in tensors if id(t) not in shared)


def replaced_weights(
    unet: UNet2DConditionModel, blocks: Mapping[str, CompactBlock]
) -> list[torch.nn.Parameter]:
    """Weights and biases of layers that the compact blocks do without."""
    needed = {id(t) for block in blocks.values() for t in block.tensors()}
    layers = gated_layers(unet, blocks)
    return [p for layer in layers for p in layer.parameters() if id(p) not in needed]


@contextmanager
def parked(unet: UNet2DConditionModel, blocks: Mapping[str, CompactBlock]) -> Iterator[None]:
    """Move the `replaced_weights` to the CPU, and back again afterwards."""
    weights, device = replaced_weights(unet, blocks), unet.device
    try:
        for weight in weights:
            weight.data = weight.data.to("cpu")
        yield
    finally:
        for weight in weights:
            weight.data = weight.data.to(device)


def block_variants(
    unet: UNet2DConditionModel,
    prunings: Sequence[Pruning],
    paddings: Sequence[Padding],
    shape: tuple[int, int, int],
    seed: int,
) -> list[Variant]:
    """The `BLOCK` on its own, on a random map of ``shape`` (batch, height, width)."""
    block = unet.get_submodule(BLOCK)
    generator = torch.Generator().manual_seed(seed)
    batch, height, width = shape
    to = dict(device=unet.device, dtype=unet.dtype)
    x = torch.randn(batch, block.in_channels, height, width, generator=generator).to(**to)
    temb = torch.randn(batch, block.time_emb_proj.in_features, generator=generator).to(**to)

    @torch.no_grad()
    def run() -> Tensor:
        return block(x, temb)

    return [Variant(DENSE, "nothing", run), *pruned_variants(unet, run, prunings, paddings)]
