"""Gates on a diffusers U-Net: pruning in a pipeline, without ComfyUI.

    from ldcp_core.diffusers import pruned

    with pruned(pipe.unet, "gates.safetensors"):
        image = pipe("a face").images[0]

A pruned block gets an instance-level ``forward`` for as long as the pruning lasts; modules and
weights stay what they are. diffusers itself is not imported: its modules are known by their parts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import HEADS, Attention, AttentionWeights, CompactAttention, masked_attention
from .blocks import Block, Padding, PrunedSite, SoftGate
from .feedforward import HIDDEN, CompactFeedForward, FeedForward, masked_feed_forward
from .gatefile import load_gates
from .gates import Gates
from .gathering import WatchesReader
from .linear import LinearWeights
from .pruning import Pruned, block_gates
from .readers import See, watch_conv2, watch_linear
from .resblock import (
    CompactResBlock,
    ConvWeights,
    ResBlock,
    ResBlockGate,
    masked_resblock,
)
from .schedule import ALWAYS, Schedule, StepRange, step_index
from .sites import Topology, blocks_of, kind_of

CompactBlock = CompactResBlock | CompactFeedForward | CompactAttention
#: the forward of a block of the U-Net, in its own signature
BlockForward = Callable[..., Tensor]
#: the last of the timesteps that Stable Diffusion was trained on
LAST_TIMESTEP = 999
#: attribute of a U-Net that `ldcp_core.export` loaded
EXPORTED = "ldcp_exported"
#: methods of a U-Net that write through ``.data``, so that no version tells of it
WRITING = ("load_lora_adapter", "fuse_lora", "unfuse_lora")
#: what diffusers' attention has where it computes something else; versions differ in which
UNLIKE_PLAIN = ("norm_q", "norm_k", "group_norm", "residual_connection", "fused_projections")
#: diffusers' classes that compute attention and nothing else
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor")


class UnsupportedModel(ValueError):
    """A U-Net, block or layer that can't be pruned; the message names it and what is expected."""


def pruned(
    unet: Any,
    gates: Gates | str | PathLike[str],
    *,
    sparsity: float | None = None,
    steps: str | Schedule | None = None,
    scheduler: Any = None,
) -> Pruning:
    """Prune the `UNet2DConditionModel` of SD1.5, SD2 or SDXL until the result is removed.

    The result is a context manager, and has ``remove()`` for all other uses. ``gates`` is a gate
    file, or what `load_gates` read from it. ``sparsity`` prunes that share of the gated channels by
    rank, instead of those as learned, whose stages it leaves aside. ``steps`` says when: step
    ranges such as ``"0-4, 10-"`` or any `Schedule`; None prunes every step. Step ranges need the
    pipeline's ``scheduler``, whose timesteps tell which step an evaluation belongs to.

    Outside these steps and after the removal the U-Net computes the same bits as before. LoRA
    loaded through PEFT, before or meanwhile, is pruned with the weights; what else writes through
    a weight's ``.data`` meanwhile is not noticed. The full weights stay in memory. Of two prunings
    of one block the later counts, in the steps that it prunes.

    Raises GateFileError for a file that holds no gates, ScheduleError for steps that can't be
    meant, UnsupportedModel where gates and U-Net don't fit, and ValueError for a sparsity outside
    [0, 1] or step ranges without a scheduler. An evaluation raises UnsupportedModel when a layer
    has become one that pruning does not understand. Entering the context of a pruning that was
    removed raises RuntimeError.
    """
    schedule = Schedule.steps(steps) if isinstance(steps, str) else steps or ALWAYS
    if schedule != ALWAYS and scheduler is None:
        if any(isinstance(stretch, StepRange) for stretch in schedule.ranges):
            raise ValueError(
                f"a U-Net does not know its step, and the schedule is {schedule}: give the "
                "scheduler of the pipeline, pruned(..., scheduler=pipe.scheduler)"
            )
    unet, found = fitted(unet, gates)
    by_stage = found.by_stage(sparsity)
    stages = [(schedule.during(stage), keep_sets) for stage, keep_sets in by_stage]
    return Pruning(unet, found, stages, scheduler)


def fitted(unet: Any, gates: Gates | str | PathLike[str]) -> tuple[Any, Gates]:
    """The U-Net itself, and gates that fit it; see `pruned` for what is raised."""
    found = gates if isinstance(gates, Gates) else load_gates(Path(gates))
    unet = getattr(unet, "_orig_mod", unet)  # of a shell that torch.compile made
    _check_fit(unet, found)
    return unet, found


class Pruning:
    """A pruning in its place in a U-Net; see `pruned`.

    ``active`` says whether the latest evaluation was pruned.
    """

    def __init__(
        self,
        unet: nn.Module,
        gates: Gates,
        stages: Sequence[tuple[Schedule, Mapping[str, Tensor]]],
        scheduler: Any,
    ) -> None:
        self.active = self._up_to_date = self._removed = False
        self._gates, self._stages, self._scheduler = gates, stages, scheduler
        self._stage = 0
        self._unet = unet
        self._forwards: dict[str, BlockForward] = {}
        self._selected_from: list[Any] = []
        self._timesteps: Any = None
        self._firsts: list[float] = []
        less = [s for _, kept in stages for s, keep in kept.items() if not bool(keep.all())]
        names = blocks_of(less)
        self._adapters = [adapter(unet, name) for name in names]
        self._state()  # refuses what it does not understand before anything changes
        blocks = {name: unet.get_submodule(name) for name in names}
        switched = [(b, "forward", self._switched(name, b.forward)) for name, b in blocks.items()]
        writing = [name for name in WRITING if hasattr(unet, name)]
        watched = [(unet, name, self._forgetting(getattr(unet, name))) for name in writing]
        self._in_place = ExitStack()
        self._in_place.enter_context(replaced([*switched, *watched]))
        self._in_place.enter_context(unet.register_forward_pre_hook(self._begin, with_kwargs=True))

    def __enter__(self) -> Pruning:
        if self._removed:
            raise RuntimeError("this pruning was removed; make another with pruned(...)")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the pruning out of the U-Net, whatever was put in after it; once is enough."""
        self.active, self._removed = False, True
        self._forwards.clear()
        self._in_place.close()

    def _switched(self, name: str, before: BlockForward) -> BlockForward:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if not self.active:
                return before(*args, **kwargs)
            if not self._up_to_date:
                self._select()
            return self._forwards.get(name, before)(*args, **kwargs)

        return forward

    def _begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._up_to_date = False
        if self._stages[0][0] == ALWAYS:
            self.active = True  # spares a copy from the device
            return
        t = float(torch.as_tensor(kwargs["timestep"] if "timestep" in kwargs else args[1]).max())
        step = self._step(t)
        active = [
            number
            for number, (schedule, _) in enumerate(self._stages)
            if schedule.is_active(step, t, timestep_at)
        ]
        self.active = bool(active)
        self._stage = active[-1] if active else self._stage  # of two that meet the later

    def _select(self) -> None:
        """Select the kept rows and columns anew if the weights are not those they came from.

        Within the evaluation, since what offloads a model moves its weights when that begins.
        """
        now = self._state()
        if now != self._selected_from:
            self._forwards, self._selected_from = {}, []
            with torch.inference_mode(False), torch.no_grad():  # for evaluations of any kind
                keep_sets = self._stages[self._stage][1]
                blocks = compact_blocks(self._unet, self._gates.pruned(keep_sets))
                self._forwards = compact_forwards(self._unet, blocks)
            self._selected_from = now
        self._up_to_date = True

    def _forgetting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the U-Net after which the kept rows and columns are selected anew."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self._selected_from = []
            return method(*args, **kwargs)

        return call

    def _state(self) -> list[Any]:
        """Equal for as long as the weights that were selected are the U-Net's, and the stage's."""
        layers = [layer for block in self._adapters for layer in block.layers()]
        return [self._stage, *map(_state, layers)]

    def _step(self, t: float) -> int:
        """The 0-based step of a timestep, counted from the first that the pipeline came to."""
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is None:
            return -1
        if timesteps is not self._timesteps:  # a new run
            self._timesteps = timesteps
            # a scheduler of second order has two timesteps to a step
            firsts = timesteps[:: getattr(self._scheduler, "order", 1)].tolist()
            asked = getattr(self._scheduler, "num_inference_steps", None)
            if asked and len(firsts) > asked:
                firsts = list(dict.fromkeys(firsts))  # PNDM evaluates its second timestep twice
            firsts.append(firsts[-1] + math.copysign(1, firsts[-1] - firsts[0]))  # the end
            self._firsts = firsts[step_index(t, firsts) :]  # image to image begins later
            steps = len(self._firsts) - 1
            for stretch in self._stages[0][0].beyond(steps):
                message = f"the step range {stretch} lies past the last step, {steps - 1}"
                warnings.warn(f"{message}, and prunes nothing", stacklevel=2)
        return step_index(t, self._firsts)


def timestep_at(percent: float) -> float:
    """The timestep at a share of the full denoising schedule, as ComfyUI takes it."""
    if percent <= 0.0:
        return math.inf
    return -math.inf if percent >= 1.0 else (1.0 - percent) * LAST_TIMESTEP


def _check_fit(unet: Any, gates: Gates) -> None:
    if getattr(unet, EXPORTED, False):
        raise UnsupportedModel(
            "this U-Net was exported with what its gates left; give the U-Net that it was made of"
        )
    try:
        found = topology_of(unet)
    except (AttributeError, TypeError, ValueError) as error:
        raise UnsupportedModel(
            f"{type(unet).__name__} is no U-Net of Stable Diffusion 1.5, 2 or XL ({error}); give "
            "the UNet2DConditionModel of such a pipeline, pipe.unet"
        ) from error
    if not found.fits(gates.topology):
        raise UnsupportedModel(
            f"the gates were made for {gates.topology}, and this U-Net is {found}; choose gates "
            "that were made on a model of its architecture"
        )


def topology_of(unet: Any) -> Topology:
    """The topology of a diffusers `UNet2DConditionModel`, read off its modules.

    Raises AttributeError, TypeError or ValueError for what is not built like Stable Diffusion's.
    """
    middle = unet.mid_block
    pooled = getattr(unet, "add_embedding", None)
    levels = list(zip(unet.down_blocks, reversed(unet.up_blocks), strict=True))
    deepest = [*levels[-1], *([] if middle is None else [middle])]
    return Topology(
        widths=tuple(block.resnets[0].conv1.weight.shape[0] for block in unet.down_blocks),
        down=tuple(map(_depths, unet.down_blocks)),
        mid=() if middle is None else _depths(middle),
        up=tuple(map(_depths, unet.up_blocks)),
        context_width=unet.config.cross_attention_dim,
        pooled_width=0 if pooled is None else pooled.linear_1.weight.shape[1],
        linear_projections=bool(unet.config.use_linear_projection),
        in_channels=unet.conv_in.weight.shape[1],
        out_channels=unet.conv_out.weight.shape[0],
        heads=tuple(map(_heads, (*levels[:-1], deepest))),
    )


def _heads(blocks: Iterable[Any]) -> int:
    """The heads of a level's attention, 0 where it has none."""
    found = {
        module.heads
        for block in blocks
        for attentions in getattr(block, "attentions", ())
        for transformer in attentions.transformer_blocks
        for module in (transformer.attn1, transformer.attn2)
    }
    if len(found) > 1:
        raise ValueError(f"a level has attention of {sorted(found)} heads, expected one number")
    return found.pop() if found else 0


def _depths(block: Any) -> tuple[int, ...]:
    """How many transformer blocks come behind each ResBlock."""
    depths = [len(attention.transformer_blocks) for attention in getattr(block, "attentions", ())]
    return (*depths, *[0] * (len(block.resnets) - len(depths)))


class Adapter(WatchesReader, Protocol):
    """What pruning needs of one block of the host, of whatever kind."""

    def layers(self) -> list[nn.Module]:
        """The layers that pruning takes rows or columns from."""

    def compact(self, gate: Any, dtype: torch.dtype | None) -> CompactBlock:
        """The compact form under a gate of this kind, selected from the weights cast to ``dtype``.

        None takes them as they are.
        """

    def running(self, compact: Callable[..., Tensor]) -> BlockForward:
        """What puts a compact form in the place of the block's own forward."""

    def masked(self, gates: Sequence[SoftGate | None], padding: Padding) -> BlockForward:
        """The masked reference in the place of the block's own forward, with a gate per site."""


class DiffusersResBlock:
    """`ldcp_core.ResBlockOps` of a diffusers ResnetBlock2D."""

    folds = True

    def __init__(self, name: str, block: Any) -> None:
        plain = (
            type(block).__name__ == "ResnetBlock2D"
            and block.time_embedding_norm == "default"
            and block.upsample is None
            and block.downsample is None
            and block.time_emb_proj is not None
            and isinstance(block.nonlinearity, nn.SiLU)
            and block.output_scale_factor == 1.0
            and _base(block.conv2).padding_mode == "zeros"
        )
        if not plain:
            raise UnsupportedModel(
                f"{name} is a {type(block).__name__} that Stable Diffusion does not have"
            )
        self.block = block
        self.groups: int = block.norm2.num_groups
        self.eps: float = block.norm2.eps
        self._affine: tuple[Tensor, Tensor] | None = None

    def layers(self) -> list[nn.Module]:
        return [self.block.conv1, self.block.conv2]

    def weights(self, dtype: torch.dtype | None = None) -> tuple[ConvWeights, ConvWeights]:
        conv1, conv2 = self.layers()
        return ConvWeights(*weights_of(conv1, dtype)), ConvWeights(*weights_of(conv2, dtype))

    def compact(self, gate: ResBlockGate, dtype: torch.dtype | None) -> CompactResBlock:
        return CompactResBlock(gate, *self.weights(dtype))

    def running(self, compact: Callable[..., Tensor]) -> BlockForward:
        norm = self.block.norm2
        self._affine = norm.weight.float(), norm.bias.float()  # once, not in every evaluation
        return lambda x, temb, *args, **kwargs: compact(self, x, self.embed(temb))

    def masked(self, gates: Sequence[SoftGate | None], padding: Padding) -> BlockForward:
        def forward(x: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            conv1, conv2 = self.weights()
            inner, residual = gates
            return masked_resblock(
                self, x, self.embed(temb), conv1, conv2, inner, residual, padding
            )

        return forward

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        inner, residual = gates
        assert inner is not None
        conv1, conv2 = self.layers()
        layers = conv1, self.block.norm2, conv2
        return watch_conv2(self, layers, lambda _: self.weights()[1], inner, residual, padding, see)

    def norm1(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.nonlinearity(self.block.norm1(x))
        return y

    def norm2(self, h: Tensor) -> Tensor:
        y: Tensor = self.block.nonlinearity(self.block.norm2(h))
        return y

    def norm2_affine(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return self._affine or (self.block.norm2.weight, self.block.norm2.bias)

    def conv1(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _base(self.block.conv1)._conv_forward(x, weight, bias)
        return y

    def conv2(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = _base(self.block.conv2)._conv_forward(x, weight, bias)
        return y

    def skip(self, x: Tensor) -> Tensor:
        return x if self.block.conv_shortcut is None else self.block.conv_shortcut(x)

    def embed(self, temb: Tensor) -> Tensor:
        y: Tensor = self.block.time_emb_proj(self.block.nonlinearity(temb))
        return y


class DiffusersFeedForward:
    """The weights of a diffusers FeedForward with GEGLU."""

    def __init__(self, name: str, block: Any) -> None:
        parts = [type(part).__name__ for part in getattr(block, "net", ())]
        if parts[:1] != ["GEGLU"] or len(parts) != 3:
            raise UnsupportedModel(
                f"{name} is a {type(block).__name__} that Stable Diffusion does not have"
            )
        self.block = block

    def layers(self) -> list[nn.Module]:
        return [self.block.net[0].proj, self.block.net[2]]

    def weights(self, dtype: torch.dtype | None = None) -> tuple[LinearWeights, LinearWeights]:
        proj, out = self.layers()
        return LinearWeights(*weights_of(proj, dtype)), LinearWeights(*weights_of(out, dtype))

    def compact(self, gate: PrunedSite, dtype: torch.dtype | None) -> CompactFeedForward:
        return CompactFeedForward(gate, *self.weights(dtype))

    def running(self, compact: Callable[..., Tensor]) -> BlockForward:
        return lambda x, *args, **kwargs: compact(x)

    def masked(self, gates: Sequence[SoftGate | None], padding: Padding) -> BlockForward:
        return lambda x, *args, **kwargs: masked_feed_forward(x, *self.weights(), *gates)

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        (hidden,) = gates
        return _watch_linear(self.block.net[2], hidden, HIDDEN.axis, see)


class DiffusersAttention:
    """The weights of a diffusers Attention in a transformer.

    PyTorch's own attention runs in the place of the module's processor, which must be one that
    computes the same.
    """

    def __init__(self, name: str, block: Any) -> None:
        self.name, self.block = name, block
        plain = (
            type(block).__name__ == "Attention"
            and all(isinstance(_base(layer), nn.Linear) for layer in self.layers())
            and not any(getattr(block, part, None) for part in UNLIKE_PLAIN)
            and block.rescale_output_factor == 1.0
        )
        if not plain:
            raise UnsupportedModel(
                f"{name} is a {type(block).__name__} that Stable Diffusion does not have"
            )
        self._check()

    def layers(self) -> list[nn.Module]:
        block = self.block
        return [block.to_q, block.to_k, block.to_v, block.to_out[0]]

    def weights(self, dtype: torch.dtype | None = None) -> AttentionWeights:
        return AttentionWeights(
            *(LinearWeights(*weights_of(layer, dtype)) for layer in self.layers())
        )

    def compact(self, gate: PrunedSite, dtype: torch.dtype | None) -> CompactAttention:
        return CompactAttention(gate, self.weights(dtype), self.block.heads)

    def running(self, compact: Callable[..., Tensor]) -> BlockForward:
        def forward(
            x: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> Tensor:
            self._check(attention_mask)
            context = x if encoder_hidden_states is None else encoder_hidden_states
            return compact(x, context, context)

        return forward

    def masked(self, gates: Sequence[SoftGate | None], padding: Padding) -> BlockForward:
        (gate,) = gates

        def masked(x: Tensor, context: Tensor, value: Tensor) -> Tensor:
            return masked_attention(x, context, value, self.weights(), self.block.heads, gate)

        return self.running(masked)

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        (heads,) = gates
        return _watch_linear(self.block.to_out[0], heads, HEADS.axis, see)

    def _check(self, attention_mask: Tensor | None = None) -> None:
        """Raises UnsupportedModel where something else than plain attention is computed."""
        processor = type(self.block.processor).__name__
        if attention_mask is None and processor in PLAIN_PROCESSORS:
            return
        found = f"runs {processor}" if attention_mask is None else "is given a mask"
        raise UnsupportedModel(
            f"{self.name} {found}, which pruned heads do not understand; leave it out, or prune "
            f"without heads. Plain processors are {', '.join(PLAIN_PROCESSORS)}"
        )


def _watch_linear(
    layer: nn.Module, gate: SoftGate | None, axis: int, see: See
) -> AbstractContextManager[None]:
    assert gate is not None
    return watch_linear(layer, lambda _: LinearWeights(*weights_of(layer)), gate, axis, see)


#: kind of block -> its adapter
ADAPTERS: Mapping[type[Block], Callable[[str, Any], Adapter]] = {
    ResBlock: DiffusersResBlock,
    FeedForward: DiffusersFeedForward,
    Attention: DiffusersAttention,
}


def adapter(unet: nn.Module, block: str) -> Adapter:
    """What pruning needs of a block; raises UnsupportedModel where it is built otherwise."""
    return ADAPTERS[kind_of(block)](block, unet.get_submodule(block))


def gated_layers(unet: nn.Module, blocks: Iterable[str]) -> list[nn.Module]:
    """The layers of the named blocks that pruning takes rows or columns from."""
    return [layer for block in blocks for layer in adapter(unet, block).layers()]


def weights_of(layer: Any, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that a layer computes with, LoRA of PEFT included, in ``dtype`` if given."""
    base = _base(layer)
    weight, bias = base.weight, base.bias
    for name in _loras(layer):
        weight = weight + layer.get_delta_weight(name).to(weight)
    if dtype is None:
        return weight, bias
    return weight.to(dtype), None if bias is None else bias.to(dtype)


def _base(layer: Any) -> Any:
    """The layer itself, without what PEFT puts around it."""
    return getattr(layer, "base_layer", layer)


def _loras(layer: Any) -> list[str]:
    """The names of the LoRA that a layer of PEFT adds to its weight while it computes."""
    if layer is _base(layer) or layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _state(layer: Any) -> tuple[Any, ...]:
    """Equal as long as a layer's weights are; raises UnsupportedModel where that can't be said."""
    base = _base(layer)
    plain = type(base).forward in (nn.Conv2d.forward, nn.Linear.forward)
    unlike = "" if plain and "forward" not in vars(base) else "a forward of its own"
    if type(base.weight) not in (nn.Parameter, Tensor):
        unlike = f"a weight of the type {type(base.weight).__name__}"
    if unlike:
        raise UnsupportedModel(
            f"a pruned layer is a {type(base).__name__} with {unlike}, expected a plain "
            "convolution or linear layer; load the model without quantization, layerwise casting "
            "and sequential offloading, or remove the pruning"
        )
    if layer is base:
        return (_version(base.weight),)
    if layer.merged and layer.disable_adapters:
        layer.unmerge()  # as its own next forward would
    plain = layer.merged or layer.disable_adapters or hasattr(layer, "lora_A")
    names, variants = _loras(layer) if plain else [], getattr(layer, "lora_variant", {})
    if not plain or any(name in variants or layer.lora_B[name].bias is not None for name in names):
        raise UnsupportedModel(
            f"a LoRA on a pruned {type(base).__name__} is not a plain one (DoRA, LoHa, LoKr, or "
            "with a bias); leave it out, or fuse it with pipe.fuse_lora()"
        )
    parts = [part[name].weight for name in names for part in (layer.lora_A, layer.lora_B)]
    scales = [layer.scaling[name] for name in names]
    return (*map(_version, (base.weight, *parts)), *scales, *layer.merged_adapters)


def _version(weight: Tensor) -> tuple[Any, ...]:
    written = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), written, weight.dtype, weight.device


@contextmanager
def replaced(
    functions: Iterable[tuple[nn.Module, str, Callable[..., Any]]],
) -> Iterator[None]:
    """Give modules methods of their own within the context. Afterwards each has what it had before.

    That is its class's method, or one of its own. One that was replaced once more meanwhile stays,
    and what replaced it gives back what was there before both.
    """
    changes: list[tuple[nn.Module, str, Any, Any]] = []
    try:
        for module, name, function in functions:
            changes.append((module, name, function, module.__dict__.get(name)))
            module.__dict__[name] = function
        yield
    finally:
        for module, name, function, own in reversed(changes):
            if module.__dict__.get(name) is not function:
                vars(function)["ldcp_before"] = own
                continue
            while hasattr(own, "ldcp_before"):
                own = own.ldcp_before
            if own is None:
                del module.__dict__[name]
            else:
                module.__dict__[name] = own


def compact_blocks(
    unet: nn.Module, pruned: Pruned, dtype: torch.dtype | None = None
) -> dict[str, CompactBlock]:
    """Block name -> its kept rows and columns; `compact_forwards` runs the U-Net through them.

    Blocks that lose nothing are left out. Constants are folded in ``dtype``, by default that of the
    weights.
    """
    found: dict[str, CompactBlock] = {}
    less = {name: site for name, site in pruned.items() if not bool(site.keep.all())}
    for name, gate in block_gates(less).items():
        found[name] = adapter(unet, name).compact(gate, dtype)
    return found


def compact_forwards(
    unet: nn.Module, blocks: Mapping[str, Callable[..., Tensor]]
) -> dict[str, BlockForward]:
    """Block name -> what to put in the place of its forward."""
    return {name: adapter(unet, name).running(compact) for name, compact in blocks.items()}
