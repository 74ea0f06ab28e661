"""Decode, order and batch training images; a bad file never stops a run, and never goes unnoticed.

Listing (`training.data.sources`) is cheap and comes first, so a wrong path shows before a model
loads; an image is read when its batch is asked for.
"""

from __future__ import annotations

import hashlib
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldcp_core import printable
from training.console import progress
from training.data.sources import KINDS, Record, list_images
from training.data.stamps import FileStamps
from training.errors import UserError

log = logging.getLogger(__name__)

#: what is decoded, whatever a file is called: Pillow knows many more formats, and starts programs
#: for some of them
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
#: pixels of an image, a quarter of a GiB as RGB; a small file may claim any number of them, and
#: every worker decodes one
MAX_PIXELS = 2**30 // 12
#: images whose bytes tell one data set from another: of a table all ids are alike
DIGESTED = 8


class BrokenImage(Exception):
    """One image can't be read; the message says why."""


class Broken(dict[str, str]):
    """Id and reason of every image that could not be read so far."""

    def note(self, id: str, reason: str) -> None:
        if not self:
            log.warning("Skipping the broken image %s: %s", id, reason)
        self[id] = reason

    def summary(self, images: str) -> str:
        """How many of the ``images`` were skipped and which, or "" when none were."""
        if not self:
            return ""
        lines = [f"{len(self)} {images} could not be read and were skipped:"]
        return "\n".join(lines + [f"  {id}: {reason}" for id, reason in self.items()])


@dataclass
class Position:
    """How far a stream of batches has come: the epoch, and how much of its order lies behind.

    ``stream`` is the state of a data set that is read as it comes.
    """

    epoch: int = 0
    offset: int = 0
    stream: dict[str, Any] | None = None


@dataclass
class ImageData:
    """Listed images that are decoded when asked for.

    Attributes:
        source: what was opened.
        resolution: side of the square images in pixels; set it before the first image is read
            (the model's own size is known only later than the listing).
        broken: what could not be read so far.
    """

    source: str
    records: Sequence[Record]
    resolution: int | None = None
    broken: Broken = field(default_factory=Broken)
    _warned_small: bool = field(default=False, init=False, repr=False)

    def __len__(self) -> int:
        """Return the number of listed images, broken ones included."""
        return len(self.records)

    def pixels(self, index: int) -> Tensor:
        """The pixels of `square` alone."""
        return self.square(index)[0]

    def square(self, index: int) -> tuple[Tensor, Tensor]:
        """Decode one image: its pixels (see `to_pixels`) and its `sizes`.

        Raises BrokenImage, also noted in `broken`, where it can't be read.
        """
        if self.resolution is None:
            raise ValueError("set ImageData.resolution before reading images")
        record = self.records[index]
        try:
            image = decode_image(record.read())
        except MemoryError:  # says nothing about the image
            raise
        except Exception as error:  # damaged bytes make image decoders raise nearly anything
            self.broken.note(record.id, reason_of(error))
            raise BrokenImage(f"{record.id}: {reason_of(error)}") from error
        if min(image.size) < self.resolution and not self._warned_small:
            self._warned_small = True
            log.warning(
                "%s is %d x %d pixels, smaller than %d: it and others like it are enlarged.",
                record.id,
                *image.size,
                self.resolution,
            )
        return to_pixels(image, self.resolution), sizes(image, self.resolution)

    def note_broken(self, broken: Mapping[int, str]) -> None:
        """Take over what is known to be broken, index -> reason, without reading it."""
        for index, reason in broken.items():
            self.broken.note(self.records[index].id, reason)

    def captions(self, indices: Iterable[int] | None = None) -> dict[int, str]:
        """Index -> caption of the given images, or of all.

        An image whose caption can't be had is noted in `broken`, and left out.
        """
        found: dict[int, str] = {}
        for index in range(len(self)) if indices is None else indices:
            record = self.records[index]
            try:
                found[index] = record.caption()
            except (OSError, ValueError) as error:
                self.broken.note(record.id, reason_of(error))
        return found

    def stamps(self, folder: Path) -> list[str]:
        """What tells each image's content apart (see `Record`).

        Files are read whole, those apart that ``folder`` remembers (see `FileStamps`).
        """
        stamps = FileStamps(folder, self.source)
        bar = progress(self.records, "looking for changes", unit="image")
        found = [record.stamp(stamps) for record in bar]
        stamps.save()
        return found

    def broken_report(self) -> str:
        return self.broken.summary(f"of {len(self)} images")

    def split(self, validation_fraction: float, seed: int) -> tuple[list[int], list[int]]:
        """Return disjoint, sorted indices for training and validation.

        Which image goes where depends on the seed and the ids alone, not on platform or order.

        Raises:
            UserError: nothing would be left to train on.
        """
        if validation_fraction == 0:
            return list(range(len(self))), []
        held_out = max(1, round(len(self) * validation_fraction))
        if held_out >= len(self):
            raise UserError(
                f"{self.source} has {len(self)} image(s), and a validation fraction of "
                f"{validation_fraction} leaves none to train on.",
                "at least one image for each",
                "add images, or use --validation-fraction 0",
            )
        order = self._shuffled(range(len(self)), f"split {seed}")
        return sorted(order[held_out:]), sorted(order[:held_out])

    def index_batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        readable: Callable[[int], bool],
        *,
        seed: int | None = None,
        epochs: int | None = 1,
        position: Position | None = None,
    ) -> Iterator[list[int]]:
        """Yield the indices that make up batches; the last one of an epoch may be smaller.

        Args:
            indices: which images, for example one half of `split`.
            batch_size: images per batch, at least one.
            readable: says whether an image can be had (and has noted in `broken` why not). Others
                are skipped; the order of the rest does not depend on them.
            seed: shuffle, differently in each epoch; None keeps the order of `indices`.
            epochs: how many times over; None goes on for ever.
            position: where to begin; moved along, so that it always says where to go on after the
                batch that was yielded last.

        Raises:
            UserError: not one of the images can be read.
        """
        position = position or Position()
        if not len(indices):
            return
        while epochs is None or position.epoch < epochs:
            order = (
                indices
                if seed is None
                else self._shuffled(indices, f"epoch {position.epoch} {seed}")
            )
            found = position.offset > 0  # something was, before this iterator began
            batch: list[int] = []
            for offset in range(position.offset, len(order)):
                if readable(order[offset]):
                    batch.append(order[offset])
                if batch and (len(batch) == batch_size or offset + 1 == len(order)):
                    found, position.offset = True, offset + 1
                    yield batch
                    batch = []
            if not found:
                id = self.records[order[0]].id
                raise UserError(
                    f"None of the {len(indices)} image(s) chosen from {self.source} can be read, "
                    f"for example {id}: {self.broken[id]}.",
                    "intact images",
                    "look at that file; download the data again if all are like it",
                )
            position.epoch, position.offset = position.epoch + 1, 0

    def digest(self, indices: Sequence[int]) -> str:
        """A short hash of which images these are, by id, and of the bytes of the first ones."""
        ids = "\n".join(self.records[index].id for index in indices)
        return digest_of(ids, (self.records[index].read for index in indices[:DIGESTED]))

    def _shuffled(self, indices: Iterable[int], salt: str) -> list[int]:
        """Order by a hash of the id: the same everywhere, and untouched by other images."""

        def rank(index: int) -> bytes:
            return hashlib.sha256(f"{salt} {self.records[index].id}".encode()).digest()

        return sorted(indices, key=rank)


def open_dataset(source: str, *, resolution: int | None = None) -> ImageData:
    """List the images of `source` (see `list_images`, also for what it raises), decoding none.

    Args:
        source: a folder, a file, or a hub data set id.
        resolution: see `ImageData`.
    """
    return ImageData(source, list_images(source), resolution)


def digest_of(which: str, first: Iterable[Callable[[], bytes]]) -> str:
    """A short hash of ``which`` images these are, and of what reads the ``first`` of them."""
    found = hashlib.sha256(which.encode())
    for read in first:
        try:
            content = read()
        except (OSError, ValueError):  # noted when its turn comes
            content = b""
        found.update(hashlib.sha256(content).digest())
    return found.hexdigest()[:32]


def reason_of(error: Exception) -> str:
    """Why an image can't be read, in one line."""
    return printable(" ".join(str(error).split())) or type(error).__name__


# --- decoding -------------------------------------------------------------------------------------


def decode_image(data: bytes) -> Image.Image:
    """Decode `data` into an upright image of mode RGB, or F in [0, 255] where it had 16 bits.

    Transparency is laid over white; colour profiles are ignored. Raises ValueError and whatever the
    decoders raise where there is no image of `FORMATS` with at most `MAX_PIXELS` pixels.
    """
    if not data:
        raise ValueError("the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer, not the image (run `git lfs pull`)")
    image = open_image(io.BytesIO(data))
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.float32)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("a 32-bit image; expected 8 or 16 bits per channel")
        return Image.fromarray(values * (255 / 65535))
    if image.mode == "F":
        raise ValueError("a floating-point image; expected 8 or 16 bits per channel")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Open an image without decoding it; raises ValueError as `decode_image`."""
    where = f"{file}: " if isinstance(file, Path) else ""
    try:
        image = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError as error:  # its own text is the address of a BytesIO
        raise ValueError(f"{where}not a {KINDS} image, whatever its name says") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{where}more than {MAX_PIXELS:,} pixels") from error
    if math.prod(image.size) > MAX_PIXELS:
        width, height = image.size
        raise ValueError(f"{where}{width} x {height} pixels; at most {MAX_PIXELS:,} in all")
    return image


def to_pixels(image: Image.Image, resolution: int) -> Tensor:
    """Cut out the centre square, scale it, and return float32 [3, R, R] in [-1, 1]."""
    left, top, side = _centre(image)
    square = image.resize(
        (resolution, resolution),
        Image.Resampling.LANCZOS,
        box=(left, top, left + side, top + side),
    )
    values = torch.from_numpy(np.array(square, dtype=np.float32))
    values = values.expand(3, -1, -1) if values.ndim == 2 else values.permute(2, 0, 1)
    return (values / 127.5 - 1).clamp(-1, 1).contiguous()


def sizes(image: Image.Image, resolution: int) -> Tensor:
    """What SDXL is told of the image that `to_pixels` makes, float32 [6], in pixels.

    Original height and width; top and left of the crop, in the image scaled to ``resolution``;
    height and width of the result (Podell et al. 2023, arXiv:2307.01952, §2.2).
    """
    left, top, side = _centre(image)
    width, height = image.size
    crop = [round(top * resolution / side), round(left * resolution / side)]
    return torch.tensor([height, width, *crop, resolution, resolution], dtype=torch.float32)


def _centre(image: Image.Image) -> tuple[int, int, int]:
    """Left, top and side of the centre square."""
    width, height = image.size
    side = min(width, height)
    return (width - side) // 2, (height - side) // 2, side
