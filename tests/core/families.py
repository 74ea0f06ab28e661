"""The U-Nets of the families that can be pruned, and diffusers' own model of each."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from diffusers import UNet2DConditionModel

from ldcp_core import SD15, Topology

#: parameters as published
PARAMETERS = {
    "Stable Diffusion 1.5": 859_520_964,
    "Stable Diffusion 2": 865_910_724,
    "SDXL": 2_567_463_684,
}
SD2 = Topology(context_width=1024, linear_projections=True, heads=(5, 10, 20, 20))
SDXL = Topology(
    widths=(320, 640, 1280),
    down=((0, 0), (2, 2), (10, 10)),
    mid=(10, 0),
    up=((10, 10, 10), (2, 2, 2), (0, 0, 0)),
    context_width=2048,
    pooled_width=2816,
    linear_projections=True,
    heads=(0, 10, 20),
)
REFINER = Topology(
    widths=(384, 768, 1536, 1536),
    down=((0, 0), (4, 4), (4, 4), (0, 0)),
    mid=(4, 0),
    up=((0, 0, 0), (4, 4, 4), (4, 4, 4), (0, 0, 0)),
    context_width=1280,
    pooled_width=2560,
    linear_projections=True,
    heads=(0, 12, 24, 24),
)
#: Segmind's SSD-1B: SDXL with fewer transformers, and half a mid block
SSD_1B = Topology(
    widths=(320, 640, 1280),
    down=((0, 0), (2, 2), (4, 4)),
    mid=(0,),
    up=((4, 4, 10), (2, 1, 1), (0, 0, 0)),
    context_width=2048,
    pooled_width=2816,
    linear_projections=True,
    heads=(0, 10, 20),
)
INPAINTING = replace(SD15, in_channels=9)
SMALL = Topology(widths=(32, 64, 96, 160), context_width=48, heads=(4, 4, 4, 4))
SMALL_XL = Topology(
    widths=(32, 64, 96),
    down=((0, 0), (1, 1), (3, 3)),
    mid=(3, 0),
    up=((3, 3, 3), (1, 1, 1), (0, 0, 0)),
    context_width=48,
    pooled_width=80,
    linear_projections=True,
    heads=(0, 4, 4),
)
NO_MID = Topology(
    widths=(32, 32, 64),
    down=((0,), (2,), (3,)),
    mid=(),
    up=((3, 3), (2, 2), (0, 0)),
    context_width=16,
    pooled_width=64,
    linear_projections=True,
    heads=(0, 4, 4),
)
NO_ATTENTION = Topology(
    widths=(32, 32, 64, 64),
    down=((0,),) * 4,
    up=((0, 0),) * 4,
    heads=(0, 0, 0, 8),
)
FAMILIES = (SD15, SD2, SDXL, REFINER, SSD_1B, INPAINTING, SMALL, SMALL_XL, NO_MID, NO_ATTENTION)


def name_of(topology: Topology) -> str:
    return f"{topology.family} {topology.widths[0]} {len(topology.blocks())}"


@cache
def diffusers_unet(topology: Topology, device: str = "meta") -> UNet2DConditionModel:
    """diffusers' model of a topology; with no weights on the meta device, else random ones."""

    def kinds(levels: tuple[tuple[int, ...], ...], way: str) -> list[str]:
        return [f"CrossAttn{way}Block2D" if any(level) else f"{way}Block2D" for level in levels]

    def depths(levels: tuple[tuple[int, ...], ...]) -> list[list[int]]:
        return [[depth or 1 for depth in level] for level in levels]  # a level without takes none

    mid = topology.mid
    settings = {
        "in_channels": topology.in_channels,
        "out_channels": topology.out_channels,
        "block_out_channels": topology.widths,
        "layers_per_block": topology.layers_per_block,
        "cross_attention_dim": topology.context_width,
        "down_block_types": kinds(topology.down, "Down"),
        "up_block_types": kinds(topology.up, "Up"),
        "mid_block_type": None,
        "transformer_layers_per_block": depths(topology.down),
        "reverse_transformer_layers_per_block": depths(topology.up),
        "use_linear_projection": topology.linear_projections,
        # what diffusers calls the size of a head is their number; a level without has some, too
        "attention_head_dim": tuple(heads or 1 for heads in topology.heads),
    }
    if mid:
        settings["mid_block_type"] = "UNetMidBlock2DCrossAttn" if any(mid) else "UNetMidBlock2D"
        if any(mid):  # the last entry is the mid block's as well
            settings["transformer_layers_per_block"][-1] = [mid[0]] * topology.layers_per_block
    if topology.pooled_width:
        settings |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": topology.pooled_width,
        }
    with torch.device(device):
        return UNet2DConditionModel(**settings).eval()


def inputs(topology: Topology, batch: int, side: tuple[int, int], device: str = "meta") -> dict:
    """What diffusers' model takes, drawn at random."""
    g = None if device == "meta" else torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, device=device)

    found = {
        "sample": draw(batch, topology.in_channels, *side),
        "timestep": torch.full((batch,), 500.0, device=device),
        "encoder_hidden_states": draw(batch, 77, topology.context_width),
    }
    if topology.pooled_width:  # six numbers in 8 channels each, and the text
        text = draw(batch, topology.pooled_width - 48)
        added = {"text_embeds": text, "time_ids": torch.full((batch, 6), 64.0, device=device)}
        found["added_cond_kwargs"] = added
    return found
