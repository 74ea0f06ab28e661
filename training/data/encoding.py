"""Images as the U-Net sees them: latents, sizes and prompt embeddings, each computed once.

`CachedImages` keeps them on disk: with it in hand neither VAE nor text encoder is needed any more.
`FreshImages` computes those that are met, and keeps them in memory. Both give the same batches.

Images are encoded one by one: the bits of a convolution depend on how many images it gets at once,
and a latent must not depend on what it was computed together with.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from training.data.cache import TensorCache, digest, weights_digest
from training.data.images import BrokenImage, ImageData, Position
from training.errors import UserError
from training.model.encode import (
    added_conditions,
    context_shape,
    embed_prompts,
    encode_images,
    latent_shape,
)
from training.model.load import DiffusionModel

#: how an image becomes a square (`to_pixels`) and a latent (`encode_images`): change it with them
CROP = "centre square, lanczos, mode of the posterior"
#: threads that read and decode images ahead (Pillow decodes outside Python's lock)
WORKERS = min(8, os.cpu_count() or 1)
#: what the cache keeps of an image and of a prompt, each a row of numbers
IMAGE, PROMPT = "latent, then sizes", "text states, then pooled text"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Batch:
    """Images together: ``latents`` [B, 4, h, w] and ``context`` [B, T, D], float32 on the CPU.

    Where several processes share a batch of ``total`` images, these are its ``rows`` alone; the
    same holds where some of them can't be read. ``added`` is what `added_conditions` gives.
    """

    latents: Tensor
    context: Tensor
    ids: list[str]
    total: int
    rows: slice | list[int]
    added: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        images: Iterable[Pair],
        prompts: Iterable[Pair],
        ids: list[str],
        total: int,
        rows: slice | list[int],
    ) -> Batch:
        """A batch of (latent, sizes) and (context, pooled), of which as many count as ``ids``."""
        latents, sizes = _stacked(images, len(ids))
        context, pooled = _stacked(prompts, len(ids))
        return cls(latents, context, ids, total, rows, added_conditions(pooled, sizes))


def _stacked(pairs: Iterable[Pair], count: int) -> list[Tensor]:
    return [torch.stack(each)[:count] for each in zip(*pairs, strict=True)]


class Images:
    """The images of ``data``; how they are encoded is up to a subclass."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

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
        """Batches of the images that can be read, in the order of `ImageData.index_batches`.

        ``share`` says which rows of a batch of so many images to give; all by default.
        """
        for chosen in self.data.index_batches(
            indices, batch_size, self._readable, seed=seed, epochs=epochs, position=position
        ):
            rows = share(len(chosen))
            mine = chosen[rows]
            read = mine or chosen[:1]  # nothing of this batch is ours: shapes without rows
            yield Batch.of(
                map(self._image, read),
                map(self._prompt, read),
                [self.data.records[index].id for index in mine],
                len(chosen),
                rows,
            )

    def _readable(self, index: int) -> bool:
        raise NotImplementedError

    def _image(self, index: int) -> Pair:
        """Latent and sizes."""
        raise NotImplementedError

    def _prompt(self, index: int) -> Pair:
        """Text states and pooled text."""
        raise NotImplementedError


class FreshImages(Images):
    """The images of ``data``, each encoded by ``model`` when it is first met."""

    def __init__(self, data: ImageData, model: DiffusionModel) -> None:
        super().__init__(data)
        self._model = model
        self._captions: dict[int, str] = {}
        self._images: dict[int, Pair] = {}
        self._embedded = cache(partial(embedded_prompt, model))

    def _readable(self, index: int) -> bool:
        if index in self._images:
            return True
        try:
            square = self.data.square(index)
        except BrokenImage:
            return False
        self._captions |= self.data.captions([index])
        if index not in self._captions:
            return False
        self._images[index] = encoded_image(self._model, square)
        return True

    def _image(self, index: int) -> Pair:
        return self._images[index]

    def _prompt(self, index: int) -> Pair:
        return self._embedded(self._captions[index])


class CachedImages(Images):
    """The images of ``data``, encoded by ``model`` and kept in ``folder``."""

    def __init__(self, data: ImageData, model: DiffusionModel, folder: Path) -> None:
        super().__init__(data)
        captions = data.captions()
        self._prompts = list(dict.fromkeys(captions.values()))
        number = {prompt: i for i, prompt in enumerate(self._prompts)}
        self._prompt_of = {index: number[caption] for index, caption in captions.items()}
        assert data.resolution is not None
        self._latent_shape = latent_shape(model, data.resolution)
        self._context_shape = context_shape(model)
        vae = model.vae
        scaling = str(vae.config.scaling_factor)
        latents = digest([IMAGE, weights_digest(vae), scaling, CROP, str(data.resolution)])
        embeddings = digest(
            [
                PROMPT,
                *map(weights_digest, model.text_encoders),
                *(str(sorted(t.get_vocab().items())) + str(t.pad_token) for t in model.tokenizers),
            ]
        )
        self.latents = TensorCache(folder / f"latents-{latents}", data.stamps(folder))
        self.embeddings = TensorCache(folder / f"prompts-{embeddings}", self._prompts)

    def build(
        self, model: DiffusionModel, rank: int = 0, world: int = 1, workers: int = WORKERS
    ) -> None:
        """Compute what is not cached yet; see `TensorCache.build`.

        ``workers`` threads read and decode ahead of the VAE. Raises UserError when one of them
        dies; what is cached so far stays.
        """

        def latents(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for found in _ahead(self._decoded, indices, workers):
                yield found if isinstance(found, str) else _packed(encoded_image(model, found))

        def embeddings(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for index in indices:
                yield _packed(embedded_prompt(model, self._prompts[index]))

        self.latents.build(latents, "encoding images", rank, world)
        self.embeddings.build(embeddings, "encoding prompts", rank, world)
        self.data.note_broken(self.latents.broken)

    def _readable(self, index: int) -> bool:
        return index in self._prompt_of and index not in self.latents.broken

    def _image(self, index: int) -> Pair:
        return _unpacked(self.latents[index], self._latent_shape)

    def _prompt(self, index: int) -> Pair:
        return _unpacked(self.embeddings[self._prompt_of[index]], self._context_shape)

    def _decoded(self, index: int) -> Pair | str:
        id = self.data.records[index].id
        try:
            return self.data.square(index)
        except BrokenImage:
            return self.data.broken[id]
        except BaseException as error:
            raise UserError(
                f"A worker that read images died at {id}: {error!r}.",
                "memory for a few decoded images per worker",
                "run the same command again, with fewer --workers: what is cached so far stays",
            ) from error


def encoded_image(model: DiffusionModel, square: Pair) -> Pair:
    """Latent [4, h, w] and sizes [6], on the CPU, of what `ImageData.square` gives."""
    pixels, sizes = square
    return encode_images(model, pixels[None])[0].cpu(), sizes


def embedded_prompt(model: DiffusionModel, prompt: str) -> Pair:
    """Text states [T, D] and pooled text [P] of one prompt, on the CPU."""
    context, pooled = embed_prompts(model, [prompt])
    return context[0].cpu(), pooled[0].cpu()


def _packed(pair: Pair) -> Tensor:
    """Both in one row of numbers: a cache keeps one tensor per item."""
    return torch.cat([each.flatten() for each in pair])


def _unpacked(row: Tensor, shape: Sequence[int]) -> Pair:
    """Inverse of `_packed`, where the first of the two has this shape."""
    count = math.prod(shape)
    return row[:count].view(*shape), row[count:]


def _ahead(
    read: Callable[[int], Pair | str], indices: Sequence[int], workers: int
) -> Iterator[Pair | str]:
    """``read`` of each index in order, a few ahead of what is asked for."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Pair | str]] = deque()
        try:
            for index in indices:
                waiting.append(pool.submit(read, index))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for left in waiting:
                left.cancel()
