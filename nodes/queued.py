"""The other inputs of a node that ComfyUI checks before a run.

ComfyUI gives ``validate_inputs`` what it names, and repeats the answer for every input that was
named: a check of four widgets is answered four times. So a node names one input, and finds the
others here, in the prompt that the server has just been sent. The server calls its prompt handlers
and the checks in one task, hence the context variable: prompts sent at once do not mix.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_prompt: ContextVar[Mapping[str, Any]] = ContextVar("prompt", default={})


def remember(sent: dict[str, Any]) -> dict[str, Any]:
    """Keep the prompt that the server was sent, for the checks that follow."""
    prompt = sent.get("prompt")
    _prompt.set(prompt if isinstance(prompt, dict) else {})
    return sent


def inputs_of(node_id: str | None) -> Mapping[str, Any]:
    """The inputs of a node of the prompt being checked, without links; empty where unknown."""
    node = _prompt.get().get(str(node_id))
    inputs = node.get("inputs", {}) if isinstance(node, dict) else {}
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


def listen() -> None:
    """Ask the server for its prompts; outside of a server there are none."""
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is not None:
        server.add_on_prompt_handler(remember)
