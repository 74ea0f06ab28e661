"""Text from outside, made fit to be shown: one printable line, of a length that is known.

A field of a gate file, a file's name, a widget's value may hold anything: escape sequences that
steer a terminal, line breaks that forge the row of a table, Markdown, megabytes. Whatever of this
kind a message, a log line, a table or a picture shows goes through here.
"""

from __future__ import annotations

import re
import reprlib

#: characters shown of a value, and of the path of a file
QUOTED, PATH = 120, 160
#: what Markdown reads as syntax inside a line, also addresses that turn into links by themselves;
#: an underscore between letters is none
SYNTAX = re.compile(r"[\\`*\[\]<>|~^&$:@#!]|(?<![^\W_])_|_(?![^\W_])|(?<=www)\.", re.IGNORECASE)


def one_line(found: object, most: int = QUOTED) -> str:
    """What a message may show of ``found``: printable, without a line break, ``most`` long.

    What a terminal would obey or hide is written out; of a long text its two ends stay.

    >>> print(one_line("two\\nlines, \\x1b[31mred\\u202e"))
    two\\nlines, \\x1b[31mred\\u202e
    >>> one_line("x" * 1000, 20)
    'xxxxxxxxx ... xxxxxx'
    """
    text = _ends(str(found), most)  # before what follows makes it longer
    return _ends(printable(text), most)


def printable(text: str) -> str:
    r"""``text`` with everything written out that a terminal would obey or hide, however long.

    >>> print(printable("face \x1b[2J \udcff"))
    face \x1b[2J \udcff
    """
    return "".join(c if c.isprintable() else _written_out(c) for c in text)


def quoted(value: object) -> str:
    """The ``repr`` of a value as `one_line`, made without writing out megabytes.

    >>> quoted("mid"), len(quoted("mid" * 10**6))
    ("'mid'", 80)
    """
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return one_line(short.repr(value))


def markdown(found: object, most: int = QUOTED) -> str:
    """`one_line` that Markdown shows as it is, also in the cell of a table.

    >>> print(markdown("mid_block.* | **[a](http://b)**"))
    mid_block.\\* \\| \\*\\*\\[a\\](http\\://b)\\*\\*
    """
    return SYNTAX.sub(r"\\\g<0>", one_line(found, most))


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _ends(text: str, most: int) -> str:
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail - 5]} ... {text[-tail:]}"
