"""A custom node for ComfyUI's own server: the narrow SD1.5 of these tests, without a checkpoint.

The server imports it from ``custom_nodes``; the stock loaders know full-size models alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))  # in the server this file is a link
import full_checkpoint


class SmallModel:
    """A U-Net of widths 32, 64, 128, 128 with random weights, and a conditioning for it."""

    RETURN_TYPES = ("MODEL", "CONDITIONING")
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        import comfy.model_base
        import comfy.model_patcher
        import comfy.supported_models
        import torch

        torch.manual_seed(0)
        narrow = {**full_checkpoint.UNET, "model_channels": 32, "context_dim": 64}
        config = comfy.supported_models.SD15(narrow)
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        model = comfy.model_base.BaseModel(config, device=cpu).eval()
        for parameter in model.diffusion_model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        patcher = comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
        return patcher, [[torch.randn(1, 77, 64), {}]]


class SmallVae:
    """A VAE without weights: three of the latent's channels, eight times as large."""

    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}

    def make(self):
        return (self,)

    def decode(self, samples):
        planes = samples[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
        return planes.movedim(1, 3).sigmoid()


NODE_CLASS_MAPPINGS = {"LDCPTestSmallModel": SmallModel, "LDCPTestSmallVae": SmallVae}
