"""Show what a gate file prunes and what that saves.

    python -m training.inspect gates.safetensors
    python -m training.inspect gates.safetensors --image report.png --resolution 768 --batch 4

The savings are counted from the architecture, in half precision.
"""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

from ldcp_core import Latent, gates_report, load_gates, report_image
from training.console import explaining
from training.options import COUNT, Bound, Options, option, parsed
from training.output import PICTURE, output_file, write

#: pixels of the image per position of the latent (SD1.5's VAE)
SCALE = 8
SIDE = Bound(lambda value: value >= SCALE and value % SCALE == 0, f"a positive multiple of {SCALE}")


@dataclass(frozen=True)
class InspectOptions(Options):
    """A gate file, and the evaluation of the U-Net that its savings are counted for."""

    gates: str = option("gate file made by training.fit", positional=True)
    image: str | None = option("also write the report as an image, a PNG file", None)
    resolution: int = option("side of the image in pixels", 512, SIDE)
    batch: int = option("images in one evaluation of the U-Net, CFG included", 2, COUNT)


@explaining
def main(argv: list[str] | None = None) -> int:
    given = parsed(InspectOptions, argv, "inspect", __doc__)
    if given.image is not None:
        output_file("--image", given.image, PICTURE, (given.gates,))
    side = given.resolution // SCALE
    report = gates_report(load_gates(given.gates), Latent(side, side, given.batch))
    print(report.text())
    if given.image is not None:
        buffer = io.BytesIO()
        report_image(report).save(buffer, "PNG")
        write(Path(given.image), buffer.getvalue())
        print(f"\nwrote {given.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
