"""Images side by side with a caption each, as one image; drawn with Pillow alone, as the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy
import torch
from torch import Tensor

from ..ldcp_core.report_image import BACKGROUND, MUTED, TEXT, font
from .compare import Rendered

GAP = 16  # pixels around every image
LEAST_WIDTH = 256  # of a column, so that the captions can be read
SMALLEST, USUAL = 12, 18  # font sizes in pixels


@dataclass(frozen=True)
class Cell:
    """An image float [H, W, 3] in [0, 1], its title and the lines below."""

    image: Tensor
    title: str
    lines: Sequence[str]


def comparison_grid(rendered: Sequence[Rendered]) -> Tensor:
    """A grid for every image of the batch: float32 [B, height, width, 3] in [0, 1].

    A row for every schedule, each of which begins with the full model.
    """
    full, *others = rendered
    rows = [(name, [full, *row]) for name, row in groupby(others, lambda each: each.schedule)]

    def cell(each: Rendered, number: int) -> Cell:
        return Cell(each.images[number], each.name, each.figures(float(each.rmse[number])))

    grids = [
        draw([(name, [cell(each, number) for each in row]) for name, row in rows])
        for number in range(len(full.images))
    ]
    return torch.from_numpy(numpy.stack(grids)).float().div(255)


def draw(rows: Sequence[tuple[str, Sequence[Cell]]]) -> Any:
    """Rows of cells of one size, each under its heading: uint8 [height, width, 3]."""
    from PIL import Image, ImageDraw

    cells = [cell for _, row in rows for cell in row]
    height, width = cells[0].image.shape[:2]
    column = max(width, LEAST_WIDTH)
    size = _fitting([line for cell in cells for line in (cell.title, *cell.lines)], column)
    line = round(size * 1.4)
    caption = line * (1 + max(len(cell.lines) for cell in cells))
    row_height = line + GAP // 2 + height + caption + GAP
    canvas = Image.new(
        "RGB",
        (GAP + max(len(row) for _, row in rows) * (column + GAP), GAP + len(rows) * row_height),
        BACKGROUND,
    )
    pen = ImageDraw.Draw(canvas)
    for number, (heading, row) in enumerate(rows):
        top = GAP + number * row_height
        pen.text((GAP, top), heading, MUTED, font(size))
        top += line + GAP // 2
        for place, cell in enumerate(row):
            left = GAP + place * (column + GAP)
            canvas.paste(Image.fromarray(_pixels(cell.image)), (left, top))
            for under, text in enumerate((cell.title, *cell.lines)):
                color = MUTED if under else TEXT
                pen.text((left, top + height + 4 + under * line), text, color, font(size))
    return numpy.array(canvas)


def _fitting(texts: Sequence[str], width: int) -> int:
    """The largest font size in which all texts fit into a width, larger for larger images."""
    sizes = range(max(USUAL, width // 28), SMALLEST, -1)
    fits = (size for size in sizes if max(font(size).getlength(text) for text in texts) <= width)
    return next(fits, SMALLEST)


def _pixels(image: Tensor) -> Any:
    """uint8 [H, W, 3]; what is no number is black."""
    return image.float().nan_to_num(0.0).mul(255).round().clamp(0, 255).byte().numpy()
