"""What stands in for pruned channels, trained by gradient: the dense model is the teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from ldcp_core import Correction, Gates, SoftGate
from training.console import progress
from training.model.gating import deviation, masked
from training.step.denoising import Denoising, Problem

#: of Adam, unless asked otherwise; the rate falls to zero
STEPS, LEARNING_RATE = 200, 2e-3
#: the gradient's norm is cut to this many times the running mean of the norms before
CLIP = 3.0


def recovered(
    denoising: Denoising,
    next_problems: Callable[[], Sequence[Problem]],
    gates: Gates,
    steps: int = STEPS,
    learning_rate: float = LEARNING_RATE,
) -> Gates:
    """The gates with constants and corrections trained so that the answers are the dense model's.

    Each step draws ``next_problems``. Scores, and so the channels kept, stay as they are. Of gates
    with stages the corrections alone are trained, for the stage that has them: all stages share
    the constants. Gates that prune nothing come back as they are.
    """
    stand_ins = StandIns(gates).to(denoising.model.unet.device)
    if not stand_ins.masks:
        return gates
    optimizer = torch.optim.Adam(stand_ins.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    norm = 0.0
    for _ in progress(range(steps), "recovering", unit="step"):
        problems = next_problems()
        for problem in problems:
            dense = denoising.dense(problem)
            with masked(denoising.model.unet, stand_ins.soft_gates(), gates.padding):
                output = denoising.predict(problem)
                (deviation(output, dense) / len(problems)).backward()
        found = nn.utils.clip_grad_norm_(stand_ins.parameters(), CLIP * norm or torch.inf)
        norm = 0.9 * norm + 0.1 * min(found.item(), CLIP * norm or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return stand_ins.gates()


class StandIns(nn.Module):
    """Constants and corrections of pruned sites as parameters, in float32."""

    def __init__(self, gates: Gates) -> None:
        super().__init__()
        keep_sets = {site: keep for site, keep in gates.keep_sets().items() if not bool(keep.all())}
        self._gates = gates
        self._keys = {site: str(number) for number, site in enumerate(keep_sets)}
        self.masks = {site: keep.float() for site, keep in keep_sets.items()}
        self.constants = nn.ParameterDict(
            {self._keys[site]: gates.constant(site).clone() for site in keep_sets}
        )
        self.constants.requires_grad_(not gates.stages)
        self.corrections = nn.ModuleDict(
            {
                self._keys[site]: nn.ParameterDict(
                    {part: value.float().clone() for part, value in vars(correction).items()}
                )
                for site, correction in gates.corrections.items()
            }
        )

    def soft_gates(self) -> dict[str, SoftGate]:
        """Site -> gate of the masked reference, differentiable in all parameters."""
        found = {}
        for site, key in self._keys.items():
            constant, correction = self.constants[key], None
            if key in self.corrections:
                correction = Correction(**dict(self.corrections[key].items()))  # type: ignore[operator]
            found[site] = SoftGate(self.masks[site], constant, correction)
        return found

    def gates(self) -> Gates:
        """The gates with what has been trained, as a file holds it."""
        constants, found = dict(self._gates.constants), {}
        for site, gate in self.soft_gates().items():
            constants[site] = gate.constant.detach().cpu().clone()
            if gate.correction is not None:
                left, right, bias = (t.detach().cpu() for t in vars(gate.correction).values())
                found[site] = Correction(left.half(), right.half(), bias.clone())
        return replace(self._gates, constants=constants, corrections=found)
