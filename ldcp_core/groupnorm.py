"""GroupNorm and SiLU where some channels are constants: the constants are never laid out as maps.

A kept channel is a map [H, W] plus a shift per image, which moves its mean and nothing else; a
pruned one is the shift alone. To its group a channel with mean m and standard deviation s counts
as much as the two values m + s and m - s do, and a constant as much as itself twice. So PyTorch's
own GroupNorm of two values per channel has the statistics of the whole maps and gives the normed
constants; what is left for the maps is one pass, silu(h · scale + level).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fused
from .channels import Channels, add_

#: Devices with one pass for the moments. Launches are counted on tensors without contents ("meta"),
#: which stand for those of a GPU.
GPU = ("cuda", "meta")
#: added to a channel's variance, whose root is divided by; a host's own epsilon is 1e-5
TINY = 1e-12


def group_norm_silu(
    h: Tensor,
    emb: Tensor,
    shifts: Tensor,
    channels: Channels,
    affine: tuple[Tensor, Tensor],
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """silu(GroupNorm) of kept maps [B, K, H, W] and of pruned constants [B, P].

    ``h`` lacks its shift, which is ``emb`` [B, C] plus ``shifts`` [C], float32, and may be
    overwritten; for a pruned channel the shift is the constant. ``affine`` is the norm's weight
    and bias, each [C]. Statistics, scale and level are float32, what comes back has the dtype of
    ``h``.
    """
    weight, bias = (t.float() for t in affine)
    if h.shape[1] and fused.usable(h):
        return fused.norm_silu(h, emb, shifts, channels, (weight, bias), groups, eps)
    values = (emb[:, :, None] + shifts[:, None].expand(-1, 2)).float().contiguous()
    if h.shape[1]:
        mean, inverse = _moments(h)
        ends = torch.addcdiv(mean[:, :, None], channels.signs, inverse[:, :, None])
        values = add_(values, ends, channels)
    normed = F.group_norm(values, groups, weight, bias, eps)
    constants = normed[:, :, 0].index_select(1, channels.pruned)
    constants = F.silu(constants.to(h.dtype))
    if h.shape[1] == 0:
        return h, constants
    normed = normed.index_select(1, channels.kept)
    # the line through both ends: what is 2 s long becomes as long as the normed ends are apart
    double_scale = (normed[:, :, 0] - normed[:, :, 1]) * inverse
    level = torch.addcmul(normed[:, :, 0], ends[:, :, 0], double_scale, value=-0.5)
    return _scaled_silu(h, double_scale, level), constants


def _moments(h: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation of each map, float32 [B, K]."""
    if h.device.type in GPU and h.dtype != torch.float64 and _may_overwrite(h):
        # what SyncBatchNorm calls: one pass in float32, without a float32 copy of the maps
        maps = h.reshape(1, -1, *h.shape[2:])
        mean, inverse = torch.batch_norm_stats(maps, TINY)
        return mean.view(h.shape[:2]), inverse.view(h.shape[:2])
    mean = h.mean((2, 3), dtype=torch.float32)
    # in two passes: on a CPU torch.var_mean over the last dimensions takes 17 times as long
    variance = (h.float() - mean[:, :, None, None]).square().mean((2, 3))
    return mean, (variance + TINY).rsqrt()


def _scaled_silu(h: Tensor, double_scale: Tensor, level: Tensor) -> Tensor:
    """silu(h · scale + level) per map, in float32 and rounded once before the SiLU."""
    scale, level = double_scale[:, :, None, None], level[:, :, None, None]
    if _may_overwrite(h):
        normed = torch.addcmul(level, h, scale, value=0.5, out=h)
    else:
        normed = torch.addcmul(level, h.float(), scale, value=0.5).to(h.dtype)
    return F.silu(normed, inplace=True)


def _may_overwrite(h: Tensor) -> bool:
    """Whether operations of mixed types may write into ``h``.

    Not where a derivative may be asked for, nor inside torch.compile, which fuses better itself,
    nor on devices whose operations want one type.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return h.device.type in ("cpu", *GPU)
