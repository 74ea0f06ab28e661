"""Pictures of the shipped workflows with the graph inside, so that they can be dropped as well.

ComfyUI reads the graph of an image that is dropped on the canvas from its ``workflow`` text. A
screenshot becomes such an image here; after a workflow file was changed, its picture needs the new
graph:

    python tests/nodes/workflow_png.py [screenshot.png named like the workflow, or like a node ...]

The templates menu shows a JPEG beside the file. A screenshot of a node becomes the picture of its
help page. The browser tests take both kinds (see `test_node_browser`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ui_workflow
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

TEXT = "workflow"
#: of a tile of the templates menu, in pixels
THUMBNAIL = (480, 480)
HELP = ui_workflow.FOLDER.parent / "nodes" / "web" / "docs"


def embedded(path: Path) -> ui_workflow.Workflow | None:
    """The graph inside a PNG; None where there is none."""
    with Image.open(path) as image:
        image.load()
        text: dict[str, Any] = getattr(image, "text", {})
    return json.loads(text[TEXT]) if TEXT in text else None


def embed(picture: Path, workflow: Path) -> Path:
    """Write ``picture``, in 256 colours, with the graph inside, beside the workflow file."""
    info = PngInfo()
    info.add_text(TEXT, json.dumps(ui_workflow.read(workflow)))
    with Image.open(picture) as image:
        reduced = image if image.mode == "P" else few_colours(image.convert("RGB"))
        path = workflow.with_suffix(".png")
        reduced.save(path, pnginfo=info, optimize=True)
        plain = image.convert("RGB")
        canvas = plain.getpixel((0, 0))
        small = ImageOps.pad(plain, THUMBNAIL, Image.Resampling.LANCZOS, color=canvas)
        small.save(path.with_suffix(".jpg"), quality=80, optimize=True)
    return path


def few_colours(image: Image.Image) -> Image.Image:
    """256 colours, not dithered: an interface has few, and compresses well without noise."""
    return image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)


def help_picture(picture: Path) -> Path:
    """Write the picture of a node beside its help page, in few colours."""
    path = HELP / picture.name
    with Image.open(picture) as image:
        few_colours(image.convert("RGB")).save(path, optimize=True)
    return path


if __name__ == "__main__":
    given = {Path(name).stem: Path(name) for name in sys.argv[1:]}
    for file in ui_workflow.FILES:
        written = embed(given.get(file.stem, file.with_suffix(".png")), file)
        print(f"{written} ({written.stat().st_size / 1000:.0f} kB)")
    for page in sorted(HELP.glob("*.md")):
        if page.stem in given:
            written = help_picture(given[page.stem])
            print(f"{written} ({written.stat().st_size / 1000:.0f} kB)")
