"""A complete SD1.5 checkpoint with random weights: U-Net, VAE and text encoder in the true layout.

The stock checkpoint loader recognises only these names and shapes, and the server can be given
nothing less than a whole checkpoint. It is made once per machine, in the temporary folder;
``LDCP_TEST_CHECKPOINT`` names a complete checkpoint to use instead.
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


def unet() -> nn.Module:
    """ComfyUI's U-Net of SD1.5 at full width, without memory for its weights."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    with torch.device("meta"):
        return UNetModel(**UNET)


def networks(comfyui: Path) -> dict[str, nn.Module]:
    """Prefix in the file -> network of ComfyUI's own classes, without memory for its weights."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.models.autoencoder import AutoencoderKL

    text = json.loads((comfyui / "comfy" / "sd1_clip_config.json").read_text())
    with torch.device("meta"):
        return {
            "model.diffusion_model": unet(),
            "first_stage_model": AutoencoderKL(ddconfig=VAE, embed_dim=4),
            "cond_stage_model.transformer": CLIPTextModel(
                text, torch.float32, "meta", comfy.ops.manual_cast
            ),
        }


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


def make_checkpoint(path: Path, comfyui: Path) -> None:
    """Write the checkpoint (2.1 GB, half precision) to ``path``, which appears only complete."""
    from safetensors.torch import save_file

    generator, tensors = torch.Generator().manual_seed(15), {}
    for prefix, network in networks(comfyui).items():
        for name, parameter in network.named_parameters():
            if "text_projection" not in name:  # no SD1.5 file has it
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


def find_or_make(comfyui: Path) -> Path:
    """The checkpoint that every test uses."""
    named = os.environ.get("LDCP_TEST_CHECKPOINT")
    path = Path(named or Path(tempfile.gettempdir()) / "ldcp-tests" / "random_sd15.safetensors")
    if not named and not path.is_file():
        make_checkpoint(path, comfyui)
    assert is_complete(path), (
        f"{path} lacks a VAE or a text encoder: let LDCP_TEST_CHECKPOINT name a complete SD1.5 "
        "checkpoint, or unset it to have one made"
    )
    return path.resolve()
