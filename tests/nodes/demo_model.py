"""The embedded demo model in ComfyUI's own U-Net, with its text encoder.

ComfyUI builds norms of 32 groups, widths that are multiples of the first, and one number of heads
for all levels; the demo has none of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import full_checkpoint
import torch
from safetensors.torch import load_file

PIPELINE = Path(__file__).resolve().parents[2] / "training" / "demo" / "pipeline"
WIDTHS, HEADS, GROUPS, CONTEXT = (12, 32, 64, 144), (1, 2, 4, 8), 4, 64


class Width(int):
    """A multiple of the first width: itself the width that comes out."""

    def __mul__(self, other: int) -> int:
        return int(self)

    __rmul__ = __mul__


def load(pipeline: Path = PIPELINE) -> Any:
    """A ModelPatcher of the demo's U-Net."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models
    import comfy.utils

    class Operations(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(
                self, num_groups: int, num_channels: int, *args: Any, **options: Any
            ) -> None:
                super().__init__(GROUPS, num_channels, *args, **options)

    multiples = [Width(width) for width in WIDTHS]
    own = {"model_channels": WIDTHS[0], "channel_mult": multiples, "context_dim": CONTEXT}
    config = comfy.supported_models.SD15({**full_checkpoint.UNET, **own})
    config.unet_config["num_heads"] = 1  # the constructor has set SD1.5's
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = Operations
    cpu = torch.device("cpu")
    model = comfy.model_base.BaseModel(config, device=cpu).eval()
    unet = model.diffusion_model
    for module in unet.modules():
        if hasattr(module, "to_q"):
            width = module.to_q.out_features
            module.heads = HEADS[WIDTHS.index(width)]
            module.dim_head = width // module.heads
    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    names = comfy.utils.unet_to_diffusers(config.unet_config)
    shapes = unet.state_dict()
    found = {ours: weights[theirs] for theirs, ours in names.items() if theirs in weights}
    assert len(found) == len(weights)
    unet.load_state_dict({k: v.reshape(shapes[k].shape) for k, v in found.items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(text: str, pipeline: Path = PIPELINE) -> list[list[Any]]:
    """A prompt as its text encoder reads it."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = tokenizer([text], max_length=tokenizer.model_max_length, **options)
    return [[encoder(tokens.input_ids)[0].detach(), {}]]
