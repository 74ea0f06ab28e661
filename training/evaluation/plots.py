"""The pictures of an evaluation: quality against cost, and the images side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Deviation against parameters and FLOPs left, a line per criterion and scope, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for r in rows:
        if "deviation" in r:
            groups.setdefault((r["scope"], r["criterion"]), []).append(r)
    scopes = list(dict.fromkeys(scope for scope, _ in groups))
    figure, axes = plt.subplots(1, len(scopes), figsize=(6 * len(scopes), 4.5), squeeze=False)
    for axis, scope in zip(axes[0], scopes, strict=True):
        for (of, criterion), members in groups.items():
            if of != scope:
                continue
            members = sorted(members, key=lambda r: r["parameters_left"])
            x = [100 * r["parameters_left"] for r in members]
            y = [r["deviation"]["mean"] for r in members]
            low = [m - r["deviation_interval"][0] for m, r in zip(y, members, strict=True)]
            high = [r["deviation_interval"][1] - m for m, r in zip(y, members, strict=True)]
            axis.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=criterion)
        axis.set(
            title=f"scope {scope}",
            xlabel="parameters of the U-Net left, %",
            ylabel="deviation from dense (MSE, held out)",
            yscale="log",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def grid(paths: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> Image.Image:
    """One row per model and one column per image, each row labelled with its model."""
    rows = {
        name: [Image.open(path).convert("RGB") for path in files] for name, files in paths.items()
    }
    side, label, head = next(iter(rows.values()))[0].width, 18, 20
    sheet = Image.new(
        "RGB", (side * len(prompts), head + (side + label) * len(rows)), (255, 255, 255)
    )
    canvas = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = prompt
        while text and canvas.textlength(text) > side - 4:
            text = text[:-1]
        canvas.text((column * side + 2, 4), text, (0, 0, 0))
    for row, (name, images) in enumerate(rows.items()):
        y = head + row * (side + label)
        canvas.text((2, y + 2), name, (0, 0, 0))
        for column, image in enumerate(images):
            sheet.paste(image, (column * side, y + label))
    return sheet
