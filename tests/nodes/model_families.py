"""Narrow models of the families that can be pruned, with random weights."""

from __future__ import annotations

from typing import Any

import full_checkpoint
import torch

XL: dict[str, Any] = {
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "num_heads": -1,
    "num_head_channels": 16,
    "context_dim": 64,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
    "transformer_depth": [0, 0, 1, 1, 3, 3],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 3, 3, 3],
    "transformer_depth_middle": 3,
}
#: name -> class of supported_models, class of model_base, what its U-Net has
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "SD2": (
        "SD20",
        "BaseModel",
        {"model_channels": 64, "context_dim": 64, "use_linear_in_transformer": True},
    ),
    "SDXL": ("SDXL", "SDXL", XL),
    "SDXL refiner": (
        "SDXLRefiner",
        "SDXLRefiner",
        {
            **XL,
            "channel_mult": [1, 2, 4, 4],
            "num_res_blocks": [2, 2, 2, 2],
            "adm_in_channels": 2560,
            "transformer_depth": [0, 0, 2, 2, 2, 2, 0, 0],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0],
            "transformer_depth_middle": 2,
        },
    ),
    "SSD-1B": (
        "SSD1B",
        "SDXL",
        {
            **XL,
            "transformer_depth": [0, 0, 2, 2, 2, 2],
            "transformer_depth_output": [0, 0, 0, 1, 1, 2, 3, 2, 2],
            "transformer_depth_middle": -1,
        },
    ),
    "KOALA": (
        "KOALA_700M",
        "SDXL",
        {
            **XL,
            "num_res_blocks": [1, 1, 1],
            "transformer_depth": [0, 1, 3],
            "transformer_depth_output": [0, 0, 1, 1, 3, 3],
            "transformer_depth_middle": -2,
        },
    ),
    "SDXL inpainting": ("SDXL", "SDXL", {**XL, "in_channels": 9}),
}


def make(comfy: Any, family: str) -> Any:
    """A ModelPatcher; ``comfy`` is the package of that name."""
    config, base, changes = FAMILIES[family]
    settings = {**full_checkpoint.UNET, "model_channels": 32, **changes}
    model_config = getattr(comfy.supported_models, config)(settings)
    model_config.set_inference_dtype(torch.float32, None)
    cpu = torch.device("cpu")
    model = getattr(comfy.model_base, base)(model_config, device=cpu).eval()
    if model_config.unet_config["in_channels"] == 9:
        model.set_inpaint()
    full_checkpoint.randomise_(model.diffusion_model, 0)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
