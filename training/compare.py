"""Compare a gate file with cheap ways of choosing as many channels: random, L1 magnitude, FLAP.

    python -m training.compare gates.safetensors --demo

All keep-sets prune equally many channels under the same rule with the same constants, and meet the
same held-out images, noise and timesteps; the figure is the mean squared deviation of the U-Net's
output from the dense model's.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ldcp_core import Gates, load_gates, top_channels
from training.arguments import DEMO_SETTINGS, parse_seed
from training.console import explaining, log_progress
from training.criteria import magnitudes
from training.data import ImageData, open_dataset
from training.denoising import Denoising, HeldOut
from training.errors import UserError
from training.gating import hard_gates, watched
from training.models import DiffusionModel, load_model

#: how many training samples FLAP sees
CALIBRATION_SAMPLES, CALIBRATION_BATCH = 64, 8
log = logging.getLogger("training.compare")


def flap_importance(
    denoising: Denoising, images: ImageData, indices: Sequence[int], sites: Sequence[str]
) -> dict[str, Tensor]:
    """`ldcp_core.fluctuation` on training images, each site in units of its mean.

    As in ComfyUI's Calibrate Gates, but on noised images instead of a sampler's.
    """
    batches = images.batches(indices, CALIBRATION_BATCH, epochs=None)
    with watched(denoising.model.unet, sites) as seen:
        for _ in range(CALIBRATION_SAMPLES // CALIBRATION_BATCH):
            denoising.dense(denoising.problem(next(batches)))
    return {site: values / values.mean() for site, values in seen.importances().items()}


def ranked_together(importance: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The ``kept`` most important channels of all sites, as keep-sets."""
    keep = top_channels(torch.cat(list(importance.values())), kept)
    widths = [values.numel() for values in importance.values()]
    return dict(zip(importance, keep.split(widths), strict=True))


def ranked_per_site(
    importance: Mapping[str, Tensor], keep_sets: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """As many of the most important channels at each site as ``keep_sets`` keeps there."""
    return {
        site: top_channels(values, int(keep_sets[site].sum()))
        for site, values in importance.items()
    }


def candidates(
    model: DiffusionModel, gates: Gates, flap: Mapping[str, Tensor], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Keep-sets that keep as many channels as ``gates`` does, by name of the way they were chosen.

    "per site" keeps what the learned gates keep at each site, so that only the choice within a
    site differs; "together" ranks the channels of all sites in one list.
    """
    learned = gates.keep_sets()
    kept = sum(int(keep.sum()) for keep in learned.values())
    generator = torch.Generator().manual_seed(seed)
    chance = {site: torch.rand(keep.numel(), generator=generator) for site, keep in learned.items()}
    sites = [site for site in gates.topology.all_sites() if site.name in learned]
    weights = magnitudes(model.unet, sites, "l1")
    return {
        "learned": learned,
        "random, together": ranked_together(chance, kept),
        "random, per site": ranked_per_site(chance, learned),
        "L1 magnitude, together": ranked_together(weights, kept),
        "L1 magnitude, per site": ranked_per_site(weights, learned),
        "FLAP, together": ranked_together(flap, kept),
        "FLAP, per site": ranked_per_site(flap, learned),
    }


def compare(
    gates: Gates, model: DiffusionModel, data: str, seeds: Sequence[int], samples: int
) -> dict[str, list[float]]:
    """Held-out deviation from dense per way of choosing and seed of the noise (and of chance)."""
    config = gates.info.get("config", {})
    images = open_dataset(data, resolution=config.get("resolution") or model.resolution)
    fraction = config.get("validation_fraction", 0.1)
    training, held_out = images.split(fraction, config.get("seed", 0))
    if not held_out:
        raise UserError(
            "These gates were trained on all images: none is held out to compare on.",
            "gates made with --validation-fraction above 0",
            "train again with a validation fraction",
        )
    denoising = Denoising(model, 0)
    constants = {site: gates.constant(site) for site in gates.scores}
    flap = flap_importance(denoising, images, training, list(gates.scores))
    found: dict[str, list[float]] = {}
    for seed in seeds:
        heldout = HeldOut(denoising, images, held_out, samples, 8, seed + 1000)
        for name, keep_sets in candidates(model, gates, flap, seed).items():
            deviations = heldout.deviations(hard_gates(keep_sets, constants), gates.padding)
            found.setdefault(name, []).append(deviations.mean().item())
    return found


def table(found: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> str:
    """Markdown: one row per way of choosing, one column per seed, mean and ratio to learned."""
    lines = [
        f"| chosen by | {' | '.join(f'seed {seed}' for seed in seeds)} | mean | × learned |",
        f"|---|{'---|' * (len(seeds) + 2)}",
    ]
    reference = math.fsum(found["learned"]) / len(seeds)
    for name, values in found.items():
        mean = math.fsum(values) / len(values)
        shown = " | ".join(f"{value:.3e}" for value in values)
        lines.append(f"| {name} | {shown} | {mean:.3e} | {mean / reference:.2f} |")
    return "\n".join(lines)


@explaining
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.compare", description=__doc__)
    parser.add_argument("gates", nargs="+", help="gate files made by training.fit")
    parser.add_argument("--model", help="the model the gates were trained on")
    parser.add_argument("--data", help="the images the gates were trained on")
    parser.add_argument("--demo", action="store_true", help="the embedded demo model and faces")
    parser.add_argument("--samples", type=int, default=96, help="held-out samples per seed")
    parser.add_argument("--seeds", type=parse_seed, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args(argv)
    log_progress(logging.WARNING)
    source = arguments.model or (DEMO_SETTINGS["model"] if arguments.demo else None)
    data = arguments.data or (DEMO_SETTINGS["data"] if arguments.demo else None)
    if source is None or data is None:
        parser.error("--model and --data are missing; or use --demo")
    model = load_model(source)
    for path in arguments.gates:
        gates = load_gates(path)
        print(
            f"\n{path}: {gates.sparsity:.1%} of {gates.channels} channels pruned, "
            f"rule {gates.padding!r}\n"
        )
        print(
            table(compare(gates, model, data, arguments.seeds, arguments.samples), arguments.seeds)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
