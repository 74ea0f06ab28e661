"""What hosts of different age know about a node: the one place that asks.

A node declares everything the newest host understands; what an older one lacks is left out.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

#: node id -> other words under which a user may look for it
SEARCH_ALIASES = {
    "LDCPLoadGates": ["load gates", "ldcp", "pruning mask", "channel pruning"],
    "LDCPApplyDynamicPruning": ["ldcp", "prune model", "channel pruning", "speed up", "sparsity"],
    "LDCPStepSchedule": ["ldcp", "prune steps", "timestep range", "sigma range"],
    "LDCPPruningReport": ["ldcp", "pruning statistics", "memory saved", "flops"],
    "LDCPEstimateGates": ["ldcp", "create gates", "l1 magnitude", "prune without training"],
    "LDCPCalibrateGates": ["ldcp", "create gates", "flap", "activations", "calibration"],
    "LDCPSaveGates": ["ldcp", "export gates", "write gate file"],
}


def schema(node_id: str, **declared: Any) -> io.Schema:
    """The node's schema, with its search aliases where this host has them (ComfyUI 0.33 does)."""
    if any(field.name == "search_aliases" for field in fields(io.Schema)):
        declared["search_aliases"] = SEARCH_ALIASES[node_id]
    return io.Schema(node_id=node_id, **declared)
