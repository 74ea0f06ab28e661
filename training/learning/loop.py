"""The loop that learns gates: two losses, one optimizer, one controller.

`Learning` owns everything that changes from step to step, so that what a step reads and writes is
exactly what a checkpoint holds: a run that goes on from one meets the same images, noise and
timesteps as if it had never stopped, and ends, on a CPU, with the same bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ldcp_core import PrunedSite, SoftGate
from training.config import FitConfig
from training.console import progress
from training.data.encoding import Batch
from training.data.images import Position
from training.errors import UserError
from training.learning.curves import History
from training.learning.learner import (
    ORIGINAL_WEIGHT,
    GateLearner,
    SparsityController,
    default_learning_rate,
    learning_rate_factor,
    new_optimizer,
    noise_scale,
    price_of,
)
from training.learning.processes import Processes
from training.learning.start import Start
from training.learning.stopping import Stopped, StopRequest
from training.model.gating import deviation
from training.step.denoising import Denoising, Problem
from training.step.reuse import WINDOW, Problems

log = logging.getLogger(__name__)

#: share of its steps' learning rates that a logit falls by at least. Measured on the demo (`mid`,
#: target 30%): 9.2, 21.7 and 37.2% after 3, 5 and 8 steps, where this gives 7.9, 16.7 and 29.8%;
#: 9.4% after 60 steps at 0.01, where the bound is 10.2%
LEAST_FALL = 0.5


class Learning:
    """A run of ``steps`` optimizer steps, as far as it has come.

    ``stream`` yields the batches and moves ``position`` along.
    """

    def __init__(
        self,
        config: FitConfig,
        denoising: Denoising,
        learner: GateLearner,
        stream: Iterator[Batch],
        position: Position,
        steps: int,
        processes: Processes,
    ) -> None:
        self.step = 0
        self.processes = processes
        self.steps = steps
        self.learner = learner
        self.history = History(target=config.target_sparsity)
        self._config, self._denoising, self._stream = config, denoising, stream
        window = WINDOW * config.gradient_accumulation
        gated = list(learner.gate_of)
        self._problems = Problems(denoising, stream, position, gated, window, config.reuse)
        self._kept_at_start = learner.keep_sets()
        self._start: Start | None = None
        rate = config.learning_rate or default_learning_rate(steps)
        self._optimizer = new_optimizer(learner, rate, config.sparsity_weight)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, steps)
        )
        self._scaler = torch.amp.GradScaler(
            denoising.model.unet.device.type, enabled=config.precision == "fp16"
        )
        self._controller = SparsityController(config.sparsity_weight, config.target_sparsity, steps)

    @property
    def start(self) -> Start:
        assert self._start is not None, "measure the start, or load a state, first"
        return self._start

    def begin(self, start: Start) -> None:
        """Start at what was measured; a run that goes on has it from its checkpoint."""
        self._use(start)
        self.learner.start_(start.effects, self._price)
        self._problems.begin()

    def pruned(self) -> dict[str, PrunedSite]:
        """What would be pruned by what has been learned so far."""
        constants, rule = self.start.constants, self._config.padding
        return {
            site: PrunedSite(keep, constants[site], rule)
            for site, keep in self.learner.keep_sets().items()
        }

    def next_problems(self, samples: int, least: int = 1) -> list[Problem]:
        """``least`` new problems or more, of ``samples`` images or more, for this process."""
        found: list[Problem] = []
        while len(found) < least or sum(map(len, found)) < samples:
            problem = self._denoising.problem(next(self._stream))
            if len(problem):
                found.append(problem)
        return found

    def reach(self) -> tuple[float, float]:
        """The sparsities between which the steps that are left will bring the learning.

        The higher one is a bound: a step of Adam is at most the learning rate. Beyond them the cut
        at the end goes by what each channel does alone, where the logits began.
        """
        rate, steps = self._optimizer.defaults["lr"], range(self.step, self.steps)
        travel = rate * sum(learning_rate_factor(step, self.steps) for step in steps)
        low, high = (self.learner.pruned_by(torch.tensor(s * travel)) for s in (LEAST_FALL, 1.0))
        return low, high

    def _use(self, start: Start) -> None:
        self._start = start
        target = self._config.target_sparsity
        self._price = price_of(start.effects, self.learner.budget, target)
        # what the reconstruction is measured in: see `training.learning.learner`
        self._unit = self._price / ORIGINAL_WEIGHT

    def advance(self) -> None:
        """One optimizer step.

        Raises UserError when the loss is no number; the state is then still that of the step before
        except for the images and noise drawn.
        """
        scaler = self._scaler
        part = sum(self._reconstruct() for _ in range(self._config.gradient_accumulation))
        reconstruction = self.processes.sum_gradients_(self.learner, part)
        if not math.isfinite(reconstruction):
            raise UserError(
                f"The reconstruction loss became {reconstruction} at step {self.step}.",
                "a finite loss",
                "begin anew with --precision fp32 or bf16, or look for damaged model weights",
            )
        penalty = self.learner.penalty()
        scaler.scale(self._controller.weight * penalty).backward()
        scaler.step(self._optimizer)
        scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        self.learner.clamp_()

        sparsity = self.learner.sparsity()
        self.history.add(reconstruction, penalty.item(), self._controller.weight, sparsity)
        self._controller.update(self.step, sparsity)
        self.step += 1

    def finish(self) -> None:
        """Cut at the target, and count what changed since the start."""
        target = self._config.target_sparsity
        if target is not None:
            log.info(
                "learning ended at a sparsity of %.1f%%; cut by rank of the scores at %.1f%%",
                100 * self.learner.sparsity(),
                100 * target,
            )
            self.learner.settle_(target)
        end = self.learner.keep_sets()
        self.history.changed = sum(
            int((self._kept_at_start[site] != end[site]).sum()) for site in self._kept_at_start
        )

    def _reconstruct(self) -> float:
        """Loss and gradient of the next batch, as its share of a step, in `_unit`."""
        config, constants = self._config, self.start.constants
        answered = next(self._problems)
        masks = self.learner.masks(noise_scale(self.step, self.steps))
        gates = {site: SoftGate(mask, constants[site]) for site, mask in masks.items()}
        if answered is None:
            return 0.0
        problem = answered.problem
        with self._denoising.pruned(answered, gates, config.padding) as output:
            target = problem.target if config.reconstruction == "noise" else answered.dense
            mse = deviation(output, target) / self._unit
            mse = mse * problem.share / config.gradient_accumulation
            self._scaler.scale(mse).backward()
        return mse.item()

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "calibration": vars(self.start),
            "learner": self.learner.state_dict(),
            "learner_generator": self.learner.generator.get_state(),
            **{name: part.state_dict() for name, part in self._parts().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; before the first batch is drawn."""
        self.step = state["step"]
        self._use(Start(**state["calibration"]))
        self.learner.load_state_dict(state["learner"])
        self.learner.generator.set_state(state["learner_generator"])
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "optimizer": self._optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
            "controller": self._controller,
            "history": self.history,
            "problems": self._problems,
        }


def run(
    learning: Learning,
    every: int,
    save: Callable[[], None],
    record: Callable[[Learning], None],
) -> None:
    """Take the steps that are left; ``record`` each, ``save`` after every so many and the last.

    Raises Stopped when Ctrl-C or SIGTERM came; the step was finished and saved.
    """
    bar = progress(None, "learning gates", learning.steps, unit="step", initial=learning.step)
    with bar, StopRequest() as stop:
        while learning.step < learning.steps:
            learning.advance()
            history = learning.history
            bar.set_postfix(
                mse=f"{history.reconstruction[-1]:.2e}",
                l1=f"{history.l1[-1]:.3f}",
                λ=f"{history.weight[-1]:.1e}",
                sparsity=f"{history.sparsity[-1]:.1%}",
                refresh=False,
            )
            bar.update()
            record(learning)
            last = learning.step == learning.steps
            asked = learning.processes.any(stop.asked)
            if asked or (every and (last or learning.step % every == 0)):
                save()
            if asked:
                raise Stopped(f"Stopped after step {learning.step} of {learning.steps}.")
