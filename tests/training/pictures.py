"""Images of one colour, as files and as bytes."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from training.data.images import ImageData

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
