"""What all nodes share: their types, their schema, and showing text on them.

A node declares everything the newest host understands; what an older one lacks is left out.

Text is written so that both of ComfyUI's frontends draw it as it was meant. The classic canvas sets
it as HTML with a line break for every newline. Nodes 2.0 reads it as Markdown, where a line break
is a newline after two spaces. What either would take for markup is written as a character
reference, which both undo.
"""

from __future__ import annotations

import re
import sys
from dataclasses import fields
from typing import Any

from comfy_api.latest import io

#: what travels between the nodes: `Gates`, `Schedule`, `Calibration` of `ldcp_core`
GatesType = io.Custom("LDCP_GATES")
ScheduleType = io.Custom("LDCP_SCHEDULE")
CalibrationType = io.Custom("LDCP_CALIBRATION")

CATEGORY = "model_patches/LDCP"
#: node id -> other words under which a user may look for it (ComfyUI 0.33 has them)
SEARCH_ALIASES = {
    "LDCPLoadGates": ["load gates", "ldcp", "pruning mask", "channel pruning"],
    "LDCPApplyDynamicPruning": ["ldcp", "prune model", "channel pruning", "speed up", "sparsity"],
    "LDCPStepSchedule": ["ldcp", "prune steps", "timestep range", "sigma range"],
    "LDCPPruningReport": ["ldcp", "pruning statistics", "memory saved", "flops"],
    "LDCPEstimateGates": ["ldcp", "create gates", "l1 magnitude", "prune without training"],
    "LDCPCalibrateGates": ["ldcp", "create gates", "flap", "activations", "calibration"],
    "LDCPSaveGates": ["ldcp", "export gates", "write gate file"],
    "LDCPCompareShares": ["ldcp", "xy plot", "grid", "compare sparsity", "prune and compare"],
}
#: node id -> its name on a host without aliases, which searches in names alone, mostly their start
NAMES_TO_FIND = {"LDCPApplyDynamicPruning": "Prune Channels for Speed (Apply Dynamic Pruning)"}


#: an underscore within a word is none
_MARKUP = re.compile(r"[<>&*`~\[\]|\\#]|(?<![^\W_])_|_(?![^\W_])")


def schema(node_id: str, **declared: Any) -> io.Schema:
    """The node's schema, with its search aliases, or a name to find where this host has none."""
    if any(field.name == "search_aliases" for field in fields(io.Schema)):
        declared["search_aliases"] = SEARCH_ALIASES[node_id]
    elif node_id in NAMES_TO_FIND:
        declared["display_name"] = NAMES_TO_FIND[node_id]
    return io.Schema(node_id=node_id, **declared)


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
