"""One picture of what the dense and the pruned model draw from the same noise.

Deterministic sampling (DDIM, Song et al. 2021, arXiv:2010.02502, η = 0) from fixed seeds, with
generators of its own: drawing them changes nothing in what is learned.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from diffusers import DDIMScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor

from ldcp_core import Pruned
from training.console import progress
from training.model.encode import added_conditions, embed_prompts
from training.model.gating import compacted
from training.model.load import DiffusionModel

STEPS = 20
GUIDANCE = 4.0


class SampleSheet:
    """One image per prompt; holds the VAE of ``model``, but not its text encoders.

    Prompts are embedded at once. An empty prompt is drawn without guidance.
    """

    def __init__(self, model: DiffusionModel, prompts: Sequence[str], resolution: int) -> None:
        self._unet, self._vae = model.unet, model.vae
        self._prompts = [embed_prompts(model, ["", p] if p else [""]) for p in prompts]
        self._resolution, self._side = resolution, resolution // model.vae_scale_factor
        self._scheduler = DDIMScheduler.from_config(model.scheduler.config, clip_sample=False)
        self._dense: list[Image.Image] | None = None

    def picture(self, pruned: Pruned) -> bytes:
        """A PNG: the dense model's images above, the pruned one's of the same noise below."""
        if self._dense is None:
            self._dense = self._draw(nullcontext())
        drawn = self._draw(compacted(self._unet, pruned))
        stream = io.BytesIO()
        make_image_grid([*self._dense, *drawn], 2, len(drawn)).save(stream, "PNG")
        return stream.getvalue()

    @torch.no_grad()
    def _draw(self, gates: AbstractContextManager[object]) -> list[Image.Image]:
        with gates:
            prompts = progress(self._prompts, "drawing samples", unit="image")
            return [self._one(seed, *prompt) for seed, prompt in enumerate(prompts)]

    def _one(self, seed: int, context: Tensor, pooled: Tensor) -> Image.Image:
        unet, vae = self._unet, self._vae
        generator = torch.Generator().manual_seed(seed)
        shape = (1, unet.config.in_channels, self._side, self._side)
        latents = torch.randn(shape, generator=generator).to(unet.device)
        context = context.to(unet.device, unet.dtype)
        sizes = torch.tensor([self._resolution] * 2 + [0] * 2 + [self._resolution] * 2)
        sizes = sizes.to(pooled).expand(len(pooled), -1)
        added = added_conditions(pooled, sizes)
        self._scheduler.set_timesteps(STEPS)
        for timestep in self._scheduler.timesteps:
            inputs = latents.expand(context.shape[0], -1, -1, -1).to(unet.dtype)
            noise = unet(
                inputs, timestep, encoder_hidden_states=context, added_cond_kwargs=added
            ).sample.float()
            if noise.shape[0] == 2:
                noise = noise[:1] + GUIDANCE * (noise[1:] - noise[:1])
            latents = self._scheduler.step(noise, timestep, latents).prev_sample
        decoded = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample
        image: Image.Image = VaeImageProcessor().postprocess(decoded.float(), "pil")[0]
        return image
