"""A LoRA and a ControlNet with random weights, in the true layout of files for SD1.5.

Made once per machine, like the checkpoint they go with (see `full_checkpoint`).
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import full_checkpoint
import torch
from torch import Tensor

RANK = 4
#: diffusers' name of a layer -> (inputs, outputs, kernel size): gated convolutions and some more
LORA_LAYERS = {
    "mid_block_resnets_0_conv1": (1280, 1280, 3),
    "mid_block_resnets_0_conv2": (1280, 1280, 3),
    "mid_block_resnets_1_conv1": (1280, 1280, 3),
    "mid_block_resnets_1_conv2": (1280, 1280, 3),
    "mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (1280, 1280, 0),
    "up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_v": (768, 1280, 0),
}


def make_lora() -> dict[str, Tensor]:
    """A kohya-style LoRA of the U-Net, half precision."""
    generator, tensors = torch.Generator().manual_seed(21), {}
    for name, (inputs, outputs, kernel) in LORA_LAYERS.items():
        taps = (kernel, kernel) if kernel else ()
        point = (1, 1) if kernel else ()
        down = torch.randn(RANK, inputs, *taps, generator=generator)
        up = torch.randn(outputs, RANK, *point, generator=generator)
        key = f"lora_unet_{name}"
        tensors[f"{key}.lora_down.weight"] = (down * down[0].numel() ** -0.5).half()
        tensors[f"{key}.lora_up.weight"] = (0.5 * up).half()
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    return tensors


def make_controlnet() -> dict[str, Tensor]:
    """A ControlNet, 361 M parameters in half precision."""
    from comfy.cldm.cldm import ControlNet

    config = {k: v for k, v in full_checkpoint.UNET.items() if k != "out_channels"}
    with torch.device("meta"):
        network = ControlNet(hint_channels=3, **config)
    generator, tensors = torch.Generator().manual_seed(22), {}
    for name, parameter in network.named_parameters():
        weight = full_checkpoint.random_weight(name, parameter.shape, generator)
        tensors[f"control_model.{name}"] = weight.half()
    return tensors


def find_or_make(name: str, make: Callable[[], dict[str, Tensor]]) -> Path:
    """A cached file in the temporary folder, which appears there only complete."""
    from safetensors.torch import save_file

    path = Path(tempfile.gettempdir()) / "ldcp-tests" / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.part")
        save_file(make(), partial)
        os.replace(partial, path)
    return path.resolve()


def add_to(base: Path, comfyui: Path) -> None:
    """Put both, and ComfyUI's example picture, where the shipped workflows look for them."""
    files = {
        "models/loras/lora.safetensors": find_or_make("random_lora.safetensors", make_lora),
        "models/controlnet/control_v11p_sd15_canny_fp16.safetensors": find_or_make(
            "random_controlnet.safetensors", make_controlnet
        ),
    }
    for place, file in files.items():
        (base / place).parent.mkdir(parents=True, exist_ok=True)
        (base / place).symlink_to(file)
    (base / "input").mkdir(exist_ok=True)
    # copied: newer hosts follow no link out of the input folder
    shutil.copy(comfyui / "input" / "example.png", base / "input")
