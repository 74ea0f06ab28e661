"""Optimal Brain Surgeon for whole structures of a layer: which to remove, what the rest becomes.

A layer W [O, n] that is fed x has the squared error tr(Δ H Δᵀ) with H = E[x xᵀ] when its weights
change by Δ. A structure P is a run of its columns: one for a linear layer's input, nine for an
input channel of a 3x3 convolution, those of all its channels for a head. Removing P and changing
the rest so that the error is least (Hassibi & Stork 1992, "Second order derivatives for network
pruning", for one weight; OBS-Diff, arXiv:2510.06751, eq. 6, for one column) costs

    tr(W_P ([H⁻¹]_PP)⁻¹ W_Pᵀ)    by    Δ = −W_P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P:

and leaves the inverse of H without P at H⁻¹ − [H⁻¹]_:P ([H⁻¹]_PP)⁻¹ [H⁻¹]_P:. The cheapest goes
first, one at a time. For heads OBS-Diff's eq. 7 is cheaper to compute and takes their columns one
by one; this is what it approximates.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: share of the mean of H's diagonal that is added to it, as in SparseGPT (arXiv:2301.00774)
DAMPING = 0.01


def damped_inverse(hessian: Tensor) -> Tensor:
    """(H + damping)⁻¹ in float64 of H [n, n]."""
    hessian = hessian.double()
    added = DAMPING * hessian.diagonal().mean() + torch.finfo().tiny
    return torch.linalg.inv(hessian + added * torch.eye(len(hessian)).to(hessian))


def prices(weight: Tensor, inverse: Tensor, gone: Tensor) -> tuple[Tensor, Tensor]:
    """What each structure costs, [S], and ([H⁻¹]_PP)⁻¹ W_Pᵀ of each, [S, n/S, O].

    ``weight`` [O, n] and ``inverse`` [n, n] hold S structures in turn, of which those in ``gone``,
    bool [S], cost infinitely much.
    """
    count = len(gone)
    blocks = inverse.view(count, -1, count, inverse.shape[0] // count)
    blocks = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0).clone()
    blocks[gone] = torch.eye(blocks.shape[1]).to(blocks)
    columns = weight.view(len(weight), count, -1).permute(1, 2, 0)
    solved = torch.linalg.solve(blocks, columns)
    return (columns * solved).sum((1, 2)).masked_fill(gone, torch.inf), solved


def removed(
    weight: Tensor, hessian: Tensor, keep: int, structures: int, bands: int = 1
) -> tuple[Tensor, Tensor]:
    """Keep so many of the layer's structures: which, bool [S], and the new weight [O, n].

    The columns of removed structures are zero. Of each of ``bands`` equal runs of structures as
    many stay, so that the groups of a GroupNorm stay equal; ``keep`` is a multiple of them.
    """
    weight, inverse = weight.double().clone(), damped_inverse(hessian)
    gone = torch.zeros(structures, dtype=torch.bool, device=weight.device)
    for _ in range(structures - keep):
        price, solved = prices(weight, inverse, gone)
        full = (~gone).view(bands, -1).sum(1) <= keep // bands
        price.view(bands, -1)[full] = torch.inf
        least = int(price.argmin())
        size = len(inverse) // structures
        part = slice(least * size, (least + 1) * size)
        weight -= (inverse[:, part] @ solved[least]).T
        inverse -= inverse[:, part] @ torch.linalg.solve(inverse[part, part], inverse[part].clone())
        gone[least] = True
        weight[:, part], inverse[part], inverse[:, part] = 0, 0, 0
    return ~gone, weight
