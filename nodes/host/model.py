"""Where the sites of a gate file are in a ComfyUI model.

Sites carry diffusers names; ComfyUI keeps the original layout. This module translates, and refuses
every model that is not one of Stable Diffusion's U-Nets or whose layers have other widths than the
gates, before anything is patched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ...ldcp_core import (
    Attention,
    Block,
    FeedForward,
    Gates,
    ResBlock,
    Topology,
    block_of,
    blocks_of,
    groups_of,
    kind_of,
    one_line,
)
from .attention import ComfyAttention
from .blocks import HostBlock, first_of
from .feedforward import ComfyFeedForward
from .resblock import ComfyResBlock
from .weights import quantised

#: kind of block -> what knows ComfyUI's modules of it
HOST_BLOCKS: Mapping[type[Block], type[HostBlock]] = {
    ResBlock: ComfyResBlock,
    FeedForward: ComfyFeedForward,
    Attention: ComfyAttention,
}
FAMILIES = "Stable Diffusion 1.5, Stable Diffusion 2 and SDXL"
#: transformer blocks behind each ResBlock, down and up, where ComfyUI does not say
SD15_DEPTHS = ([1] * 6 + [0] * 2, [1] * 9 + [0] * 3)
LEAVE_OUT = "leave out the node or extension that changes this layer"


class ModelError(ValueError):
    """A model that these gates cannot prune; the message is what the user reads."""


def module_path(block: str, layers_per_block: int = 2) -> str:
    """ComfyUI's path of a block below ``diffusion_model``, from its diffusers name.

    >>> module_path("mid_block.resnets.1"), module_path("down_blocks.1.resnets.0")
    ('middle_block.2', 'input_blocks.4.0')
    >>> module_path("up_blocks.3.resnets.2")
    'output_blocks.11.0'
    >>> module_path("up_blocks.1.attentions.0.transformer_blocks.0.ff")
    'output_blocks.3.1.transformer_blocks.0.ff'
    """
    stage, *parts = block.split(".")
    stride = layers_per_block + 1  # the downsampler or upsampler of a level takes one place
    if stage == "mid_block":
        kind, number, *inside = parts
        places = {("resnets", "0"): 0, ("attentions", "0"): 1, ("resnets", "1"): 2}
        path = f"middle_block.{places[kind, number]}"
    else:
        level, kind, number, *inside = parts
        first = 1 if stage == "down_blocks" else 0  # the input convolution comes first
        place = stride * int(level) + first + int(number)
        stages = {"down_blocks": "input_blocks", "up_blocks": "output_blocks"}
        path = f"{stages[stage]}.{place}.{0 if kind == 'resnets' else 1}"
    return ".".join([path, *inside])


def layer_path(site: str, layers_per_block: int = 2) -> str:
    """ComfyUI's path of a gated layer below ``diffusion_model``: the one that owns the weight.

    >>> layer_path("mid_block.resnets.0.conv1"), layer_path("mid_block.resnets.0.conv2")
    ('middle_block.0.in_layers.2', 'middle_block.0.out_layers.3')
    >>> layer_path("mid_block.attentions.0.transformer_blocks.0.ff.net.0")
    'middle_block.1.transformer_blocks.0.ff.net.0.proj'
    """
    block = block_of(site)
    layers, layer = HOST_BLOCKS[kind_of(block)].layers, site.removeprefix(f"{block}.")
    return f"{module_path(block, layers_per_block)}.{layers[layer]}"


def unet(base_model: Any) -> nn.Module:
    """The U-Net of ComfyUI's BaseModel, without the shell that torch.compile puts around it."""
    found: nn.Module = base_model.diffusion_model
    return getattr(found, "_orig_mod", found)


def model_topology(base_model: Any) -> Topology:
    """The topology of a ComfyUI BaseModel, as ComfyUI found it in the checkpoint's tensors.

    Raises ModelError when it is not built like Stable Diffusion's U-Nets.
    """
    kind = type(base_model.model_config).__name__
    config: Mapping[str, Any] = base_model.model_config.unet_config
    try:
        problem = _not_supported(config) or ""
        if not problem:
            return _topology(config)
    except (KeyError, TypeError, ValueError) as error:
        problem = one_line(error)
    raise ModelError(
        f"LDCP: this model is {kind} ({problem}), but pruning gates are made for {FAMILIES} and "
        "their fine-tunes; connect a checkpoint of one of these"
    )


def _not_supported(config: Mapping[str, Any]) -> str | None:
    """What in ComfyUI's description of a model rules it out; None when nothing does."""
    if "model_channels" not in config or "channel_mult" not in config:
        return "not a convolutional U-Net"
    if len(set(config["num_res_blocks"])) != 1:
        return f"levels of different depth {config['num_res_blocks']}"
    if config.get("use_temporal_attention"):
        return "a video model"
    if config.get("num_classes") not in (None, "sequential"):
        return f"a U-Net of {config['num_classes']} classes"
    if not isinstance(config.get("context_dim"), int):
        return f"text embeddings of width {config.get('context_dim')}"
    return None


def _topology(config: Mapping[str, Any]) -> Topology:
    layers, levels = config["num_res_blocks"][0], len(config["channel_mult"])
    depths = config.get("transformer_depth", SD15_DEPTHS[0])
    above = config.get("transformer_depth_output", SD15_DEPTHS[1])[::-1]
    mid = config.get("transformer_depth_middle", 1)
    found = Topology(
        widths=tuple(config["model_channels"] * m for m in config["channel_mult"]),
        down=tuple(tuple(depths[layers * b : layers * (b + 1)]) for b in range(levels)),
        # ComfyUI's marks: -1 for a ResBlock alone, -2 for no mid block
        mid=(mid, 0) if mid >= 0 else (0,) * (mid + 2),
        up=tuple(tuple(above[(layers + 1) * b : (layers + 1) * (b + 1)]) for b in range(levels)),
        context_width=config["context_dim"],
        pooled_width=config.get("adm_in_channels") or 0,
        linear_projections=bool(config.get("use_linear_in_transformer")),
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
    )
    size = config.get("num_head_channels", -1)
    heads = [
        attends and (config["num_heads"] if size == -1 else width // size)
        for width, attends in zip(found.widths, found.attends, strict=True)
    ]
    return replace(found, heads=tuple(map(int, heads)))


def find_blocks(base_model: Any, gates: Gates) -> dict[str, HostBlock]:
    """Block name -> that block of the model, for every block that ``gates`` names.

    Raises ModelError for another family, another width, or a block this host builds differently.
    """
    found, problems = examine(base_model, gates)
    for name, problem in problems.items():
        path = module_path(name, gates.topology.layers_per_block)
        raise ModelError(
            f"LDCP: the model's {path} ({name}) cannot be pruned: {problem}; remove the node or "
            "extension that rebuilds this layer, or leave pruning out"
        )
    return found


def examine(base_model: Any, gates: Gates) -> tuple[dict[str, HostBlock], dict[str, str]]:
    """The same of the blocks that this host builds as expected, and what the others are instead.

    Raises ModelError for another family or another width.
    """
    topology = model_topology(base_model)
    if gates.topology.family != topology.family:
        raise ModelError(
            f"LDCP: the gates were made for {gates.topology.family}, and the model is "
            f"{topology.family}; choose gates that were made for this family"
        )
    widths = {site.name: site.channels for site in topology.all_sites()}
    theirs, ours = (groups_of(known.all_sites()) for known in (gates.topology, topology))
    for site, score in gates.scores.items():
        if widths.get(site) != score.numel() or theirs.get(site) != ours.get(site):
            raise ModelError(
                f"LDCP: the gates have {score.numel()} channels at {site}, the model has "
                f"{widths.get(site, 'no such layer')}; gates and model must be of the same "
                f"architecture (gates: {gates.topology}, model: {topology}). Choose gates that "
                "were trained for this model"
            )
    named = blocks_of(gates.scores)
    found, problems = {}, {}
    for block in topology.blocks():
        if block.name in named:
            path = module_path(block.name, topology.layers_per_block)
            try:
                host = HOST_BLOCKS[type(block)](unet(base_model), path)
                problem = host.check(block)
            except AttributeError as error:  # a part of it is gone
                problem = one_line(error)
            if problem:
                problems[block.name] = problem
            else:
                found[block.name] = host
    return found, problems


def refuse_quantised(blocks: Mapping[str, HostBlock]) -> None:
    """Raises ModelError where no gates can be made of a block's weights, as they are quantised."""
    formats = {name: first_of(map(quantised, b.judge().layers)) for name, b in blocks.items()}
    found = [name for name, kind in formats.items() if kind]
    if found:
        raise ModelError(
            f"LDCP: {len(found)} of the {len(blocks)} blocks, {found[0]} the first, have quantised "
            f"weights ({formats[found[0]]}), and gates are made of others; choose a scope without "
            "ff and heads, or gates without these, or load a checkpoint that is not quantised"
        )
