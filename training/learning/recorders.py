"""What is written of a run while it goes: the history as CSV, TensorBoard, and sample images.

Recorders read a `Learning` after each step and change nothing in it: what is learned does not
depend on what is recorded.
"""

from __future__ import annotations

import csv
import io
import logging
from pathlib import Path
from typing import Any, Protocol

from ldcp_core import write_atomically
from training.errors import UserError
from training.learning.loop import Learning
from training.learning.sample_sheet import SampleSheet
from training.output import write

log = logging.getLogger(__name__)

COLUMNS = ("step", "reconstruction", "mean_score", "weight", "sparsity")
#: score histograms over a run
HISTOGRAMS = 50


class Recorder(Protocol):
    def record(self, learning: Learning) -> None:
        """After each step."""

    def close(self) -> None:
        """When the run ends, however it does."""


class CsvHistory:
    """One line per step, there as soon as the step is done.

    Begins with the steps that a resumed run already took, so that the file always tells one run
    from its first step. A disk that refuses costs the file, and not the run.
    """

    def __init__(self, path: Path, learning: Learning) -> None:
        self._path = path
        self._file: io.TextIOBase | None = None
        text = io.StringIO()
        csv.writer(text).writerow(COLUMNS)
        for step in range(learning.step):
            csv.writer(text).writerow((step, *learning.history.row(step)))
        try:
            write_atomically(path, text.getvalue().encode())
            self._file = path.open("a", newline="", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def record(self, learning: Learning) -> None:
        if self._file is None:
            return
        try:
            step = learning.step - 1
            csv.writer(self._file).writerow((step, *learning.history.row(step)))
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _give_up(self, error: OSError) -> None:
        log.warning("%s can't be written (%s): going on without it.", self._path, error)
        self._file = None


class TensorBoard:
    """Scalars of every step, and now and then histograms of the scores.

    Raises UserError where the package tensorboard is not installed.
    """

    def __init__(self, folder: Path, learning: Learning) -> None:
        self._writer = summary_writer()(str(folder), purge_step=learning.step)
        self._interval = max(1, learning.steps // HISTOGRAMS)

    def record(self, learning: Learning) -> None:
        for name, value in zip(COLUMNS[1:], learning.history.row(learning.step - 1), strict=True):
            self._writer.add_scalar(name, value, learning.step)
        if learning.step % self._interval == 0 or learning.step == learning.steps:
            for site, score in learning.learner.scores().items():
                self._writer.add_histogram(f"scores/{site}", score, learning.step)

    def close(self) -> None:
        self._writer.close()


class SampleImages:
    """Dense against pruned, every so many steps, as PNG files in ``folder``."""

    def __init__(self, folder: Path, sheet: SampleSheet, every: int) -> None:
        self._folder, self._sheet, self._every = folder, sheet, every

    def record(self, learning: Learning) -> None:
        if learning.step % self._every:
            return
        picture = self._sheet.picture(learning.pruned())
        path = self._folder / f"step-{learning.step:08d}.png"
        try:
            self._folder.mkdir(exist_ok=True)
            write(path, picture)
        except OSError as error:
            log.warning("%s can't be written: %s.", path, error)

    def close(self) -> None:
        pass


def summary_writer() -> Any:
    """TensorBoard's writer; raises UserError where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            f"--tensorboard needs the package tensorboard ({error}).",
            "an environment with it",
            "pip install tensorboard, or leave out --tensorboard (the CSV holds the same numbers)",
        ) from error
    return SummaryWriter
