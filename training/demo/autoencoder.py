"""The demo's autoencoder: 128 px portraits to 4x32x32 latents and back.

Latents keep the demo honest: the pipeline has the same parts as Stable Diffusion 1.5 and loads
the same way. The portraits are smooth, so a tiny convolutional network is enough. It is trained on
crops first, for speed, and on whole portraits at the end, because group normalisation sees other
statistics there. Few normalisation groups matter: with one channel per group the global colour,
which the portraits vary strongly, is normalised away. Left to itself the encoder still spends its
channels on brightness and the red-blue axis, so a last phase teaches the weakest channel the
green-magenta axis and keeps the others as they are.
"""

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

log = logging.getLogger(__name__)

CROP, CROP_BATCH, WHOLE_BATCH = 64, 8, 3
CROP_SHARE = 0.7  # share of the time spent on crops
PEAK_RATE = 2e-3
KL_WEIGHT = 1e-5
TARGET_NOISE = 0.03  # on standardised latents, so that the decoder tolerates a denoiser's errors
TARGET_LOGVAR = -7.0
LOG_SECONDS = 20.0


def new_autoencoder() -> AutoencoderKL:
    """An untrained autoencoder that reduces height and width by 4.

    Its posterior starts narrow (logarithm of the variance -6): at unit variance the noise would
    hide the image from the decoder for most of a short training.
    """
    vae = AutoencoderKL(
        sample_size=128,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=2,
        mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
    )
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = -6.0
    return vae


def train_autoencoder(images: np.ndarray, seconds: float, seed: int) -> AutoencoderKL:
    """Train on `images` (uint8, `[N, H, W, 3]`) for a given wall-clock time."""
    torch.manual_seed(seed)
    vae = new_autoencoder()

    def loss(pixels: Tensor, _latents: Tensor | None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return _reconstruction(decoded, pixels) + KL_WEIGHT * kl

    _train(vae, loss, images, None, seconds, seed)
    return vae.eval()


def add_colour_channel_(
    vae: AutoencoderKL, images: np.ndarray, latents: Tensor, seconds: float, seed: int
) -> None:
    """Teach the weakest channel the green-magenta axis.

    `latents` are standardised; the channel that `weakest_channel` named before standardising is
    expected to hold its targets already (`colour_targets`).
    """
    torch.manual_seed(seed)

    def loss(pixels: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            # Half the batches decode the targets, so the new channel is used from the first step.
            source = targets if torch.rand(()) < 0.5 else posterior.mean.float()
            decoded = vae.decode(source + TARGET_NOISE * torch.randn_like(source)).sample.float()
        narrow = (posterior.logvar.float() - TARGET_LOGVAR).pow(2).mean()
        return (
            _reconstruction(decoded, pixels)
            + F.mse_loss(posterior.mean.float(), targets)
            + 0.01 * narrow
        )

    _train(vae, loss, images, latents, seconds, seed)


def weakest_channel(latents: Tensor) -> int:
    """The channel with the smallest deviation, `latents` not yet standardised."""
    return int(latents.std((0, 2, 3)).argmin())


def colour_targets(images: np.ndarray) -> Tensor:
    """Green minus the mean of red and blue in 4x4 cells, standardised, `[N, H/4, W/4]`."""
    cells = torch.cat(
        [F.avg_pool2d(to_pixels(images[i : i + 64]), 4) for i in range(0, len(images), 64)]
    )
    colour = cells[:, 1] - (cells[:, 0] + cells[:, 2]) / 2
    return (colour - colour.mean()) / colour.std()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, images: np.ndarray, batch: int = 16) -> Tensor:
    """Posterior means of all images, unscaled, float32 `[N, 4, H/4, W/4]`."""
    with torch.autocast("cpu", torch.bfloat16):
        parts = [
            vae.encode(to_pixels(images[i : i + batch])).latent_dist.mean.float()
            for i in range(0, len(images), batch)
        ]
    return torch.cat(parts)


@torch.no_grad()
def standardise_(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Fold each latent channel's mean and deviation into the 1x1 convolutions around the latent.

    Returns the standardised latents; what the autoencoder reconstructs stays the same.
    """
    count = latents.shape[1]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:count] /= std[:, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()  # logarithm of the variance
    out.bias += out.weight[:, :, 0, 0] @ mean
    out.weight *= std[None, :, None, None]
    return (latents - mean[:, None, None]) / std[:, None, None]


def to_pixels(images: np.ndarray) -> Tensor:
    """uint8 `[N, H, W, 3]` to float32 `[N, 3, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _train(
    vae: AutoencoderKL,
    loss_of: Callable[[Tensor, Any], Tensor],
    images: np.ndarray,
    latents: Tensor | None,
    seconds: float,
    seed: int,
) -> None:
    """Minimise `loss_of(pixels, latents of the same crop)`, crops first, whole images at last."""
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-4
    )
    started, last_log, step = time.monotonic(), 0.0, 0
    while (elapsed := time.monotonic() - started) < seconds:
        progress = elapsed / seconds
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1.0, (step + 1) / 30, 1.6 * (1 - progress) + 0.01)
        whole = progress > CROP_SHARE
        side, count = (images.shape[1], WHOLE_BATCH) if whole else (CROP, CROP_BATCH)
        loss = loss_of(*_crops(images, latents, rng, side, count))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed - last_log > LOG_SECONDS:
            last_log = elapsed
            log.info("autoencoder: step %d, %.0f s, loss %.4f", step, elapsed, loss.item())


def _reconstruction(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Absolute and squared error, and the absolute error of 8x8 means, which is about colour."""
    coarse = F.l1_loss(F.avg_pool2d(decoded, 8), F.avg_pool2d(pixels, 8))
    return F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels) + coarse


def _crops(
    images: np.ndarray, latents: Tensor | None, rng: np.random.Generator, side: int, count: int
) -> tuple[Tensor, Tensor | None]:
    """Random square crops on the latents' grid of 4 pixels, with their latents if there are any."""
    reach = (images.shape[1] - side) // 4 + 1
    picks = list(
        zip(
            rng.integers(len(images), size=count),
            4 * rng.integers(reach, size=count),
            4 * rng.integers(reach, size=count),
            strict=True,
        )
    )
    pixels = to_pixels(np.stack([images[i, y : y + side, x : x + side] for i, y, x in picks]))
    if latents is None:
        return pixels, None
    return pixels, torch.stack(
        [latents[i, :, y // 4 : (y + side) // 4, x // 4 : (x + side) // 4] for i, y, x in picks]
    )
