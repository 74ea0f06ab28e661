"""Writing gates into ``models/ldcp_gates``, under a name that nothing there has yet."""

from __future__ import annotations

import logging

import folder_paths
from comfy_api.latest import io

from ..ldcp_core import Gates, one_line
from .files import FOLDER, checked, save_numbered
from .shared import CATEGORY, GatesType, schema, show_on_node

log = logging.getLogger("ldcp")


class LDCPSaveGates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPSaveGates",
            display_name="Save Gates",
            category=CATEGORY,
            description="Saves pruning gates as a new file for Load Pruning Gates. Nothing is "
            "overwritten: every file gets the next number.",
            inputs=[
                GatesType.Input("gates", tooltip="The gates to save."),
                io.String.Input(
                    "filename_prefix",
                    default="gates",
                    tooltip="How the file name begins; a number follows. 'portraits/gates' saves "
                    "in a subfolder. Always below ComfyUI's models/ldcp_gates folder.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str | None) -> bool | str:
        if filename_prefix is None:  # connected to another node, not known yet
            return True
        try:
            checked(filename_prefix)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, gates: Gates, filename_prefix: str) -> io.NodeOutput:
        folder = folder_paths.get_folder_paths(FOLDER)[0]
        try:
            name = save_numbered(gates, folder, filename_prefix)
        except OSError as error:
            raise OSError(
                f"LDCP: gates cannot be saved as {one_line(repr(filename_prefix), 400)} in "
                f"{folder}: {one_line(error, 400)}; choose another prefix, or make room and allow "
                "writing there"
            ) from error
        log.info("LDCP: gates saved as %s in %s", name, folder)
        show_on_node(f"saved as {name}", cls.hidden.unique_id if cls.hidden else None)
        return io.NodeOutput()
