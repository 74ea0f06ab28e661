"""Training of the demo's U-Net: Stable Diffusion 1.5's topology at small width.

Trained plainly for a short time, a small U-Net of this shape leaves its lowest level unused: the
skip connections and the transformers above carry all that is needed, and pruning experiments on a
dead block prove nothing. So the detours are closed for a part of every batch: those samples go
without the transformers above the mid block (stochastic depth, Huang et al. 2016) and without the
skip connections below the highest level, so that layout and prompt reach them through the lowest
level only. The others use the whole network, as inference does. This also saves time, since the
transformers of the upper levels are by far the most expensive part on a CPU. Residual branches
start at zero, as in latent diffusion's own code, and the loss is weighted towards heavy noise,
where global things have to be inferred.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel

log = logging.getLogger(__name__)

WIDTHS = (16, 32, 64, 128)
HEADS = (1, 2, 4, 8)
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the denoiser's training."""

    seconds: float = 6600.0  # wall-clock budget
    batch: int = 16
    peak_rate: float = 1.5e-3
    mid_rate_factor: float = 2.0  # the mid block learns faster
    caption_dropout: float = 0.1
    ema_decay: float = 0.999
    seed: int = 0

    def transformer_shares(self, progress: float) -> tuple[float, float, float]:
        """Share of each batch that passes through the transformers of levels 0, 1 and 2."""
        return (0.125, 0.25, 0.5) if progress < 0.75 else (0.25, 0.5, 0.75)

    def detour_share(self, progress: float) -> float:
        """Share of each batch that goes without the skip connections below the highest level."""
        return 0.5 if progress < 0.75 else 0.25


@dataclass
class State:
    """Everything needed to resume."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    ema: nn.ModuleList
    optimizer: torch.optim.Optimizer
    step: int = 0
    elapsed: float = 0.0

    @classmethod
    def fresh(cls, text: CLIPTextModel, recipe: Recipe) -> "State":
        unet = new_unet(text.config.hidden_size)
        mid = list(unet.mid_block.parameters())
        special = {id(p) for p in mid}
        rest = [p for p in unet.parameters() if id(p) not in special]
        optimizer = torch.optim.AdamW(
            [
                {"params": [*rest, *text.parameters()], "factor": 1.0},
                {"params": mid, "factor": recipe.mid_rate_factor},
            ],
            betas=(0.9, 0.99),
        )
        ema = copy.deepcopy(nn.ModuleList([unet, text])).requires_grad_(False)
        return cls(unet, text, ema, optimizer)

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        torch.save(
            {
                "unet": self.unet.state_dict(),
                "text": self.text.state_dict(),
                "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "elapsed": self.elapsed,
            },
            part,
        )
        part.replace(path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("unet", "text", "ema", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.elapsed = saved["step"], saved["elapsed"]


def new_unet(text_width: int) -> UNet2DConditionModel:
    """An untrained U-Net: SD1.5's blocks, four levels from 32x32 to 4x4, silent residuals."""
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        attention_head_dim=HEADS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def new_scheduler() -> PNDMScheduler:
    """SD1.5's scheduler; `clip_sample` is for the schedulers that are made from its settings."""
    scheduler = PNDMScheduler(
        **SCHEDULE, steps_offset=1, skip_prk_steps=True, set_alpha_to_one=False
    )
    scheduler.register_to_config(clip_sample=False)
    return scheduler


def train_denoiser(
    state: State,
    latents: Tensor,
    ids: Tensor,
    empty_ids: Tensor,
    recipe: Recipe,
    every: dict[float, Callable[[State], None]],
) -> None:
    """Train until the budget is used; `every` maps a period in seconds to a callback.

    `latents` are scaled `[N, 4, 32, 32]`, `ids` `[N, T]`, `empty_ids` `[1, T]`.
    """
    noiser = DDPMScheduler(**SCHEDULE)
    samplers = [TransformerSampler(state.unet, level) for level in (0, 1, 2)]
    skips = SkipSampler(state.unet)
    due = {period: state.elapsed + period for period in every}
    torch.manual_seed(recipe.seed + state.step)
    while state.elapsed < recipe.seconds:
        began = time.monotonic()
        progress = state.elapsed / recipe.seconds
        _set_rate(state, recipe, progress)
        for sampler, share in zip(samplers, recipe.transformer_shares(progress), strict=True):
            sampler.count = round(recipe.batch * share)
        skips.count = round(recipe.batch * (1 - recipe.detour_share(progress)))
        picks = torch.randint(len(latents), (recipe.batch,))
        kept_ids = torch.where(
            torch.rand(recipe.batch, 1) < recipe.caption_dropout, empty_ids, ids[picks]
        )
        loss = _loss(state, noiser, latents[picks], kept_ids)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*state.unet.parameters(), *state.text.parameters()], 1.0)
        state.optimizer.step()
        state.step += 1
        _update_ema(state, recipe)
        state.elapsed += time.monotonic() - began
        for period, callback in every.items():
            if state.elapsed >= due[period]:
                due[period] = state.elapsed + period
                callback(state)
    for sampler in (*samplers, skips):
        sampler.detach()


class TransformerSampler:
    """Runs the transformers of one level for the first `count` samples of a batch only."""

    def __init__(self, unet: UNet2DConditionModel, level: int) -> None:
        self.count = 0
        self.blocks = [
            block
            for part in (unet.down_blocks[level], unet.up_blocks[-1 - level])
            for transformer in part.attentions
            for block in transformer.transformer_blocks
        ]
        for block in self.blocks:
            block.forward = self._sampled(block.forward)

    def _sampled(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def partly(hidden: Tensor, encoder_hidden_states: Tensor, **kwargs) -> Tensor:
            n = self.count
            if n == 0:
                return hidden
            done = forward(hidden[:n], encoder_hidden_states=encoder_hidden_states[:n], **kwargs)
            return torch.cat([done.to(hidden.dtype), hidden[n:]])

        return partly

    def detach(self) -> None:
        for block in self.blocks:
            del block.forward


class SkipSampler:
    """Keeps the skip connections below the highest level for the first `count` samples only."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.count = 0
        width = WIDTHS[-1]  # of the hidden state; the skip tensor is concatenated behind it
        self.handles = []
        for block in unet.up_blocks[:-1]:
            for resnet in block.resnets:
                self.handles.append(resnet.register_forward_pre_hook(self._cut(width)))
                width = resnet.out_channels

    def _cut(self, width: int) -> Callable[[nn.Module, tuple], tuple]:
        def cut(_module: nn.Module, inputs: tuple) -> tuple:
            hidden, *rest = inputs
            n = self.count
            if n == len(hidden):
                return inputs
            open_part, closed = hidden[:n], hidden[n:]
            closed = torch.cat([closed[:, :width], torch.zeros_like(closed[:, width:])], 1)
            return torch.cat([open_part, closed]), *rest

        return cut

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def _loss(state: State, noiser: DDPMScheduler, latents: Tensor, ids: Tensor) -> Tensor:
    """Epsilon loss weighted by sqrt((1-a)/a) within [0.5, 4], between noise and image space."""
    steps = torch.randint(1000, (len(latents),))
    high = torch.rand(len(latents)) < 0.4
    steps[high] = torch.randint(400, 1000, (int(high.sum()),))
    noise = torch.randn_like(latents)
    noisy = noiser.add_noise(latents, noise, steps)
    with torch.autocast("cpu", torch.bfloat16):
        states = state.text(ids).last_hidden_state
        predicted = state.unet(noisy, steps, states).sample
    kept = noiser.alphas_cumprod[steps]
    weight = ((1 - kept) / kept).sqrt().clamp(0.5, 4.0)
    return (weight * (predicted.float() - noise).pow(2).mean((1, 2, 3))).mean()


def _set_rate(state: State, recipe: Recipe, progress: float) -> None:
    warm = min(1.0, (state.step + 1) / 100)
    decay = min(1.0, 2.0 * (1 - progress)) + 0.01
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.peak_rate * group["factor"] * warm * decay


@torch.no_grad()
def _update_ema(state: State, recipe: Recipe) -> None:
    decay = min(recipe.ema_decay, (1 + state.step) / (10 + state.step))
    live = [*state.unet.parameters(), *state.text.parameters()]
    torch._foreach_lerp_(list(state.ema.parameters()), live, 1 - decay)
