"""Two kernels in place of the small operations of a compact block, where Triton can compile them.

A GPU's host needs as long to launch an operation on a few numbers as one on a map. ComfyUI on Linux
comes with Triton (PyTorch brings it), on Windows it can be installed; everywhere else, and with
``LDCP_TRITON=0`` in the environment, the same is computed from PyTorch's own operations. Before a
device is trusted with the kernels they have to give the right result on it once.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .channels import Channels

log = logging.getLogger("ldcp")

#: numbers that one program of a kernel handles at once, at most
BLOCK = 1024
#: types of devices that Triton compiles for; AMD's are called "cuda" as well
DEVICES = ("cuda",)
TYPES = (torch.float32, torch.float16, torch.bfloat16)


def usable(*maps: Tensor) -> bool:
    """Whether the kernels take these maps [B, C, H, W]: of one type, in order, and on a GPU."""
    first = maps[0]
    if first.device.type not in DEVICES:
        return False
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    fit = all(t.is_contiguous() and t.dtype == first.dtype and t.numel() for t in maps)
    return fit and first.dtype in TYPES and _works(first.device)


def norm_silu(
    h: Tensor,
    emb: Tensor,
    shifts: Tensor,
    channels: Channels,
    affine: tuple[Tensor, Tensor],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`groupnorm.group_norm_silu` in one launch; writes into ``h``. ``affine`` is float32."""
    batch, count = emb.shape
    kept, pruned, size = h.shape[1], count - h.shape[1], h[0, 0].numel()
    constants = h.new_empty(batch, pruned)
    launch(
        "norm_silu",
        (batch, groups),
        *(h, constants, emb.contiguous(), shifts, *affine, channels.rows),
        *(kept, pruned, size, count, eps),
        PER_GROUP=count // groups,
        BLOCK=_block(size),
    )
    return h, constants


def join(
    skip: Tensor, y: Tensor, taps: Tensor, residual: Channels | None, planes: Tensor | None
) -> Tensor:
    """The block's output: skip path, conv2's rows ``y``, and ``taps`` [B, 9·O] or [B, O].

    ``planes`` [C] are added to every channel where there is a residual gate.
    """
    batch, channels, height, width = skip.shape
    out, block = torch.empty_like(skip), _block(height * width)
    launch(
        "join",
        (batch, channels, -(-height * width // block)),
        *(out, skip, y, taps.contiguous()),
        *((taps, taps) if residual is None or planes is None else (planes, residual.rows)),
        *(y.shape[1], channels, height, width),
        GATED=residual is not None,
        TAPS=taps.shape[1] // y.shape[1],
        BLOCK=block,
    )
    return out


def launch(name: str, grid: tuple[int, ...], *args: Any, **constants: int) -> None:
    """Run a kernel of `kernels` where its first tensor lies; replaced when launches are counted."""
    with torch.cuda.device_of(args[0]):  # type: ignore[no-untyped-call]  # PyTorch types it not
        getattr(_kernels(), name)[grid](*args, **constants)


def _block(size: int) -> int:
    return min(BLOCK, 1 << (size - 1).bit_length())


@cache
def _kernels() -> ModuleType | None:
    if os.environ.get("LDCP_TRITON") == "0":
        return None
    from . import kernels

    return kernels if kernels.AVAILABLE else None


@cache
def _works(device: torch.device) -> bool:
    """Whether both kernels compile for this device and are right on a small block."""
    if _kernels() is None:
        return False
    try:
        error = _error(device)
    except Exception as problem:  # whatever a compiler or driver may raise
        error, reason = 1.0, f"{type(problem).__name__}: {problem}"
    else:
        reason = f"they are {error:.1e} off"
    if not error < 1e-4:
        log.warning(
            "LDCP: its Triton kernels don't work on %s (%s); PyTorch's own operations are used, "
            "which is slower but not wrong. LDCP_TRITON=0 in the environment spares this attempt.",
            device,
            reason,
        )
        return False
    return True


def _error(device: torch.device) -> float:
    """Greatest deviation of both kernels from their definition, on random numbers of order one."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    keep = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    channels = Channels.of(keep, device)
    h, emb, shifts, affine = random(2, 4, 3, 5), random(2, 6), random(6), (random(6), random(6))
    full = (emb + shifts)[:, :, None, None].repeat(1, 1, 3, 5)
    full.index_add_(1, channels.kept, h)
    normed = F.silu(F.group_norm(full, 2, *affine, 1e-5))
    maps, constants = norm_silu(h, emb, shifts, channels, affine, 2, 1e-5)
    skip, taps = random(2, 6, 3, 5), random(2, 36)
    out = skip + shifts[:, None, None]
    inside = F.unfold(torch.ones(1, 1, 3, 5, device=device), 3, padding=1)
    left = (taps.view(2, 4, 9) @ inside).view(2, 4, 3, 5)
    out.index_add_(1, channels.kept, maps + left)
    found = join(skip, maps, taps, channels, shifts)
    errors = [
        maps - normed.index_select(1, channels.kept),
        constants - normed.index_select(1, channels.pruned)[:, :, 0, 0],
        found - out,
    ]
    return max(float(error.abs().max()) for error in errors)
