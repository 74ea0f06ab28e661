"""Attaching gates to a ComfyUI model.

One keyed APPLY_MODEL wrapper on a clone of the model. For an evaluation that the schedule prunes
it puts a compact ``forward`` on the blocks and takes it off again when the evaluation ends, so
no state is left on the model that all clones share, and an evaluation outside the schedule runs
the host's code untouched. Weights are selected before the U-Net is entered, and dropped when the
run ends or the host changes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from .blocks import Forward
from .model import find_blocks
from .parking import Parking, Places
from .record import RunRecord
from .run import Layer, Run

KEY = "ldcp"


class Onlooker(Protocol):
    """Whoever is told what a run does."""

    def evaluated(self, record: RunRecord) -> None:
        """An evaluation has ended: so much has been done."""

    def ended(self, record: RunRecord) -> None:
        """The run has ended: this is what it did."""


def attach(model: Any, *layers: Layer, onlooker: Onlooker | None = None) -> Any:
    """A clone of the ModelPatcher ``model`` that is pruned by ``layers``.

    Gates already attached stay, each with its own schedule; where several name a site in the same
    evaluation, the one attached last wins. All of their onlookers are told of a run.
    Raises ModelError when the model does not fit.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    for layer in layers:
        find_blocks(model.model, layer.chosen)
    patched, earlier = detached(model), attached(model)
    pruning = DynamicPruning(
        (*(earlier.layers if earlier else ()), *layers),
        (*(earlier.onlookers if earlier else ()), *([onlooker] if onlooker else ())),
    )
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, pruning)
    for event, callback in {
        CallbacksMP.ON_PRE_RUN: pruning.begin_run,
        CallbacksMP.ON_CLEANUP: pruning.end_run,
        CallbacksMP.ON_LOAD: pruning.weights_loaded,
        CallbacksMP.ON_APPLY_HOOKS: pruning.weights_changed,
        CallbacksMP.ON_DETACH: pruning.model_unloaded,
    }.items():
        patched.add_callback_with_key(event, KEY, callback)
    return patched


def detached(model: Any) -> Any:
    """A clone of the ModelPatcher ``model`` without pruning."""
    from comfy.patcher_extension import WrappersMP

    plain = model.clone()
    plain.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    for event in list(plain.callbacks):
        plain.remove_callbacks_with_key(event, KEY)
    return plain


def attached(model: Any) -> DynamicPruning | None:
    """The pruning of the ModelPatcher ``model``; None when it has none."""
    from comfy.patcher_extension import WrappersMP

    found = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return found[0] if found else None


class DynamicPruning:
    """The wrapper: one object for a patched model and all of its clones.

    It knows no ModelPatcher; runs are kept apart by the model they run on, and end with it.
    ``record`` is what the latest run did, None before the first. Evaluations without a sampler are
    a run too, which takes no sampler's place in it.
    """

    def __init__(self, layers: tuple[Layer, ...], onlookers: tuple[Onlooker, ...] = ()) -> None:
        self.layers = layers
        self.onlookers = onlookers
        self.record: RunRecord | None = None
        self._runs: WeakKeyDictionary[nn.Module, Run] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicPruning:
        return self  # model options that carry the wrapper get copied; weights must not be

    def begin_run(self, patcher: Any, *_: Any) -> None:
        earlier = self._runs.get(patcher.model)
        if earlier is not None and earlier.record.evaluations:
            self.end_run(patcher)  # the host did not clean up after it
        self._new_run(patcher.model, Parking(Places.of(patcher)))

    def end_run(self, patcher: Any, *_: Any) -> None:
        run = self._runs.pop(patcher.model, None)
        if run is not None:
            run.forget_weights()  # first, to make room for what comes back
            if run.parking is not None:
                run.parking.unpark(patcher.model)
            run.finish()
            for onlooker in self.onlookers:
                onlooker.ended(run.record)

    def weights_loaded(self, patcher: Any, *_: Any) -> None:
        run = self._runs.get(patcher.model)
        if run is not None and run.parking is not None:
            run.parking.surrender()
        self.weights_changed(patcher)

    def weights_changed(self, patcher: Any, *_: Any) -> None:
        run = self._runs.get(patcher.model)
        if run is not None:
            run.forget_weights()

    def model_unloaded(self, patcher: Any, unpatch_all: bool = True, *_: Any) -> None:
        run = self._runs.get(patcher.model)
        if run is not None and unpatch_all:
            run.give_way()

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """One evaluation of the model (the signature is that of BaseModel.apply_model)."""
        model = executor.class_obj
        options = {} if transformer_options is None else transformer_options
        inputs = (x, t, c_concat, c_crossattn, control, options)
        run = self._runs.get(model)
        if run is None:
            if any(known.record.sampled for known in self._runs.values()):
                return executor(*inputs, **kwargs)  # another model, with the options of this one
            run = self._new_run(model)
        try:
            active = run.active(model, t, options)
            forwards = run.forwards(model, x.device, options, active) if any(active) else []
            with _installed(forwards):
                output = executor(*inputs, **kwargs)
            run.count(t, options, wanted=bool(forwards))
        finally:
            if not run.record.sampled:  # nobody says when weights change, or when it ends
                run.forget_weights()
        for onlooker in self.onlookers:
            onlooker.evaluated(run.record)
        return output

    def _new_run(self, model: nn.Module, parking: Parking | None = None) -> Run:
        self._runs[model] = run = Run(self.layers, parking)
        if self.record is None or run.record.sampled:
            self.record = run.record
        return run


@contextmanager
def _installed(forwards: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Put a ``forward`` on each module, and take it off whatever happens."""
    earlier = [vars(module).get("forward") for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for (module, _), found in zip(forwards, earlier, strict=True):
            vars(module).pop("forward", None)
            if found is not None:  # left behind by another extension
                module.forward = found
