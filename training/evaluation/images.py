"""Images drawn by the models: against the dense model's, their prompts, each other, a reference.

What is compared image by image is summarised over the images; what compares sets of images is one
number per model, and is left out, with a note, where there are too few images for it to mean
anything. Which metrics there are depends on the networks at hand (`training.evaluation.networks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import normalize

from ldcp_core.readers import hooked
from training.console import progress
from training.data.images import open_image
from training.evaluation import distances
from training.evaluation.networks import BATCH, Clip, Inception, Networks, Vgg
from training.evaluation.reference import Reference
from training.evaluation.statistics import bootstrap, ranks, summary
from training.sample import DENSE

#: images on each side below which no set metric is given: our choice, since with fewer an estimate
#: varies about as much as the models that it should tell apart
MINIMUM = 100
#: pixels that the five scales of MS-SSIM need more than
MS_SSIM_PIXELS = 160
INSTALL = 'pip install ".[evaluate]"'
#: metrics of an image against another of which less is nearer
DISTANCES = ("L1", "LPIPS", "VAE features")

#: a metric of one image against another, each uint8 [1, 3, H, W]
PairMetric = Callable[[Tensor, Tensor], float]


@dataclass
class ImageQuality:
    """What was found out about each model's images.

    ``single``: model -> metric -> summary over its images (diversity: over its prompts), against
    the dense ones with an interval of the mean, and of `DISTANCES` a rank; ``sets``: model ->
    metric -> value; ``notes``: what is missing, and why.
    """

    single: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    sets: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def compare_images(
    paths: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    networks: Networks,
    reference: Reference,
    vae: AutoencoderKL,
) -> ImageQuality:
    """Everything about the images of ``paths``: model -> files, which take the prompts in turn."""
    found = ImageQuality(notes=list(networks.notes))
    pairs = pair_metrics(networks, read_image(paths[DENSE][0]).shape[-1], found.notes)
    pairs["VAE features"] = vae_features(vae)
    beside: dict[str, dict[str, np.ndarray]] = {metric: {} for metric in pairs}
    texts = None if networks.clip is None else networks.clip.texts(prompts)
    distance: tuple[str, PairMetric] = ("LPIPS", networks.vgg.lpips) if networks.vgg else ("L1", l1)
    for name, files in paths.items():
        metrics = found.single.setdefault(name, {})
        if name != DENSE:
            for metric, values in against(files, paths[DENSE], pairs).items():
                beside[metric][name] = values
                metrics[metric] = summary(values)
                if np.isfinite(values).all():  # the PSNR of equal images is not
                    metrics[metric]["interval"] = bootstrap(values)
        if networks.clip is not None and texts is not None:
            scores = clip_scores(features(networks.clip, files), texts)
            metrics["CLIP score"] = summary(scores.numpy())
        if len(files) > len(prompts):
            values = diversity(files, len(prompts), distance[1])
            metrics[f"diversity ({distance[0]})"] = summary(values)
    for metric in set(DISTANCES) & set(beside):
        for name, place in ranks(beside[metric]).items():
            found.single[name][metric]["rank"] = place
    if len(paths[DENSE]) == len(prompts):
        found.notes.append("diversity within a prompt needs --seeds 2 or more")
    found.sets = compare_sets(paths, networks, reference, found.notes)
    return found


def read_image(path: Path) -> Tensor:
    """uint8 [1, 3, H, W]."""
    with open_image(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None]


def features(network: Inception | Vgg | Clip, files: Sequence[Path]) -> Tensor:
    """[N, D] of image files."""
    parts = [files[start : start + BATCH] for start in range(0, len(files), BATCH)]
    shown = progress(parts, f"features by {type(network).__name__}", unit="batch")
    return torch.cat([network.features(torch.cat([*map(read_image, part)])) for part in shown])


# --- one image ------------------------------------------------------------------------------------


def pair_metrics(networks: Networks, side: int, notes: list[str]) -> dict[str, PairMetric]:
    """The metrics of an image against another of ``side`` pixels; ``notes`` says what is missing.

    PSNR, SSIM (Wang et al. 2004), MS-SSIM (Wang et al. 2003) and UQI (Wang & Bovik 2002) are
    torchmetrics'.
    """
    found: dict[str, PairMetric] = {"L1": l1}
    try:
        from torchmetrics.functional import image as of
    except ImportError as error:
        notes.append(f"PSNR, SSIM, MS-SSIM and UQI not measured: {error}; {INSTALL}")
    else:
        scaled: dict[str, Callable[..., Any]] = {
            "PSNR": of.peak_signal_noise_ratio,
            "SSIM": of.structural_similarity_index_measure,
            "MS-SSIM": of.multiscale_structural_similarity_index_measure,
        }
        if side <= MS_SSIM_PIXELS:
            del scaled["MS-SSIM"]
            notes.append(f"MS-SSIM needs images of more than {MS_SSIM_PIXELS} pixels: left out")
        found |= {
            name: _of_unit(partial(metric, data_range=1.0)) for name, metric in scaled.items()
        }
        found["UQI"] = _of_unit(of.universal_image_quality_index)
    if networks.vgg is not None:
        found["LPIPS"] = networks.vgg.lpips
    return found


def _of_unit(metric: Callable[..., Any]) -> PairMetric:
    """A metric of images in [0, 1]."""
    return lambda a, b: float(metric(a.float() / 255, b.float() / 255))


def l1(one: Tensor, other: Tensor) -> float:
    """Mean absolute difference of the pixels, of images in [0, 1]."""
    return float((one.float() - other.float()).abs().mean() / 255)


def vae_features(vae: AutoencoderKL) -> PairMetric:
    """Distance of two images in what the pipeline's own VAE sees in them.

    Of the maps behind each block of its encoder, as LPIPS has it (Zhang et al. 2018,
    arXiv:1801.03924, eq. 1) with all weights one: channels normalised at each position, squared
    distance, mean over the positions, sum over the maps. It compares models of one VAE.
    """

    @torch.no_grad()
    def distance(one: Tensor, other: Tensor) -> float:
        maps: list[Tensor] = []
        blocks = vae.encoder.down_blocks
        hooks = [b.register_forward_hook(lambda m, i, o: maps.append(normalize(o))) for b in blocks]
        with hooked(*hooks):
            vae.encoder(torch.cat([one, other]).to(vae.device, vae.dtype) / 127.5 - 1)
        return sum(float((a - b).square().sum(0).mean()) for a, b in maps)

    return distance


def against(
    files: Sequence[Path], dense: Sequence[Path], metrics: Mapping[str, PairMetric]
) -> dict[str, np.ndarray]:
    """Metric -> its value for each image against the dense model's of the same prompt and seed."""
    values: dict[str, list[float]] = {name: [] for name in metrics}
    pairs = list(zip(files, dense, strict=True))
    for pair in progress(pairs, "images beside dense ones", unit="image"):
        a, b = (read_image(path) for path in pair)
        for name, metric in metrics.items():
            values[name].append(metric(a, b))
    return {name: np.array(of) for name, of in values.items()}


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """100 · max(cos, 0) of unit embeddings of images [N, D] and of prompts [P, D] in turn: [N].

    Hessel et al. 2021 (arXiv:2104.08718, §3), with the factor 100 that is usual for diffusion
    models instead of their 2.5.
    """
    turns = texts[torch.arange(len(images)) % len(texts)]
    return 100 * (images * turns).sum(1).clamp(min=0)


def diversity(files: Sequence[Path], prompts: int, distance: PairMetric) -> np.ndarray:
    """Mean distance between any two images of a prompt, for each of the ``prompts`` prompts.

    With LPIPS for the distance this is the diversity of Zhu et al. 2017 (BicycleGAN,
    arXiv:1711.11586, §5), which has no equation number.
    """
    found = []
    for prompt in progress(range(prompts), "diversity within a prompt", unit="prompt"):
        images = [read_image(path) for path in files[prompt::prompts]]
        found.append(np.mean([distance(a, b) for a, b in combinations(images, 2)]))
    return np.array(found)


# --- sets of images -------------------------------------------------------------------------------


def compare_sets(
    paths: Mapping[str, Sequence[Path]],
    networks: Networks,
    reference: Reference,
    notes: list[str],
) -> dict[str, dict[str, float]]:
    """FID, KID, CMMD, precision and recall of each model's images against the reference.

    What needs more images than there are gets a note instead of a value.
    """
    found: dict[str, dict[str, float]] = {name: {} for name in paths}
    drawn, real = len(paths[DENSE]), len(reference.data)

    def too_few(metrics: str, least: int, why: str) -> None:
        notes.append(
            f"{metrics} not given: {why}, that is {least:,} images; {drawn:,} were drawn and the "
            f"reference has {real:,}. --seeds N draws N images per prompt"
        )

    for network, metrics in (
        (networks.inception, "FID and KID"),
        (networks.vgg, "precision and recall"),
        (networks.clip, "CMMD"),
    ):
        if network is None:
            continue
        if min(drawn, real) < MINIMUM:
            too_few(metrics, MINIMUM, "fewer would say little")
            continue
        of_reference = reference.features(network)
        dimensions = of_reference.shape[1]
        try:
            for name, files in paths.items():
                found[name] |= set_metrics(network, of_reference, features(network, files))
        except ImportError as error:
            notes.append(f"{metrics} not measured: {error}; {INSTALL}")
        else:
            if network is networks.inception and min(drawn, len(of_reference)) <= dimensions:
                too_few("FID", dimensions + 1, "its covariance needs more images than features")
    return found


def set_metrics(network: Inception | Vgg | Clip, real: Tensor, fake: Tensor) -> dict[str, float]:
    """What a network's features [N, D] of the reference and of drawn images are compared by."""
    if isinstance(network, Clip):
        return {"CMMD": distances.cmmd(real, fake)}
    if isinstance(network, Vgg):
        precision, recall = distances.precision_recall(real, fake)
        return {"precision": precision, "recall": recall}
    mean, deviation = distances.kid(real, fake)
    found = {"KID": mean, "KID std": deviation}
    if min(len(real), len(fake)) > real.shape[1]:
        found["FID"] = distances.fid(real, fake)
    return found
