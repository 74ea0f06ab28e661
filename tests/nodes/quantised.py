"""A small model whose linear layers are quantised, built by ComfyUI as from a checkpoint.

Newer hosts keep such weights in a tensor class of their own, older ones in fp8 with a scale.
"""

from __future__ import annotations

import importlib.util
import json

import full_checkpoint
import torch
from torch import nn

NARROW = {**full_checkpoint.UNET, "model_channels": 32, "context_dim": 64}
#: format -> (its dtype, the largest value)
FORMATS = {"float8_e4m3fn": (torch.float8_e4m3fn, 448), "int8_tensorwise": (torch.int8, 127)}


def newer_host():
    return importlib.util.find_spec("comfy.quant_ops") is not None


def quantised_model(comfy, kind, plain=()):
    """A ModelPatcher like that of ``small_model``; linear layers named in ``plain`` are as there.

    None where the host does not know the format.
    """
    if kind != "float8_e4m3fn" and not newer_host():
        return None
    cpu, config = torch.device("cpu"), comfy.supported_models.SD15(NARROW)
    config.set_inference_dtype(torch.float32, torch.float32)
    full = comfy.model_base.BaseModel(config, device=cpu).diffusion_model
    full_checkpoint.randomise_(full, 0)
    weights = full.state_dict()
    for name, layer in full.named_modules():
        if isinstance(layer, nn.Linear) and name not in plain:
            weights |= quantised(name, layer.weight, kind)
    config.quant_config, config.scaled_fp8 = {"mixed_ops": True}, torch.float8_e4m3fn
    model = comfy.model_base.BaseModel(config, device=cpu).eval()
    model.load_model_weights(weights)
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def quantised(layer, weight, kind):
    """The weight of a layer as it is in a checkpoint."""
    dtype, largest = FORMATS[kind]
    scale = weight.abs().max() / largest
    stored = weight / scale if dtype.is_floating_point else (weight / scale).round()
    found = {f"{layer}.weight": stored.to(dtype)}
    if not newer_host():
        return {**found, f"{layer}.scale_weight": scale}
    said = torch.tensor(list(json.dumps({"format": kind}).encode()), dtype=torch.uint8)
    return {**found, f"{layer}.weight_scale": scale, f"{layer}.comfy_quant": said}
