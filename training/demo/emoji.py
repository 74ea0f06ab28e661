"""Emoji with their names as captions: real pictures of many kinds, named by the text alone.

The pictures are Google's Noto emoji, read from npm's package `emoji-datasource-google`:

    npm pack emoji-datasource-google@16.0.0

A picture shows one emoji on a plain background. The caption says which, how large, where, and
mostly on what colour, so that under heavy noise only the text knows what is to be drawn. Every
eighth picture is a drawn face (`faces.py`).
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from training.data.images import open_image
from training.errors import UserError

from .faces import draw_face
from .traits import BACKGROUNDS, vary

SUBCATEGORIES = ("food-fruit", "food-vegetable", "food-sweet", "animal-bird", "plant-flower")
PICTURES = "package/img/google/64/"
FACE_EVERY = 8
SMALLEST, LARGEST = 0.55, 0.95  # of the picture's side
SMALL, LARGE = 0.65, 0.85  # below and above, the caption says so
ASIDE = 0.08  # of the picture's side; an emoji farther from the centre is said to be there


@dataclass(frozen=True)
class Emoji:
    """One emoji; `pixels` is RGBA of 64 x 64."""

    name: str
    pixels: Image.Image


def read_emoji(package: Path, subcategories: Sequence[str] = SUBCATEGORIES) -> list[Emoji]:
    """The emoji of these subcategories, in the package's order.

    `package` is the file that `npm pack` writes. Raises UserError where it isn't one.
    """
    try:
        with tarfile.open(package) as archive:
            files = {member.name: member for member in archive if member.isfile()}

            def content(name: str) -> bytes:
                file = archive.extractfile(files[name])
                assert file is not None  # an ordinary file
                return file.read()

            return [
                Emoji(
                    entry["name"].lower(),
                    open_image(io.BytesIO(content(PICTURES + entry["image"]))).convert("RGBA"),
                )
                for entry in json.loads(content("package/emoji.json"))
                if entry["subcategory"] in subcategories and entry["has_img_google"]
            ]
    except (OSError, tarfile.TarError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{package} holds no emoji: {error!r}.",
            "the file that `npm pack emoji-datasource-google@16.0.0` writes",
            "run that, and name the file it wrote",
        ) from error


@dataclass(frozen=True)
class EmojiPictures:
    """Draws captioned pictures of emoji, and some faces; equal seeds give equal pictures."""

    emoji: Sequence[Emoji]

    def __call__(self, seed: int, size: int = 128) -> tuple[Image.Image, str]:
        """An RGB picture of `size` x `size` pixels and its caption."""
        if seed % FACE_EVERY == 0:
            return draw_face(seed, size)
        rng = Random(seed)
        chosen = rng.choice(self.emoji)
        scale = rng.uniform(SMALLEST, LARGEST)
        reach = (1 - scale) / 2
        x, y = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
        colour = rng.choice(list(BACKGROUNDS))
        picture = Image.new("RGB", (size, size), vary(BACKGROUNDS[colour], rng, 22))
        side = round(scale * size)
        pixels = chosen.pixels.resize((side, side), Image.Resampling.LANCZOS)
        corner = (round((0.5 + x) * size - side / 2), round((0.5 + y) * size - side / 2))
        picture.paste(pixels, corner, pixels)
        said = colour if rng.random() < 0.75 else None
        return picture, emoji_caption(chosen.name, scale, x, y, said)


def emoji_caption(name: str, scale: float, x: float, y: float, background: str | None) -> str:
    """The caption of an emoji at (x, y) from the centre, all in sides of the picture.

    >>> emoji_caption("fox face", 0.5, -0.2, 0.0, "blue")
    'small fox face, left, blue background'
    >>> emoji_caption("lemon", 0.7, 0.05, 0.1, None)
    'lemon, bottom'
    """
    size = "small " * (scale < SMALL) + "large " * (scale > LARGE)
    places = ["top"] * (y < -ASIDE) + ["bottom"] * (y > ASIDE)
    places += ["left"] * (x < -ASIDE) + ["right"] * (x > ASIDE)
    parts = [size + name, " ".join(places), f"{background} background" if background else ""]
    return ", ".join(filter(None, parts))
