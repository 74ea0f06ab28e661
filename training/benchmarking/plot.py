"""Time against sparsity from benchmarks of one scope, beside what the kept FLOPs would take.

    python -m training.benchmarking.plot low.json high.json --output cost.png

Each file is what `training.benchmark --output` wrote; several together may cover more sparsities
than fit into memory at once. Every time is a ratio to the dense runs of its own rounds.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.output import PICTURE, output_file, write

NAME = re.compile(r"pruned on ([\d.]+)%, (\w+)")


@dataclass(frozen=True)
class Point:
    """One variant: sparsity in percent, time relative to dense with its interval, FLOPs left."""

    sparsity: float
    ratio: float
    low: float
    high: float
    flops_left: float


def points(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Padding rule -> its points in ascending sparsity; raises ValueError where there are none."""
    found: dict[str, list[Point]] = {}
    for result in results:
        for row in result["unet"]["rows"]:
            match = NAME.fullmatch(row["name"])
            if match is None or row.get("interval") is None:
                continue
            low, high = row["interval"]
            # a ratio within the noise is not printed, but its place in the plot is its interval
            ratio = row["ratio"] if row["ratio"] is not None else (low + high) / 2
            point = Point(float(match[1]), ratio, low, high, row["flops_left"])
            found.setdefault(match[2], []).append(point)
    if not found:
        raise ValueError("no pruned variant with an interval in these files; use 6 rounds or more")
    return {rule: sorted(of, key=lambda p: p.sparsity) for rule, of in found.items()}


def draw(found: Mapping[str, Sequence[Point]], title: str) -> bytes:
    """The plot as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    for color, (rule, of) in zip(("tab:blue", "tab:orange"), found.items(), strict=False):
        x = [0.0, *(p.sparsity for p in of)]
        errors = [[0.0, *(p.ratio - p.low for p in of)], [0.0, *(p.high - p.ratio for p in of)]]
        times = [1.0, *(p.ratio for p in of)]
        axis.errorbar(x, times, errors, marker="o", capsize=3, color=color, label=f"time, {rule}")
        flops = [1.0, *(p.flops_left for p in of)]
        axis.plot(x, flops, ls="--", color=color, label=f"FLOPs left, {rule} (counted)")
    axis.set(xlabel="channels pruned in every layer, %", ylabel="share of dense", title=title)
    axis.set_ylim(0, 1.1)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmarking.plot")
    parser.add_argument("results", nargs="+", help="JSON files of training.benchmark")
    parser.add_argument("--output", required=True, help="the PNG to write")
    given = parser.parse_args(argv)
    try:
        output = output_file("--output", given.output, PICTURE, given.results)
        results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in given.results]
        options = results[0]["options"]
        title = (
            f"SD1.5 U-Net, scope {options['scope']}, {options['resolution']} px, "
            f"batch {options['batch']}, {options['precision']}, {results[0]['machine']['cpu']}"
        )
        write(output, draw(points(results), title))
    except (UserError, ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
