"""Tensors computed once and kept on disk: latents of images, embeddings of prompts.

Items are kept in shards of `SHARD` items, each a safetensors file that is mapped into memory and
named by a hash of the content of its items. The folder is named by a hash of what computed them.
So a cache needs no record of its own: what is there under the right name and with the right
checksum is used, whatever is missing is computed, and any file may be deleted or copied to another
machine.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ldcp_core import write_atomically
from training.console import progress
from training.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "ldcp.cache.1"
#: items per file: at 512 pixels 16 MiB of latents, a few seconds of a GPU's work
SHARD = 256
#: computes the items of these numbers in order: a tensor, or why there is none
Compute = Callable[[Sequence[int]], Iterator[Tensor | str]]


def default_cache() -> Path:
    """$LDCP_CACHE, or `ldcp` in the user's cache folder."""
    if named := os.environ.get("LDCP_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "ldcp"


def digest(parts: Iterable[str]) -> str:
    """A short hash of a list of texts."""
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part.encode(errors="surrogateescape")).digest())
    return found.hexdigest()[:32]


def weights_digest(module: torch.nn.Module) -> str:
    """A short hash of all weights of a module, to the bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(memoryview(flat.view(torch.uint8).numpy()))
    return found.hexdigest()[:32]


class CacheNotWritable(UserError):
    """The disk takes no cache."""


class TensorCache:
    """One tensor per item, read from ``folder``; `build` first.

    ``stamps`` says what the items are, by content: equal stamps have equal tensors. Items that
    can't be computed are in ``broken``, with the reason.
    """

    def __init__(self, folder: Path, stamps: Sequence[str]) -> None:
        self._folder = folder
        self._shards = [range(i, min(i + SHARD, len(stamps))) for i in range(0, len(stamps), SHARD)]
        self._paths = [
            folder / f"{digest(stamps[i] for i in shard)}.safetensors" for shard in self._shards
        ]
        self._there: set[int] = set()
        self._rows: dict[int, tuple[Tensor, int]] = {}
        self.broken: dict[int, str] = {}

    def __getitem__(self, item: int) -> Tensor:
        """A copy of the tensor of one item; KeyError when it is broken."""
        values, row = self._rows[item]
        return values[row].clone()

    def build(self, compute: Compute, label: str, rank: int = 0, world: int = 1) -> None:
        """Open what is there and whole, and compute and keep the rest, with a progress bar.

        Of ``world`` processes each calls it with its ``rank``, and computes its share of the
        missing shards. Raises `CacheNotWritable`.
        """
        closed = [k for k in range(len(self._shards)) if k not in self._there]
        kept = [k for k in closed if self._paths[k].is_file()]
        opened = {k for k in progress(kept, "opening the cache", unit="file") if self._open(k)}
        missing = [k for k in closed if k not in opened]
        mine = missing[rank::world]
        if not mine:
            return
        total = sum(len(self._shards[k]) for k in mine)
        with progress(None, label, total) as bar:
            for k in mine:
                self._write(k, compute, bar.update)
                if not self._open(k):
                    raise CacheNotWritable(f"{self._paths[k]} was written and can't be read back.")

    def _write(self, k: int, compute: Compute, done: Callable[[], object]) -> None:
        values: list[Tensor] = []
        broken: dict[int, str] = {}
        rows: list[int] = []
        for place, found in enumerate(compute(self._shards[k])):
            if isinstance(found, str):
                broken[place] = found
            else:
                rows.append(place)
                values.append(found)
            done()
        tensors = {"rows": torch.tensor(rows, dtype=torch.int64)}
        tensors["values"] = torch.stack(values) if values else torch.zeros(0)
        reasons = json.dumps(broken)
        metadata = {"format": FORMAT, "broken": reasons, "checksum": _checksum(tensors, reasons)}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._paths[k], serialize(tensors, metadata))
        except OSError as error:
            raise CacheNotWritable(
                f"The cache {self._paths[k]} can't be written: {error}.",
                "a folder that can be written, with room",
                "make room (what is cached so far stays), or use --cache FOLDER or --no-cache",
            ) from error

    def _open(self, k: int) -> bool:
        """Map a shard into memory; False when it is not there, or damaged (said in the log)."""
        if not self._paths[k].is_file():
            return False
        try:
            metadata, tensors = _mapped(self._paths[k])
            reasons = metadata.get("broken", "")
            if metadata.get("format") != FORMAT:
                raise ValueError(f"format {metadata.get('format')}")
            if metadata.get("checksum") != _checksum(tensors, reasons):
                raise ValueError("its checksum does not match its contents")
            tensors = _mapped(self._paths[k])[1]  # anew: without the pages that were just read
        except (SafetensorError, ValueError, OSError) as error:
            log.warning("The cache %s is damaged (%s); making it again.", self._paths[k], error)
            return False
        first = self._shards[k].start
        for row, place in enumerate(tensors["rows"].tolist()):
            self._rows[first + place] = (tensors["values"], row)
        self.broken |= {first + int(place): why for place, why in json.loads(reasons).items()}
        self._there.add(k)
        return True


def _mapped(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a shard; their pages come into memory when they are read."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in ("rows", "values")}
        return file.metadata() or {}, tensors


def _checksum(tensors: Mapping[str, Tensor], reasons: str) -> str:
    """CRC-32: finds damage, at the speed of the disk; nobody is trusted or kept out by it."""
    found = zlib.crc32(reasons.encode())
    for name in ("rows", "values"):
        tensor = tensors[name]
        found = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode(), found)
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"
