"""What the commands share: a log of this project's own lines, and errors without a traceback."""

from __future__ import annotations

import io
import logging
import sys
import unicodedata
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import ParamSpec

from training.errors import UserError

P = ParamSpec("P")
#: libraries whose log says nothing that a user of a command could act on
NOISY = ("httpx", "datasets", "diffusers", "transformers", "matplotlib")

#: Unicode's categories of control codes, of invisible marks that turn writing around, of halves of
#: a character, and of line and paragraph ends
UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def log_progress(level: int = logging.INFO) -> None:
    """Show log lines as they are, and of the noisy libraries only errors."""
    take_any_name()
    logging.basicConfig(level=level, format="%(message)s")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def take_any_name() -> None:
    """Make printing a path escape what the terminal's encoding lacks, instead of ending the run."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def explaining(main: Callable[P, int]) -> Callable[P, int]:
    """``main`` that prints what a user can put right, and then returns the exit status 1.

    That is a UserError, a file that can't be had, and what `ldcp_core` says of a value or a gate
    file.
    """

    @wraps(main)
    def explained(*args: P.args, **kwargs: P.kwargs) -> int:
        take_any_name()
        try:
            return main(*args, **kwargs)
        except (UserError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return explained


def printable(text: str) -> str:
    r"""``text`` in one line that any terminal, page and file takes: escaped where it is no writing.

    File names of POSIX may hold line ends, a terminal's control codes, and what is not Unicode.

    >>> print(printable("face \x1b[2J \udcff"))
    face \x1b[2J \udcff
    """
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNPRINTABLE else c
        for c in text
    )


def name_of(path: str) -> str:
    """What a path ends in, `printable`: its folders are nobody else's business."""
    return printable(Path(path).name)
