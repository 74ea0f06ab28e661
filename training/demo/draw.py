"""Draw faces in FFHQ's layout, as many as wanted: a data set to try a long run on.

    python -m training.demo.draw --images 2000 --output faces/

The faces are those of the demo (`faces.py`), with captions in `metadata.jsonl`; equal numbers give
equal faces. Images that are there already are left as they are, so that an interrupted command goes
on and a larger number adds to what there is.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image

from ldcp_core import write_atomically
from training.console import explaining, log_progress, progress
from training.demo.faces import draw_face
from training.demo.traits import draw_traits
from training.errors import UserError
from training.options import COUNT, NOT_NEGATIVE, Options, option, parsed
from training.output import output_folder

#: apart from the faces that the demo model learned from and those in `images/`
FIRST_SEED = 10_000_000
PER_FOLDER = 1000
METADATA = "metadata.jsonl"


def file_name(number: int) -> str:
    """FFHQ's own: a folder for every thousand.

    >>> file_name(12345)
    '12000/12345.png'
    """
    return f"{number // PER_FOLDER * PER_FOLDER:05d}/{number:05d}.png"


def has_faces(folder: Path, lines: Sequence[str]) -> bool:
    """Whether ``folder`` has the faces of these lines of metadata, and perhaps more.

    False where it has the first of them, or nothing. Raises UserError where it has anything else.
    """
    metadata = folder / METADATA
    there = metadata.read_text("utf-8", "replace").splitlines() if metadata.exists() else []
    common = min(len(there), len(lines))
    others = not there and any(folder.glob("[!.]*"))
    if there[:common] != list(lines[:common]) or others:
        raise UserError(
            f"{folder} holds other files than these faces.",
            "a new folder, or one that this command has drawn into",
            "change --output",
        )
    return len(there) >= len(lines)


def draw(folder: Path, images: int, size: int, grain: float, workers: int) -> None:
    """Draw what is missing of ``images`` faces of ``size`` x ``size`` pixels.

    ``grain`` is the standard deviation of a camera's noise, of 255. Raises OSError, and UserError
    where the folder holds anything else.
    """
    lines = [
        json.dumps({"file_name": file_name(i), "text": draw_traits(FIRST_SEED + i).caption})
        for i in range(images)
    ]
    complete = has_faces(output_folder("--output", folder, ()), lines)
    folder.mkdir(parents=True, exist_ok=True)
    if not complete:
        write_atomically(folder / METADATA, ("\n".join(lines) + "\n").encode())
    for start in range(0, images, PER_FOLDER):
        (folder / file_name(start)).parent.mkdir(exist_ok=True)
    missing = [i for i in range(images) if not (folder / file_name(i)).exists()]
    with Pool(workers) as pool:
        drawn = pool.imap_unordered(partial(_draw, folder, size, grain), missing, 16)
        for _ in progress(drawn, "drawing", len(missing), unit="image"):
            pass


def _draw(folder: Path, size: int, grain: float, number: int) -> None:
    path = folder / file_name(number)
    torn = path.with_suffix(".part")
    image = draw_face(FIRST_SEED + number, size)[0]
    if grain:
        noise = np.random.default_rng(number).normal(0.0, grain, (size, size, 3))
        grainy = np.clip(np.rint(np.asarray(image) + noise), 0, 255)
        image = Image.fromarray(grainy.astype(np.uint8))
    image.save(torn, "PNG")
    torn.replace(path)


@dataclass(frozen=True)
class DrawOptions(Options):
    """How many faces to draw, and how."""

    images: int = option("how many", bound=COUNT)
    output: str = option("the folder to write")
    size: int = option("pixels", 128, COUNT)
    grain: float = option(
        "a camera's noise, its standard deviation of 255; with 1.2 a file of 1024 pixels is as "
        "large as one of FFHQ",
        0.0,
        NOT_NEGATIVE,
    )
    workers: int = option("processes", os.cpu_count() or 1, COUNT)


@explaining
def main(argv: Sequence[str] | None = None) -> int:
    given = parsed(DrawOptions, argv, "demo.draw", __doc__)
    log_progress()
    draw(Path(given.output), given.images, given.size, given.grain, given.workers)
    print(f"{given.images} images in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
