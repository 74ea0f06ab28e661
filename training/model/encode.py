"""What the frozen encoders make of prompts and images, as the model was trained.

SDXL's U-Net is told more than text states: pooled text, and the sizes of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from training.model.load import DiffusionModel


@torch.no_grad()
def embed_prompts(model: DiffusionModel, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return text states [B, T, D] and pooled text [B, P], as the model was trained.

    SD1.5 and SD2 take the last states of their encoder (T = 77, D = 768 and 1024) and no pooled
    text (P = 0); SD2's files hold one layer more, which the loading leaves out. SDXL
    takes the last but one of both, side by side (D = 2048), and the pooled text of the second
    (P = 1280). Prompts are padded to T tokens and cut beyond, without a mask.
    """
    if model.text_encoder_2 is None:
        context = _encoded(model, 0, prompts).last_hidden_state
        return context, context.new_zeros(len(prompts), 0)
    found = [_encoded(model, i, prompts, output_hidden_states=True) for i in range(2)]
    return torch.cat([each.hidden_states[-2] for each in found], -1), found[1].text_embeds


def _encoded(model: DiffusionModel, encoder: int, prompts: Sequence[str], **options: Any) -> Any:
    """What a text encoder makes of the prompts."""
    module = model.text_encoders[encoder]
    tokens = model.tokenizers[encoder](
        list(prompts),
        padding="max_length",
        max_length=module.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return module(tokens.to(module.device), **options)


def context_shape(model: DiffusionModel) -> tuple[int, int]:
    """[T, D] of a prompt's text states."""
    tokens = model.text_encoder.config.max_position_embeddings
    return tokens, model.unet.config.cross_attention_dim


def latent_shape(model: DiffusionModel, resolution: int) -> tuple[int, int, int]:
    """[4, h, w] of a square image of so many pixels."""
    side = resolution // model.vae_scale_factor
    return model.vae.config.latent_channels, side, side


def pooled_width(config: Any) -> int:
    """P of the pooled text that a U-Net of this config takes; 0 without."""
    joined = config.projection_class_embeddings_input_dim  # with six numbers in so many channels
    return joined - 6 * config.addition_time_embed_dim if joined else 0


def added_conditions(pooled: Tensor, sizes: Tensor) -> dict[str, Tensor]:
    """What SDXL's U-Net is told beside the text states, by diffusers' names; else nothing.

    ``pooled`` [B, P] as `embed_prompts` gives it, ``sizes`` [B, 6] as `training.data.images`
    gives them.
    """
    return {"text_embeds": pooled, "time_ids": sizes} if pooled.shape[1] else {}


@torch.no_grad()
def encode_images(model: DiffusionModel, pixels: Tensor) -> Tensor:
    """Return scaled latents [B, 4, H/f, W/f] of `pixels` [B, 3, H, W] in [-1, 1].

    They are the mean of the VAE's posterior, which repeats exactly, times the VAE's
    `scaling_factor` (0.18215 for SD1.5, 0.13025 for SDXL).
    """
    posterior = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype)).latent_dist
    return posterior.mode() * model.vae.config.scaling_factor
