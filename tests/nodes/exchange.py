"""What the training room hands to the ComfyUI room: a fitted gate file, and its numbers.

    python -m tests.nodes.exchange FOLDER

Learns gates on a small random diffusers model through `training.fit`, and writes the gate file, the
U-Net's weights, an input, and diffusers' dense, masked and compact outputs. The node tests load the
same weights into ComfyUI's own U-Net and must get the same numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

WIDTHS, CONTEXT = (32, 64, 128, 128), 64
TIMESTEP = 500


def make_exchange(folder: Path) -> None:
    import numpy as np
    import torch
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from PIL import Image
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from ldcp_core import load_gates
    from training import fit
    from training.model import gating
    from training.model.load import _clip_tokenizer, load_model

    model, images = folder / "model", folder / "images"
    images.mkdir(parents=True)
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16, block_out_channels=WIDTHS, cross_attention_dim=CONTEXT
    ).save_pretrained(model / "unet")
    AutoencoderKL(block_out_channels=(32,), sample_size=16).save_pretrained(model / "vae")
    CLIPTextModel(
        CLIPTextConfig(
            hidden_size=CONTEXT,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    ).save_pretrained(model / "text_encoder")
    _clip_tokenizer().save_pretrained(model / "tokenizer")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(model / "scheduler")
    random = np.random.default_rng(0)
    for i in range(8):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")

    output = folder / "gates.safetensors"
    arguments = ["--model", str(model), "--data", str(images), "--output", str(output)]
    arguments += ["--max-steps", "120", "--batch-size", "2", "--gradient-accumulation", "1"]
    if fit.main([*arguments, "--target-sparsity", "0.5"]) != 0:
        raise RuntimeError("the fit failed")

    gates, unet = load_gates(output), load_model(str(model)).unet
    x, context = torch.randn(2, 4, 32, 40), torch.randn(2, 77, CONTEXT)

    def evaluate() -> torch.Tensor:
        with torch.no_grad():
            return unet(x, TIMESTEP, encoder_hidden_states=context).sample

    found = {"x": x, "context": context, "dense": evaluate()}
    with gating.masked(unet, gating.hard_gates(gates.pruned()), gates.padding):
        found["masked"] = evaluate()
    with gating.compacted(unet, gates.pruned()):
        found["compact"] = evaluate()
    save_file(found, folder / "outputs.safetensors")
    save_file(dict(unet.state_dict()), folder / "unet.safetensors")


if __name__ == "__main__":
    make_exchange(Path(sys.argv[1]))
