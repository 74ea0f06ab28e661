"""Watching the gated layers of a model while ComfyUI samples.

One keyed APPLY_MODEL wrapper on a clone of the model, as for pruning. For the length of an
evaluation it puts forward hooks on the layers where the sites' channels can be seen; when the
evaluation ends, also by an interrupt, they are gone. What goes through the layers is reduced to
moments at once. Pruning attached to the model is left out: it is the dense model that is watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...ldcp_core import Calibration, Gates, Site, Topology, column_norms
from .blocks import Watched
from .model import LEAVE_OUT, ModelError, find_blocks, refuse_quantised
from .patch import detached
from .weights import NotCaptured, captured, captured_linear, is_linear

KEY = "ldcp_calibration"
#: ComfyUI's key of the wrapper that puts a compiled model in place; compiled layers call no hooks
COMPILED = "torch.compile"
Hook = Callable[[Any, tuple[Tensor, ...], Tensor], None]


def find_watched(base_model: Any, sites: Sequence[Site], topology: Topology) -> dict[Site, Watched]:
    """Site -> where to watch it; raises ModelError when the model does not fit."""
    gates = Gates({site.name: torch.ones(site.channels) for site in sites}, topology=topology)
    blocks = find_blocks(base_model, gates)
    refuse_quantised(blocks)
    return {site: blocks[site.block.name].watched(site.kind) for site in sites}


class Observer:
    """The wrapper, and what it has seen. It knows no ModelPatcher."""

    def __init__(self, places: Mapping[Site, Watched]) -> None:
        self.seen = Calibration()
        self._places = places
        self._columns: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Observer:
        return self  # model options that carry the wrapper get copied

    def weights_changed(self, *_: Any) -> None:
        """The host has changed weights, a LoRA that hooks bring for one prompt, say."""
        self._columns.clear()

    def __call__(self, executor: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """One evaluation of the model (the signature is that of BaseModel.apply_model)."""
        if not self._columns:
            self._read_weights(executor.class_obj, x.device)
        with self._hooks():
            output = executor(x, *args, **kwargs)
        for site, columns in self._columns.items():
            self.seen.read_with(site, columns)
        self.seen.evaluations += 1
        return output

    def check(self) -> None:
        """Raises ModelError when a layer was never seen, or gave what is no number."""
        for site in (site.name for site in self._places):
            found = self.seen.outputs.get(site)
            if found is None:
                raise ModelError(
                    f"LDCP: {site} was not evaluated once while sampling, so there is nothing to "
                    "calibrate it with; leave out the node that compiles, caches or replaces the "
                    "model's layers, and sample at least one step"
                )
            if not bool(torch.isfinite(found.m2).all()):
                raise ModelError(
                    f"LDCP: {site} gave values that are not finite numbers while sampling; load "
                    "the model in another precision, or another copy of it"
                )

    @contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        try:
            for site, place in self._places.items():
                if place.output is not None:
                    handles.append(place.output.register_forward_hook(self._output(site)))
                if place.reader is not None:
                    handles.append(place.reader.register_forward_hook(self._input(site)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _output(self, site: Site) -> Hook:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.saw_output(site.name, output, site.kind.axis)

        return see

    def _input(self, site: Site) -> Hook:
        def see(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.saw_input(site.name, inputs[0], site.kind.axis)
            if not site.kind.replaces_output:
                self.seen.saw_output(site.name, inputs[0], site.kind.axis)

        return see

    def _read_weights(self, model: Any, device: torch.device) -> None:
        """How large the readers' weights are as they run now: with LoRA, casts and hooks."""
        dtype = model.manual_cast_dtype or model.get_dtype()
        for site, place in self._places.items():
            if place.reader is not None:
                read = captured_linear if is_linear(place.reader) else captured
                try:
                    weight = read(place.reader, device, dtype).weight
                except NotCaptured as error:
                    message = f"LDCP: {site.name} is read by {error}; {LEAVE_OUT}"
                    raise ModelError(message) from error
                self._columns[site.name] = column_norms(weight)


def observed(model: Any, sites: Sequence[Site], topology: Topology) -> tuple[Any, Observer]:
    """A clone of the ModelPatcher ``model``, unpruned and watched, and its observer."""
    from comfy.patcher_extension import CallbacksMP

    observer = Observer(find_watched(model.model, sites, topology))
    clone = watched_by(model, observer)
    clone.add_callback_with_key(CallbacksMP.ON_APPLY_HOOKS, KEY, observer.weights_changed)
    return clone, observer


def watched_by(model: Any, wrapper: Callable[..., Any]) -> Any:
    """A clone of the ModelPatcher ``model``, unpruned, whose evaluations go through ``wrapper``."""
    from comfy.patcher_extension import WrappersMP

    clone = detached(model)
    clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, COMPILED)
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    return clone
