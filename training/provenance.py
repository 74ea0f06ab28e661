"""How a gate file came about: what every command that makes one writes into its metadata."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from ldcp_core import Gates
from training.budget import Budget
from training.console import name_of

PACKAGES = ("torch", "diffusers", "transformers", "datasets", "safetensors", "numpy")
#: settings that are paths; their folders are nobody else's business
PATHS = ("model", "data", "output")


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command as a gate file stores them.

    >>> without_folders({"model": "/home/me/sd15.safetensors", "seed": 0})
    {'model': 'sd15.safetensors', 'seed': 0}
    """
    return {k: name_of(value) if k in PATHS else value for k, value in settings.items()}


def provenance(
    criterion: str, settings: Mapping[str, Any], gates: Gates, budget: Budget
) -> dict[str, Any]:
    """The part that learned and measured gates have in common, JSON-able."""
    return {
        "criterion": criterion,
        "scope": settings["scope"],
        "target_sparsity": settings["target_sparsity"],
        "achieved_sparsity": gates.sparsity,
        "budget": budget.kind,
        "achieved_budget": budget.pruned(gates.keep_sets()),
        "floor": settings["floor"],
        "seed": settings["seed"],
        "config": without_folders(settings),
        "versions": {name: version(name) for name in PACKAGES},
        "created": time.strftime("%Y-%m-%d"),
    }
