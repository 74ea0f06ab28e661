"""ComfyUI's feed-forward with GEGLU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...ldcp_core import (
    HIDDEN,
    CompactFeedForward,
    FeedForward,
    LinearWeights,
    Padding,
    PrunedSite,
    See,
    SiteKind,
    SoftGate,
    expected_hidden,
    watch_linear,
)
from .blocks import Compact, Judgement, Watched, dropping, first_of, prunes, rebuilt
from .changes import Watch, changed_call, changed_class, changed_function, hooks_on_all
from .weights import captured_linear, captured_norm, is_linear


class ComfyFeedForward:
    """A `HostBlock`."""

    layers = {"net.0": "net.0.proj"}

    def __init__(self, unet: nn.Module, path: str) -> None:
        self.module = unet.get_submodule(path)
        #: the transformer block's norm of what the feed-forward reads
        self._norm = unet.get_submodule(path.removesuffix("ff") + "norm3")

    def check(self, block: FeedForward) -> str | None:
        module = self.module
        linear = _linear_layers(module)
        if not linear:
            name = type(module).__name__
            parts = [type(part).__name__ for part in getattr(module, "net", ())]
            return f"it is a {name} of {parts}, not GEGLU, dropout and a linear layer"
        widths = [(layer.in_features, layer.out_features) for layer in linear]
        expected = [(block.channels, 2 * block.hidden), (block.hidden, block.channels)]
        if widths != expected:
            return f"its linear layers have widths {widths}, expected {expected}"
        return None

    def judge(self) -> Judgement:
        block = self.module
        if not _linear_layers(block):
            return rebuilt(block, [block.net], list(block.net))
        geglu, dropout, out = block.net
        layers, functions = [geglu, dropout, geglu.proj, out], ["linear", "gelu"]
        bypassed = [hooks_on_all(), changed_class(type(block))]
        bypassed += map(changed_call, (block.net, geglu, dropout))
        bypassed += [changed_call(layer, any_class=True) for layer in (geglu.proj, out)]
        bypassed += map(changed_function, functions)
        bypassed.append(dropping(dropout))
        watch = Watch([block.net, *layers], [type(block)], functions)
        return Judgement(first_of(bypassed), "", layers, watch.holds)

    def passed_over(self, options: Mapping[str, Any]) -> str:
        return ""

    def compact(
        self,
        gate: PrunedSite | None,
        device: torch.device,
        dtype: torch.dtype,
        rows_only: str = "",
    ) -> Compact | None:
        block = self.module
        if gate is None or not prunes(gate.keep):
            return None
        layers = [block.net[0].proj, block.net[2]]
        weights = [captured_linear(layer, device, dtype) for layer in layers]
        core = CompactFeedForward(gate, *weights)
        return Compact(core, core.tensors(), layers, layers)

    def watched(self, kind: SiteKind) -> Watched:
        return Watched(self.module.net[0], self.module.net[2])

    def watch_reader(
        self, gates: Sequence[SoftGate | None], padding: Padding, see: See
    ) -> AbstractContextManager[None]:
        if self.judge().bypassed:
            return nullcontext()
        (hidden,), out = gates, self.module.net[2]

        def weights(fed: Tensor) -> LinearWeights:
            return captured_linear(out, fed.device, fed.dtype)

        return watch_linear(out, weights, hidden, HIDDEN.axis, see)

    def estimates(
        self, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[Tensor, Tensor]]:
        proj = captured_linear(self.module.net[0].proj, device, dtype)
        affine = captured_norm(self._norm, device, dtype)
        yield HIDDEN.rows_of(proj.weight), expected_hidden(proj, *affine)


def _linear_layers(module: nn.Module) -> list[nn.Module]:
    """The two linear layers of a feed-forward; none of one that is built in another way."""
    net = list(getattr(module, "net", ()))
    linear = [getattr(net[0], "proj", None), net[2]] if len(net) == 3 else []
    gated = bool(net) and type(net[0]).__name__ == "GEGLU"
    return linear if gated and all(is_linear(layer) for layer in linear) else []
