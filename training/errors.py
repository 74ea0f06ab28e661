"""The one exception a user is meant to read.

Everything that can go wrong because of what was typed, downloaded or stored is raised as
`UserError`; the command line prints its text without a traceback. Any other exception is a
defect in this code and keeps its traceback.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path


class UserError(Exception):
    """Says what was found, what was expected, and what to do next.

    >>> print(UserError("photo.png is empty.", "an image", "download it again"))
    photo.png is empty.
      Expected: an image
      Next step: download it again
    """

    def __init__(self, found: str, expected: str = "", next_step: str = "") -> None:
        self.found, self.expected, self.next_step = found, expected, next_step
        lines = [found]
        if expected:
            lines.append(f"  Expected: {expected}")
        if next_step:
            lines.append(f"  Next step: {next_step}")
        super().__init__("\n".join(lines))


def refuse_unless_hub_id(source: str, suffixes: Collection[str], expected: str) -> None:
    """Raises UserError unless ``source``, where nothing lies, is `owner/name` without a suffix."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or Path(source).suffix.lower() in suffixes:
        raise UserError(
            f"There is no file or folder {source}.",
            expected,
            f"check the spelling; the path is taken from {Path.cwd()}",
        )


def first_line(error: Exception) -> str:
    """The beginning of what a library says, printable."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "".join(letter if letter.isprintable() else "?" for letter in line[:200])
