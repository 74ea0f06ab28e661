"""The pictures of an evaluation: quality against cost, and the images side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ldcp_core import one_line
from training.data.images import open_image
from training.drawing import png, pyplot

Row = Mapping[str, Any]


def shown(text: str) -> str:
    """A gate file's own words as matplotlib draws them: a line, and no formula between dollars."""
    return one_line(text).replace("$", r"\$")


def plot(rows: Sequence[Row]) -> bytes:
    """Deviation against what is left of the U-Net, a line per criterion and precision, as PNG.

    A panel for every scope; one against bytes where there are several precisions; one for
    structured beside unstructured pruning where there is such.
    """
    plt = pyplot()
    several = len({r["precision"] for r in rows}) > 1
    panels = panels_of([r for r in rows if "deviation" in r], several)
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False, layout="tight"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for label, members in panel.lines.items():
            points = sorted(members, key=panel.x)
            x = [panel.x(r) for r in points]
            y = [r["deviation"]["mean"] for r in points]
            low = [m - r["deviation_interval"][0] for m, r in zip(y, points, strict=True)]
            high = [r["deviation_interval"][1] - m for m, r in zip(y, points, strict=True)]
            style = "--" if label.startswith("unstructured") else "-"
            axis.errorbar(x, y, [low, high], marker="o", capsize=3, label=label, linestyle=style)
        axis.set(
            title=panel.title,
            xlabel=panel.label,
            ylabel="deviation from dense (MSE, held out)",
            yscale="log",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    return png(figure)


@dataclass(frozen=True)
class Panel:
    """Lines of rows by label, and what they lie over."""

    title: str
    label: str
    x: Callable[[Row], float]
    lines: dict[str, list[Row]]


def panels_of(rows: Sequence[Row], several: bool) -> list[Panel]:
    """The panels of `plot`, of rows that have a deviation, in one precision or several."""
    gates = [r for r in rows if r["scope"]]

    def lines(of: Sequence[Row], *more: str) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for r in of:
            words = [r["criterion"], *(r[name] for name in more)]
            words += [r["precision"]] if several else []
            found.setdefault(shown(" ".join(filter(None, words))), []).append(r)
        return found

    panels = [
        Panel(
            f"scope {shown(scope)}",
            "parameters of the U-Net left, %",
            lambda r: 100 * r["parameters_left"],
            lines([r for r in gates if r["scope"] == scope]),
        )
        for scope in dict.fromkeys(r["scope"] for r in gates)
    ]
    if several:
        of_bytes = lines([r for r in rows if not r["zeroed"]], "scope")
        title = "pruned, then cast or quantized"
        panels.append(Panel(title, "weights, MiB", lambda r: r["bytes"] / 2**20, of_bytes))
    if any(r["zeroed"] for r in rows):
        title = "structured beside unstructured"
        of_all = lines([r for r in rows if r["scope"] or r["zeroed"]], "scope")
        label = "parameters of the U-Net left out or zero, %"
        panels.append(Panel(title, label, lambda r: 100 * r["sparsity"], of_all))
    return panels


@dataclass(frozen=True)
class Cell:
    """A learned gate file of a sweep: target sparsity, λ, and what came of them."""

    scope: str
    target: float
    weight: float
    deviation: float
    pruned: float


def heat_map(cells: Sequence[Cell]) -> bytes:
    """Deviation over target sparsity × λ, a panel per scope, as PNG.

    Each cell says its deviation and the share of channels that was really pruned.
    """
    plt = pyplot()
    from matplotlib.colors import LogNorm

    scopes = list(dict.fromkeys(cell.scope for cell in cells))
    targets, weights = (sorted({getattr(c, of) for c in cells}) for of in ("target", "weight"))
    values = [cell.deviation for cell in cells if cell.deviation > 0] or [1.0]
    norm = LogNorm(min(values), max(values) * (1 + 1e-9), clip=True)  # 0: nothing was pruned
    size = (2 + 1.4 * len(targets) * len(scopes), 1.5 + 0.9 * len(weights))
    figure, axes = plt.subplots(1, len(scopes), figsize=size, squeeze=False, layout="constrained")
    for axis, scope in zip(axes[0], scopes, strict=True):
        table = np.full((len(weights), len(targets)), np.nan)
        for cell in (cell for cell in cells if cell.scope == scope):
            place = weights.index(cell.weight), targets.index(cell.target)
            table[place] = cell.deviation
            text = f"{cell.deviation:.1e}\n{cell.pruned:.1%} pruned"
            dark = norm(cell.deviation) < 0.5
            axis.text(*place[::-1], text, ha="center", va="center", color="w" if dark else "k")
        image = axis.imshow(table, norm=norm, aspect="auto")
        axis.set(title=f"scope {shown(scope)}", xlabel="target sparsity", ylabel="λ")
        axis.set_xticks(range(len(targets)), [f"{target:.0%}" for target in targets])
        axis.set_yticks(range(len(weights)), [f"{weight:g}" for weight in weights])
    figure.colorbar(image, ax=axes[0], label="deviation from dense (MSE, held out)")
    return png(figure)


def grid(paths: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> Image.Image:
    """One row per model and one column per image, each row labelled with its model."""
    rows = {
        name: [open_image(path).convert("RGB") for path in files] for name, files in paths.items()
    }
    side, label, head = next(iter(rows.values()))[0].width, 18, 20
    sheet = Image.new(
        "RGB", (side * len(prompts), head + (side + label) * len(rows)), (255, 255, 255)
    )
    canvas = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = one_line(prompt)
        while text and canvas.textlength(text) > side - 4:
            text = text[:-1]
        canvas.text((column * side + 2, 4), text, (0, 0, 0))
    for row, (name, images) in enumerate(rows.items()):
        y = head + row * (side + label)
        canvas.text((2, y + 2), one_line(name), (0, 0, 0))
        for column, image in enumerate(images):
            sheet.paste(image, (column * side, y + label))
    return sheet
