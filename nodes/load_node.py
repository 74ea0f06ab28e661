"""Loading a gate file from ``models/ldcp_gates``."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..ldcp_core import GateFileError, content_digest, load_gates
from .files import FOLDER, gates_path, offered
from .shared import CATEGORY, GatesType, schema


class LDCPLoadGates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPLoadGates",
            display_name="Load Pruning Gates",
            category=CATEGORY,
            description="Loads learned channel-pruning gates for a Stable Diffusion model (1.5, 2 "
            "or XL).",
            inputs=[
                io.Combo.Input(
                    "gates_name",
                    options=offered(),
                    tooltip="A gate file in ComfyUI's models/ldcp_gates folder, as training.fit "
                    "writes it. It says which channels were learned to be dispensable.",
                )
            ],
            outputs=[
                GatesType.Output(
                    display_name="gates",
                    tooltip="Which channels to prune, for Apply Dynamic Pruning.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, gates_name: str | None) -> bool | str:
        if gates_name is None:  # connected to another node, not known yet
            return True
        try:
            gates_path(gates_name)
        except FileNotFoundError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, gates_name: str | None) -> str:
        """Path, time and content, so that a file trained again is read again."""
        path = None if gates_name is None else folder_paths.get_full_path(FOLDER, gates_name)
        if path is None:
            return ""
        try:
            return f"{path}:{os.stat(path).st_mtime_ns}:{content_digest(path)}"
        except (OSError, GateFileError):  # which the run will explain
            return ""

    @classmethod
    def execute(cls, gates_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_gates(gates_path(gates_name)))
