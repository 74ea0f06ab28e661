"""How a message shows a value that somebody else wrote: escaped, on one line, and never at length.

Widgets, prompts and files may hold megabytes or control characters; an error that echoes them
whole floods a log, a dialog, and a server's memory.
"""

from __future__ import annotations

import reprlib

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def quoted(value: object) -> str:
    """The ``repr`` of a value in one printable line, the middle left out where it is long.

    >>> quoted("mid"), len(quoted("mid" * 10**6))
    ("'mid'", 80)
    """
    return _short.repr(value)
