"""A picture of what the demo pipeline draws: twelve prompts, fixed seeds, classifier-free guidance.

`python -m training.demo.samples --output samples.png`
"""

import argparse
import io
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageDraw

from training.console import explaining
from training.output import PICTURE, output_file, write

from .check import PIPELINE, load_pipeline

PROMPTS = (
    "a young woman with long red hair and glasses, smiling",
    "an old man with short white hair and a beard, serious",
    "a girl with long blond hair, laughing, blue background",
    "a bald man with sunglasses, smiling, yellow background",
    "a woman with curly black hair, laughing, purple background",
    "a young man with short brown hair, serious, green background",
    "an old woman with curly grey hair and glasses, smiling",
    "a boy with short red hair, laughing, white background",
    "a young woman with long pink hair, smiling, black background",
    "a man with curly brown hair and a beard, laughing",
    "a woman with short blond hair and sunglasses, serious",
    "a young man with short blue hair, smiling, orange background",
)
CAPTION_HEIGHT = 40


def sample(
    pipe: StableDiffusionPipeline,
    prompts: tuple[str, ...],
    steps: int = 30,
    guidance: float = 4.0,
    seed: int = 7,
) -> list[Image.Image]:
    """One image per prompt, each from its own seed (DDIM)."""
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    return pipe(
        list(prompts), num_inference_steps=steps, guidance_scale=guidance, generator=generators
    ).images


def grid(images: list[Image.Image], prompts: tuple[str, ...], columns: int = 6) -> Image.Image:
    """Images in rows with their prompts below."""
    side = images[0].width
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * (side + CAPTION_HEIGHT)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        x, y = i % columns * side, i // columns * (side + CAPTION_HEIGHT)
        sheet.paste(image, (x, y))
        draw.multiline_text(
            (x + 3, y + side + 2),
            _wrapped(draw, prompt, side - 6),
            fill="black",
            font_size=9,
            spacing=1,
        )
    return sheet


def _wrapped(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font_size=9) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines)


@explaining
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=4.0)
    args = parser.parse_args()
    output_file("--output", args.output, PICTURE, ())
    pipe = load_pipeline(args.pipeline)
    buffer = io.BytesIO()
    grid(sample(pipe, PROMPTS, args.steps, args.guidance), PROMPTS).save(buffer, "PNG")
    write(args.output, buffer.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(main())
