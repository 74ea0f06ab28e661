"""Where a command may write: its own kind of file, made anew, and never one of its inputs.

A mistyped --output must not cost a checkpoint that took days to make or hours to download. So every
command asks here, before any work: a missing folder must be one that can be made, what lies there
already must be of the kind that the command writes (told by its first bytes), and it must not be
one of the command's inputs, under whatever name or link. `claimed` keeps two processes from one
output.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ldcp_core import export as ldcp_export
from ldcp_core import gatefile, write_atomically
from training.errors import UserError

log = logging.getLogger(__name__)

#: text chunk of every PNG written here: a photo has none, so that it is never replaced
MARK = b"tEXtSoftware\0LDCP"
#: bytes of a file's beginning in which its mark lies
BEGINNING = 4096
#: signature and header of a PNG, after which text may stand
PNG, PNG_HEADER = b"\x89PNG\r\n\x1a\n", 33
#: what a system says of a lock that another process holds
HELD = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
#: bytes of the header of a .safetensors file, at most
MAX_HEADER = 64 * 1024 * 1024


@dataclass(frozen=True)
class Kind:
    """What a command writes, in words, and how a file that lies there is told to be one."""

    name: str
    is_one: Callable[[Path], bool]


def marked(name: str, mark: bytes) -> Kind:
    """Files that hold ``mark`` near their beginning."""
    return Kind(name, lambda path: mark in _beginning(path))


def _has_format(path: Path, name: str) -> bool:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= MAX_HEADER else b""
    try:
        return bool(json.loads(header)["__metadata__"]["format"] == name)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


GATES = Kind("a gate file", partial(_has_format, name=gatefile.FORMAT))
EXPORT = Kind("an exported U-Net", partial(_has_format, name=ldcp_export.FORMAT))
PICTURE = marked("a picture of an earlier run", MARK)
HISTORY = marked("the history of an earlier run", b"step,reconstruction,")
PAGE = marked("the report of an earlier run", b"<title>Pruning gates</title>")


def report_of(kind: str) -> dict[str, Kind]:
    """What lies under a prefix for results of this ``format``: numbers, and tables beside them."""
    numbers = marked(f"results of an earlier run ({kind})", f'"format": "{kind}"'.encode())
    tables = Kind(
        "the tables of an earlier run, beside its .json",
        lambda path: _is(numbers, path.with_suffix(".json")),
    )
    return {".json": numbers, ".md": tables}


def output_file(option: str, path: str | Path, kind: Kind, inputs: Iterable[str | None]) -> Path:
    """``path``, which can be written; `write` and `claimed` make its folder if that is missing.

    ``option`` is what the user typed, ``inputs`` are the paths (or other names) that the command
    reads. Raises UserError where there is something that must stay.
    """
    path = Path(path)
    output_folder(option, path.parent, ())
    try:
        _refuse_inputs(option, path, inputs)
        if path.is_dir():
            raise UserError(f"{option} is {path}, a folder.", "the name of a file", _change(option))
        if path.exists() and not _is(kind, path):
            raise UserError(
                f"{path} is there already, and is not {kind.name}.",
                f"a new name, or that of {kind.name}",
                f"{_change(option)}, or move that file away",
            )
    except OSError as error:
        raise UserError(f"{path} can't be written: {error}.", "", _change(option)) from error
    return path


def gate_output(path: str | Path, inputs: Iterable[str | None]) -> Path:
    """`output_file` of ``--output`` for commands that make a gate file."""
    if Path(path).suffix != ".safetensors":
        raise UserError(
            f"--output is {path}.", "a file name ending in .safetensors", _change("--output")
        )
    return output_file("--output", path, GATES, inputs)


def output_files(
    option: str, prefix: str, kinds: Mapping[str, Kind], inputs: Iterable[str | None]
) -> None:
    """`output_file` of ``prefix`` with each suffix of ``kinds``."""
    if not os.path.basename(prefix):
        raise UserError(
            f"{option} is {prefix!r}, which ends in no name.",
            "the beginning of a file's name",
            _change(option),
        )
    for suffix, kind in kinds.items():
        output_file(option, prefix + suffix, kind, inputs)


def output_folder(option: str, path: str | Path, inputs: Iterable[str | None]) -> Path:
    """``path`` as a folder that is there or can be made, with its parents; raises UserError.

    Files in it stay: of those that are to be written, ask `output_file`. Nothing is made yet, so
    that a command which is refused for another reason leaves no folder behind.
    """
    if path == "":  # such as a variable that is not set
        raise UserError(
            f"{option} is empty.", "a folder (. is the one you are in)", _change(option)
        )
    path = Path(path)
    try:
        _refuse_inputs(option, path, inputs)
        there = next((found for found in (path, *path.parents) if found.exists()), path)
    except OSError as error:
        raise UserError(f"{path} can't be a folder: {error}.", "", _change(option)) from error
    if not there.is_dir():
        raise UserError(f"{there} is no folder.", "a folder to write into", _change(option))
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there.resolve()} is not writable.", "", _change(option))
    return path


def write(path: Path, data: bytes) -> None:
    """Write whole or not at all, and a PNG so that `PICTURE` tells it as one of ours.

    Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if data.startswith(PNG) and MARK not in data[:BEGINNING]:
        chunk = struct.pack(">I", len(MARK) - 4) + MARK + struct.pack(">I", zlib.crc32(MARK))
        data = data[:PNG_HEADER] + chunk + data[PNG_HEADER:]
    write_atomically(path, data)


@contextmanager
def claimed(path: Path) -> Iterator[None]:
    """Context in which no other process claims ``path``; raises UserError where one does.

    The lock is the operating system's, on a file beside ``path``: a process that dies lets go of
    it, and what it leaves is an empty file that the next one takes over.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder of {path} can't be made: {error}.") from error
    file = _locked(lock, path)
    try:
        yield
    finally:
        if file is not None:
            if sys.platform == "win32":  # where an open file can't be removed
                file.close()
            with suppress(OSError):
                lock.unlink()
            file.close()


def _locked(lock: Path, path: Path) -> BinaryIO | None:
    """The open lock; None where the file system knows no locks."""
    while True:
        file = None
        try:
            file = lock.open("ab")
            _lock(file)
        except OSError as error:
            if file is None or error.errno not in HELD:
                log.warning("%s can't be locked (%s): start no other run on it.", path, error)
                return None
            file.close()
            raise UserError(
                f"Another process is making {path} now.",
                "one process for one output",
                "wait until it has ended, or give another --output",
            ) from error
        with suppress(FileNotFoundError):  # removed by who held it before: lock what lies there now
            if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                return file
        file.close()


if sys.platform == "win32":
    import msvcrt

    def _lock(file: BinaryIO) -> None:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(file: BinaryIO) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _refuse_inputs(option: str, path: Path, inputs: Iterable[str | None]) -> None:
    if not path.exists():
        return
    for name in inputs:
        if name and os.path.exists(name) and os.path.samefile(name, path):
            raise UserError(
                f"{option} is {path}, which this command reads.",
                "another name than those of the inputs",
                _change(option),
            )


def _is(kind: Kind, path: Path) -> bool:
    """Whether ``path`` is an ordinary file of that kind; an empty one is of every kind."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and (found.st_size == 0 or kind.is_one(path))


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(BEGINNING)


def _change(option: str) -> str:
    return f"change {option}"
