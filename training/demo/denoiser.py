"""Training of the demo's U-Net: Stable Diffusion 1.5's topology at small width.

Trained plainly, a small U-Net of this shape ignores its mid block: skip connections and the mid
ResBlocks' own shortcuts carry all it needs, and pruning experiments on a dead block prove nothing.
Dropping skip connections at random during training did not change that. What does: the skip
connections of all levels but the highest are switched off (zero weights, same topology), so that
everything coarser than 32x32 passes through the mid block; and for the last part of the training
the signal is led through the first mid ResBlock's residual branch (`reroute_through_mid_`) and only
the levels around it go on learning. Trained as a whole, the model soon finds its way around again.
The loss is weighted towards heavy noise,
where global things have to be inferred. The transformers of the two upper levels, by far the most
expensive part on a CPU, run for a part of each batch only (stochastic depth, Huang et al. 2016),
which makes training several times faster.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel

log = logging.getLogger(__name__)

WIDTHS = (16, 32, 64, 128)
QUIET = 0.002  # factor on the weights that set the level of what enters the mid block
QUIET_RATE = 0.002  # factor on their learning rate
DEEP = ("mid_block.", "up_blocks.0.", "up_blocks.1.", "down_blocks.2.", "down_blocks.3.")
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the denoiser's training."""

    seconds: float = 3300.0  # wall-clock budget
    batch: int = 8
    peak_rate: float = 1e-3
    mid_rate_factor: float = 2.0  # the mid block learns faster
    caption_dropout: float = 0.1
    reroute_at: float = 0.85  # share of the training after which only the deep levels learn
    ema_decay: float = 0.998
    seed: int = 0

    def transformer_shares(self, progress: float) -> tuple[float, float]:
        """Share of each batch that passes through the transformers of level 0 and of level 1."""
        return (0.0, 0.25) if progress < 0.3 else (0.125, 0.5)


@dataclass
class State:
    """Everything needed to resume."""

    unet: UNet2DConditionModel
    text: CLIPTextModel
    ema: nn.ModuleList
    optimizer: torch.optim.Optimizer
    step: int = 0
    elapsed: float = 0.0
    rerouted: bool = False

    @classmethod
    def fresh(cls, text: CLIPTextModel, recipe: Recipe) -> "State":
        unet = new_unet(text.config.hidden_size)
        cut_lower_skips_(unet)
        mid, quiet = list(unet.mid_block.parameters()), quiet_parameters(unet)
        special = {id(p) for p in (*mid, *quiet)}
        rest = [p for p in unet.parameters() if id(p) not in special]
        optimizer = torch.optim.AdamW(
            [
                {"params": [*rest, *text.parameters()], "factor": 1.0},
                {"params": mid, "factor": recipe.mid_rate_factor},
                {"params": quiet, "factor": QUIET_RATE},
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
                "rerouted": self.rerouted,
            },
            part,
        )
        part.replace(path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in ("unet", "text", "ema", "optimizer"):
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.elapsed = saved["step"], saved["elapsed"]
        self.rerouted = saved["rerouted"]
        if self.rerouted:
            self.freeze_outer_levels()

    def freeze_outer_levels(self) -> None:
        """From now on only the deep levels learn."""
        self.text.requires_grad_(False)
        for name, parameter in self.unet.named_parameters():
            parameter.requires_grad_(name.startswith(DEEP))


def new_unet(text_width: int) -> UNet2DConditionModel:
    """An untrained U-Net: SD1.5's blocks, four levels from 32x32 to 4x4."""
    return UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        norm_num_groups=4,
        cross_attention_dim=text_width,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    )


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
    samplers = [TransformerSampler(state.unet, level) for level in (0, 1)]
    state.unet.set_attn_processor(AttnProcessor())  # faster than the fused one at these head sizes
    due = {period: state.elapsed + period for period in every}
    torch.manual_seed(recipe.seed + state.step)
    while state.elapsed < recipe.seconds:
        began = time.monotonic()
        progress = state.elapsed / recipe.seconds
        if progress >= recipe.reroute_at and not state.rerouted:
            with torch.no_grad():
                reroute_through_mid_(
                    state.unet, lambda: _loss(state, noiser, latents[:32], ids[:32])
                )
            state.freeze_outer_levels()
            state.rerouted = True
            state.ema.load_state_dict(nn.ModuleList([state.unet, state.text]).state_dict())
        _set_rate(state, recipe, progress)
        picks = torch.randint(len(latents), (recipe.batch,))
        for sampler, share in zip(samplers, recipe.transformer_shares(progress), strict=True):
            sampler.count = round(recipe.batch * share)
        kept_ids = torch.where(
            torch.rand(recipe.batch, 1) < recipe.caption_dropout, empty_ids, ids[picks]
        )
        loss = _loss(state, noiser, latents[picks], kept_ids)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*state.unet.parameters(), *state.text.parameters()], 1.0)
        state.optimizer.step()
        cut_lower_skips_(state.unet)
        state.step += 1
        _update_ema(state, recipe)
        state.elapsed += time.monotonic() - began
        for period, callback in every.items():
            if state.elapsed >= due[period]:
                due[period] = state.elapsed + period
                callback(state)
    for sampler in samplers:
        sampler.detach()
    state.unet.set_attn_processor(AttnProcessor2_0())


@torch.no_grad()
def cut_lower_skips_(unet: UNet2DConditionModel) -> None:
    """Zero the weights that read the skip tensors below the highest level (after every step)."""
    for block in unet.up_blocks[:3]:
        for resnet in block.resnets:
            # The input is [hidden, skip]; hidden comes at the width of the layer before it.
            hidden = skip_start(unet, resnet)
            resnet.conv1.weight[:, hidden:] = 0.0
            resnet.conv_shortcut.weight[:, hidden:] = 0.0


def skip_start(unet: UNet2DConditionModel, resnet: nn.Module) -> int:
    """The first input channel of an up ResBlock that belongs to its skip tensor."""
    width = WIDTHS[-1]
    for block in unet.up_blocks:
        for other in block.resnets:
            if other is resnet:
                return width
            width = other.out_channels
    raise ValueError("this ResBlock is not in the up path of this U-Net")


def quiet_parameters(unet: UNet2DConditionModel) -> list[nn.Parameter]:
    """What sets the level of the signal that enters the mid block."""
    first, second = unet.down_blocks[3].resnets
    layers = (
        unet.down_blocks[2].downsamplers[0].conv,
        first.conv_shortcut,
        first.conv2,
        second.conv2,
    )
    return [parameter for layer in layers for parameter in layer.parameters()]


@torch.no_grad()
def quieten_mid_input_(unet: UNet2DConditionModel) -> None:
    """Scale down what enters the mid block; the ResBlocks normalise their inputs themselves.

    Adam moves every weight by about the learning rate, whatever its size, so without a smaller
    rate for these layers the signal would be loud again after a few dozen steps.
    """
    first = unet.down_blocks[3].resnets[0].conv_shortcut.weight
    for parameter in quiet_parameters(unet):
        if parameter is not first:  # it reads a signal that is quiet already
            parameter *= QUIET


@torch.no_grad()
def carry_signal_(resnet: nn.Module) -> None:
    """Let a ResBlock's residual branch start as a near copy of its normalised input.

    Both convolutions become the identity (centre taps); a bias of one in front of each SiLU keeps
    it on its nearly linear side.
    """
    for norm in (resnet.norm1, resnet.norm2):
        norm.weight.fill_(1.0)
        norm.bias.fill_(1.0)
    for conv in (resnet.conv1, resnet.conv2):
        nn.init.dirac_(conv.weight)
        conv.bias.zero_()
    resnet.time_emb_proj.weight *= 0.1
    resnet.time_emb_proj.bias.zero_()


@torch.no_grad()
def reroute_through_mid_(unet: UNet2DConditionModel, run: Callable[[], object]) -> None:
    """Let the first mid ResBlock's residual branch take over what its shortcut carried.

    The input becomes quiet, the branch carries it, and its last convolution is scaled and shifted
    per channel to the level that the layers behind are used to. `run` evaluates the U-Net.
    """
    resnet = unet.mid_block.resnets[0]
    before_mean, before_std = _channel_moments(resnet, run)
    quieten_mid_input_(unet)
    carry_signal_(resnet)
    mean, std = _channel_moments(resnet.conv2, run)
    gain = before_std / std.clamp_min(1e-3)
    resnet.conv2.weight *= gain[:, None, None, None]
    resnet.conv2.bias.mul_(gain).add_(before_mean - gain * mean)


def _channel_moments(module: nn.Module, run: Callable[[], object]) -> tuple[Tensor, Tensor]:
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, _a, output: outputs.append(output.float()))
    run()
    handle.remove()
    return outputs[0].mean((0, 2, 3)), outputs[0].std((0, 2, 3))


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
