"""Ctrl-C ends a run between two steps, not within one."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Stopped(KeyboardInterrupt):
    """The user (or the machine's scheduler) asked the run to end, and it did, with all saved."""


class StopRequest:
    """Context in which Ctrl-C and SIGTERM are noted, to be obeyed after the step.

    The second Ctrl-C interrupts at once. Outside the main thread Python can't catch signals, and
    nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nfinishing this step, then saving (Ctrl-C again: stop at once)", file=sys.stderr)
