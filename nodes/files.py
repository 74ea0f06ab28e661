"""Gate files in ``models/ldcp_gates``: the folder, its dropdown, and names for new files."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import folder_paths

from ..ldcp_core import Gates, one_line, remove_abandoned, save_gates

FOLDER = "ldcp_gates"
EXTENSIONS = {".safetensors"}
#: file names shown in a message
KNOWN = 10
#: what Windows refuses in file names; refused everywhere, so that a workflow works on any system.
#: And what steers a terminal, breaks a line or turns its direction, and half of a surrogate pair,
#: which has no UTF-8 form
RESERVED = re.compile(
    r'[<>:"|?*\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]'
)
DEVICES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])[ .]*(\..*)?", re.IGNORECASE)
#: characters; no file system takes as many in one name
LONGEST = 1000


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
