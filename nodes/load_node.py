"""Loading a gate file from ``models/ldcp_gates``."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..ldcp_core import GateFileError, content_digest, load_gates, one_line, remove_abandoned
from .io_types import CATEGORY, GatesType
from .schema import schema

FOLDER = "ldcp_gates"
EXTENSIONS = {".safetensors"}
#: file names shown in a message
KNOWN = 10


def register_folder() -> None:
    """Make ``models/ldcp_gates`` known to ComfyUI; folders from extra_model_paths.yaml stay.

    What savers that were killed left in them is removed.
    """
    default = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, EXTENSIONS)
    with contextlib.suppress(OSError):  # read-only models folder: the user may add another one
        os.makedirs(default, exist_ok=True)
    for path in paths:
        for folder, _, _ in os.walk(path):
            remove_abandoned(Path(folder))


register_folder()


def offered() -> list[str]:
    """The names in the dropdown: of the folders that are there."""
    try:
        return folder_paths.get_filename_list(FOLDER)
    except FileNotFoundError:  # ComfyUI asks a folder that it has listed when that was changed
        folder_paths.filename_list_cache.pop(FOLDER, None)
        return folder_paths.get_filename_list(FOLDER)


def gates_path(name: str) -> str:
    """The full path of a gate file in the dropdown.

    Raises FileNotFoundError, naming the folders that were searched, when it is gone.
    """
    path = folder_paths.get_full_path(FOLDER, name)
    if path is None or not os.path.isfile(path):
        folders = ", ".join(one_line(path, 400) for path in folder_paths.get_folder_paths(FOLDER))
        names = offered()
        known = ", ".join(one_line(known) for known in names[:KNOWN]) or "none"
        more = f" and {len(names) - KNOWN} more" if len(names) > KNOWN else ""
        raise FileNotFoundError(
            f"LDCP: no gate file {one_line(repr(name))} in {folders} (found there: {known}{more}); "
            "make gates without training: put Estimate Gates from Model or Calibrate Gates in the "
            "place of this node, and Save Gates behind it; or put a gate file made by training.fit "
            "into this folder, refresh the page and choose it"
        )
    return path


class LDCPLoadGates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPLoadGates",
            display_name="Load Pruning Gates",
            category=CATEGORY,
            description="Loads learned channel-pruning gates for a Stable Diffusion 1.5 model.",
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
