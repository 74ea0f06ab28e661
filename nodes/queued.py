"""The other inputs of a node that ComfyUI checks before a run.

ComfyUI gives ``validate_inputs`` what it names, and repeats the answer for every input that was
named: a check of four widgets is answered four times. So a node names one input, and finds the
others here, in the prompt that the server has just been sent. The server calls its prompt handlers
and the checks in one task, hence the context variable: prompts sent at once do not mix.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from .shared import server

_sent: ContextVar[dict[str, Any]] = ContextVar("sent")


def remember(sent: dict[str, Any]) -> dict[str, Any]:
    """Keep what the server was sent, for the checks that follow."""
    _sent.set(sent)  # all of it: another extension may put another prompt there
    return sent


def inputs_of(node_id: str | None) -> Mapping[str, Any]:
    """The inputs of a node of the prompt being checked, without links; empty where unknown."""
    prompt = _sent.get({}).get("prompt")
    node = prompt.get(str(node_id)) if isinstance(prompt, dict) else None
    inputs = node.get("inputs", {}) if isinstance(node, dict) else {}
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def listen() -> None:
    """Ask the server for its prompts; outside of a server there are none."""
    host = server()
    if host is not None:
        host.add_on_prompt_handler(remember)
