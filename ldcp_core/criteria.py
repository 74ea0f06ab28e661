"""Gates without training: what the weights say alone, and together with the activations.

A magnitude criterion ranks the channels without data, `fluctuation` by what they were seen to do.
`scores_at` turns a ranking into scores that prune a given share, and `expected_output` is the
constant that stands in for a pruned channel where none was measured. A first try for any model;
learned gates are better.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Literal

import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import Tensor

from .blocks import ALIGNMENT
from .gates import THRESHOLD, keep_by_rank
from .linear import LinearWeights
from .resblock import ConvWeights

Magnitude = Literal["l1", "l2"]
MAGNITUDES: tuple[Magnitude, ...] = ("l1", "l2")
Ranking = Literal["per layer", "global"]
RANKINGS: tuple[Ranking, ...] = ("per layer", "global")
#: nodes of the Gauss-Hermite rule: E[silu] is then right to 1e-6 for gains up to 3, 2e-4 at 5
QUADRATURE_NODES = 64
#: the smallest step above the threshold that float32 holds
_JUST_KEPT = THRESHOLD + torch.finfo(torch.float32).eps / 2


def magnitude(weight: Tensor, norm: Magnitude) -> Tensor:
    """Size of each output channel's weights [C, ...], float32 [C] on the CPU.

    ``l1`` is the sum of |w|, ``l2`` the root of the sum of squares (Li et al. 2017,
    arXiv:1608.08710, rank filters by the former). Sums are taken in float64, so that half
    precision neither overflows nor ties. Raises ValueError for another norm.
    """
    if norm not in MAGNITUDES:
        raise ValueError(f"unknown criterion {norm!r}; known are {', '.join(MAGNITUDES)}")
    rows = weight.detach().cpu().flatten(1).float()
    if norm == "l1":
        return rows.abs().sum(1, dtype=torch.float64).float()
    return rows.square().sum(1, dtype=torch.float64).sqrt().float()


def fluctuation(variance: Tensor, columns: Tensor | None = None) -> Tensor:
    """What leaving only a channel's mean costs the sum that reads it, float32 [C] on the CPU.

    ``variance`` [C] is that of the channel as it is read, ``columns`` [C] the squared norm of the
    weights that read it: FLAP's weighted input feature variance (An et al. 2023, arXiv:2312.11983)

        S_c = E[(a_c − E a_c)²] · ‖W[:, c]‖²

    It is the squared error at the reading layer's output, summed over that layer's channels, as
    far as pruned channels, and the positions under a kernel, deviate independently. (An upper
    estimate for inner channels: what the embedding adds to them varies too, and pruning keeps it.
    On the demo model, leaving that part out chose no better.) A *residual*
    channel has no such layer: a sum reads it, with weight one, and everything behind the sum reads
    that. Without ``columns`` the score therefore is the variance itself, again the squared error
    that pruning the channel adds to the block's output: the same unit for the inner and the
    residual channels of a block.
    """
    score = variance.double() if columns is None else variance.double() * columns.double()
    return score.cpu().float()


def column_norms(weight: Tensor) -> Tensor:
    """Squared norm of the weights that read each input channel, float64 [C_in] on the CPU.

    ``weight`` is [C_out, C_in] or [C_out, C_in, kH, kW]; sums are taken in float64.
    """
    columns = weight.detach().cpu().movedim(1, 0).flatten(1).float()
    return columns.square().sum(1, dtype=torch.float64)


def scores_at(
    importances: Mapping[str, Tensor],
    sparsity: float,
    ranking: Ranking,
    floor: float = 0.0,
    groups: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Site -> scores, float32 [C] in [0, 1], that keep (score > 0.5) all but ``sparsity``.

    ``importances[site]`` are float32 [C], finite and not negative, and the same for all channels of
    a group (see `groups_of`). ``per layer`` prunes the same
    share of every site. ``global`` ranks all sites together, each site's importances divided by
    their mean (as Diff-Pruning does, Fang et al. 2023, arXiv:2305.10924): how large a layer's
    weights are says little about what it contributes, since a normalisation or a residual sum
    follows, and without the division the layer with the smallest ones would simply be emptied.

    What is kept is `keep_by_rank`: of each site at least the share ``floor``, counts are aligned,
    ties broken by site, then index. Scores
    follow the rank, not the size: magnitudes bunch around their mean, and ranks of different sites
    can be compared, so that a cut at another sparsity is the one that this ranking would make
    there, up to the alignment. The lowest rank is near 0, the cut at 0.5, the highest near 1;
    within a site scores rise with the importance. Raises ValueError for another ranking, a
    sparsity outside [0, 1], and importances that are not finite.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"unknown ranking {ranking!r}; known are {', '.join(RANKINGS)}")
    for site, importance in importances.items():
        if not bool((torch.isfinite(importance) & (importance >= 0)).all()):
            raise ValueError(
                f"the importances of {site} are not all finite numbers from 0 up; the weights of "
                "this layer may hold NaN or infinite values, load another copy of the model"
            )
    # float64 holds the quotient of two float32 numbers finely enough to keep their order
    relative = {
        site: i.double() / i.double().mean().clamp(min=1e-300) for site, i in importances.items()
    }
    together = [relative] if ranking == "global" else [{site: i} for site, i in relative.items()]
    scores: dict[str, Tensor] = {}
    for part in together:
        kept = keep_by_rank(part, sparsity, ALIGNMENT, floor, groups)
        scores |= scores_by_rank(part, kept, groups)
    return scores


def scores_by_rank(
    ranked: Mapping[str, Tensor],
    keep_sets: Mapping[str, Tensor],
    groups: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Scores whose order is the common rank and whose cut at 0.5 is ``keep_sets``.

    Alignment may keep a few channels below the common cut of a site, or prune a few above it: they
    take the score nearest to their rank on the right side of 0.5. The channels of a group (see
    `groups_of`) have the same: that of the first.
    """
    values, keep = torch.cat(list(ranked.values())), torch.cat(list(keep_sets.values()))
    channels = values.numel()
    order = torch.sort(values, descending=True, stable=True).indices
    share = torch.empty(channels, dtype=torch.float64)  # of the channels that rank lower, in (0, 1)
    share[order] = (torch.arange(channels, 0, -1, dtype=torch.float64) - 0.5) / channels
    cut = 1.0 - float(keep.double().mean())
    above = THRESHOLD + (1.0 - THRESHOLD) * (share - cut) / max(1.0 - cut, 1.0 / channels)
    below = THRESHOLD * share / max(cut, 1.0 / channels)
    scores = torch.where(keep, above.clamp(min=_JUST_KEPT), below.clamp(max=THRESHOLD)).float()
    widths = [value.numel() for value in ranked.values()]
    found = {}
    for site, part in zip(ranked, torch.split(scores, widths), strict=True):
        group = (groups or {}).get(site, 1)
        found[site] = part[::group].repeat_interleave(group)
    return found


def expected_output(conv: ConvWeights, gamma: Tensor, beta: Tensor) -> Tensor:
    """What a convolution of normalised maps gives on average, float32 [C_out] on the CPU.

    ``conv`` [C_out, C_in, kH, kW] reads ``silu(norm(x))`` with a GroupNorm of weight ``gamma`` and
    bias ``beta`` [C_in]. If each normalised channel is standard normal, the mean of its output is

        μ = b + Σ_i (Σ_taps W_i) · E[silu(γ_i z + β_i)],  z ~ N(0, 1)

    A GroupNorm standardises groups, not channels, so this is an estimate. All taps are counted: at
    the border zero padding takes some away, the mean is that of the interior.
    """
    taps = conv.weight.detach().cpu().float().sum((2, 3), dtype=torch.float64)
    mean = taps @ expected_silu(gamma, beta)
    if conv.bias is not None:
        mean = mean + conv.bias.detach().cpu().double()
    return mean.float()


def expected_heads(value: LinearWeights, beta: Tensor) -> Tensor:
    """What the heads of a self-attention give on average, float32 [C] on the CPU.

    ``value`` [C, C] reads a LayerNorm of bias ``beta`` [C]. Attention takes a mean of what that
    gives over the positions, so if the normalised inputs have mean 0, μ = W β + b.
    """
    mean = value.weight.detach().cpu().double() @ beta.detach().cpu().double()
    return (mean if value.bias is None else mean + value.bias.detach().cpu().double()).float()


def expected_hidden(proj: LinearWeights, gamma: Tensor, beta: Tensor) -> Tensor:
    """What a GEGLU of normalised vectors gives on average, float32 [H] on the CPU.

    ``proj`` [2·H, C] reads a LayerNorm of weight ``gamma`` and bias ``beta`` [C]. If its normalised
    inputs are independent and standard normal, a and g are jointly normal, a = E[a] + (cov/σ²)
    (g − E[g]) + rest with the rest independent of g, and

        μ = E[a · gelu(g)] = E[gelu(g) · (E[a] + cov(a, g) / σ_g² · (g − E[g]))]

    which leaves an integral over g alone. Gauss-Hermite quadrature.
    """
    weight = proj.weight.detach().cpu().double()
    gamma, beta = gamma.detach().cpu().double(), beta.detach().cpu().double()
    means = weight @ beta
    if proj.bias is not None:
        means = means + proj.bias.detach().cpu().double()
    mean_a, mean_g = means.chunk(2)
    rows_a, rows_g = (weight * gamma).chunk(2)
    deviation = rows_g.square().sum(1).sqrt()
    slope = (rows_a * rows_g).sum(1) / deviation.clamp(min=1e-300)  # cov / σ_g
    nodes, weights = _quadrature()
    g = mean_g[:, None] + deviation[:, None] * nodes
    a = mean_a[:, None] + slope[:, None] * nodes
    return ((torch.nn.functional.gelu(g) * a) @ weights).float()


def expected_silu(gamma: Tensor, beta: Tensor) -> Tensor:
    """E[silu(γz + β)] for z ~ N(0, 1), float64 of the shape of ``gamma``, by Gauss-Hermite."""
    nodes, weights = _quadrature()
    gamma, beta = (t.detach().cpu().double()[..., None] for t in (gamma, beta))
    return torch.nn.functional.silu(gamma * nodes + beta) @ weights


@cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Nodes and weights that integrate against the standard normal density."""
    nodes, weights = hermegauss(QUADRATURE_NODES)
    return torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
