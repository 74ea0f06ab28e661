"""The shipped workflow files, and the prompt that the browser would send for them.

ComfyUI's server takes a flat prompt (node id -> class and inputs); the files hold what the canvas
saves, with positions, and widget values as a bare list. The browser translates between the two;
`to_prompt` does the same for files as plain as ours, so that tests need no browser.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "workflows"
FILES = sorted(FOLDER.glob("*.json"))
#: subgraphs for ComfyUI's node library, called like their files
BLUEPRINTS = sorted((FOLDER.parent / "subgraphs").glob("*.json"))
#: nodes of the canvas that the server never sees
CANVAS_ONLY = {"MarkdownNote", "Note"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}

Workflow = dict[str, Any]
#: class -> {"required": {name: (type, options)}, "optional": ...}, as INPUT_TYPES() has it
Schemas = dict[str, dict[str, dict[str, Any]]]


def read(path: Path) -> Workflow:
    return json.loads(path.read_text(encoding="utf-8"))


def declared(schema: dict[str, dict[str, Any]]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Input name -> (type, options), required inputs first, in the order of the widgets."""
    inputs = {**schema.get("required", {}), **schema.get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in inputs.items()}


def is_widget(kind: Any) -> bool:
    """Whether an input of this type is a widget; a list is a dropdown of these values."""
    return isinstance(kind, list) or kind in WIDGET_TYPES


def widgets(node: dict[str, Any], schema: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Widget name -> value. Raises ValueError when the file has more or fewer than the schema.

    The canvas adds widgets of its own: "control after generate" below a seed, a button below an
    image.
    """
    names: list[str | None] = []
    for name, (kind, options) in declared(schema).items():
        if is_widget(kind):
            added = options.get("control_after_generate") or options.get("image_upload")
            names += [name, None] if added else [name]
    values = node.get("widgets_values", [])
    if len(names) != len(values):
        raise ValueError(f"{node['type']} saved {values}, but its widgets are {names}")
    return {name: value for name, value in zip(names, values, strict=True) if name is not None}


def to_prompt(workflow: Workflow, schemas: Schemas) -> dict[str, dict[str, Any]]:
    """The prompt for ``POST /prompt``. Raises ValueError for muted or bypassed nodes."""
    origins = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in CANVAS_ONLY:
            continue
        if node["mode"] != 0:
            raise ValueError(f"node {node['id']} ({node['type']}) is muted or bypassed")
        connected = [socket for socket in node["inputs"] if socket["link"] is not None]
        links = {socket["name"]: origins[socket["link"]] for socket in connected}
        inputs = widgets(node, schemas[node["type"]]) | links
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def load_gates(prompt: dict[str, dict[str, Any]], name: str = "gates.safetensors") -> None:
    """Let a prompt of a shipped workflow take its gates from a file, not from the weights."""
    for node in prompt.values():
        if node["class_type"] == "LDCPEstimateGates":
            node |= {"class_type": "LDCPLoadGates", "inputs": {"gates_name": name}}


def with_gate_file(workflow: Workflow, name: str = "gates.safetensors") -> Workflow:
    """The same of a workflow, before it is opened in a browser."""
    (node,) = (node for node in workflow["nodes"] if node["type"] == "LDCPEstimateGates")
    (model,) = (socket["link"] for socket in node["inputs"])
    node |= {"type": "LDCPLoadGates", "inputs": [], "widgets_values": [name]}
    node["properties"] = {"Node name for S&R": "LDCPLoadGates"}
    _unlink(workflow, {model})
    return workflow


def remove(workflow: Workflow, *numbers: int) -> None:
    """Take nodes out of a workflow, with the links to them."""
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in numbers]
    _unlink(workflow, {link[0] for link in workflow["links"] if {link[1], link[3]} & set(numbers)})


def _unlink(workflow: Workflow, gone: set[int]) -> None:
    workflow["links"] = [link for link in workflow["links"] if link[0] not in gone]
    for node in workflow["nodes"]:
        for socket in node["outputs"]:
            socket["links"] = [link for link in socket["links"] or [] if link not in gone]


def set_widgets(prompt: dict[str, dict[str, Any]], **changes: dict[str, Any]) -> None:
    """Set widgets of every node of a class: ``set_widgets(prompt, KSampler={"steps": 2})``.

    Raises KeyError for a class or widget that the prompt does not have.
    """
    for class_type, values in changes.items():
        nodes = [node for node in prompt.values() if node["class_type"] == class_type]
        if not nodes:
            raise KeyError(class_type)
        for node in nodes:
            for name, value in values.items():
                if name not in node["inputs"]:
                    raise KeyError(f"{class_type}.{name}")
                node["inputs"][name] = value
