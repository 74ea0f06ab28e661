"""The pruning report as an image, for a preview inside ComfyUI or a file.

Drawn with Pillow alone, because ComfyUI has no plotting library. Pillow is imported when an image
is asked for: the core itself must load without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

from .gates import THRESHOLD
from .report import Report, RunFacts, bytes_lines, run_line, show_bytes, show_flops
from .sites import short_name

if TYPE_CHECKING:
    from PIL import Image

WIDTH, MARGIN = 768, 30
LEFT, RIGHT = MARGIN, WIDTH - MARGIN
BODY, HEADING, TITLE = 18, 23, 34  # font sizes in pixels
AXIS = 68  # room for the numbers at the left of a chart
#: up to here every site has a row with its name, above it a thin column
MOST_ROWS = 12
BINS = 40  # even: the threshold lies between two of them

Color = tuple[int, int, int]
Align = Literal["left", "middle", "right"]
BACKGROUND, PANEL, LINE = (27, 28, 32), (39, 41, 47), (84, 88, 98)
TEXT, MUTED = (236, 238, 241), (168, 174, 184)
KEPT, PRUNED = (92, 160, 242), (245, 152, 66)


def report_image(report: Report) -> Image.Image:
    """The report as an RGB image, 768 pixels wide and as high as it needs.

    Raises ImportError without Pillow. With a Pillow older than 10.1 the letters are small.
    """
    height = _draw(report, _Page(1))  # drawing past the end of a page does no harm
    page = _Page(height)
    _draw(report, page)
    return page.image


class _Page:
    """An image that is filled from the top; ``y`` is where the next part begins."""

    def __init__(self, height: int) -> None:
        from PIL import Image, ImageDraw

        self.image = Image.new("RGB", (WIDTH, height), BACKGROUND)
        self._draw = ImageDraw.Draw(self.image)
        self.y = 24

    def width(self, text: str, size: int = BODY) -> float:
        return float(self._draw.textlength(text, font(size)))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: int = BODY,
        color: Color = TEXT,
        align: Align = "left",
    ) -> None:
        shift = {"left": 0.0, "middle": 0.5, "right": 1.0}[align] * self.width(text, size)
        self._draw.text((round(x - shift), round(y)), text, color, font(size))

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Color) -> None:
        """A filled rectangle; nothing where it is thinner than half a pixel."""
        left, top, right, bottom = round(x0), round(y0), round(x1), round(y1)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), color)

    def panel(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self._draw.rounded_rectangle((x0, y0, x1, y1), 8, PANEL)

    def heading(self, text: str) -> None:
        self.y += 26
        self.text(LEFT, self.y, text, HEADING)
        self.y += 36

    def paragraph(self, text: str, color: Color = MUTED) -> None:
        """Text broken into lines at the right margin."""
        line = ""
        for word in text.split():
            longer = f"{line} {word}" if line else word
            if line and self.width(longer) > RIGHT - LEFT:
                self.text(LEFT, self.y, line, color=color)
                self.y += 25
                longer = word
            line = longer
        self.text(LEFT, self.y, line, color=color)
        self.y += 25


def font(size: int) -> Any:
    """Pillow's own font, ``size`` pixels high."""
    from PIL import ImageFont

    try:
        return ImageFont.load_default(size=size)
    except TypeError:  # Pillow before 10.1 has one small size
        return ImageFont.load_default()


def _draw(report: Report, page: _Page) -> int:
    """Draw everything; returns the height in pixels that it needs."""
    page.text(LEFT, page.y, "Pruning Report", TITLE)
    page.y += 48
    for line in report.gates_lines():
        page.paragraph(line)
    _totals(report, page)
    if len(report.scores) <= MOST_ROWS:
        _site_rows(report, page)
    else:
        _site_columns(report, page)
    _histogram(report, page)
    if report.run is not None:
        _measured(report.run, page)
    for note in report.notes:
        page.paragraph(note, TEXT)
    return page.y + 14


def _totals(report: Report, page: _Page) -> None:
    """Three figures side by side: channels, weights, compute."""
    found = report.savings
    pruned = found.channels - found.kept
    cards = [
        (
            f"{found.sparsity:.1%}",
            "of channels pruned",
            f"{pruned:,} of {found.channels:,}",
        ),
        (
            show_bytes(report.saved_bytes),
            "of weights left out",
            f"{found.parameter_share:.2%} of the U-Net",
        ),
        (
            show_flops(found.saved.flops),
            "of compute left out",
            f"{found.flop_share:.2%} of the U-Net",
        ),
    ]
    page.heading("Counted per pruned evaluation")
    width, gap = 226, 15
    for number, (figure, what, share) in enumerate(cards):
        x = LEFT + number * (width + gap)
        page.panel(x, page.y, x + width, page.y + 110)
        fitting = (size for size in range(32, BODY, -1) if page.width(figure, size) <= width - 28)
        page.text(x + 14, page.y + 12, figure, next(fitting, BODY))
        page.text(x + 14, page.y + 54, what, BODY, MUTED)
        page.text(x + 14, page.y + 79, share, BODY, MUTED)
    page.y += 124
    page.paragraph(report.counted_for())


def _legend(page: _Page, y: float, kept: str, pruned: str) -> None:
    """Swatches at the right margin."""
    x = float(RIGHT)
    for color, text in ((PRUNED, pruned), (KEPT, kept)):
        x -= page.width(text)
        page.text(x, y, text)
        x -= 26
        page.box(x, y + 3, x + 16, y + 19, color)
        x -= 22


def _sites_heading(report: Report, page: _Page) -> None:
    found = report.savings
    page.heading("Channels per site")
    _legend(page, page.y - 34, f"{found.kept:,} kept", f"{found.channels - found.kept:,} pruned")


def _site_rows(report: Report, page: _Page) -> None:
    """A bar per site between its name and its counts."""
    _sites_heading(report, page)
    names = max((page.width(short_name(row.site)) for row in report.savings.sites), default=0.0)
    start, end = LEFT + names + 14, RIGHT - page.width("0,000 of 0,000") - 14
    for row in report.savings.sites:
        middle = start + (end - start) * row.kept / row.channels
        page.text(LEFT, page.y, short_name(row.site))
        page.box(start, page.y + 1, middle, page.y + 22, KEPT)
        page.box(middle, page.y + 1, end, page.y + 22, PRUNED)
        page.text(RIGHT, page.y, f"{row.kept:,} of {row.channels:,}", align="right")
        page.y += 34
    page.y -= 8


def _site_columns(report: Report, page: _Page) -> None:
    """A thin column per site, in the order of the U-Net, under which stand its levels."""
    _sites_heading(report, page)
    levels: dict[str, list[float]] = {}
    for row in report.savings.sites:
        levels.setdefault(_level(row.site), []).append(row.kept / row.channels)
    room, label, least_gap = RIGHT - LEFT - AXIS, 46, 8  # 46 pixels hold the name of a level

    def taken(column: int) -> int:
        return sum(max(column * len(shares), label) for shares in levels.values())

    gaps = len(levels) - 1
    column = max((c for c in range(1, 40) if taken(c) + gaps * least_gap <= room), default=1)
    gap = (room - taken(column)) / gaps if gaps else 0.0
    height, top = 180, page.y + 10
    for percent in (100, 50, 0):
        y = top + height * (1 - percent / 100)
        page.text(LEFT + AXIS - 10, y - 11, f"{percent}%", color=MUTED, align="right")
        page.box(LEFT + AXIS, y, RIGHT, y + 1, LINE)
    x = float(LEFT + AXIS)
    for level, shares in levels.items():
        width = max(column * len(shares), label)
        start = round(x + (width - column * len(shares)) / 2)  # whole pixels: even gaps
        for place, share in enumerate(shares):
            left, right = start + place * column, start + (place + 1) * column - (column > 3)
            page.box(left, top, right, top + height * (1 - share), PRUNED)
            page.box(left, top + height * (1 - share), right, top + height, KEPT)
        for line, word in enumerate(level.split()):
            page.text(x + width / 2, top + height + 6 + 22 * line, word, BODY, MUTED, "middle")
        x += width + gap
    page.y = top + height + 56


def _level(site: str) -> str:
    """
    >>> _level("up_blocks.3.resnets.0.conv2"), _level("mid_block.resnets.0.conv1")
    ('up 3', 'mid')
    """
    stage, number = site.split(".")[:2]
    return "mid" if stage == "mid_block" else f"{stage.split('_')[0]} {number}"


def _histogram(report: Report, page: _Page) -> None:
    """How many channels have which score, coloured by what happens to them."""
    page.heading("Scores")
    kept, pruned = _score_counts(report, True), _score_counts(report, False)
    most = max(1, *(k + p for k, p in zip(kept, pruned, strict=True)))
    how = "kept: score above 0.5" if report.as_learned else "kept: highest scores, as many as set"
    page.text(RIGHT, page.y - 32, how, color=MUTED, align="right")
    height, top = 150, page.y
    start, width = LEFT + AXIS, (RIGHT - LEFT - AXIS) / BINS
    bottom = top + height
    page.text(start - 10, top - 4, f"{most:,}", color=MUTED, align="right")
    page.text(start - 10, bottom - 18, "0", color=MUTED, align="right")
    for place, counts in enumerate(zip(kept, pruned, strict=True)):
        y = float(bottom)
        left, right = start + place * width + 1, start + (place + 1) * width - 1
        for count, color in zip(counts, (KEPT, PRUNED), strict=True):
            tall = max(2.0, count / most * height) if count else 0.0  # one channel is seen as well
            page.box(left, y - tall, right, y, color)
            y -= tall
    page.box(start, bottom, RIGHT, bottom + 1, LINE)
    middle = start + THRESHOLD * (RIGHT - start)
    for y in range(top - 4, bottom, 10):
        page.box(middle - 1, y, middle + 1, y + 6, TEXT)
    for score in (0.0, 0.5, 1.0):
        align: Align = "left" if score == 0 else "right" if score == 1 else "middle"
        label = "threshold 0.5" if score == THRESHOLD else f"{score:.1f}"
        page.text(start + score * (RIGHT - start), bottom + 6, label, BODY, MUTED, align)
    page.y = bottom + 32


def _score_counts(report: Report, kept: bool) -> Sequence[int]:
    """Channels per bin of scores; a bin includes its upper end, as the threshold prunes 0.5."""
    chosen = [
        score.float()[report.keep_sets[site] == kept] for site, score in report.scores.items()
    ]
    bins = (torch.cat(chosen) * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    return [int(count) for count in torch.bincount(bins, minlength=BINS)]


def _measured(run: RunFacts, page: _Page) -> None:
    """The steps of the run, and the bytes that were there before and during pruning."""
    page.heading("Measured in the last run")
    if run.steps:
        width = (RIGHT - LEFT) / run.steps
        for step in range(run.steps):
            x = LEFT + step * width
            color = PRUNED if step in run.pruned_steps else PANEL
            page.box(x, page.y, x + width - (2 if width > 6 else 0), page.y + 18, color)
        page.y += 26
    page.paragraph(run_line(run), TEXT)
    lines = bytes_lines(run)
    if lines:
        page.y += 8
        bars = (("in full", run.full_bytes, MUTED), ("resident", run.resident_bytes, KEPT))
        _byte_bars(page, bars)
    for line in lines:
        page.paragraph(line)


def _byte_bars(page: _Page, bars: Sequence[tuple[str, int, Color]]) -> None:
    start, end = LEFT + 90, RIGHT - 110
    most = max(1, *(count for _, count, _ in bars))
    for name, count, color in bars:
        page.text(LEFT, page.y, name)
        page.box(start, page.y + 1, start + (end - start) * count / most, page.y + 22, color)
        page.text(RIGHT, page.y, show_bytes(count), align="right")
        page.y += 32
