"""Read the files of a data set, and no other file: somebody else may have made it.

A link or a table can name any file of this machine, whose words would end in the cache; a device or
a FIFO never ends; and what is read has to fit into memory. So whatever a data set names is opened
here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

#: bytes of an image or a metadata file: twice a 16-bit RGB TIFF of 20 megapixels
FILE_LIMIT = 256 * 2**20
#: bytes of a caption file, characters of any caption; CLIP reads 77 tokens of it
CAPTION_LIMIT = 64 * 2**10


def checked(folder: Path, file: Path, limit: int | None = FILE_LIMIT) -> tuple[str, os.stat_result]:
    """Where ``file`` really lies, and what the disk says of it.

    Raises:
        ValueError: it lies outside ``folder`` once links are followed, is no regular file, or has
            more than ``limit`` bytes.
        OSError: it is not there, or can't be reached.
    """
    real = os.path.realpath(file)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise ValueError("outside the data set's folder, where links lead (copy the file there)")
    found = os.stat(real)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("not a regular file")
    if limit is not None and found.st_size > limit:
        raise ValueError(f"{found.st_size:,} bytes; at most {limit:,} are read")
    return real, found


def read_inside(folder: Path, file: Path, limit: int = FILE_LIMIT) -> bytes:
    """The bytes of a file that passes `checked`, which says what is raised."""
    with open(checked(folder, file, limit)[0], "rb") as stream:
        return stream.read(limit)
