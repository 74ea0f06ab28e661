"""Images as the U-Net sees them: latents and prompt embeddings, computed once and kept on disk.

An `EncodedImages` stands in for `ImageData` wherever batches are drawn: the same images in the same
order, without decoding one. With it in hand neither VAE nor text encoder is needed any more.
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
class EncodedBatch:
    """Images together: ``latents`` [B, 4, h, w] and ``context`` [B, T, D], float32 on the CPU.

    Where several processes share a batch of ``total`` images, these are its ``rows`` alone; the
    same holds where some of them can't be read.
    """

    latents: Tensor
    context: Tensor
    ids: list[str]
    total: int
    rows: slice | list[int]


class EncodedImages:
    """The images of ``data``, encoded by ``model`` and kept in ``folder``."""

    def __init__(self, data: ImageData, model: DiffusionModel, folder: Path) -> None:
        self._data = data
        self._captions = data.captions()
        self._prompts = list(dict.fromkeys(self._captions.values()))
        number = {prompt: i for i, prompt in enumerate(self._prompts)}
        self._prompt = {index: number[caption] for index, caption in self._captions.items()}
        vae, text = model.vae, model.text_encoder
        latents = digest(
            [weights_digest(vae), str(vae.config.scaling_factor), CROP, str(data.resolution)]
        )
        embeddings = digest(
            [weights_digest(text), str(sorted(model.tokenizer.get_vocab().items()))]
        )
        self.latents = TensorCache(folder / f"latents-{latents}", data.stamps(folder))
        self.embeddings = TensorCache(folder / f"prompts-{embeddings}", self._prompts)

    def __len__(self) -> int:
        """How many images there are, those included that can't be read."""
        return len(self._data)

    def build(
        self, model: DiffusionModel, rank: int = 0, world: int = 1, workers: int = WORKERS
    ) -> None:
        """Compute what is not cached yet; see `TensorCache.build`.

        ``workers`` threads read and decode ahead of the VAE. Raises UserError when one of them
        dies; what is cached so far stays.
        """

        def latents(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for found in _ahead(self._decoded, indices, workers):
                # one by one: a latent must not depend on what it was computed together with
                broken = isinstance(found, str)
                yield found if broken else encode_images(model, found[None])[0].cpu()

        def embeddings(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for index in indices:
                yield embed_prompts(model, [self._prompts[index]])[0].cpu()

        self.latents.build(latents, "encoding images", rank, world)
        self.embeddings.build(embeddings, "encoding prompts", rank, world)
        self._data.note_broken(self.latents.broken)

    def batches(
        self,
        indices: Sequence[int],
        batch_size: int,
        *,
        seed: int | None = None,
        epochs: int | None = 1,
        position: Position | None = None,
        share: Callable[[int], slice] = slice,
    ) -> Iterator[EncodedBatch]:
        """As `ImageData.batches`, in the same order.

        ``share`` says which rows of a batch of so many images to read; all by default.
        """
        for chosen in self._data.index_batches(
            indices,
            batch_size,
            lambda index: index in self._prompt and index not in self.latents.broken,
            seed=seed,
            epochs=epochs,
            position=position,
        ):
            rows = share(len(chosen))
            mine = chosen[rows]
            read = mine or chosen[:1]  # nothing of this batch is ours: shapes without rows
            yield EncodedBatch(
                torch.stack([self.latents[index] for index in read])[: len(mine)],
                torch.stack([self.embeddings[self._prompt[index]] for index in read])[: len(mine)],
                [self._data.records[index].id for index in mine],
                len(chosen),
                rows,
            )

    def _decoded(self, index: int) -> Tensor | str:
        id = self._data.records[index].id
        try:
            return self._data.pixels(index)
        except BrokenImage:
            return self._data.broken[id]
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
