"""Show what a gate file prunes and what that saves.

    python -m training.inspect gates.safetensors
    python -m training.inspect gates.safetensors --image report.png --resolution 768 --batch 4

The savings are counted from the architecture, in half precision.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path

from ldcp_core import Latent, gates_report, load_gates, report_image
from training.console import explaining
from training.errors import UserError
from training.output import PICTURE, output_file, write

#: pixels of the image per position of the latent (SD1.5's VAE)
SCALE = 8


def latent_of(resolution: int, batch: int) -> Latent:
    """The latent of square images; raises UserError for a size that is none."""
    if resolution < SCALE or resolution % SCALE:
        raise UserError(
            f"--resolution is {resolution}.", f"a positive multiple of {SCALE}", "change it"
        )
    if batch < 1:
        raise UserError(f"--batch is {batch}.", "at least 1", "change it")
    return Latent(resolution // SCALE, resolution // SCALE, batch)


@explaining
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("gates", help="gate file made by training.fit")
    parser.add_argument("--image", help="also write the report as an image, a PNG file")
    parser.add_argument("--resolution", type=int, default=512, help="side of the image in pixels")
    parser.add_argument(
        "--batch", type=int, default=2, help="images in one evaluation of the U-Net, CFG included"
    )
    arguments = parser.parse_args(argv)
    latent = latent_of(arguments.resolution, arguments.batch)
    if arguments.image is not None:
        output_file("--image", arguments.image, PICTURE, (arguments.gates,))
    report = gates_report(load_gates(arguments.gates), latent)
    print(report.text())
    if arguments.image is not None:
        buffer = io.BytesIO()
        report_image(report).save(buffer, "PNG")
        write(Path(arguments.image), buffer.getvalue())
        print(f"\nwrote {arguments.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
