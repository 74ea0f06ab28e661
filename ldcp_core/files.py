"""Writing files so that neither a reader nor a killed writer ever meets half of one.

The content is written beside its destination under a name of its own and then moved there at once.
What a killed writer leaves is such a temporary file: hidden, of no kind that any menu offers, and
removed by the next process that writes in the folder.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import sys
import time
from functools import cache
from pathlib import Path
from typing import IO

if sys.platform != "win32":
    import fcntl

#: the names of files that are being written
TEMPORARY = f".*.{'[0-9a-f]' * 8}.ldcp"
#: seconds for which a temporary file is not called abandoned, though nobody locks it: its writer
#: may be about to lock it, or to move it
YOUNG = 5


def write_atomically(path: Path, data: bytes, overwrite: bool = True) -> None:
    """Write a file so that at any moment its name holds the old content or the new one.

    Before the first file in a folder, what killed writers left there is removed. Raises
    FileExistsError when the name is taken and not to be overwritten, OSError when the disk refuses.
    """
    remove_abandoned(path.parent)
    # of a long name the beginning, so that there is room for the rest
    temporary = path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.ldcp")
    file = open(temporary, "xb")
    try:
        with file:
            with contextlib.suppress(OSError):  # a file system without locks
                _lock(file)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            os.utime(temporary)  # young again, however long that took
        _move(temporary, path, overwrite)
    finally:
        temporary.unlink(missing_ok=True)


@cache
def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files of killed writers, once per folder and process.

    The file of a living writer is locked; on Windows it is open, and an open file can't be removed.
    """
    for path in folder.glob(TEMPORARY):
        with contextlib.suppress(OSError):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > YOUNG:
                with open(path, "rb+") as file:
                    _lock(file)
                path.unlink()


def _lock(file: IO[bytes]) -> None:
    """Raises OSError when another writer has it, or where the file system has no locks."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _move(temporary: Path, path: Path, overwrite: bool) -> None:
    if overwrite:
        os.replace(temporary, path)
    elif os.name == "nt":
        os.rename(temporary, path)  # refuses a name that is taken
    else:
        try:
            os.link(temporary, path)  # so does this, where os.rename would replace it
        except FileExistsError:
            raise
        except OSError as error:  # a file system without links, such as exFAT
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from error
            os.rename(temporary, path)
