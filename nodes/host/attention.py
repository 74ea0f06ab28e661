"""ComfyUI's attention in a transformer of the U-Net."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...ldcp_core import (
    HEADS,
    Attention,
    AttentionWeights,
    CompactAttention,
    LinearWeights,
    Padding,
    PrunedSite,
    See,
    SiteKind,
    SoftGate,
    expected_heads,
    watch_linear,
)
from .blocks import Compact, Judgement, Watched, dropping, first_of, prunes, rebuilt
from .changes import Watch, changed_call, changed_class, changed_function, hooks_on_all
from .weights import captured_linear, captured_norm, is_linear

#: ComfyUI's names of the stages, by what the paths of their blocks begin with
STAGES = {"input_blocks": "input", "middle_block": "middle", "output_blocks": "output"}


class ComfyAttention:
    """A `HostBlock`. The attention itself is the host's, on fewer heads, with all its options."""

    layers = {"to_v": "to_v"}

    def __init__(self, unet: nn.Module, path: str) -> None:
        self.module: Any = unet.get_submodule(path)
        transformer, self._name = path.rsplit(".", 1)
        #: the transformer block's norm of what the attention reads
        self._norm = unet.get_submodule(f"{transformer}.{self._name.replace('attn', 'norm')}")
        stage, number, *_, depth = transformer.split(".")
        self._block = (STAGES[stage], 0 if stage == "middle_block" else int(number))
        self._place = (*self._block, int(depth))

    def check(self, block: Attention) -> str | None:
        module = self.module
        if not _linear_layers(module):
            return f"it is a {type(module).__name__} without four linear layers and dropout"
        widths = [(layer.in_features, layer.out_features) for layer in _linear_layers(module)]
        read, channels = block.widths(HEADS)
        expected = [(size, channels) for size in (channels, read, read, channels)]
        if widths != expected:
            return f"its linear layers have widths {widths}, expected {expected}"
        if module.heads != block.heads:
            return f"it has {module.heads} heads, expected {block.heads}"
        return None

    def judge(self) -> Judgement:
        module = self.module
        linear = _linear_layers(module)
        if not linear:
            return rebuilt(module, [module], [])
        dropout, functions = module.to_out[1], ["linear"]
        bypassed = [hooks_on_all(), changed_class(type(module)), changed_call(module.to_out)]
        bypassed += [changed_call(layer, any_class=True) for layer in linear]
        bypassed += map(changed_function, functions)
        bypassed += [changed_call(dropout), dropping(dropout)]
        layers = [*linear, dropout]
        watch = Watch([module.to_out, *layers], [type(module)], functions)
        return Judgement(first_of(bypassed), "", layers, watch.holds)

    def passed_over(self, options: Mapping[str, Any]) -> str:
        replaced = options.get("patches_replace", {}).get(self._name, {})
        found = self._place in replaced or self._block in replaced
        return f"replaced the attention {self._name}" if found else ""

    def compact(
        self,
        gate: PrunedSite | None,
        device: torch.device,
        dtype: torch.dtype,
        rows_only: str = "",
    ) -> Compact | None:
        from comfy.ldm.modules import attention

        module = self.module
        if gate is None or not prunes(gate.keep):
            return None
        layers = _linear_layers(module)
        weights = AttentionWeights(*(captured_linear(layer, device, dtype) for layer in layers))
        core = CompactAttention(gate, weights, module.heads)

        def forward(
            x: Tensor,
            context: Tensor | None = None,
            value: Tensor | None = None,
            mask: Tensor | None = None,
            transformer_options: Mapping[str, Any] | None = None,
        ) -> Tensor:
            context = x if context is None else context
            value = context if value is None else value
            options = {
                "attn_precision": module.attn_precision,
                "transformer_options": transformer_options or {},
            }

            def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
                if mask is None:  # looked up here: others exchange them
                    return attention.optimized_attention(q, k, v, heads, **options)
                return attention.optimized_attention_masked(q, k, v, heads, mask, **options)

            return core(x, context, value, attend)

        return Compact(forward, core.tensors(), layers, layers)

    def watched(self, kind: SiteKind) -> Watched:
        return Watched(None, self.module.to_out[0])

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        if self.judge().bypassed:
            return nullcontext()
        (heads,), out = gates, self.module.to_out[0]

        def weights(fed: Tensor) -> LinearWeights:
            return captured_linear(out, fed.device, fed.dtype)

        return watch_linear(out, weights, heads, HEADS.axis, see)

    def estimates(
        self, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        value = captured_linear(self.module.to_v, device, dtype)
        if self._name == "attn1":
            _, beta = captured_norm(self._norm, device, dtype)
            yield value.weight, expected_heads(value, beta)
        else:  # what the text is like on average is not known
            yield value.weight, torch.zeros(len(value.weight))


def _linear_layers(module: Any) -> list[Any]:
    """The four linear layers of an attention; none of one that is built in another way."""
    out = getattr(module, "to_out", ())
    parts = [getattr(module, name, None) for name in ("to_q", "to_k", "to_v")]
    linear = [*parts, out[0]] if len(out) == 2 else []
    return linear if all(is_linear(layer) for layer in linear) else []
