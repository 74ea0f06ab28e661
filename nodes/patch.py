"""Attaching gates to a ComfyUI model, and deciding per evaluation what runs pruned.

One keyed APPLY_MODEL wrapper on a clone of the model. For an evaluation that the schedule prunes
it puts a compact ``forward`` on the ResBlocks and takes it off again when the evaluation ends, so
no state is left on the model that all clones share, and an evaluation outside the schedule runs
the host's code untouched. Compact weights are selected when a run first needs them, before the
U-Net is entered, and dropped when the run ends or the host changes the weights under them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..ldcp_core import ALWAYS, BlockGate, Gates, Schedule, step_index
from .blocks import Forward, compact_forward, override
from .sites import find_blocks

KEY = "ldcp"
log = logging.getLogger(KEY)

#: an inner and a residual gate of one block, as positions of the layers they come from
Owners = tuple[int | None, int | None]


@dataclass(frozen=True)
class Layer:
    """What one Apply node adds: the channels it keeps, the constants for the others, and when."""

    gates: Gates
    keep_sets: Mapping[str, Tensor]
    schedule: Schedule = ALWAYS


@dataclass
class _Run:
    """What is worked out once per run."""

    blocks: dict[str, nn.Module] = field(default_factory=dict)
    forwards: dict[tuple[str, Owners], Forward | None] = field(default_factory=dict)
    schedule: Tensor | None = None
    sigmas: list[float] = field(default_factory=list)
    percent_sigmas: dict[float, float] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def warn_once(self, message: str) -> None:
        if message not in self.warned:
            self.warned.add(message)
            log.warning(message)


def attach(model: Any, layer: Layer) -> Any:
    """A clone of the ModelPatcher ``model`` that is pruned by ``layer``.

    Gates already attached stay, each with its own schedule; where several name a site in the same
    evaluation, the one attached last wins. Raises ModelError when the model does not fit.
    """
    from comfy.patcher_extension import CallbacksMP, WrappersMP

    find_blocks(model.model, layer.gates)
    patched = model.clone()
    earlier = patched.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    pruning = DynamicPruning((*(earlier[0].layers if earlier else ()), layer))
    patched.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, pruning)
    for event, callback in {
        CallbacksMP.ON_PRE_RUN: pruning.forget_run,
        CallbacksMP.ON_CLEANUP: pruning.forget_run,
        CallbacksMP.ON_LOAD: pruning.forget_weights,
        CallbacksMP.ON_APPLY_HOOKS: pruning.forget_weights,
    }.items():
        patched.remove_callbacks_with_key(event, KEY)
        patched.add_callback_with_key(event, KEY, callback)
    return patched


class DynamicPruning:
    """The wrapper: one object for a patched model and all of its clones.

    It knows no ModelPatcher; runs are kept apart by the model they run on, and end with it.
    """

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers
        self._runs: WeakKeyDictionary[nn.Module, _Run] = WeakKeyDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> DynamicPruning:
        return self  # model options that carry the wrapper get copied; weights must not be

    def forget_run(self, patcher: Any, *_: Any) -> None:
        self._runs.pop(patcher.model, None)

    def forget_weights(self, patcher: Any, *_: Any) -> None:
        run = self._runs.get(patcher.model)
        if run is not None:
            run.forwards.clear()

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
        options = {} if transformer_options is None else transformer_options
        run = self._runs.setdefault(executor.class_obj, _Run())
        active = self._active(executor.class_obj, t, options, run)
        forwards = self._forwards(executor.class_obj, x.device, active, run) if any(active) else []
        with _installed(forwards):
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _active(self, model: Any, t: Tensor, options: Mapping[str, Any], run: _Run) -> list[bool]:
        """Which layers prune the evaluation that is about to start."""
        if all(layer.schedule == ALWAYS for layer in self.layers):
            return [True] * len(self.layers)  # spares the copy of sigma from the device
        sigma = float(torch.max(options.get("sigmas", t)))
        self._read_schedule(run, options.get("sample_sigmas"))
        # a node that evaluates the model without a sampler has no steps
        step = step_index(sigma, run.sigmas) if run.sigmas else -1

        def percent_to_sigma(percent: float) -> float:
            if percent not in run.percent_sigmas:
                run.percent_sigmas[percent] = float(model.model_sampling.percent_to_sigma(percent))
            return run.percent_sigmas[percent]

        return [layer.schedule.is_active(step, sigma, percent_to_sigma) for layer in self.layers]

    def _read_schedule(self, run: _Run, schedule: Tensor | None) -> None:
        """Copy the sampler's schedule to the host once; samplers may write into it later."""
        if schedule is None or schedule is run.schedule:
            return
        run.schedule, run.sigmas = schedule, schedule.tolist()
        steps = len(run.sigmas) - 1
        beyond = [str(r) for layer in self.layers for r in layer.schedule.beyond(steps)]
        if beyond:
            run.warn_once(
                f"LDCP: this run has {steps} steps (0 to {steps - 1}); the range "
                f"{', '.join(beyond)} lies past the last one and prunes nothing"
            )

    def _forwards(
        self, model: Any, device: torch.device, active: list[bool], run: _Run
    ) -> list[tuple[nn.Module, Forward]]:
        """ResBlocks and their forwards for one evaluation; selects weights where still missing."""
        for layer in self.layers if not run.blocks else ():
            run.blocks |= find_blocks(model, layer.gates)
        found = []
        for name, owners in self._owners(active).items():
            block = run.blocks[name]
            changed = override(block)
            if changed:
                run.warn_once(
                    f"LDCP: {name} runs unpruned, because another node or extension has changed "
                    f"{changed} and would lose its effect"
                )
                continue
            if (name, owners) not in run.forwards:
                run.forwards[name, owners] = compact_forward(
                    block, self._gate(name, owners), device, _compute_dtype(model)
                )
            forward = run.forwards[name, owners]
            if forward is not None:
                found.append((block, forward))
        return found

    def _owners(self, active: list[bool]) -> dict[str, Owners]:
        """Block name -> the last active layer that names its inner and its residual site."""
        owner = {
            site: number
            for number, layer in enumerate(self.layers)
            if active[number]
            for site in layer.keep_sets
        }
        blocks = dict.fromkeys(site.rsplit(".", 1)[0] for site in owner)
        return {b: (owner.get(f"{b}.conv1"), owner.get(f"{b}.conv2")) for b in blocks}

    def _gate(self, block: str, owners: Owners) -> BlockGate:
        """The gate of one block, each site as its layer has it."""
        found: list[tuple[Tensor | None, Tensor | None]] = []
        for number, conv in zip(owners, ("conv1", "conv2"), strict=True):
            site = f"{block}.{conv}"
            layer = None if number is None else self.layers[number]
            found.append(
                (layer.keep_sets[site], layer.gates.constant(site)) if layer else (None, None)
            )
        # the padding rule concerns the inner gate alone
        padding = "zero" if owners[0] is None else self.layers[owners[0]].gates.padding
        return BlockGate(padding, *found[0], *found[1])


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype of the maps inside the U-Net: the weights' own, unless the host casts manually."""
    return model.manual_cast_dtype or model.get_dtype()


@contextmanager
def _installed(forwards: list[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Put a ``forward`` on each module, and take it off whatever happens."""
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, _ in forwards:
            vars(module).pop("forward", None)
