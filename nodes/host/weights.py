"""Weights as ComfyUI itself would use them now.

Everything that depends on how ComfyUI stores and casts weights is here. A layer's own forward runs
while the operation at its end is replaced by a function that catches weight and bias. What arrives
includes LoRA, hooks, low-VRAM casts and quantised formats; nothing is computed. A layer that does
anything but this one operation, with its input as it is, is not one that pruning understands.
Under dynamic VRAM a copy of the layer runs, so that ComfyUI brings nothing in for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...ldcp_core import ConvWeights, LinearWeights
from . import dynamic_vram
from .changes import changed_convolution


class NotCaptured(ValueError):
    """A layer whose weights can't be had: it is computed in another way.

    They are quantised, or another extension computes it. The message is what the layer's block has.
    """


def is_linear(layer: Any) -> bool:
    """Whether it is a linear layer: ComfyUI's own for quantised checkpoints is no `nn.Linear`."""
    from comfy.ops import CastWeightBiasOp

    hosts_own = isinstance(layer, CastWeightBiasOp) and hasattr(layer, "in_features")
    return isinstance(layer, nn.Linear) or hosts_own


def quantised(layer: Any) -> str:
    """The format of weights that ComfyUI computes with before it casts them; empty: others.

    Weights in fp8 without a scale are others: they are cast, then used.
    """
    found = getattr(layer, "layout_type", None) is not None
    if hasattr(layer, "scale_weight"):  # older hosts; None where ComfyUI multiplies in plain fp8
        found = layer.scale_weight is not None or layer.weight.dtype == torch.float8_e4m3fn
    if not found:
        return ""
    return getattr(layer, "quant_format", None) or str(layer.weight.dtype).removeprefix("torch.")


def captured(conv: nn.Conv2d, device: torch.device, dtype: torch.dtype) -> ConvWeights:
    """Weight and bias with which the host would now run ``conv`` on such an input.

    Raises NotCaptured when that is not a convolution whose rows can be left out.
    """
    found: list[ConvWeights] = []
    asked = _asked(conv, device)
    probe = torch.empty(0, conv.in_channels, 1, 1, device=device, dtype=dtype)
    answer = probe.new_empty(0, conv.out_channels, 1, 1)

    def catch(x: Tensor, weight: Tensor, bias: Tensor | None, *_: object) -> Tensor:
        if x is probe:
            found.append(ConvWeights(*_kept(asked, weight, bias)))
        return answer

    earlier = vars(asked).get("_conv_forward")
    asked._conv_forward = catch
    try:
        result = type(asked).forward(asked, probe)
    finally:
        del asked._conv_forward
        if earlier is not None:
            asked._conv_forward = earlier
    if result is not answer or len(found) != 1:
        raise NotCaptured(f"a {type(conv).__name__} that is not computed as a convolution")
    if changed_convolution(conv):
        _check_rows(conv, found[0], device, dtype)
    return found[0]


def _check_rows(
    conv: nn.Conv2d, weights: ConvWeights, device: torch.device, dtype: torch.dtype
) -> None:
    """Raises NotCaptured unless the convolution's last step is one convolution by these weights.

    What it does to its input (seamless tiling pads it in its own way) concerns no row.
    """
    probe = torch.zeros(1, conv.in_channels, 8, 8, device=device, dtype=dtype)
    answer = probe.new_empty(1, conv.out_channels, 8, 8)
    try:
        used = _operands(
            torch.conv2d, lambda: conv._conv_forward(probe, weights.weight, weights.bias), answer
        )
    except Exception:  # somebody else's code, on an input of ours
        used = None
    if used is None or used["weight"] is not weights.weight or used["bias"] is not weights.bias:
        raise NotCaptured(f"a {type(conv).__name__} that is not computed as a convolution")


def captured_linear(linear: Any, device: torch.device, dtype: torch.dtype) -> LinearWeights:
    """Weight and bias with which the host would now run ``linear`` on such an input.

    Raises NotCaptured when that is not a plain linear operation.
    """
    if quantised(linear):
        raise NotCaptured(f"quantised weights ({quantised(linear)})")
    probe = torch.empty(0, linear.in_features, device=device, dtype=dtype)
    answer = probe.new_empty(0, linear.out_features)
    asked = _asked(linear, device)
    used = _operands(F.linear, lambda: type(asked).forward(asked, probe), answer)
    if used is None or used["input"] is not probe:
        raise NotCaptured(f"a {type(linear).__name__} that is not computed as a linear layer")
    return LinearWeights(*_kept(asked, used["weight"], used["bias"]))


def captured_norm(
    norm: nn.GroupNorm | nn.LayerNorm, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weight and bias [C] with which the host would now run ``norm`` on such an input, as copies.

    Raises NotCaptured when that is not a plain group or layer normalisation.
    """
    grouped = isinstance(norm, nn.GroupNorm)
    shape = (1, norm.num_channels, 2, 2) if grouped else (1, *norm.normalized_shape)
    probe = torch.empty(shape, device=device, dtype=dtype)
    operation = F.group_norm if grouped else F.layer_norm
    asked = _asked(norm, device)
    used = _operands(operation, lambda: type(asked).forward(asked, probe), torch.empty_like(probe))
    own = {"eps": norm.eps, "num_groups": norm.num_groups} if grouped else {"eps": norm.eps}
    same = used is not None and all(used[name] == value for name, value in own.items())
    if not same or used["input"] is not probe:
        raise NotCaptured(f"a {type(norm).__name__} that is not computed as one")
    return used["weight"].detach().clone(), used["bias"].detach().clone()


def _asked(layer: Any, device: torch.device) -> Any:
    """What runs in a layer's place to show its weights: it, or under dynamic VRAM a copy of it."""
    readable = dynamic_vram.readable(layer, device)
    return dynamic_vram.read(layer, device) if readable else layer


def _kept(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    # a cast weight may lie in a buffer that the host uses again: keep a copy
    kept = weight if weight is layer.weight else weight.clone()
    return kept.detach(), None if bias is None else bias.detach().clone()


#: the operations' parameters that matter here, in order
PARAMETERS: Mapping[Any, tuple[str, ...]] = {
    F.linear: ("input", "weight", "bias"),
    torch.conv2d: ("input", "weight", "bias"),
    F.group_norm: ("input", "num_groups", "weight", "bias", "eps"),
    F.layer_norm: ("input", "normalized_shape", "weight", "bias", "eps"),
}


def _operands(operation: Any, call: Callable[[], Any], answer: Tensor) -> dict[str, Any] | None:
    """What ``call`` gives ``operation``, which answers with ``answer`` instead of computing.

    None when it calls it twice, not at all, or gives another result.
    """
    with _Catch(operation, answer) as catch:
        result = call()
    if result is not answer or len(catch.operands) != 1:
        return None
    return catch.operands[0]


class _Catch(TorchFunctionMode):
    """Catches what an operation is called with, in this thread."""

    def __init__(self, operation: Any, answer: Tensor) -> None:
        super().__init__()
        self._operation, self._answer = operation, answer
        self.operands: list[dict[str, Any]] = []

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is not self._operation:
            return function(*args, **(kwargs or {}))
        defaults = {"bias": None, "weight": None, "eps": 1e-5}
        given = dict(zip(PARAMETERS[function], args, strict=False))
        self.operands.append({**defaults, **given, **(kwargs or {})})
        return self._answer
