"""What the commands share: a log of this project's own lines, and errors without a traceback."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from training.errors import UserError

P = ParamSpec("P")
#: libraries whose log says nothing that a user of a command could act on
NOISY = ("httpx", "datasets", "diffusers", "transformers", "matplotlib")


def log_progress(level: int = logging.INFO) -> None:
    """Show log lines as they are, and of the noisy libraries only errors."""
    logging.basicConfig(level=level, format="%(message)s")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)


def explaining(main: Callable[P, int]) -> Callable[P, int]:
    """``main`` that prints what a user can put right, and then returns the exit status 1.

    That is a UserError, a file that can't be had, and what `ldcp_core` says of a value or a gate
    file.
    """

    @wraps(main)
    def explained(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except (UserError, ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1

    return explained
