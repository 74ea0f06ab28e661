"""How a gate file came about: what every command that makes one writes into its metadata.

And how that is read: a file may come from anyone, so that what it says is checked like an argument.
"""

from __future__ import annotations

import json
import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any, TypeGuard

from ldcp_core import Gates, one_line
from training.console import name_of
from training.errors import UserError
from training.learning.budget import Budget

PACKAGES = ("torch", "diffusers", "transformers", "datasets", "safetensors", "numpy")
#: settings that are paths; their folders are nobody else's business
PATHS = ("model", "data", "output", "gates", "prompts")


def without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a command as a gate file stores them.

    >>> without_folders({"model": "/home/me/sd15.safetensors", "seed": 0})
    {'model': 'sd15.safetensors', 'seed': 0}
    """
    return {k: name_of(v) if k in PATHS and v is not None else v for k, v in settings.items()}


def derived(config: Any) -> dict[str, Any]:
    """The settings of a command that makes gates of other gates, as the new file stores them."""
    found: dict[str, Any] = json.loads(json.dumps(without_folders(asdict(config))))
    return found


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
        "seed": settings["seed"],
        "config": without_folders(settings),
        "versions": {name: version(name) for name in PACKAGES},
        "created": time.strftime("%Y-%m-%d"),
    }


def read(
    info: Mapping[str, Any],
    key: str,
    default: Any,
    holds: Callable[[Any], bool],
    expected: str,
    name: str,
) -> Any:
    """What the gate file ``name`` says under ``key``, which must hold; ``default`` without it.

    >>> read({"scope": [1]}, "scope", "", is_text, "a line of text", "a.safetensors")
    Traceback (most recent call last):
    training.errors.UserError: a.safetensors says that its scope is [1].
      Expected: a line of text
      Next step: make this gate file again
    """
    found = info.get(key)
    if found is None:
        return default
    if not holds(found):
        raise UserError(
            f"{one_line(name)} says that its {key} is {reprlib.repr(found)}.",
            expected,
            "make this gate file again",
        )
    return found


def is_number(value: object) -> TypeGuard[float]:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    return abs(value) < 2**63


def is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def is_text(value: object) -> TypeGuard[str]:
    """One line without control characters."""
    return isinstance(value, str) and value.isprintable()
