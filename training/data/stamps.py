"""Tell the content of files apart: what a latent was computed from is what it is named by.

A stamp is a hash of the whole file, since any smaller sample of a BMP or a TIFF leaves out pixels
that may be edited. It is of the content alone, so that a copy elsewhere finds its latents. Hashing
FFHQ (70,000 files, 91 GB) reads all of it: a minute and a half of SHA-256 at 1 GiB/s, or as long as
the disk takes. So hashes are remembered beside the cache and serve as long as a file has the same
size and the same times of change, to the nanosecond: a second run asks the disk for those alone
(half a second for 70,000 files).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from ldcp_core import write_atomically
from training.data.files import FILE_LIMIT, checked

log = logging.getLogger(__name__)

#: a file that changed this many nanoseconds ago may change again unnoticed (FAT counts in 2 s)
SETTLED = 3 * 10**9


def file_stamp(file: Path) -> str:
    """Size and SHA-256 of a whole file; why not, where it can't be read."""
    try:
        return _stamp(file)
    except OSError as error:
        return f"unreadable: {error}"


class FileStamps:
    """Stamps of the files of the data set at ``source``, remembered in ``folder``.

    What is remembered is a mere saving: it may be deleted, and is made anew where it is damaged.
    An edit is missed only where a program sets the time of modification back and the system keeps
    no time of change beside it (Windows).
    """

    def __init__(self, folder: Path, source: str) -> None:
        place = os.fsencode(os.path.realpath(os.path.expanduser(source)))
        self._path = folder / f"stamps-{hashlib.sha256(place).hexdigest()[:32]}.json"
        self._known = _read(self._path)
        self._kept: dict[str, list[Any]] = {}

    def __call__(self, folder: Path, file: Path, limit: int | None = FILE_LIMIT) -> str:
        """As `file_stamp`, of a file that passes `checked`."""
        try:
            real, found = checked(folder, file, limit)
            state = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
            known = self._known.get(real)
            if not isinstance(known, list) or known[:-1] != state:
                known = [*state, _stamp(real)]
        except (OSError, ValueError) as error:
            return f"unreadable: {error}"
        if time.time_ns() - max(state[1:]) > SETTLED:
            self._kept[real] = known
        return str(known[-1])

    def save(self) -> None:
        """Remember the stamps that were asked for."""
        if self._kept == self._known:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(self._kept).encode())
        except OSError as error:
            log.warning(
                "%s can't be written (%s): the next run reads all again.", self._path, error
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("%s can't be read (%s): reading all images again.", path, error)
        return {}
    return found if isinstance(found, dict) else {}


def _stamp(file: str | Path) -> str:
    found, size = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
            size += len(block)
    return f"{size} {found.hexdigest()}"
