"""What stands in for pruned channels beyond a constant: an update of the layer that reads them.

A constant is what is known of a pruned channel without looking at any other. The kept channels of
the same site tell more: what the reader would have made of the pruned ones is predicted from them
by least squares (GRAIL, arXiv:2602.23795, does so for language models). A prediction that is linear
in what the reader is fed anyway is a change of its weights, so it costs nothing at run time:

    W[:, kept] += left @ right,    b += bias

It holds while the site is pruned to the channels that it was made for, and adds to whatever weights
the host delivers, LoRA included. Of low rank it is a small part of a gate file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

#: of a correction unless asked otherwise, and the most that a gate file takes
RANK, MAX_RANK = 16, 64
#: shares of the mean of the diagonal, added to it; the one that leaves least elsewhere is taken
RIDGES = (1e-3, 1e-2, 1e-1)
#: rows held out of one batch, at most, and rows of a batch that are written out together
HELD_OUT_AT_ONCE, ROWS_AT_ONCE = 256, 4096


@dataclass(frozen=True)
class Correction:
    """A low-rank update of the layer that reads a site's channels, and of its bias.

    ``left`` [O, R] and ``right`` [R, K·T] for a reader [O, C, ...] with T weights per output and
    channel, of whose C channels K are kept; ``bias`` [O].
    """

    left: Tensor
    right: Tensor
    bias: Tensor

    def added(
        self, weight: Tensor, bias: Tensor | None, keep: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Weight [O, C, ...] and bias [O] of the reader while channels ``keep``, bool [C], are.

        Computed in float32 at least, and rounded once to the dtype of ``weight``. Differentiable
        in the correction.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left, right, shift = (t.to(weight.device, dtype) for t in vars(self).values())
        kept = keep.to(weight.device).nonzero()[:, 0]
        update = (left @ right).view(weight.shape[0], kept.numel(), *weight.shape[2:])
        corrected = weight.to(dtype).index_add(1, kept, update).to(weight.dtype)
        return corrected, (shift if bias is None else bias.to(dtype) + shift).to(weight.dtype)

    def added_(
        self, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same of what is kept, [O, K, ...], or of its ``rows`` alone.

        ``weight`` is written into, so that a large one is not there twice, where its dtype allows.
        """
        dtype = torch.promote_types(weight.dtype, torch.float32)
        left, right, shift = (t.to(weight.device, dtype) for t in vars(self).values())
        if rows is not None:
            left, shift = left.index_select(0, rows), shift.index_select(0, rows)
        corrected = weight.to(dtype)
        corrected.flatten(1).addmm_(left, right)
        shift = shift if bias is None else bias.to(dtype) + shift
        return corrected.to(weight.dtype), shift.to(weight.dtype)


class Regression:
    """Least squares of what a reader lacks on what it is fed, gathered from batches.

    ``keep``, bool [C], are the channels kept. Some rows are held out, to tell whether what was
    found holds elsewhere. Sums are kept in float32 on the CPU, [K·T + 1]² and [K·T + 1, O] of them.
    """

    #: rows held out of all batches together, at most
    HELD_OUT = 2048

    def __init__(self, keep: Tensor) -> None:
        self.keep = keep
        self._rows = 0
        self._moments: Tensor | None = None
        self._products: Tensor | None = None
        self._held: list[tuple[Tensor, Tensor]] = []
        self._held_at_once = HELD_OUT_AT_ONCE

    def add(self, fed: Tensor, missing: Tensor, held_out: bool = False) -> None:
        """``fed`` is the input of the reader under pruning, ``missing`` what its output lacks.

        Maps [B, C, H, W] and [B, O, H, W] of a 3x3 convolution with zero padding, or [..., C] and
        [..., O] of a linear layer.
        """
        rows = _rows(fed, self.keep)
        y = (missing.movedim(1, -1) if missing.dim() == 4 else missing).flatten(0, -2)
        if held_out:
            count = min(len(y), self._held_at_once)
            some = torch.linspace(0, len(y) - 1, count, device=y.device).long()
            self._held.append((rows(some).cpu(), y[some].float().cpu()))
            if sum(len(part) for part, _ in self._held) > self.HELD_OUT:  # of all batches alike
                self._held = [(x[::2], y[::2]) for x, y in self._held]
                self._held_at_once = max(1, self._held_at_once // 2)
            return
        self._rows += len(y)
        sums: dict[str, Tensor] = {}
        for first in range(0, len(y), ROWS_AT_ONCE):
            x = rows(torch.arange(first, min(first + ROWS_AT_ONCE, len(y)), device=y.device))
            part = y[first : first + ROWS_AT_ONCE].float()
            for name, other in (("_moments", x), ("_products", part)):
                sums[name] = _plus(sums.get(name), x.T, other)
        for name, product in sums.items():
            known, product = getattr(self, name), product.cpu()  # they may be gigabytes
            setattr(self, name, product if known is None else known.add_(product))

    def correction(
        self, rank: int = RANK, between: Callable[[], None] | None = None
    ) -> Correction | None:
        """The correction of this rank, as a file holds it; None where it does not hold elsewhere.

        ``between`` is called now and then: a layer of 1280 channels takes a minute of a CPU core.

        That is where it leaves more of what was missing in the rows held out than nothing does. Of
        the least-squares update the part is kept that matters most to the outputs seen: the leading
        singular vectors of the update times a square root of the second moments of what is fed.
        """
        if self._moments is None or self._products is None or not self._held:
            return None
        if not bool(self._moments.isfinite().all() and self._products.isfinite().all()):
            return None
        # in place from here on: they may be gigabytes
        parts = (self._moments, self._products)
        moments, products = (part.double().div_(self._rows) for part in parts)
        mean_x, mean_y = moments[-1, :-1].clone(), products[-1].clone()  # the last feature is one
        centred = moments[:-1, :-1].addr_(mean_x, mean_x, alpha=-1)
        products = products[:-1].addr_(mean_x, mean_y, alpha=-1)
        diagonal = centred.diagonal().clone()
        best = None
        for ridge in RIDGES:
            if between is not None:
                between()
            centred.diagonal().copy_(diagonal + ridge * diagonal.mean() + torch.finfo().tiny)
            root, failed = torch.linalg.cholesky_ex(centred)
            if failed:
                continue
            update = torch.cholesky_solve(products, root).T
            left_over = self._left_over(update, mean_y - update @ mean_x)
            if best is None or left_over < best[0]:
                best = left_over, update, root
        if best is None:
            return None
        _, update, root = best
        u, s, v = torch.linalg.svd(update @ root, full_matrices=False)
        size = s[:rank].sqrt()
        right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
        left, right = (u[:, :rank] * size).half(), (size[:, None] * right).half()
        bias = (mean_y - left.double() @ (right.double() @ mean_x)).float()
        after = self._left_over(left.float() @ right.float(), bias)
        before = sum(y.square().sum().item() for _, y in self._held)
        return Correction(left, right, bias) if after < before else None

    def _left_over(self, update: Tensor, bias: Tensor) -> float:
        """The squared error of an update [O, K·T] in the rows held out; NaN where it is none."""
        errors = (y - x[:, :-1] @ update.float().T - bias.float() for x, y in self._held)
        return sum(error.square().sum().item() for error in errors)


def _plus(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """``total`` with a matrix product added to it, in place."""
    return left @ right if total is None else total.addmm_(left, right)


def _rows(fed: Tensor, keep: Tensor) -> Callable[[Tensor], Tensor]:
    """What a reader is fed of the kept channels at positions [N], and a one: [N, K·T + 1].

    By position, since all neighbours of all positions of a large map are gigabytes.
    """
    kept = keep.to(fed.device).nonzero()[:, 0]
    if fed.dim() != 4:
        linear = fed.flatten(0, -2).index_select(1, kept).float()
        return lambda at: F.pad(linear[at], (0, 1), value=1.0)
    height, width = fed.shape[2:]
    padded = F.pad(fed.index_select(1, kept).float(), (1, 1, 1, 1)).movedim(1, -1)

    def neighbours(at: Tensor) -> Tensor:
        image, y, x = at // (height * width), at // width % height, at % width
        taps = [padded[image, y + down, x + right] for down in range(3) for right in range(3)]
        return F.pad(torch.stack(taps, -1).flatten(1), (0, 1), value=1.0)

    return neighbours
