"""Weights as ComfyUI itself would use them now.

Everything that depends on how ComfyUI stores and casts weights is here. A layer's own forward runs
on an empty input while the operation at its end is replaced by a function that catches weight and
bias. What arrives includes LoRA, hooks, low-VRAM casts and quantised formats.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ldcp_core import ConvWeights, LinearWeights


class NotCaptured(ValueError):
    """A layer whose weights can't be had: another extension computes it in its own way."""


def captured(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> ConvWeights:
    """Weight and bias with which the host would now run ``conv`` on such an input."""
    found: list[ConvWeights] = []

    def catch(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        # a cast weight may lie in a buffer that the host uses again: keep a copy
        kept = weight if weight is conv.weight else weight.clone()
        found.append(ConvWeights(kept.detach(), None if bias is None else bias.detach().clone()))
        return x

    earlier = vars(conv).get("_conv_forward")
    conv._conv_forward = catch
    try:
        type(conv).forward(conv, torch.empty(0, conv.in_channels, 1, 1, device=device, dtype=dtype))
    finally:
        del conv._conv_forward
        if earlier is not None:
            conv._conv_forward = earlier
    return found[0]


def captured_linear(linear: nn.Linear, device: torch.device, dtype: torch.dtype) -> LinearWeights:
    """Weight and bias with which the host would now run ``linear`` on such an input.

    Raises NotCaptured when that never comes down to a plain linear operation.
    """
    with _CatchLinear(linear.weight) as catch:
        type(linear).forward(linear, torch.empty(0, linear.in_features, device=device, dtype=dtype))
    if catch.found is None:
        raise NotCaptured(f"a {type(linear).__name__} that is not computed as a linear layer")
    return catch.found


class _CatchLinear(TorchFunctionMode):
    """Catches what `torch.nn.functional.linear` is called with, in this thread."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self._own = own
        self.found: LinearWeights | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.linear and self.found is None:
            self.found = self._copied(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _copied(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> LinearWeights:
        # a cast weight may lie in a buffer that the host uses again: keep a copy
        kept = weight if weight is self._own else weight.clone()
        return LinearWeights(kept.detach(), None if bias is None else bias.detach().clone())


def norm_affine(
    norm: nn.GroupNorm, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias of a GroupNorm through the host's own casting, as copies.

    The one place that knows `comfy.ops.cast_bias_weight`. Newer hosts lend an offloaded weight and
    want it back (``offloadable``, ``uncast_bias_weight``); older ones know neither.
    """
    if not hasattr(norm, "comfy_cast_weights"):
        return norm.weight.detach().to(device, dtype), norm.bias.detach().to(device, dtype)
    import comfy.ops

    hands_back = getattr(comfy.ops, "uncast_bias_weight", None)
    offloadable = {"offloadable": True} if hands_back else {}
    lent = comfy.ops.cast_bias_weight(
        norm, dtype=dtype, bias_dtype=dtype, device=device, **offloadable
    )
    weight, bias = (t.detach().clone() for t in lent[:2])
    if hands_back:
        hands_back(norm, *lent)
    return weight, bias


def folds(conv: nn.Conv2d) -> bool:
    """Whether the convolution pads one ring of zeros, as the folded form assumes."""
    own = "_conv_forward" in vars(conv) or type(conv)._conv_forward is not nn.Conv2d._conv_forward
    padding = (conv.padding_mode, conv.padding, conv.dilation)
    return not own and padding == ("zeros", (1, 1), (1, 1))
