"""Images as the U-Net sees them: latents and prompt embeddings, each computed once.

`CachedImages` keeps them on disk: with it in hand neither VAE nor text encoder is needed any more.
`FreshImages` computes those that are met, and keeps them in memory. Both give the same batches.

Images are encoded one by one: the bits of a convolution depend on how many images it gets at once,
and a latent must not depend on what it was computed together with.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from training.data.cache import TensorCache, digest, weights_digest
from training.data.images import BrokenImage, ImageData, Position
from training.errors import UserError
from training.model.load import DiffusionModel, embed_prompts, encode_images

#: how an image becomes a square (`to_pixels`) and a latent (`encode_images`): change it with them
CROP = "centre square, lanczos, mode of the posterior"
#: threads that read and decode images ahead (Pillow decodes outside Python's lock)
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Batch:
    """Images together: ``latents`` [B, 4, h, w] and ``context`` [B, T, D], float32 on the CPU.

    Where several processes share a batch of ``total`` images, these are its ``rows`` alone; the
    same holds where some of them can't be read.
    """

    latents: Tensor
    context: Tensor
    ids: list[str]
    total: int
    rows: slice | list[int]


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
            yield Batch(
                torch.stack([self._latent(index) for index in read])[: len(mine)],
                torch.stack([self._context(index) for index in read])[: len(mine)],
                [self.data.records[index].id for index in mine],
                len(chosen),
                rows,
            )

    def _readable(self, index: int) -> bool:
        raise NotImplementedError

    def _latent(self, index: int) -> Tensor:
        raise NotImplementedError

    def _context(self, index: int) -> Tensor:
        raise NotImplementedError


class FreshImages(Images):
    """The images of ``data``, each encoded by ``model`` when it is first met."""

    def __init__(self, data: ImageData, model: DiffusionModel) -> None:
        super().__init__(data)
        self._model = model
        self._captions: dict[int, str] = {}
        self._latents: dict[int, Tensor] = {}
        self._contexts: dict[str, Tensor] = {}

    def _readable(self, index: int) -> bool:
        if index in self._latents:
            return True
        try:
            pixels = self.data.pixels(index)
        except BrokenImage:
            return False
        self._captions |= self.data.captions([index])
        if index not in self._captions:
            return False
        self._latents[index] = encode_images(self._model, pixels[None])[0].cpu()
        return True

    def _latent(self, index: int) -> Tensor:
        return self._latents[index]

    def _context(self, index: int) -> Tensor:
        caption = self._captions[index]
        if caption not in self._contexts:
            self._contexts[caption] = embed_prompts(self._model, [caption])[0].cpu()
        return self._contexts[caption]


class CachedImages(Images):
    """The images of ``data``, encoded by ``model`` and kept in ``folder``."""

    def __init__(self, data: ImageData, model: DiffusionModel, folder: Path) -> None:
        super().__init__(data)
        captions = data.captions()
        self._prompts = list(dict.fromkeys(captions.values()))
        number = {prompt: i for i, prompt in enumerate(self._prompts)}
        self._prompt = {index: number[caption] for index, caption in captions.items()}
        vae, text = model.vae, model.text_encoder
        latents = digest(
            [weights_digest(vae), str(vae.config.scaling_factor), CROP, str(data.resolution)]
        )
        embeddings = digest(
            [weights_digest(text), str(sorted(model.tokenizer.get_vocab().items()))]
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
                if isinstance(found, Tensor):
                    found = encode_images(model, found[None])[0].cpu()
                yield found

        def embeddings(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for index in indices:
                yield embed_prompts(model, [self._prompts[index]])[0].cpu()

        self.latents.build(latents, "encoding images", rank, world)
        self.embeddings.build(embeddings, "encoding prompts", rank, world)
        self.data.note_broken(self.latents.broken)

    def _readable(self, index: int) -> bool:
        return index in self._prompt and index not in self.latents.broken

    def _latent(self, index: int) -> Tensor:
        return self.latents[index]

    def _context(self, index: int) -> Tensor:
        return self.embeddings[self._prompt[index]]

    def _decoded(self, index: int) -> Tensor | str:
        id = self.data.records[index].id
        try:
            return self.data.pixels(index)
        except BrokenImage:
            return self.data.broken[id]
        except BaseException as error:
            raise UserError(
                f"A worker that read images died at {id}: {error!r}.",
                "memory for a few decoded images per worker",
                "run the same command again, with fewer --workers: what is cached so far stays",
            ) from error


def _ahead(
    read: Callable[[int], Tensor | str], indices: Sequence[int], workers: int
) -> Iterator[Tensor | str]:
    """``read`` of each index in order, a few ahead of what is asked for."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Tensor | str]] = deque()
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
