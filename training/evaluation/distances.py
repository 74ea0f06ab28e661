"""Distances between two sets of images, from features [N, D] of each that are given.

FID and KID are torchmetrics', which takes features as well as images. CMMD and improved precision
and recall are here, since no library has them without torchvision.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

#: KID: subsets, and images in each at most (Bińkowski et al. 2018, arXiv:1801.01401)
KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000
#: CMMD: bandwidth of the kernel, and what the squared distance is multiplied by to be readable
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
#: precision and recall: the neighbour whose distance is the radius
NEIGHBOUR = 3
#: rows of a matrix of distances that are computed at once
ROWS = 1024


class Given(nn.Module):
    """Stands in for a feature extractor where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def fid(real: Tensor, fake: Tensor) -> float:
    """‖μ − μ'‖² + Tr(Σ + Σ' − 2(ΣΣ')^½), Heusel et al. 2017 (arXiv:1706.08500, eq. 6)."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(Given(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return float(metric.compute())


def kid(real: Tensor, fake: Tensor, seed: int = 0) -> tuple[float, float]:
    """MMD² with the kernel (x·y / D + 1)³: mean and standard deviation over random subsets.

    Bińkowski et al. 2018 (arXiv:1801.01401), with the unbiased estimate of Gretton et al. 2012
    (JMLR 13, eq. 3) in each of the subsets, which repeat from run to run.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(len(real), len(fake), KID_SUBSET_SIZE)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features
        torch.manual_seed(seed)
        metric = KernelInceptionDistance(
            Given(real.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def cmmd(real: Tensor, fake: Tensor) -> float:
    """1000 · MMD² of unit CLIP embeddings with the kernel exp(−‖x − y‖² / 2σ²), σ = 10.

    Jayasumana et al. 2024 (arXiv:2401.09603, §4), the unbiased estimate of Gretton et al. 2012
    (JMLR 13, eq. 3). The code released with the paper takes eq. 5, which counts each image with
    itself as well and is larger by what vanishes as the sets grow.
    """
    real, fake = real.double(), fake.double()

    def mean(x: Tensor, y: Tensor, less: int) -> Tensor:
        total = x.new_zeros(())
        for rows in x.split(ROWS):
            total += torch.exp(-torch.cdist(rows, y).square() / (2 * CMMD_SIGMA**2)).sum()
        return (total - less) / (len(x) * (len(y) - bool(less)))

    within = mean(real, real, len(real)) + mean(fake, fake, len(fake))
    return float(CMMD_SCALE * (within - 2 * mean(real, fake, 0)))


def precision_recall(real: Tensor, fake: Tensor, neighbour: int = NEIGHBOUR) -> tuple[float, float]:
    """Share of ``fake`` within the manifold of ``real``, and the other way round.

    Kynkäänniemi et al. 2019 (arXiv:1904.06991, eq. 1 and 2): a point lies within the manifold of a
    set when it is no further from one of its points than that one's k-th nearest neighbour in the
    set (k = 3).
    """
    real, fake = real.double(), fake.double()
    return _within(fake, real, neighbour), _within(real, fake, neighbour)


def _within(points: Tensor, manifold: Tensor, neighbour: int) -> float:
    # the nearest neighbour of a point of the set is itself
    between = (torch.cdist(rows, manifold) for rows in manifold.split(ROWS))
    radii = torch.cat([distances.kthvalue(neighbour + 1).values for distances in between])
    inside = [(torch.cdist(rows, manifold) <= radii).any(1) for rows in points.split(ROWS)]
    return float(torch.cat(inside).double().mean())
