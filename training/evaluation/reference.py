"""Features of the images that drawn ones are held against, computed once and kept on disk.

Features are cached one per image (see `training.data.cache`), in files named by the content of the
images, by the network and by the resolution: FID, KID, CMMD, precision and recall of any later run
against the same images start from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from training.data.cache import TensorCache, digest
from training.data.encoding import CROP
from training.data.images import BrokenImage, ImageData
from training.errors import UserError
from training.evaluation.networks import BATCH, Clip, Inception, Vgg


class Reference:
    """The images of ``data``, whose resolution must be set, with features kept in ``folder``."""

    def __init__(self, data: ImageData, folder: Path) -> None:
        self.data, self._folder = data, folder

    def features(self, network: Inception | Vgg | Clip) -> Tensor:
        """[N, D] of all images that can be read.

        Raises UserError when none can, or the cache can't be written.
        """
        data = self.data
        name = digest([network.stamp, CROP, str(data.resolution)])
        cache = TensorCache(self._folder / f"features-{name}", data.stamps(self._folder))

        def compute(indices: Sequence[int]) -> Iterator[Tensor | str]:
            for start in range(0, len(indices), BATCH):
                read = [self._read(index) for index in indices[start : start + BATCH]]
                images = [found for found in read if isinstance(found, Tensor)]
                rows = iter(network.features(torch.stack(images)) if images else ())
                yield from (found if isinstance(found, str) else next(rows) for found in read)

        cache.build(compute, "features of the reference")
        data.note_broken(cache.broken)
        if len(cache.broken) == len(data):
            raise UserError(f"No image of {data.source} can be read.", "intact images")
        return torch.stack([cache[i] for i in range(len(data)) if i not in cache.broken])

    def _read(self, index: int) -> Tensor | str:
        """uint8 [3, R, R], or why it can't be read."""
        try:
            pixels = self.data.pixels(index)
        except BrokenImage:
            return self.data.broken[self.data.records[index].id]
        return ((pixels + 1) * 127.5).round().to(torch.uint8)
