"""Does every layer of the demo's U-Net matter? (`python -m training.demo.check`)

A pruning experiment means nothing on a layer that the model ignores: removing channels there is
free, whatever the criterion. So the output of every ResBlock's residual branch and of every
transformer's attn1, attn2 and ff is replaced by zero in turn, and the noise-prediction loss on
portraits never seen in training is compared with the intact model's. Both use the same images,
noise and timesteps, so the difference is far more precise than the losses themselves.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

from .autoencoder import to_pixels
from .denoiser import SCHEDULE
from .faces import draw_face
from .text import tokenize

PIPELINE = Path(__file__).parent / "pipeline"
FIRST_SEED = 2_000_000  # training uses seeds from 0, the sample images from 1,000,000
MID = ("mid_block.resnets.0.conv2", "mid_block.resnets.1.conv2")


@dataclass(frozen=True)
class Probe:
    """Noisy latents with everything that is needed to score a prediction."""

    noisy: Tensor  # [N, 4, 32, 32]
    noise: Tensor  # [N, 4, 32, 32]
    steps: Tensor  # [N]
    states: Tensor  # [N, T, C]


@dataclass(frozen=True)
class Effect:
    """Relative increase of the loss, with the standard error of the paired difference."""

    increase: float
    error: float

    @classmethod
    def of(cls, changed: Tensor, intact: Tensor) -> "Effect":
        """Of the losses of the same samples, `[N]`, with a change and without."""
        difference = changed - intact
        error = difference.std() / len(difference) ** 0.5
        return cls((difference.mean() / intact.mean()).item(), (error / intact.mean()).item())

    def __str__(self) -> str:
        return f"{100 * self.increase:+.3f} % ± {100 * self.error:.3f}"


def load_pipeline(folder: Path = PIPELINE) -> StableDiffusionPipeline:
    """The demo pipeline, from disk only (float16 files, computed in float32)."""
    pipe = StableDiffusionPipeline.from_pretrained(
        folder, safety_checker=None, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def make_probe(
    pipe: StableDiffusionPipeline, count: int, lowest_step: int = 0, first_seed: int = FIRST_SEED
) -> Probe:
    """`count` held-out portraits, with timesteps evenly spread from `lowest_step` to 999."""
    drawn = [draw_face(first_seed + i) for i in range(count)]
    images = np.stack([np.asarray(image) for image, _ in drawn])
    latents = (
        torch.cat(
            [
                pipe.vae.encode(to_pixels(images[i : i + 16])).latent_dist.mean
                for i in range(0, count, 16)
            ]
        )
        * pipe.vae.config.scaling_factor
    )
    states = pipe.text_encoder(tokenize(pipe.tokenizer, [c for _, c in drawn])).last_hidden_state
    return noisy_probe(latents, states, lowest_step)


def noisy_probe(latents: Tensor, states: Tensor, lowest_step: int) -> Probe:
    """Scaled latents with fixed noise and evenly spread timesteps."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(latents.shape, generator=generator)
    spread = torch.linspace(lowest_step, 999, len(latents)).round().long()
    steps = spread[torch.randperm(len(latents), generator=generator)]
    noisy = DDPMScheduler(**SCHEDULE).add_noise(latents, noise, steps)
    return Probe(noisy, noise, steps, states)


@torch.no_grad()
def predictions(unet: UNet2DConditionModel, probe: Probe, batch: int = 16) -> Tensor:
    """The predicted noise, `[N, 4, 32, 32]`."""
    slices = [slice(i, i + batch) for i in range(0, len(probe.steps), batch)]
    return torch.cat([unet(probe.noisy[s], probe.steps[s], probe.states[s]).sample for s in slices])


def losses(unet: UNet2DConditionModel, probe: Probe) -> Tensor:
    """Mean squared error of the predicted noise, per sample, `[N]`."""
    return (predictions(unet, probe) - probe.noise).pow(2).mean((1, 2, 3))


@contextmanager
def zeroed(unet: UNet2DConditionModel, *names: str) -> Iterator[None]:
    """Replace the outputs of the named modules by zero."""
    handles = [unet.get_submodule(name).register_forward_hook(_zeros) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def effect(unet: UNet2DConditionModel, probe: Probe, intact: Tensor, *names: str) -> Effect:
    """What zeroing the named modules does to the loss; `intact` is `losses(unet, probe)`."""
    with zeroed(unet, *names):
        return Effect.of(losses(unet, probe), intact)


def layer_names(unet: UNet2DConditionModel) -> list[str]:
    """Every residual branch: the ResBlocks' conv2, the transformers' attn1, attn2 and ff."""
    return [
        name
        for name, _ in unet.named_modules()
        if name.endswith((".conv2", ".attn1", ".attn2", ".ff"))
    ]


def _zeros(_module: nn.Module, _args: tuple[object, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--samples", type=int, default=16, help="portraits per layer")
    parser.add_argument("--mid-samples", type=int, default=96, help="portraits for the mid block")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    wide = make_probe(pipe, args.mid_samples, 500)
    intact = losses(pipe.unet, wide)
    print(
        f"both mid ResBlocks, t >= 500, {args.mid_samples} portraits: loss {intact.mean():.5f}, "
        f"{effect(pipe.unet, wide, intact, *MID)}"
    )
    probe = make_probe(pipe, args.samples, 500)
    dense = predictions(pipe.unet, probe)
    intact = (dense - probe.noise).pow(2).mean((1, 2, 3))
    print(f"{'zeroed layer, t >= 500':58} {'increase of the loss':>22} {'output moved (MSE)':>20}")
    for name in layer_names(pipe.unet):
        with zeroed(pipe.unet, name):
            output = predictions(pipe.unet, probe)
        increase = Effect.of((output - probe.noise).pow(2).mean((1, 2, 3)), intact)
        moved = (output - dense).pow(2).mean().item()
        print(f"{name:58} {increase!s:>22} {moved:>20.1e}", flush=True)


if __name__ == "__main__":
    main()
