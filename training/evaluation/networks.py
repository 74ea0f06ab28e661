"""The networks whose features learned metrics compare, from files that the user has put in place.

Nothing is downloaded. Inception and VGG-16 are the TorchScript files published with StyleGAN2-ADA
(Karras et al. 2020), which need no other package, CLIP is a folder of transformers. All take
uint8 images [B, 3, H, W] of 0 to 255 and do their own scaling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from training.data.cache import weights_digest
from training.data.stamps import file_stamp
from training.errors import UserError, first_line

#: images given to a network at once
BATCH = 32


@dataclass(frozen=True)
class Source:
    """A file or folder that metrics need: its option, its usual name, and where it is published."""

    option: str
    name: str
    published: str
    metrics: str

    def missing(self, folder: Path) -> str:
        """What to do to have the metrics."""
        return (
            f"{self.metrics} not measured: put {self.name} ({self.published}) at "
            f"{folder / self.name}, or give it with {self.option}"
        )


_NVLABS = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/"
_CLIP = "openai/clip-vit-large-patch14-336"
INCEPTION = Source(
    "--inception",
    "inception-2015-12-05.pt",
    f"published at {_NVLABS}inception-2015-12-05.pt",
    "FID and KID",
)
VGG = Source("--vgg", "vgg16.pt", f"published at {_NVLABS}vgg16.pt", "LPIPS, precision and recall")
CLIP = Source(
    "--clip",
    "clip",
    f"a transformers folder such as `hf download {_CLIP} --local-dir clip` makes",
    "CLIP score and CMMD",
)


class _Script:
    """A network from TorchScript, which resizes images itself."""

    source: ClassVar[Source]

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.stamp = f"{type(self).__name__.lower()} {file_stamp(path)}"
        self._device = device
        try:
            self._script = torch.jit.load(os.fspath(path), map_location=device).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise _unreadable(path, self.source, error) from error

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, D] of images."""
        return self._script(images.to(self._device), return_features=True).float().cpu()


class Inception(_Script):
    """Inception-v3 as FID and KID know it: D = 2048, the last pooling layer, at 299 pixels."""

    source = INCEPTION


class Vgg(_Script):
    """VGG-16 for precision and recall: D = 4096, the second linear layer, at 224 pixels; LPIPS."""

    source = VGG

    @torch.no_grad()
    def lpips(self, one: Tensor, other: Tensor) -> float:
        """LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1) between two images [1, 3, H, W].

        The network's embedding is weighted such that its squared distance is LPIPS.
        """
        pair = torch.cat([one, other]).to(self._device, torch.float32)
        a, b = self._script(pair, resize_images=False, return_lpips=True)
        return float((a - b).square().sum())


class Clip:
    """CLIP (Radford et al. 2021, arXiv:2103.00020) from a folder of transformers."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        try:
            self._model = CLIPModel.from_pretrained(folder, local_files_only=True)
            self._processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            self._tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            raise _unreadable(folder, CLIP, error) from error
        self._model.eval().requires_grad_(False).to(device)
        self._device = device
        self.stamp = f"clip {weights_digest(self._model)} {self._processor.to_json_string()}"

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Unit embeddings [B, D] of images."""
        arrays = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self._processor(arrays, input_data_format="channels_last", return_tensors="pt")
        pooled = self._model.vision_model(pixels["pixel_values"].to(self._device)).pooler_output
        return normalize(self._model.visual_projection(pooled).float()).cpu()

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Unit embeddings [B, D] of prompts, cut where they are too long for CLIP."""
        tokens = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        pooled = self._model.text_model(**tokens.to(self._device)).pooler_output
        return normalize(self._model.text_projection(pooled).float()).cpu()


@dataclass(frozen=True)
class Networks:
    """What is there of the three, and in ``notes`` what to do about the others."""

    inception: Inception | None = None
    vgg: Vgg | None = None
    clip: Clip | None = None
    notes: tuple[str, ...] = ()


def load_networks(
    inception: str | None, vgg: str | None, clip: str | None, folder: Path, device: str
) -> Networks:
    """The networks that were named, or that lie in ``folder`` under their usual names.

    Raises UserError when one that was named is not there, or one that is there can't be read.
    """
    notes: list[str] = []

    def load(given: str | None, source: Source, network: Callable[[Path, str], Any]) -> Any:
        path = folder / source.name if given is None else Path(given).expanduser()
        if path.exists():
            return network(path, device)
        if given is not None:
            raise UserError(
                f"There is no {given}.",
                f"{source.name}, {source.published}",
                f"check the spelling of {source.option}; the path is taken from {Path.cwd()}",
            )
        notes.append(source.missing(folder))
        return None

    return Networks(
        load(inception, INCEPTION, Inception),
        load(vgg, VGG, Vgg),
        load(clip, CLIP, Clip),
        tuple(notes),
    )


def _unreadable(path: Path, source: Source, error: Exception) -> UserError:
    return UserError(
        f"{path} can't be loaded: {first_line(error)}",
        f"{source.name}, {source.published}",
        "get it again",
    )
