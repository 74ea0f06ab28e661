"""Complete checkpoints with random weights: U-Net, VAE and text encoders in the true layout.

The stock checkpoint loader recognises only these names and shapes, and the server can be given
nothing less than a whole checkpoint. They are made once per machine, in the temporary folder;
``LDCP_TEST_CHECKPOINT`` names a complete SD1.5 checkpoint to use instead.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: What ComfyUI's U-Net of SD1.5 is made with; defaults are spelled out where ComfyUI's config does.
UNET: dict[str, Any] = dict(
    image_size=32,
    in_channels=4,
    out_channels=4,
    model_channels=320,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    num_heads=8,
    num_head_channels=-1,
    use_spatial_transformer=True,
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_middle=1,
    transformer_depth_output=[1] * 9 + [0] * 3,
    context_dim=768,
    legacy=False,
    use_linear_in_transformer=False,
    adm_in_channels=None,
    use_temporal_attention=False,
)
#: the same of SDXL
UNET_XL: dict[str, Any] = {
    **UNET,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "num_heads": -1,
    "num_head_channels": 64,
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}
VAE: dict[str, Any] = dict(
    double_z=True,
    z_channels=4,
    resolution=256,
    in_channels=3,
    out_ch=3,
    ch=128,
    ch_mult=[1, 2, 4, 4],
    num_res_blocks=2,
    attn_resolutions=[],
)


def unet(settings: dict[str, Any] = UNET) -> nn.Module:
    """ComfyUI's U-Net at full width, without memory for its weights."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        return UNetModel(**settings)


def networks(comfyui: Path, xl: bool = False) -> dict[str, nn.Module]:
    """Prefix in the file -> network, of ComfyUI's own classes without memory for its weights."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.models.autoencoder import AutoencoderKL

    text = json.loads((comfyui / "comfy" / "sd1_clip_config.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKL(ddconfig=VAE, embed_dim=4)
        clip = CLIPTextModel(text, torch.float32, "meta", comfy.ops.manual_cast)
        found = {"model.diffusion_model": unet(UNET_XL if xl else UNET), "first_stage_model": vae}
        if not xl:
            return found | {"cond_stage_model.transformer": clip}
        first, second = "conditioner.embedders.0.transformer", "conditioner.embedders.1.model"
        return found | {first: clip, second: OpenCLIPText()}


class OpenCLIPText(nn.Module):
    """The parameters of SDXL's second text encoder, OpenCLIP's ViT-bigG, by their names."""

    def __init__(self, width: int = 1280, layers: int = 32) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(77, width))
        self.text_projection = nn.Parameter(torch.empty(width, width))
        self.logit_scale = nn.Parameter(torch.empty(()))
        self.token_embedding = nn.Embedding(49408, width)
        self.ln_final = nn.LayerNorm(width)
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.ModuleList(_Layer(width) for _ in range(layers))


class _Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, 20)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)}
        )


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Norms near one, the rest scaled by fan-in, so that every layer matters and none explodes."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return 0.8 * noise * noise[0].numel() ** -0.5
    return 0.02 * noise + (1.0 if name.endswith("weight") else 0.0)


def randomise_(module, seed):
    """Random weights whose layers all matter: norms near one, the rest scaled by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            noise = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        else:
            noise *= parameter[0].numel() ** -0.5
        parameter.data.copy_(noise)


def make_checkpoint(path: Path, comfyui: Path, xl: bool = False) -> None:
    """Write the checkpoint (2.1 GB, SDXL 6.9 GB) to ``path``, which appears only complete."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(15), {}
    for prefix, network in networks(comfyui, xl).items():
        for name, parameter in network.named_parameters():
            if name != "text_projection.weight":  # no file has that of CLIP-L
                weight = random_weight(name, parameter.shape, generator)
                tensors[f"{prefix}.{name}"] = weight.half()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.part")
    save_file(tensors, partial)
    os.replace(partial, path)


def is_complete(path: Path) -> bool:
    """Whether this checkpoint also has a VAE and a text encoder."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.keys()
    return all(
        any(name.startswith(prefix) for name in names)
        for prefix in ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.")
    )


def find_or_make_xl(comfyui: Path) -> Path:
    """That of SDXL."""
    path = Path(tempfile.gettempdir()) / "ldcp-tests" / "random_sdxl.safetensors"
    if not path.is_file():
        make_checkpoint(path, comfyui, xl=True)
    return path.resolve()


def find_or_make(comfyui: Path) -> Path:
    """The SD1.5 checkpoint that every test uses."""
    named = os.environ.get("LDCP_TEST_CHECKPOINT")
    path = Path(named or Path(tempfile.gettempdir()) / "ldcp-tests" / "random_sd15.safetensors")
    if not named and not path.is_file():
        make_checkpoint(path, comfyui)
    assert is_complete(path), (
        f"{path} lacks a VAE or a text encoder: let LDCP_TEST_CHECKPOINT name a complete SD1.5 "
        "checkpoint, or unset it to have one made"
    )
    return path.resolve()
