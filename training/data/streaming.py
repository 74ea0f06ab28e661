"""Images of a data set too large for the disk: read as they come, encoded, and forgotten.

Nothing is downloaded whole and nothing is cached, so VAE and text encoder stay in memory. Images
come in the order of the data set, every epoch the same; whoever wants another order shuffles the
rows when the data set is made. The first images are held out. Where the stream stands is part of
the position, so that a run goes on with the very next image.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import torch

from training.data.encoding import Batch, Pair, embedded_prompt, encoded_image
from training.data.images import (
    DIGESTED,
    Broken,
    ImageData,
    Position,
    decode_image,
    digest_of,
    reason_of,
    sizes,
    to_pixels,
)
from training.data.sources import Stream, open_stream
from training.errors import UserError
from training.model.encode import latent_shape
from training.model.load import DiffusionModel

#: rows without an image after which no image is expected any more
UNREADABLE = 64
#: prompt embeddings kept in memory
PROMPTS = 1024


class StreamedImages:
    """The images of a streamed table; in a fit it stands in for `ImageData` and its cache.

    ``held_out`` images at the start are not for training. Set ``resolution`` and call `encode_with`
    before batches are drawn.
    """

    def __init__(self, source: str, held_out: int) -> None:
        self.source = source
        self.resolution: int | None = None
        self.broken = Broken()
        self._stream: Stream = open_stream(source)
        self._held_out = held_out
        self._read = False

    def split(self) -> tuple[range, range]:
        """Row numbers to train on, without end, and those held out."""
        return range(self._held_out, sys.maxsize), range(self._held_out)

    def encode_with(self, model: DiffusionModel) -> None:
        self._model = model
        self._embedded = lru_cache(PROMPTS)(partial(embedded_prompt, model))

    def digest(self, indices: Iterable[int] = ()) -> str:
        """A short hash of the first rows' bytes and the number held out."""
        rows = islice(self._stream.rows(self._stream.table), DIGESTED)
        return digest_of(str(self._held_out), (partial(self._stream.read, row) for row in rows))

    def captions(self, indices: Sequence[int]) -> dict[int, str]:
        """Row number -> caption of the given rows among the first ones, of those that have one."""
        found: dict[int, str] = {}
        rows = self._stream.rows(self._stream.table)
        for number, row in enumerate(islice(rows, self._held_out or 1)):
            if number in indices:
                try:
                    found[number] = self._stream.caption(row)
                except ValueError as error:
                    self._note_broken(f"row {number}", error)
        return found

    def broken_report(self) -> str:
        return self.broken.summary("streamed images")

    def batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        *,
        seed: int | None = None,
        epochs: int | None = 1,
        position: Position | None = None,
        share: Callable[[int], slice] = slice,
    ) -> Iterator[Batch]:
        """Batches of the rows in ``indices``, in the order of the stream whatever the ``seed``.

        As `Images.batches`. Every process reads the whole stream, and decodes and encodes
        its own rows alone. An image that can't be read leaves its place in the batch empty.

        Raises UserError when there is no row to read, or not one can be.
        """
        position = position or Position()
        while epochs is None or position.epoch < epochs:
            seen = begun = position.offset > 0
            for chosen in self._rows(indices, batch_size, position):
                seen = True
                yield self._encoded(chosen, share(len(chosen)))
            if not seen:
                raise UserError(
                    f"{self.source} has no images beyond the first {self._held_out}, which are "
                    "held out.",
                    "more images",
                    "use --validation-fraction 0, or another data set",
                )
            if self.broken and not (self._read or begun):
                raise self._unreadable()
            position.epoch, position.offset, position.stream = position.epoch + 1, 0, None

    def _rows(
        self, indices: Sequence[int], batch_size: int, position: Position
    ) -> Iterator[list[tuple[int, Mapping[str, Any]]]]:
        """Numbered rows in batches; moves ``position`` behind each batch before it is yielded."""
        table = self._stream.table_at(position.stream)
        batch: list[tuple[int, Mapping[str, Any]]] = []
        for row in self._stream.rows(table):
            number, position.offset = position.offset, position.offset + 1
            if number in indices:
                batch.append((number, row))
            if len(batch) == batch_size:
                position.stream = table.state_dict()
                yield batch
                batch = []
            if number >= indices[-1]:
                break
        if batch:
            position.stream = table.state_dict()
            yield batch

    def _encoded(self, chosen: Sequence[tuple[int, Mapping[str, Any]]], rows: slice) -> Batch:
        assert self.resolution is not None
        images: dict[int, Pair] = {}
        prompts: dict[int, Pair] = {}
        for place in range(len(chosen))[rows]:
            number, row = chosen[place]
            try:
                image = decode_image(self._stream.read(row))
                square = to_pixels(image, self.resolution), sizes(image, self.resolution)
                caption = self._stream.caption(row)
            except Exception as error:  # damaged bytes make image decoders raise nearly anything
                self._note_broken(f"row {number}", error)
                continue
            images[place] = encoded_image(self._model, square)
            prompts[place] = self._embedded(caption)
            self._read = True
        if not images:  # shapes without rows
            nothing = torch.zeros(latent_shape(self._model, self.resolution)), torch.zeros(6)
            return Batch.of([nothing], [self._embedded("")], [], len(chosen), [])
        ids = [f"row {chosen[place][0]}" for place in images]
        return Batch.of(images.values(), prompts.values(), ids, len(chosen), list(images))

    def _note_broken(self, id: str, error: Exception) -> None:
        self.broken.note(id, reason_of(error))
        if not self._read and len(self.broken) == UNREADABLE:
            raise self._unreadable()

    def _unreadable(self) -> UserError:
        id, reason = next(iter(self.broken.items()))
        return UserError(
            f"None of the first {len(self.broken)} images of {self.source} can be read, for "
            f"example {id}: {reason}.",
            "rows that hold images",
            "look at that row; make or download the data set again",
        )


#: images to learn from
Data = ImageData | StreamedImages
