"""Moving full weights off the compute device while their compact copies do the work.

Compact copies beside the full weights would add memory. So the layers that run compact are
*parked* for the length of a run: their weights go to the host's offload device and the modules
are marked the way ComfyUI marks its own offloaded modules (cast on use), so that whoever still
evaluates one gets right numbers, only slower. When the run ends they come back. ComfyUI counts
how many bytes of a model are loaded; parking keeps that count true, and what ComfyUI itself does
to a parked module in the meantime (reload, unload) wins.

Where ComfyUI manages VRAM dynamically nothing is parked: what does not run is not brought in.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from .dynamic_vram import readable

log = logging.getLogger("ldcp")

FullWeights = Literal["auto", "offload", "keep"]
FULL_WEIGHTS: tuple[FullWeights, ...] = get_args(FullWeights)


@dataclass(frozen=True)
class Places:
    """Where a run's weights are loaded and offloaded to, or why they have to stay."""

    load: torch.device
    offload: torch.device
    obstacle: str = ""
    #: whether the host brings weights in as layers run (`dynamic_vram`)
    dynamic: bool = False

    @classmethod
    def of(cls, patcher: Any) -> Places:
        """As the ModelPatcher has it at the start of a run."""
        load, offload = patcher.load_device, patcher.offload_device
        dynamic = getattr(patcher, "is_dynamic", bool)()
        return cls(load, offload, _obstacle(patcher, load, offload), dynamic)


def _obstacle(patcher: Any, load: torch.device, offload: torch.device) -> str:
    if load.type == "mps":
        return "processor and GPU share one memory"
    if load.type == "cpu":
        return "weights and compute share one memory"
    if load == offload:
        return "ComfyUI was told to keep models on the GPU (--highvram, --gpu-only)"
    if patcher.hook_patches or patcher.forced_hooks:
        return "hooks change the weights during the run"
    return ""


#: ComfyUI's marks on a module whose weights are cast on use
CAST, CAST_BEFORE = "comfy_cast_weights", "prev_comfy_cast_weights"


@dataclass
class _Parked:
    layer: nn.Module
    bytes: int
    casts: bool
    marks: dict[str, Any]


class Parking:
    """The parked layers of one run. ``model`` is the host's BaseModel throughout."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self._parked: list[_Parked] = []

    def park(self, model: Any, layer: nn.Module) -> bool:
        """Move a layer's weights to the offload device; whether they are there now.

        One that the host has offloaded already needs nothing. One that it can't cast on use stays.
        Under dynamic VRAM: whether pruning it has left it out.
        """
        if self.places.dynamic:
            return readable(layer, self.places.load)
        if self.places.obstacle or not hasattr(layer, CAST):
            return False
        if layer.weight.device != self.places.load:
            return bool(layer.weight.device == self.places.offload)
        if getattr(layer, "comfy_patched_weights", None) is not True:
            return False  # not loaded by the host, which keeps no account of it
        marks = {name: vars(layer)[name] for name in (CAST, CAST_BEFORE) if name in vars(layer)}
        parked = _Parked(layer, nbytes(layer), getattr(layer, CAST), marks)
        layer.to(self.places.offload)
        setattr(layer, CAST_BEFORE, marks.get(CAST_BEFORE, parked.casts))
        setattr(layer, CAST, True)
        model.model_loaded_weight_memory -= parked.bytes
        self._parked.append(parked)
        return True

    def unpark(self, model: Any) -> None:
        """Bring everything back, as far as it is still ours. Never raises.

        What does not fit on the device any more stays where it is and is cast on use, as ComfyUI's
        own offloaded modules are.
        """
        for parked in self._parked:
            try:
                self._restore(model, parked)
            except Exception as error:  # out of memory, above all, whatever PyTorch calls it
                log.warning(
                    "LDCP: a pruned layer's full weights can't come back to %s (%s); they stay "
                    "offloaded, which is right but slower, until the model is loaded again",
                    self.places.load,
                    error,
                )
        self._parked.clear()

    def surrender(self) -> None:
        """The host has loaded the model anew: where its weights are now is its own decision."""
        self._parked.clear()

    def _restore(self, model: Any, parked: _Parked) -> None:
        layer, loaded = parked.layer, getattr(parked.layer, "comfy_patched_weights", None)
        if loaded is False:
            # The host offloaded the module once more: it took the bytes off its count a second
            # time, and our mark for the module's normal state.
            model.model_loaded_weight_memory += parked.bytes
            setattr(layer, CAST_BEFORE, parked.casts)
            return
        if loaded is True and layer.weight.device == self.places.offload:
            layer.to(self.places.load)
            model.model_loaded_weight_memory += parked.bytes
        # otherwise the host has unloaded the whole model, and counts from zero
        for name in (CAST, CAST_BEFORE):
            vars(layer).pop(name, None)
        vars(layer).update(parked.marks)


def nbytes(module: nn.Module) -> int:
    """Bytes of a module's own parameters, in the way the host counts them."""
    return sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
