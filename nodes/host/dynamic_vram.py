"""ComfyUI's dynamic VRAM: reading weights without bringing them in, and what has been brought in.

There a layer's weights stay in host memory. Running the layer copies them to the layer's place in
VRAM, and pins them in host memory for the next time. A pruned layer does not run, so its full
weights never take room, unless they are brought in just to select from them. So they are read
from host memory here, with their patches, and the host's place is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: ComfyUI's attribute for a layer's place in VRAM: (address space, address, bytes)
PLACE = "_v"
#: ComfyUI's attributes that belong to the place, and not to the layer
OF_PLACE = (PLACE, "_v_weight", "_v_bias", "_v_signature", "_prefetch", "_pins", "_pin_state")
#: bytes that comfy-aimdo brings in at once
PAGE = 32 * 2**20
#: address space -> for each page flags, 1 where it is in VRAM; None: an early comfy-aimdo can't say
Residency = dict[Any, list[int] | None]


def readable(layer: nn.Module, device: torch.device) -> bool:
    """Whether `read` has the layer's weights as the host would run them, without its place.

    That is so for the host's own layers with plain weights. Another ``forward`` would find the
    patches where it does not expect them.
    """
    if not hasattr(layer, PLACE) or device.type == "cpu":
        return False
    return _is_hosts_own(type(layer)) and all(map(_is_plain, layer.parameters(recurse=False)))


def _is_hosts_own(kind: type) -> bool:
    from comfy.ops import disable_weight_init

    own = vars(disable_weight_init).values()
    base = next((base for base in kind.__mro__ if base in own), None)
    methods = ("forward", "forward_comfy_cast_weights")
    return base is not None and all(getattr(kind, m) is getattr(base, m) for m in methods)


def _is_plain(weight: Tensor) -> bool:
    return type(weight.data) is Tensor and weight.device.type == "cpu"


def read(layer: nn.Module, device: torch.device) -> nn.Module:
    """A layer with the weights of a `readable` one on ``device``, and no place in VRAM.

    Its weights are temporary copies. The host casts and patches them as it would have done in the
    place, in the same order and on the same device. (Weights in fp8 with a patch are as in the
    host's first use of them: what it keeps in the place is rounded once more.)
    """
    state = {name: value for name, value in vars(layer).items() if name not in OF_PLACE}
    state["_parameters"] = dict.fromkeys(layer._parameters)  # a layer may have no bias
    copy: Any = object.__new__(type(layer))
    vars(copy).update(state)
    for name, weight in layer.named_parameters(recurse=False):
        loaded = weight.to(device).to(_loaded_dtype(weight))
        copy.register_parameter(name, nn.Parameter(loaded, requires_grad=False))
        patch = getattr(layer, f"{name}_lowvram_function", None)
        functions = list(getattr(layer, f"{name}_function", []))
        setattr(copy, f"{name}_function", [patch, *functions] if patch else functions)
    return copy


def _loaded_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the host loads a weight; the file's own may be another."""
    return getattr(weight, "_model_dtype", None) or weight.dtype


def full_bytes(layer: nn.Module) -> int:
    """Bytes of a layer's own weights as the host loads them."""
    return sum(w.numel() * _loaded_dtype(w).itemsize for w in layer.parameters(recurse=False))


def residency(layers: Iterable[nn.Module]) -> Residency:
    """What is in VRAM of the address spaces in which the layers have their places."""
    spaces = {vars(layer)[PLACE][0] for layer in layers if PLACE in vars(layer)}
    return {s: s.get_residency() if hasattr(s, "get_residency") else None for s in spaces}


def resident_bytes(layer: nn.Module, device: torch.device, pages: Residency) -> int:
    """How many of them are on ``device``, in the layer's place or for good.

    In a place the host brings in whole pages, also for other layers that share them. ``pages``:
    the `residency` of the layer, and perhaps of others.
    """
    if layer.weight.device == device:
        return full_bytes(layer)
    if not hasattr(layer, PLACE):
        return 0
    space, address, size = getattr(layer, PLACE)
    flags = pages[space]
    if flags is None:  # the host may have had it there
        return full_bytes(layer) if getattr(layer, "_v_signature", None) is not None else 0
    start = address - space.base_addr
    end = start + size
    resident = sum(
        min(end, (page + 1) * PAGE) - max(start, page * PAGE)
        for page in range(start // PAGE, -(-end // PAGE))
        if flags[page] & 1
    )
    return min(resident, full_bytes(layer))
