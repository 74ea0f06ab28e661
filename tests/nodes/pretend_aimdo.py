"""comfy-aimdo on the pretend device: ComfyUI's dynamic VRAM without a GPU.

ComfyUI's ModelPatcherDynamic asks comfy-aimdo for address space in VRAM, has pages of it brought in
("faulted") and pinned while a layer runs, and keeps copies of weights in pinned host memory. This
stand-in has the interface that ComfyUI calls, keeps the pages in memory of the pretend device, and
counts. A page that is evicted is overwritten, so that whoever still reads it gets wrong numbers.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, int, int]  # address space, address, bytes
POISON = 0xFF  # four or two of them are a NaN
SPACE = 2**40  # addresses between the beginnings of two address spaces


@dataclass
class Aimdo:
    """What the stand-in offers and what it has counted."""

    device: torch.device
    page: int
    #: bytes of pages that may be in VRAM at once
    room: int = 2**40
    spaces: list[Space] = field(default_factory=list)
    evictions: int = 0
    #: addresses of places that were ever brought in, and of those that did not fit
    faulted: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)
    #: pinned host memory: address -> bytes
    pinned: dict[int, int] = field(default_factory=dict)

    def resident(self) -> int:
        """Bytes of pages in VRAM."""
        return sum(space.loaded_size() for space in self.spaces)

    def in_use(self) -> int:
        """Pages that somebody has brought in and not let go."""
        return sum(space.users.total() for space in self.spaces)

    def space(self, size: int, index: int) -> Space:
        self.spaces.append(Space(self, size))
        return self.spaces[-1]

    def register(self, address: int, size: int, flags: int) -> int:
        self.pinned[address] = size
        return 0

    def unregister(self, address: int) -> int:
        return 0 if self.pinned.pop(address, None) else 1


class Space:
    """The address space of one model, a `ModelVBAR`."""

    def __init__(self, aimdo: Aimdo, size: int) -> None:
        self.aimdo, self.max_size, self.offset = aimdo, size, 0
        self.base_addr = SPACE * (1 + len(aimdo.spaces))
        self.pages = -(-size // aimdo.page)
        memory = self.pages * aimdo.page
        self.memory = torch.empty(memory, dtype=torch.uint8, device=aimdo.device)
        #: page in VRAM -> a number that is new whenever it is brought in
        self.serials: dict[int, int] = {}
        self.users: Counter[int] = Counter()
        self._serial = 0

    def prioritize(self) -> None:
        pass

    def alloc(self, size: int) -> Place:
        self.offset += -self.offset % 512
        assert self.offset + size <= self.max_size
        place = (self, self.base_addr + self.offset, size)
        self.offset += size
        return place

    def pages_of(self, address: int, size: int) -> range:
        first, last = address - self.base_addr, address - self.base_addr + size - 1
        return range(first // self.aimdo.page, last // self.aimdo.page + 1)

    def fault(self, address: int, size: int) -> array[int] | None:
        pages = self.pages_of(address, size)
        self.users.update(pages)
        missing = [page for page in pages if page not in self.serials]
        lacking = self.aimdo.resident() + len(missing) * self.aimdo.page - self.aimdo.room
        if lacking > 0 and self.free_memory(lacking) < lacking:
            self.unpin(address, size)
            self.aimdo.refused.add(address)
            return None
        for page in missing:
            self._serial += 1
            self.serials[page] = self._serial
        self.aimdo.faulted.add(address)
        return array("I", [self.serials[page] for page in pages])

    def unpin(self, address: int, size: int) -> None:
        pages = self.pages_of(address, size)
        assert all(self.users[page] for page in pages), "nobody has brought these pages in"
        self.users.subtract(pages)

    def loaded_size(self) -> int:
        return self.aimdo.page * len(self.serials)

    def free_memory(self, size: float) -> int:
        """Evict unused pages, the last first, until so many bytes are free."""
        unused = sorted((page for page in self.serials if not self.users[page]), reverse=True)
        evicted = unused[: math.ceil(min(size, self.max_size) / self.aimdo.page)]
        for page in evicted:
            del self.serials[page]
            self.memory[page * self.aimdo.page : (page + 1) * self.aimdo.page].fill_(POISON)
        self.aimdo.evictions += len(evicted)
        return len(evicted) * self.aimdo.page

    def get_residency(self) -> list[int]:
        return [(page in self.serials) + 2 * (self.users[page] > 0) for page in range(self.pages)]

    def tensor(self, address: int, size: int) -> Tensor:
        return self.memory[address - self.base_addr :][:size]


class HostBuffer:
    """Host memory that grows in place. (A tensor of it refers to it, so it holds none itself.)"""

    def __init__(self, size: int, prewarm: int = 0, max_grow_size: int = 0) -> None:
        self.size, self.memory = 0, mmap.mmap(-1, max(size, max_grow_size, 1))

    def extend(self, size: int, register: bool = True) -> None:
        if self.size + size > len(self.memory):
            raise RuntimeError("the buffer is full")
        self.size += size

    def truncate(self, size: int, do_unregister: bool = True) -> None:
        if do_unregister:
            torch.cuda.cudart().cudaHostUnregister(self.tensor().data_ptr() + size)
        self.size = size

    def tensor(self) -> Tensor:
        return torch.frombuffer(self.memory, dtype=torch.uint8, count=self.size)


def install(monkeypatch: Any, management: Any, device: torch.device, page: int) -> Aimdo:
    """Put the stand-in in comfy-aimdo's place for the length of a test."""
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch

    aimdo = Aimdo(device, page)
    vbar, cuda = comfy_aimdo.model_vbar, SimpleNamespace()
    cuda.cudaHostRegister, cuda.cudaHostUnregister = aimdo.register, aimdo.unregister
    for owner, name, stand_in in [
        (vbar, "ModelVBAR", aimdo.space),
        (vbar, "vbar_fault", lambda place: place[0].fault(*place[1:])),
        (vbar, "vbar_unpin", lambda place: place and place[0].unpin(*place[1:])),
        (comfy_aimdo.host_buffer, "HostBuffer", HostBuffer),
        (comfy_aimdo.torch, "aimdo_to_tensor", lambda place, _: place[0].tensor(*place[1:])),
        (comfy_aimdo.torch, "hostbuf_to_tensor", HostBuffer.tensor),
        (torch.cuda, "cudart", lambda: cuda),
        (management, "MAX_PINNED_MEMORY", 2**40),
    ]:
        monkeypatch.setattr(owner, name, stand_in)
    return aimdo
