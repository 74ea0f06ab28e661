"""One run of a patched model: what is worked out once, and what it did.

A run is what a sampler does between ComfyUI's ON_PRE_RUN and ON_CLEANUP. The sampler's schedule is
read once, compact weights are selected when a step first needs them, and the full weights that
they stand in for are parked for the rest of the run.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ...ldcp_core import (
    ALWAYS,
    Gates,
    PrunedSite,
    Schedule,
    block_gates,
    blocks_of,
    sites_of,
    step_index,
)
from .blocks import Compact, Forward, HostBlock, Judgement
from .changes import changed_attribute
from .dynamic_vram import Residency, full_bytes, residency, resident_bytes
from .model import examine
from .parking import FullWeights, Parking
from .record import RunRecord
from .weights import NotCaptured

log = logging.getLogger("ldcp")

#: for each site of one block the position of the layer that its gate comes from
Owners = tuple[int | None, ...]
Key = tuple[str, Owners]  # block, and its sites' owners
BY_OTHERS = "another node or extension has "
HELD = (
    "ComfyUI has some of them in VRAM (for steps that are not pruned, from an earlier run, or on a "
    "page with other weights) until it needs the room"
)


@dataclass(frozen=True)
class Layer:
    """What one Apply node adds: the channels it keeps, the constants for the others, and when.

    ``full_weights`` says where the full weights of pruned layers stay during a run:
    "offload": off the compute device, "keep": on it, "auto": off it when every step prunes.
    Under dynamic VRAM that is up to the host, and "keep" is said of the compact copies in steps
    that this layer does not prune.
    ``remark`` is what the user should know about these gates on this model, or empty.
    """

    gates: Gates
    keep_sets: Mapping[str, Tensor]
    schedule: Schedule = ALWAYS
    full_weights: FullWeights = "auto"
    remark: str = ""

    @property
    def chosen(self) -> Gates:
        """The gates of the sites that it prunes."""
        return replace(self.gates, scores={s: self.gates.scores[s] for s in self.keep_sets})

    def prunes(self, block: str) -> bool:
        return block in blocks_of(self.keep_sets)


class Run:
    """State of one run on one model; ``model`` is the host's BaseModel throughout.

    Without ``parking`` (the host has announced no run) no weight moves.
    """

    def __init__(self, layers: tuple[Layer, ...], parking: Parking | None = None) -> None:
        self.layers = layers
        self.parking = parking
        self.record = RunRecord(sampled=parking is not None)
        self._blocks: dict[str, HostBlock] = {}
        #: the latest judgements of each block: one from outside the U-Net and one from inside
        self._judgements: dict[str, deque[Judgement]] = defaultdict(lambda: deque(maxlen=2))
        #: the layers that each block began the run with
        self._layers: dict[str, list[nn.Module]] = {}
        #: why blocks run their norm on all channels until the run ends
        self._rows_only: dict[str, str] = {}
        self._compacts: dict[Key, Compact | None] = {}
        #: the layers of the network that the run has pruned (a set in order)
        self._gated: dict[nn.Module, None] = {}
        #: what was in VRAM when their bytes were counted; None where more is selected since
        self._counted: Residency | None = None
        self._forwards: dict[Key, tuple[Compact, Judgement, Forward]] = {}
        #: the layers that pruned the latest evaluation
        self._active: list[bool] = []
        self._schedule: Tensor | None = None
        self._sigmas: list[float] = []
        #: the step of the latest evaluation, -1 where a node evaluates without a sampler
        self._step = -1
        self._percent_sigmas: dict[float, float] = {}
        self._pruned_at: list[Tensor] = []
        self._evaluated: tuple[ref[Any], torch.device] | None = None
        #: what the evaluation that is going on has come to: a block to prune, and a pruned one
        self._reached = self._pruned = False
        #: evaluations that came to none of the blocks to prune
        self._missed = 0
        self._logged = 0

    def forget_weights(self) -> None:
        """Drop what was selected; the next pruned evaluation selects anew."""
        self._compacts.clear()
        self._forwards.clear()

    def give_way(self) -> None:
        """The host has unloaded the model to make room: under dynamic VRAM the copies go too."""
        if self._dynamic:
            self.forget_weights()

    def active(self, model: Any, t: Tensor, options: Mapping[str, Any]) -> list[bool]:
        """Which layers prune the evaluation that is about to start."""
        self.record.evaluations += 1
        earlier, self._active = self._active, self._active_layers(model, t, options)
        if self._active != earlier and self._compacts and not self._keeps_copies:
            if self._dynamic:
                self.forget_weights()  # the full weights may need the room now
            else:
                self._forget_past(model)
        return self._active

    def _forget_past(self, model: Any) -> None:
        """Drop the weights that neither this step nor a later one of the run needs."""
        later = list(enumerate(self._sigmas[:-1]))[self._step + 1 :]
        needed = {tuple(self._active)}
        needed |= {tuple(self._prunes_at(model, x, *at) for x in self.layers) for at in later}
        keys = {key for active in needed for key in self._owners(active).items()}
        for known in (self._compacts, self._forwards):
            for key in known.keys() - keys:
                del known[key]

    @property
    def _dynamic(self) -> bool:
        return self.parking is not None and self.parking.places.dynamic

    @property
    def _keeps_copies(self) -> bool:
        return any(layer.full_weights == "keep" for layer in self.layers)

    def _active_layers(self, model: Any, t: Tensor, options: Mapping[str, Any]) -> list[bool]:
        self._reached = self._pruned = False
        self._read_schedule(options.get("sample_sigmas"))
        if all(layer.schedule == ALWAYS for layer in self.layers):
            return [True] * len(self.layers)  # spares the copy of sigma from the device
        sigma = float(torch.max(options.get("sigmas", t)))
        self._step = step_index(sigma, self._sigmas) if self._sigmas else -1
        return [self._prunes_at(model, layer, self._step, sigma) for layer in self.layers]

    def forwards(
        self, model: Any, device: torch.device, options: Mapping[str, Any], active: list[bool]
    ) -> list[tuple[nn.Module, Forward]]:
        """Blocks and their forwards for one evaluation; selects weights where still missing."""
        for layer in self.layers if not self._blocks else ():
            self._find_blocks(model, layer.chosen)
        self._evaluated = ref(model), device
        found = []
        for key in self._owners(active).items():
            if key[0] not in self._blocks:
                continue
            host, judgement = self._blocks[key[0]], self._judgement(key[0])
            block = host.module
            changed = changed_attribute(block, "forward") or host.passed_over(options)
            selected = self._suitable(key, judgement, changed)
            if selected is not None:
                found.append((block, self._forward(key, selected, judgement)))
        if self._counted is None:
            self._account()
        return found

    def _find_blocks(self, model: Any, gates: Gates) -> None:
        """Look for the blocks; one that was rebuilt since the gates were attached is left alone."""
        found, problems = examine(model, gates)
        self._blocks |= found
        for name, problem in problems.items():
            self.record.note_block(name, "unpruned", problem)

    def _judgement(self, name: str) -> Judgement:
        """What other extensions have done to a block by now."""
        known = self._judgements[name]
        for judgement in known:
            if judgement.holds():
                return judgement
        now = self._blocks[name].judge()
        if now.layers != self._layers.setdefault(name, now.layers):
            now = replace(now, bypassed="exchanged one of its layers during the run")
        known.append(now)
        return now

    def _suitable(self, key: Key, judgement: Judgement, changed: str = "") -> Compact | None:
        """The compact form of a block that a judgement allows; None when it runs as it is.

        ``changed``: what others have done to the block's own ``forward``.
        """
        name, owners = key
        if changed or judgement.bypassed:
            self.record.note_block(name, "unpruned", BY_OTHERS + (changed or judgement.bypassed))
            return None
        if judgement.folded and name not in self._rows_only:
            self._rows_only[name] = BY_OTHERS + judgement.folded
            for known in (self._compacts, self._forwards):  # what was selected to be folded
                for other in [other for other in known if other[0] == name]:
                    del known[other]
        if key not in self._compacts:
            assert self._evaluated is not None
            model, device = self._evaluated
            self._select(model(), device, name, owners)
        return self._compacts[key]

    def _forward(self, key: Key, selected: Compact, judgement: Judgement) -> Forward:
        """What to put on a block: its compact form, for as long as the judgement holds.

        The same object for as long as nothing changes. Another run's is not compiled anew either:
        torch.compile looks at what a forward holds, and tensors of the same shape are the same.
        """
        known = self._forwards.get(key)
        if known is not None and known[0] is selected and known[1] is judgement:
            return known[2]

        def forward(*inputs: Tensor, **options: Any) -> Tensor:
            if not judgement.holds():
                return self._changed_meanwhile(key, *inputs, **options)
            self._pruned = True
            return selected.forward(*inputs, **options)

        self._forwards[key] = selected, judgement, forward
        return forward

    @torch.compiler.disable
    def _changed_meanwhile(self, key: Key, *inputs: Tensor, **options: Any) -> Tensor:
        """The output of a block that an extension has changed since the evaluation began."""
        block, judgement = self._blocks[key[0]].module, self._judgement(key[0])
        self._reached = True
        selected = self._suitable(key, judgement)
        if selected is None:
            return type(block).forward(block, *inputs, **options)
        self._pruned = True
        return selected.forward(*inputs, **options)

    def count(self, t: Tensor, options: Mapping[str, Any], wanted: bool) -> None:
        """Count the evaluation that has ended; which step it was is worked out at the end.

        ``wanted``: it should have been pruned.
        """
        self.record.pruning = self._pruned
        if self._pruned:
            self._account()
            self.record.pruned_evaluations += 1
            self._pruned_at.append(options.get("sigmas", t))
        self._missed += wanted and not (self._pruned or self._reached)
        self._log_notes()

    def finish(self) -> None:
        """Work out which steps had pruned evaluations, with one copy from the device."""
        if self._pruned_at and self._sigmas:
            sigmas = torch.stack([sigma.max() for sigma in self._pruned_at]).tolist()
            self.record.pruned_steps.update(step_index(sigma, self._sigmas) for sigma in sigmas)
        self._pruned_at.clear()
        if self.record.sampled and not self.record.evaluations:
            self.record.note(
                "this run never asked the model, so nothing was pruned; unless it was interrupted "
                "or had no steps, another node computed in the model's place (a cache, say) or "
                "evaluated it with another model's options (as DualModelGuider its model_negative)"
            )
        if self._missed:
            self.record.note(
                f"{self._missed} of {self.record.evaluations} evaluations did not reach the pruned "
                "layers and were not pruned, because another node (a cache, say) computed in their "
                "place"
            )
        self._log_notes()

    def _read_schedule(self, schedule: Tensor | None) -> None:
        """Copy the sampler's schedule to the host once; samplers may write into it later."""
        if schedule is None or schedule is self._schedule:
            return
        self._schedule, self._sigmas = schedule, schedule.tolist()
        steps = self.record.steps = len(self._sigmas) - 1
        ranges = [str(r) for layer in self.layers for r in layer.schedule.beyond(steps)]
        beyond = list(dict.fromkeys(ranges))
        if beyond:
            self.record.note(
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

    def _owners(self, active: Sequence[bool]) -> dict[str, Owners]:
        """Block name -> for each of its sites the last active layer that names it."""
        owner = {
            site: number
            for number, layer in enumerate(self.layers)
            if active[number]
            for site in layer.keep_sets
        }
        return {block: tuple(map(owner.get, sites_of(block))) for block in blocks_of(owner)}

    def _gate(self, block: str, owners: Owners) -> Any:
        """The gate of one block, each site as its layer has it."""
        pruned: dict[str, PrunedSite] = {}
        for site, number in zip(sites_of(block), owners, strict=True):
            if number is not None:
                layer = self.layers[number]
                pruned |= layer.gates.pruned({site: layer.keep_sets[site]})
        return block_gates(pruned)[block]

    def _select(self, model: Any, device: torch.device, name: str, owners: Owners) -> None:
        """Select one block's compact weights, and park the full ones that nobody needs now."""
        gate, dtype = self._gate(name, owners), _compute_dtype(model)
        try:
            reason = self._rows_only.get(name, "")
            selected = self._blocks[name].compact(gate, device, dtype, reason)
        except NotCaptured as error:
            self.record.note_block(name, "unpruned", f"of {error}")
            selected = None
        self._compacts[name, owners] = selected
        if selected is None:
            return
        self._gated |= dict.fromkeys(selected.layers)
        self._counted = None
        if selected.rows_only:
            self.record.note_block(name, "with a part of the savings", selected.rows_only)
        reason = self._keeps_full(model, name)
        if not reason and self.parking is not None:
            parked = {part for part in selected.replaced if self.parking.park(model, part)}
            if parked < set(selected.replaced):
                reason = "another extension holds or replaces some of these layers"
        self.record.kept_full = self.record.kept_full or reason

    def _keeps_full(self, model: Any, block: str) -> str:
        """Why a block's full weights stay on the compute device; empty when they leave."""
        if self.parking is None:
            return "the model was evaluated outside a sampler"
        if self.parking.places.obstacle or self._dynamic:
            return self.parking.places.obstacle
        layers = [layer for layer in self.layers if layer.prunes(block)]
        choices = {layer.full_weights for layer in layers}
        if "keep" in choices:
            return "full_weights is 'keep'"
        if "offload" in choices or self._always_pruned(model, layers):
            return ""
        return "some steps are not pruned, and full_weights is 'auto'"

    def _always_pruned(self, model: Any, layers: Sequence[Layer]) -> bool:
        """Whether in every step of this run one of the layers prunes."""
        steps = list(enumerate(self._sigmas[:-1]))
        return any(layer.schedule == ALWAYS for layer in layers) or (
            bool(steps)
            and all(any(self._prunes_at(model, layer, *at) for layer in layers) for at in steps)
        )

    def _account(self) -> None:
        """Count the pruned layers' bytes, and those on the compute device, if they may differ."""
        pages = residency(self._gated)
        if pages == self._counted and None not in pages.values():
            return
        self._counted = pages
        assert self._evaluated is not None
        device = self._evaluated[1]
        selected = [c for c in self._compacts.values() if c is not None]
        weights = {part.weight.data_ptr() for part in self._gated if part.weight.device == device}
        copies = {t.data_ptr(): t.nbytes for c in selected for t in c.tensors}
        full = sum(resident_bytes(part, device, pages) for part in self._gated)
        resident = full + sum(size for place, size in copies.items() if place not in weights)
        if full and self._dynamic:
            self.record.kept_full = self.record.kept_full or HELD
        self.record.device = str(device)
        self.record.full_bytes = sum(full_bytes(part) for part in self._gated)
        self.record.resident_bytes = max(self.record.resident_bytes, resident)

    def _log_notes(self) -> None:
        """Log what has been noted since the last time."""
        for note in self.record.notes[self._logged :]:
            log.warning("LDCP: %s", note)
        self._logged = len(self.record.notes)


def _compute_dtype(model: Any) -> torch.dtype:
    """The dtype of the maps inside the U-Net: the weights' own, unless the host casts manually."""
    return model.manual_cast_dtype or model.get_dtype()
