"""Training of the demo's U-Net: Stable Diffusion 1.5's topology at small width.

Trained plainly for as long as a CPU allows, a small U-Net of this shape leaves its lowest level
unused: skip connections and the transformers above carry all that is needed, and pruning
experiments on a dead block prove nothing. So the lowest level learns first, and alone:

1. Without skip connections, and with no transformer but the mid block's, the U-Net is a denoising
   autoencoder with a bottleneck of 4x4. It learns to predict the image (that part of the noise
   prediction that is not the noisy input itself).
2. The skip connections of the highest level open. With the noisy input in sight the same
   prediction, from below, becomes a prediction of the noise.
3. The other skip connections and transformers open, with weights that start at zero.

A few samples of every batch stay in stage 1 to the end. Within the lowest level the ResBlocks
beside the mid block are left out for half of the samples (stochastic depth, Huang et al. 2016):
seven ResBlocks can do each other's work there, and the outer ones learn faster. Residual branches
start at zero, as in latent diffusion's own code, and the loss is weighted towards heavy noise,
where global things have to be inferred. Leaving transformers out also saves most of the time.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from transformers import CLIPTextModel

log = logging.getLogger(__name__)

WIDTHS = (12, 32, 64, 144)
HEADS = (1, 2, 4, 8)
SCHEDULE = dict(
    num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
)


@dataclass(frozen=True)
class Stage:
    """Shares of each batch with all skip connections, with at least those of the highest level,
    and with the transformers of levels 0, 1 and 2.

    ``bottleneck_weight`` is the weight in the loss of samples without any skip connection.
    """

    all_skips: float
    top_skips: float
    transformers: tuple[float, float, float]
    bottleneck_weight: float = 0.2


BOTTLENECK = Stage(0.0, 0.0, (0.0, 0.0, 0.0))
FROM_BELOW = Stage(0.0, 0.75, (0.0, 0.0, 0.0))
WHOLE = Stage(0.75, 0.875, (0.25, 0.5, 0.75))
#: for a U-Net that has been through these stages before
FROM_TEXT = Stage(0.625, 0.75, (0.125, 1.0, 1.0))
DEEP = Stage(0.5, 0.5625, (0.125, 1.0, 1.0), bottleneck_weight=1.0)
WITH_TEXT = Stage(0.75, 0.8125, (0.25, 1.0, 1.0), bottleneck_weight=0.5)


@dataclass(frozen=True)
class Recipe:
    """Settings of the denoiser's training."""

    seconds: float = 6480.0  # of processor time, so that a busy machine makes no worse model
    batch: int = 16
    peak_rate: float = 1.5e-3
    caption_dropout: float = 0.1
    ema_decay: float = 0.998
    seed: int = 0
    stages: tuple[tuple[float, Stage], ...] = ((0.27, BOTTLENECK), (0.6, FROM_BELOW), (1.0, WHOLE))
    heavy_noise: float = 0.4  # share of samples whose timestep is drawn from 400 up
    most_weight: float = 4.0  # of a sample in the loss; that of timestep 999 would be 14.6
    stochastic_depth: bool = True

    def stage(self, progress: float) -> Stage:
        """What is open at a share of the training; `stages` are (end, stage)."""
        return next((stage for end, stage in self.stages if progress < end), self.stages[-1][1])


#: of a U-Net that starts as the demo's, on pictures that only the text can tell
CONTINUED = Recipe(
    stages=((0.5, FROM_TEXT), (0.75, DEEP), (1.0, WITH_TEXT)),
    heavy_noise=0.6,
    most_weight=16.0,
    stochastic_depth=False,
)


@dataclass
class State:
    """Everything needed to resume."""

    STATEFUL: ClassVar = ("unet", "text", "ema", "optimizer")
    unet: UNet2DConditionModel
    text: CLIPTextModel
    ema: nn.ModuleList
    optimizer: torch.optim.Optimizer
    step: int = 0
    elapsed: float = 0.0

    @classmethod
    def fresh(cls, text: CLIPTextModel, unet: UNet2DConditionModel) -> "State":
        optimizer = torch.optim.AdamW(
            [*unet.parameters(), *text.parameters()], betas=(0.9, 0.99), fused=True
        )
        ema = copy.deepcopy(nn.ModuleList([unet, text])).requires_grad_(False)
        return cls(unet, text, ema, optimizer)

    def save(self, path: Path) -> None:
        part = path.with_suffix(".part")
        states = {name: getattr(self, name).state_dict() for name in self.STATEFUL}
        torch.save({**states, "step": self.step, "elapsed": self.elapsed}, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        for name in self.STATEFUL:
            getattr(self, name).load_state_dict(saved[name])
        self.step, self.elapsed = saved["step"], saved["elapsed"]


def new_unet(text_width: int) -> UNet2DConditionModel:
    """An untrained U-Net: SD1.5's blocks, four levels from 32x32 to 4x4.

    Residual branches and what reads the skip connections below the highest level start at zero.
    """
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
    for resnet, hidden, level in up_resnets(unet):
        if level > 0:
            nn.init.zeros_(resnet.conv1.weight[:, hidden:])
            nn.init.zeros_(resnet.conv_shortcut.weight[:, hidden:])
    return unet


def up_resnets(unet: UNet2DConditionModel) -> Iterator[tuple[ResnetBlock2D, int, int]]:
    """The ResBlocks of the up path with their level and the width of their hidden state.

    The input is [hidden, skip]; the hidden state comes at the width of the ResBlock before.
    """
    width = WIDTHS[-1]
    for number, block in enumerate(unet.up_blocks):
        for resnet in block.resnets:
            yield resnet, width, len(unet.up_blocks) - 1 - number
            width = resnet.out_channels


def renew_unused_(unet: UNet2DConditionModel) -> None:
    """Draw the weights anew of the branches that the demo's training leaves without effect.

    These are the ResBlocks of the lowest level beside the mid block's, and the transformers below
    the highest level but those of the up path.
    """
    resnets = [*unet.down_blocks[-1].resnets, *unet.up_blocks[0].resnets]
    transformers = [*unet.down_blocks[1].attentions, *unet.down_blocks[2].attentions]
    branches = [
        (block.norm1, block.conv1, block.time_emb_proj, block.norm2, block.conv2)
        for block in resnets
    ]
    branches += [tuple(block.modules()) for block in (*transformers, *unet.mid_block.attentions)]
    for module in chain.from_iterable(branches):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


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
    state.unet.set_attn_processor(Float32Attention())
    samplers = [TransformerSampler(state.unet, level) for level in (0, 1, 2)]
    skips = SkipSampler(state.unet)
    depth = DepthSampler(state.unet) if recipe.stochastic_depth else None
    due = {period: state.elapsed + period for period in every}
    torch.manual_seed(recipe.seed + state.step)
    while state.elapsed < recipe.seconds:
        began = time.process_time()
        progress = state.elapsed / recipe.seconds
        _set_rate(state, recipe, progress)
        stage = recipe.stage(progress)
        for sampler, share in zip(samplers, stage.transformers, strict=True):
            sampler.count = round(recipe.batch * share)
        skips.count = round(recipe.batch * stage.all_skips)
        skips.top_count = round(recipe.batch * stage.top_skips)
        picks = torch.randint(len(latents), (recipe.batch,))
        kept_ids = torch.where(
            torch.rand(recipe.batch, 1) < recipe.caption_dropout, empty_ids, ids[picks]
        )
        loss = _loss(state, noiser, latents[picks], kept_ids, skips.top_count, stage, recipe)
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*state.unet.parameters(), *state.text.parameters()], 1.0)
        state.optimizer.step()
        state.step += 1
        _update_ema(state, recipe)
        state.elapsed += time.process_time() - began
        for period, callback in every.items():
            if state.elapsed >= due[period]:
                due[period] = state.elapsed + period
                callback(state)
    for sampler in samplers:
        sampler.detach()
    skips.detach()
    if depth:
        depth.detach()


class Float32Attention:
    """Attention outside autocast: narrow heads take three times as long in bfloat16 on a CPU."""

    def __init__(self) -> None:
        self.attend = AttnProcessor2_0()

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            encoder_hidden_states = encoder_hidden_states.float()
        with torch.autocast("cpu", enabled=False):
            return self.attend(attn, hidden_states.float(), encoder_hidden_states, **kwargs)


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
        def partly(hidden: Tensor, encoder_hidden_states: Tensor, **kwargs: Any) -> Tensor:
            n = self.count
            if n == 0:
                return hidden
            done = forward(hidden[:n], encoder_hidden_states=encoder_hidden_states[:n], **kwargs)
            return torch.cat([done.to(hidden.dtype), hidden[n:]])

        return partly

    def detach(self) -> None:
        for block in self.blocks:
            del block.forward


class DepthSampler:
    """Leaves out the residual branches beside the mid block, for half of the samples of a batch.

    The seven ResBlocks of the lowest level can do each other's work, and the outer ones learn
    faster; without them the mid block has to do it.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._kept = torch.ones(0)
        blocks = [*unet.down_blocks[-1].resnets, *unet.up_blocks[0].resnets]
        self.handles = [unet.register_forward_pre_hook(self._draw)]
        self.handles += [block.conv2.register_forward_hook(self._drop) for block in blocks]

    def _draw(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._kept = torch.rand(len(inputs[0]), 1, 1, 1) < 0.5

    def _drop(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output * self._kept

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


class SkipSampler:
    """Keeps all skip connections for the first `count` samples of a batch only, and those of the
    highest level for the first `top_count`."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.count = self.top_count = 0
        self.handles = [
            resnet.register_forward_pre_hook(self._cut(hidden, level == 0))
            for resnet, hidden, level in up_resnets(unet)
        ]

    def _cut(
        self, width: int, top: bool
    ) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def cut(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, *rest = inputs
            n = self.top_count if top else self.count
            if n >= len(hidden):
                return inputs
            open_part, closed = hidden[:n], hidden[n:]
            closed = torch.cat([closed[:, :width], torch.zeros_like(closed[:, width:])], 1)
            return torch.cat([open_part, closed]), *rest

        return cut

    def detach(self) -> None:
        for handle in self.handles:
            handle.remove()


def _loss(
    state: State,
    noiser: DDPMScheduler,
    latents: Tensor,
    ids: Tensor,
    direct: int,
    stage: Stage,
    recipe: Recipe,
) -> Tensor:
    """Epsilon loss weighted by sqrt((1-a)/a), between noise and image space, within bounds.

    Samples from `direct` on have no skip connections, so they can't know the noise: of
    eps = (x_t - sqrt(a) x_0) / sqrt(1 - a) they learn the part that speaks of the image.
    """
    count = len(latents)
    steps = torch.randint(1000, (count,))
    high = torch.rand(count) < recipe.heavy_noise
    steps[high] = torch.randint(400, 1000, (int(high.sum()),))
    steps[direct:] = torch.randint(200, 1000, (count - direct,))
    noise = torch.randn_like(latents)
    noisy = noiser.add_noise(latents, noise, steps)
    with torch.autocast("cpu", torch.bfloat16):
        states = state.text(ids).last_hidden_state
        predicted = state.unet(noisy, steps, states).sample
    kept = noiser.alphas_cumprod[steps]
    ratio = ((1 - kept) / kept).sqrt()
    target = torch.cat([noise[:direct], -latents[direct:] / ratio[direct:, None, None, None]])
    weight = ratio.clamp(0.5, recipe.most_weight)
    if direct:
        weight[direct:] *= stage.bottleneck_weight
    return (weight * (predicted.float() - target).pow(2).mean((1, 2, 3))).mean()


def _set_rate(state: State, recipe: Recipe, progress: float) -> None:
    warm = min(1.0, (state.step + 1) / 100)
    decay = min(1.0, 2.0 * (1 - progress)) + 0.01
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.peak_rate * warm * decay


@torch.no_grad()
def _update_ema(state: State, recipe: Recipe) -> None:
    decay = min(recipe.ema_decay, (1 + state.step) / (10 + state.step))
    live = [*state.unet.parameters(), *state.text.parameters()]
    torch._foreach_lerp_(list(state.ema.parameters()), live, 1 - decay)
