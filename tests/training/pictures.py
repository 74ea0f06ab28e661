"""Images of one colour, as files and as bytes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from training.data.images import BrokenImage, ImageData

RED = (255, 0, 0)


def draw(path: Path, colour: object = RED, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def png(colour: object = RED, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "PNG")
    return stream.getvalue()


def ids(data: ImageData) -> list[str]:
    return [record.id for record in data.records]


def read(
    data: ImageData, indices: Sequence[int], batch_size: int, **options: Any
) -> Iterator[list[str]]:
    """The ids of each batch of images that can be read."""

    def readable(index: int) -> bool:
        try:
            data.pixels(index)
        except BrokenImage:
            return False
        return index in data.captions([index])

    for chosen in data.index_batches(indices, batch_size, readable, **options):
        yield [data.records[index].id for index in chosen]
