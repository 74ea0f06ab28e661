"""Does every layer of the demo's U-Net matter, and does the text? (`python -m training.demo.check`)

A pruning experiment means nothing on a layer that the model ignores: removing channels there is
free, whatever the criterion. So the output of every ResBlock's residual branch and of every
transformer's attn1, attn2 and ff is replaced by zero in turn, then each half of an attention's
heads, and the noise-prediction loss on pictures never seen in training is compared with the intact
model's. Both use the same images, noise and timesteps, so the difference is far more precise than
the losses themselves. Another picture's caption, and an empty one, are compared in the same way.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from .autoencoder import to_pixels
from .denoiser import SCHEDULE
from .emoji import EmojiPictures, read_emoji
from .faces import draw_face
from .text import tokenize

PIPELINE = Path(__file__).parent / "pipeline"
FIRST_SEED = 2_000_000  # training uses seeds from 0, the sample images from 1,000,000
#: the picture of a seed, and its caption
Draw = Callable[[int], tuple[Image.Image, str]]
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
    pipe: StableDiffusionPipeline,
    count: int,
    lowest_step: int = 0,
    first_seed: int = FIRST_SEED,
    draw: Draw = draw_face,
) -> Probe:
    """`count` held-out pictures, with timesteps evenly spread from `lowest_step` to 999."""
    drawn = [draw(first_seed + i) for i in range(count)]
    images = np.stack([np.asarray(image) for image, _ in drawn])
    parts = (to_pixels(images[i : i + 16]) for i in range(0, count, 16))
    latents = torch.cat([pipe.vae.encode(part).latent_dist.mean for part in parts])
    latents *= pipe.vae.config.scaling_factor
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
    with ExitStack() as hooks:
        for name in names:
            module = unet.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(lambda m, i, o: torch.zeros_like(o)))
        yield


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


def head_groups(unet: UNet2DConditionModel) -> Iterator[tuple[str, range]]:
    """Both halves of the heads of every attention that has several: its name and the heads."""
    for name, module in unet.named_modules():
        if name.endswith((".attn1", ".attn2")) and module.heads > 1:
            middle = module.heads // 2
            yield name, range(middle)
            yield name, range(middle, module.heads)


@contextmanager
def without_heads(unet: UNet2DConditionModel, name: str, heads: range) -> Iterator[None]:
    """Replace what these heads of the named attention contribute by zero."""
    attention = unet.get_submodule(name)

    def cut(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        per_head = inputs[0].clone().unflatten(-1, (attention.heads, -1))
        per_head[..., heads.start : heads.stop, :] = 0
        return (per_head.flatten(-2), *inputs[1:])

    with attention.to_out[0].register_forward_pre_hook(cut):
        yield


def changes(unet: UNet2DConditionModel) -> Iterator[tuple[str, AbstractContextManager[None]]]:
    """Everything that is zeroed in turn, in words and as a context."""
    for name in layer_names(unet):
        yield name, zeroed(unet, name)
    for name, heads in head_groups(unet):
        yield f"{name}, heads {heads[0]}-{heads[-1]}", without_heads(unet, name, heads)


def other_captions(pipe: StableDiffusionPipeline, probe: Probe) -> Iterator[tuple[str, Probe]]:
    """The probe with each picture's caption replaced: by the next picture's, and by none."""
    yield "another picture's caption", replace(probe, states=probe.states.roll(1, 0))
    empty = pipe.text_encoder(tokenize(pipe.tokenizer, [""])).last_hidden_state
    yield "an empty caption", replace(probe, states=empty.expand_as(probe.states))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--emoji", type=Path, help="npm's package of what the model was trained on")
    parser.add_argument("--samples", type=int, default=16, help="pictures per layer")
    parser.add_argument("--mid-samples", type=int, default=96, help="pictures for the first lines")
    args = parser.parse_args()
    pipe = load_pipeline(args.pipeline)
    draw: Draw = EmojiPictures(read_emoji(args.emoji)) if args.emoji else draw_face
    wide = make_probe(pipe, args.mid_samples, 500, draw=draw)
    intact = losses(pipe.unet, wide)
    print(f"t >= 500, {args.mid_samples} pictures: loss {intact.mean():.5f}")
    print(f"both mid ResBlocks zeroed: {effect(pipe.unet, wide, intact, *MID)}")
    for label, probe in other_captions(pipe, wide):
        print(f"{label}: {Effect.of(losses(pipe.unet, probe), intact)}", flush=True)
    probe = make_probe(pipe, args.samples, 500, draw=draw)
    dense = predictions(pipe.unet, probe)
    intact = (dense - probe.noise).pow(2).mean((1, 2, 3))
    print(f"{'zeroed, t >= 500':70} {'increase of the loss':>22} {'output moved (MSE)':>20}")
    for label, change in changes(pipe.unet):
        with change:
            output = predictions(pipe.unet, probe)
        increase = Effect.of((output - probe.noise).pow(2).mean((1, 2, 3)), intact)
        moved = (output - dense).pow(2).mean().item()
        print(f"{label:70} {increase!s:>22} {moved:>20.1e}", flush=True)


if __name__ == "__main__":
    main()
