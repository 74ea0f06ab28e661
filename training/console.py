"""What the commands share: this project's own log lines, progress, errors without a traceback.

Whatever lasts shows how far it has come: a bar on a terminal; in a file or a pipe, where a bar
would be thousands of lines, a line every few seconds.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from operator import length_hint
from pathlib import Path
from typing import Any, ParamSpec, TextIO

import torch
from tqdm import tqdm

from ldcp_core import printable
from training.errors import UserError, first_line

P = ParamSpec("P")
#: libraries whose log says nothing that a user of a command could act on
NOISY = ("httpx", "datasets", "diffusers", "transformers", "matplotlib")
#: a line of progress
LINE = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
#: seconds between two lines of progress where there is no terminal
LINE_EVERY = 5.0


def log_progress() -> None:
    """Show log lines as they are, and of the noisy libraries only errors."""
    take_any_name()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def take_any_name() -> None:
    """Make printing a path escape what the terminal's encoding lacks, instead of ending the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def progress(
    over: Iterable[Any] | None,
    label: str,
    total: int | None = None,
    *,
    unit: str = "item",
    initial: int = 0,
) -> tqdm[Any]:
    """``over`` with its progress on stderr; with None, to `update` by hand.

    Shown where this project's log lines are: of the processes of a fit by the first alone, and not
    to whoever calls a function without setting up a log.
    """
    terminal = sys.stderr.isatty()
    shown = logging.getLogger("training").isEnabledFor(logging.INFO)
    nothing = total == 0 or length_hint(over, 1) == 0
    return tqdm(
        over,
        label,
        total,
        unit=unit,
        initial=initial,
        file=sys.stderr if terminal else _Lines(sys.stderr),
        mininterval=0.1 if terminal else LINE_EVERY,
        dynamic_ncols=terminal,
        bar_format=None if terminal else LINE,
        disable=nothing or not shown,
    )


class _Lines:
    """A file for tqdm, which overwrites its line: each state on a line of its own, once."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._last = file, ""

    def write(self, text: str) -> None:
        line = text.strip()
        if line and line != self._last:
            self._file.write(f"{line}\n")
            self._last = line

    def flush(self) -> None:
        self._file.flush()


def explaining(main: Callable[P, int]) -> Callable[P, int]:
    """``main`` that prints what a user can put right, and then returns the exit status 1.

    That is a UserError, a file that can't be had, and what `ldcp_core` says of a value or a gate
    file. After Ctrl-C it returns 130.
    """

    @wraps(main)
    def explained(*args: P.args, **kwargs: P.kwargs) -> int:
        take_any_name()
        try:
            return main(*args, **kwargs)
        except (UserError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except torch.OutOfMemoryError as error:
            found, expected = first_line(error), "a device with enough memory"
            told = UserError(found, expected, "take less at once, or --device cpu")
            print(f"error: {told}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stopped:
            print(str(stopped) or "interrupted", file=sys.stderr)
            return 130

    return explained


def table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a table in Markdown.

    >>> table(["a", "b"], [["1", "2"]])
    ['| a | b |', '|---|---|', '| 1 | 2 |']
    """
    lines = [f"| {' | '.join(row)} |" for row in (heads, *rows)]
    return [lines[0], f"|{'---|' * len(heads)}", *lines[1:]]


def name_of(path: str) -> str:
    """What a path ends in, `printable`: its folders are nobody else's business."""
    return printable(Path(path).name)
