"""Problems met more than once: the dense model answers each of them a single time.

A step spends half of its time or more on what its gates do not change: the dense answer, and all
that lies before the first gate. Both belong to an image, a noise and a timestep, while every step
tries other channels. So a window of batches is drawn, answered, and met several times over before
the next one is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from training.data.encoding import Batch
from training.data.images import Position
from training.step.denoising import Answered, Denoising

#: optimizer steps between two meetings of a problem
WINDOW = 8


class Problems:
    """The answered problems of a run, in the order in which its steps meet them.

    Each window of ``window`` batches of ``stream`` comes ``times`` times in a row; of the window
    the answers are kept, in the host's memory. ``begin`` first, or load a state.
    """

    def __init__(
        self,
        denoising: Denoising,
        stream: Iterator[Batch],
        position: Position,
        sites: Sequence[str],
        window: int,
        times: int,
    ) -> None:
        self._denoising, self._stream, self._position = denoising, stream, position
        self._sites = list(sites)
        self._window, self._times = (window, times) if times > 1 else (1, 1)
        self._start: dict[str, Any] = {}
        self._held: list[Answered | None] = []
        self._met = 0

    def begin(self) -> None:
        """Start a window with what the stream gives next."""
        self._start = {
            "position": asdict(self._position),
            "generator": self._denoising.generator.get_state(),
        }
        self._held, self._met = [], 0

    def __next__(self) -> Answered | None:
        """The next problem; None where a batch has no images for this process."""
        if self._met < self._window:
            self._held.append(self._draw())
        found = self._held[self._met % self._window]
        self._met += 1
        if self._met == self._window * self._times:
            self.begin()
        return None if found is None else found.to(self._denoising.model.unet.conv_in.weight.device)

    def _draw(self) -> Answered | None:
        problem = self._denoising.problem(next(self._stream))
        if not len(problem):  # the last batch of an epoch may be smaller than there are processes
            return None
        answered = self._denoising.answered(problem, self._sites)
        return answered if self._window == 1 else answered.to(torch.device("cpu"))

    def state_dict(self) -> dict[str, Any]:
        return {**self._start, "met": self._met}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to the start of the window and answer again what was drawn of it."""
        vars(self._position).update(state["position"])
        self._denoising.generator.set_state(state["generator"])
        self.begin()
        self._met = state["met"]
        self._held = [self._draw() for _ in range(min(self._met, self._window))]
