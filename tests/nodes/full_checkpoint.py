"""A complete SD1.5 checkpoint with random weights: U-Net, VAE and text encoder in the true layout.

The stock checkpoint loader recognises only these names and shapes, and the server can be given
nothing less than a whole checkpoint.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn


def networks(comfyui: Path) -> dict[str, nn.Module]:
    """Prefix in the file -> network of ComfyUI's own classes, without memory for its weights."""
    import comfy.ops
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    text = json.loads((comfyui / "comfy" / "sd1_clip_config.json").read_text())
    vae = dict(
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
    unet = dict(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[2, 2, 2, 2],
        channel_mult=[1, 2, 4, 4],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
        transformer_depth_middle=1,
        transformer_depth_output=[1] * 9 + [0] * 3,
        context_dim=768,
        legacy=False,
    )
    with torch.device("meta"):
        return {
            "model.diffusion_model": UNetModel(**unet),
            "first_stage_model": AutoencoderKL(ddconfig=vae, embed_dim=4),
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
