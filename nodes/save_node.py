"""Writing gates into ``models/ldcp_gates``, under a name that nothing there has yet."""

from __future__ import annotations

import logging
import os
import re

import folder_paths
from comfy_api.latest import io

from ..ldcp_core import Gates, one_line, save_gates
from .display import show_on_node
from .io_types import CATEGORY, GatesType
from .load_node import FOLDER
from .schema import schema

#: what Windows refuses in file names; refused everywhere, so that a workflow works on any system.
#: And what steers a terminal, breaks a line or turns its direction, and half of a surrogate pair,
#: which has no UTF-8 form
RESERVED = re.compile(
    r'[<>:"|?*\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
)
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])[ .]*(\..*)?", re.IGNORECASE)
#: characters; no file system takes as many in one name
LONGEST = 1000

log = logging.getLogger("ldcp")


def prefix_problem(prefix: str) -> str | None:
    """Why files cannot be named with this prefix; None when they can."""
    if len(prefix) > LONGEST:
        return f"it has {len(prefix):,} characters, at most {LONGEST:,} are taken"
    for part in re.split(r"[/\\]", prefix):
        if part == "..":
            return "'..' leads outside the folder"
        if part in ("", "."):
            return "a name is missing in it, or it is an absolute path"
        if found := RESERVED.search(part):
            return f"it contains {found[0]!r}"
        if part[-1] in " .":
            return "a name in it ends with a dot or a space"
        if DEVICES.fullmatch(part):
            return f"{one_line(repr(part))} is the name of a device on Windows"
    return None


def checked(prefix: str) -> list[str]:
    """The subfolders and the beginning of the file name; raises ValueError where it has none."""
    problem = prefix_problem(prefix)
    if problem:
        raise ValueError(
            f"LDCP: gates cannot be saved as {one_line(repr(prefix))}: {problem}. Files go into "
            f"ComfyUI's models/{FOLDER} folder; write a name such as 'gates', or 'portraits/gates' "
            "for a subfolder of it"
        )
    return re.split(r"[/\\]", prefix)


def save_numbered(gates: Gates, folder: str, prefix: str) -> str:
    """Save as ``<prefix>_00001.safetensors`` or the next free number; the name below ``folder``.

    Raises ValueError for a prefix that is no such name, OSError when the disk refuses.
    """
    *subfolders, name = checked(prefix)
    folder = os.path.join(folder, *subfolders)
    os.makedirs(folder, exist_ok=True)
    number = _last_number(folder, name)
    while True:
        number += 1
        path = os.path.join(folder, f"{name}_{number:05}.safetensors")
        try:
            save_gates(gates, path, overwrite=False)
        except FileExistsError:
            continue
        return "/".join([*subfolders, os.path.basename(path)])


def _last_number(folder: str, name: str) -> int:
    pattern = re.compile(re.escape(name) + r"_(\d{1,9})\.safetensors", re.IGNORECASE | re.ASCII)
    return max((int(m[1]) for f in os.listdir(folder) if (m := pattern.fullmatch(f))), default=0)


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
                GatesType.Input("gates", tooltip="The gates to save: Estimate Gates from Model."),
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
