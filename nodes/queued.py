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

from .display import server

_prompt: ContextVar[Any] = ContextVar("prompt", default=None)


def remember(sent: dict[str, Any]) -> dict[str, Any]:
    """Keep the prompt that the server was sent, for the checks that follow."""
    _prompt.set(sent.get("prompt"))
    return sent


def inputs_of(node_id: str | None) -> Mapping[str, Any]:
    """The inputs of a node of the prompt being checked, without links; empty where unknown."""
    prompt = _prompt.get()
    node = prompt.get(str(node_id)) if isinstance(prompt, dict) else None
    inputs = node.get("inputs", {}) if isinstance(node, dict) else {}
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def listen() -> None:
    """Ask the server for its prompts; outside of a server there are none."""
    host = server()
    if host is not None:
        host.add_on_prompt_handler(remember)
