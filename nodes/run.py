"""One run of a patched model: what is worked out once, and what it did.

A run is what a sampler does between ComfyUI's ON_PRE_RUN and ON_CLEANUP. The sampler's schedule is
read once, compact weights are selected when a step first needs them, and the full weights that
they stand in for are parked for the rest of the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ldcp_core import (
    ALWAYS,
    BlockGate,
    FeedForwardGate,
    Gates,
    Schedule,
    block_gates,
    blocks_of,
    sites_of,
    step_index,
)
from .blocks import Compact, Forward, compact, override
from .parking import FullWeights, Parking, nbytes
from .record import RunRecord
from .sites import find_blocks
from .weights import NotCaptured

log = logging.getLogger("ldcp")

#: for each site of one block the position of the layer that its gate comes from
Owners = tuple[int | None, ...]


@dataclass(frozen=True)
class Layer:
    """What one Apply node adds: the channels it keeps, the constants for the others, and when.

    ``full_weights`` says where the full weights of pruned convolutions stay during a run:
    "offload": off the compute device, "keep": on it, "auto": off it when every step prunes.
    ``remark`` is what the user should know about these gates on this model, or empty.
    """

    gates: Gates
    keep_sets: Mapping[str, Tensor]
    schedule: Schedule = ALWAYS
    full_weights: FullWeights = "auto"
    remark: str = ""

    def prunes(self, block: str) -> bool:
        return block in blocks_of(self.keep_sets)


class Run:
    """State of one run on one model; ``model`` is the host's BaseModel throughout.

    Without ``parking`` (the host has announced no run) no weight moves.
    """

    def __init__(self, layers: tuple[Layer, ...], parking: Parking | None = None) -> None:
        self.layers = layers
        self.parking = parking
        self.record = RunRecord()
        self._blocks: dict[str, nn.Module] = {}
        self._compacts: dict[tuple[str, Owners], Compact | None] = {}
        self._schedule: Tensor | None = None
        self._sigmas: list[float] = []
        self._percent_sigmas: dict[float, float] = {}
        self._pruned_at: list[Tensor] = []

    def forget_weights(self) -> None:
        """Drop what was selected; the next pruned evaluation selects anew."""
        self._compacts.clear()

    def active(self, model: Any, t: Tensor, options: Mapping[str, Any]) -> list[bool]:
        """Which layers prune the evaluation that is about to start."""
        self._read_schedule(options.get("sample_sigmas"))
        if all(layer.schedule == ALWAYS for layer in self.layers):
            return [True] * len(self.layers)  # spares the copy of sigma from the device
        sigma = float(torch.max(options.get("sigmas", t)))
        # a node that evaluates the model without a sampler has no steps
        step = step_index(sigma, self._sigmas) if self._sigmas else -1
        return [self._prunes_at(model, layer, step, sigma) for layer in self.layers]

    def forwards(
        self, model: Any, device: torch.device, active: list[bool]
    ) -> list[tuple[nn.Module, Forward]]:
        """Blocks and their forwards for one evaluation; selects weights where still missing."""
        for layer in self.layers if not self._blocks else ():
            self._blocks |= find_blocks(model, layer.gates)
        found = []
        for name, owners in self._owners(active).items():
            block = self._blocks[name]
            changed = override(block)
            if changed:
                self._note(
                    f"{name} runs unpruned, because another node or extension has changed "
                    f"{changed} and would lose its effect"
                )
                continue
            if (name, owners) not in self._compacts:
                self._select(model, device, name, owners)
            selected = self._compacts[name, owners]
            if selected is not None:
                found.append((block, selected.forward))
        return found

    def count(self, t: Tensor, options: Mapping[str, Any], pruned: bool) -> None:
        """Count one evaluation; which step it belonged to is worked out at the end."""
        self.record.evaluations += 1
        if pruned:
            self.record.pruned_evaluations += 1
            self._pruned_at.append(options.get("sigmas", t))

    def finish(self) -> None:
        """Work out which steps had pruned evaluations, with one copy from the device."""
        if self._pruned_at and self._sigmas:
            sigmas = torch.stack([sigma.max() for sigma in self._pruned_at]).tolist()
            self.record.pruned_steps.update(step_index(sigma, self._sigmas) for sigma in sigmas)
        self._pruned_at.clear()

    def _read_schedule(self, schedule: Tensor | None) -> None:
        """Copy the sampler's schedule to the host once; samplers may write into it later."""
        if schedule is None or schedule is self._schedule:
            return
        self._schedule, self._sigmas = schedule, schedule.tolist()
        steps = self.record.steps = len(self._sigmas) - 1
        beyond = [str(r) for layer in self.layers for r in layer.schedule.beyond(steps)]
        if beyond:
            self._note(
                f"this run has {steps} step{'s' * (steps != 1)} (0 to {steps - 1}); the range "
                f"{', '.join(beyond)} lies past the last one and prunes nothing"
            )

    def _prunes_at(self, model: Any, layer: Layer, step: int, sigma: float) -> bool:
        def percent_to_sigma(percent: float) -> float:
            known = self._percent_sigmas
            if percent not in known:
                known[percent] = float(model.model_sampling.percent_to_sigma(percent))
            return known[percent]

        return layer.schedule.is_active(step, sigma, percent_to_sigma)

    def _owners(self, active: list[bool]) -> dict[str, Owners]:
        """Block name -> for each of its sites the last active layer that names it."""
        owner = {
            site: number
            for number, layer in enumerate(self.layers)
            if active[number]
            for site in layer.keep_sets
        }
        return {block: tuple(map(owner.get, sites_of(block))) for block in blocks_of(owner)}

    def _gate(self, block: str, owners: Owners) -> BlockGate | FeedForwardGate:
        """The gate of one block, each site as its layer has it."""
        found = {
            site: self.layers[number]
            for site, number in zip(sites_of(block), owners, strict=True)
            if number is not None
        }
        # the padding rule concerns the first site alone
        padding = "zero" if owners[0] is None else self.layers[owners[0]].gates.padding
        keep_sets = {site: layer.keep_sets[site] for site, layer in found.items()}
        constants = {site: layer.gates.constant(site) for site, layer in found.items()}
        return block_gates(keep_sets, constants, padding)[block]

    def _select(self, model: Any, device: torch.device, name: str, owners: Owners) -> None:
        """Select one block's compact weights, and park the full ones that nobody needs now."""
        gate, dtype = self._gate(name, owners), _compute_dtype(model)
        try:
            selected = compact(self._blocks[name], gate, device, dtype)
        except NotCaptured as error:
            self._note(f"{name} runs unpruned, because it has {error}")
            selected = None
        self._compacts[name, owners] = selected
        if selected is None:
            return
        reason = self._keeps_full(model, name)
        if not reason and self.parking is not None:
            parked = [part for part in selected.replaced if self.parking.park(model, part)]
            if len(parked) < len(selected.pruned):
                reason = "another extension holds or replaces some of these layers"
        self.record.kept_full = self.record.kept_full or reason
        self._account(device)

    def _keeps_full(self, model: Any, block: str) -> str:
        """Why a block's full weights stay on the compute device; empty when they leave."""
        if self.parking is None:
            return "the model was evaluated outside a sampler"
        if self.parking.places.obstacle:
            return self.parking.places.obstacle
        layers = [layer for layer in self.layers if layer.prunes(block)]
        choices = {layer.full_weights for layer in layers}
        if "keep" in choices:
            return "full_weights is 'keep'"
        if "offload" in choices or all(self._prunes_always(model, layer) for layer in layers):
            return ""
        return "some steps are not pruned, and full_weights is 'auto'"

    def _prunes_always(self, model: Any, layer: Layer) -> bool:
        """Whether a layer prunes every step of this run."""
        steps = list(enumerate(self._sigmas[:-1]))
        return layer.schedule == ALWAYS or (
            bool(steps) and all(self._prunes_at(model, layer, *step) for step in steps)
        )

    def _account(self, device: torch.device) -> None:
        """Count the pruned layers' bytes, and those that are on the compute device."""
        selected = [c for c in self._compacts.values() if c is not None]
        pruned = list(dict.fromkeys(part for c in selected for part in c.pruned))
        full = [part for part in pruned if part.weight.device == device]
        weights = {part.weight.data_ptr() for part in full}
        copies = {t.data_ptr(): t.nbytes for c in selected for t in c.tensors}
        resident = sum(nbytes(part) for part in full)
        resident += sum(size for pointer, size in copies.items() if pointer not in weights)
        self.record.device = str(device)
        self.record.full_bytes = sum(nbytes(part) for part in pruned)
        self.record.resident_bytes = max(self.record.resident_bytes, resident)

    def _note(self, sentence: str) -> None:
        """Keep what the user should know of this run, once, and log it."""
        if sentence not in self.record.notes:
            self.record.notes.append(sentence)
            log.warning("LDCP: %s", sentence)


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype of the maps inside the U-Net: the weights' own, unless the host casts manually."""
    return model.manual_cast_dtype or model.get_dtype()
