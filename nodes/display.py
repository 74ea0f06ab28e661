"""Showing text on a node, in words that both of ComfyUI's frontends draw as they were meant.

The classic canvas sets the text as HTML with a line break for every newline; Nodes 2.0 reads it as
Markdown, where a line break is a newline after two spaces. What either would take for markup is
written as a character reference, which both undo.
"""

from __future__ import annotations

import re
import sys
from typing import Any

#: an underscore within a word is none
_MARKUP = re.compile(r"[<>&*`~\[\]|\\#]|(?<![^\W_])_|_(?![^\W_])")


def server() -> Any:
    """ComfyUI's server; None outside of one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def show_on_node(text: str, node_id: str | None) -> None:
    """Show some lines on a node; outside of a server there is nobody to show it to."""
    host = server()
    if host is not None and node_id is not None:
        host.send_progress_text(as_markup(text), node_id, host.client_id)


def warn(notes: list[str], node_id: str | None) -> None:
    """Have the browser say some notes by itself, should the node not be on the screen.

    Text for a node inside a closed subgraph, or of another workflow's tab, gets lost.
    """
    host = server()
    if host is not None and node_id is not None and notes:
        host.send_sync("ldcp.notes", {"node": node_id, "notes": notes}, host.client_id)


def as_markup(text: str) -> str:
    """
    >>> as_markup("<lambda>, a\\nb")
    '&#60;lambda&#62;, a  \\nb'
    """
    escaped = _MARKUP.sub(lambda found: f"&#{ord(found[0])};", text)
    return escaped.replace("\n", "  \n")
