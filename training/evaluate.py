"""Dense against any number of gate files: quality and cost in one table, with their uncertainty.

    python -m training.evaluate a.safetensors b.safetensors --demo --output evaluation
    python -m training.evaluate a.safetensors --model sd15.safetensors --data ffhq/ \\
        --images images/ --output evaluation

All gate files meet the same held-out images, noise and timesteps. Where the held-out deviations of
two files overlap, they share a rank. With --images, pictures are drawn from every model with the
same prompts and seeds and compared with the dense ones, their prompts and a reference; what needs
weights that are not there is left out, and the report says which file to put where. Writes
PREFIX.md, PREFIX.json, PREFIX.png (quality against cost) and PREFIX.grid.png.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldcp_core import Gates, Latent, Savings, savings, write_atomically
from training.cache import default_cache
from training.data import open_dataset
from training.denoising import Denoising, HeldOut
from training.errors import UserError
from training.evaluation.images import compare_images
from training.evaluation.networks import CLIP, INCEPTION, VGG, load_networks
from training.evaluation.plots import grid, plot
from training.evaluation.reference import Reference
from training.evaluation.report import render
from training.evaluation.statistics import bootstrap, by_timestep, ranks, summary
from training.fit import DEMO_SETTINGS
from training.gating import hard_gates
from training.models import DTYPES, DiffusionModel, load_model
from training.sample import (
    DENSE,
    Settings,
    Shot,
    check_fits,
    named_gates,
    read_prompts,
    sample,
)

log = logging.getLogger("training.evaluate")


@dataclass(frozen=True)
class Quality:
    """Per held-out sample: deviation from the dense output and denoising loss, float64 [N]."""

    deviation: np.ndarray
    loss: np.ndarray


def held_out_quality(
    heldout: HeldOut, gates: Mapping[str, Gates]
) -> tuple[dict[str, Quality], np.ndarray]:
    """Quality of dense and of every gate file on the same samples, and the samples' timesteps."""
    dense = heldout.losses(None, "zero").double().numpy()
    found = {DENSE: Quality(np.zeros_like(dense), dense)}
    for name, file in gates.items():
        constants = {site: file.constant(site) for site in file.scores}
        masks = hard_gates(file.keep_sets(), constants)
        found[name] = Quality(
            heldout.deviations(masks, file.padding).double().numpy(),
            heldout.losses(masks, file.padding).double().numpy(),
        )
        log.info("%s: deviation %.3g", name, found[name].deviation.mean())
    return found, heldout.timesteps.numpy()


def row(
    name: str, gates: Gates | None, quality: Quality, cost: Savings | None, steps: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything about one model, JSON-able."""
    info = {} if gates is None else gates.info
    found: dict[str, Any] = {
        "name": name,
        "criterion": info.get("criterion", DENSE),
        "scope": info.get("scope", ""),
        "target": info.get("target_sparsity"),
        "channels_pruned": 0.0 if gates is None else gates.sparsity,
        "parameters_left": 1.0 if cost is None else 1 - cost.parameter_share,
        "flops_left": 1.0 if cost is None else 1 - cost.flop_share,
        "loss": summary(quality.loss),
        "loss_by_timestep": by_timestep(quality.loss, **steps),
    }
    if gates is not None:
        found["deviation"] = summary(quality.deviation)
        found["deviation_interval"] = bootstrap(quality.deviation)
        found["deviation_by_timestep"] = by_timestep(quality.deviation, **steps)
    return found


def evaluate(
    model: DiffusionModel,
    data: str,
    gates: Mapping[str, Gates],
    samples: int,
    seed: int,
    resolution: int | None = None,
    split: tuple[float, int] = (0.1, 0),
) -> dict[str, Any]:
    """Quality on held-out images and cost of dense and of every gate file, JSON-able.

    ``split`` is the fraction of images that the fits held out and the seed that chose them. Raises
    UserError for gates of another architecture and data without held-out images.
    """
    for file in gates.values():
        check_fits(model, file)
    images = open_dataset(data, resolution=resolution or model.resolution)
    _, held_out = images.split(*split)
    if not held_out:
        raise UserError("No image is held out to evaluate on.", "more images")
    heldout = HeldOut(Denoising(model, 0), images, held_out, samples, 8, seed)
    qualities, timesteps = held_out_quality(heldout, gates)
    steps = {"timesteps": timesteps, "steps": model.alphas_cumprod.numel()}
    side = (resolution or model.resolution) // model.vae_scale_factor
    rows = [row(DENSE, None, qualities[DENSE], None, steps)]
    for name, file in gates.items():
        counts = {site: int(keep.sum()) for site, keep in file.keep_sets().items()}
        cost = savings(file.topology, counts, file.padding, Latent(side, side))
        rows.append(row(name, file, qualities[name], cost, steps))
    found = ranks({name: qualities[name].deviation for name in gates})
    for r in rows[1:]:
        r["rank"] = found[r["name"]]
    return {
        "format": "ldcp.evaluation",
        "version": 1,
        "samples": len(timesteps),
        "resolution": resolution or model.resolution,
        "rows": rows,
        "notes": [],
    }


def parser() -> argparse.ArgumentParser:
    """The options of the command line."""
    found = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, drawn = found.add_argument, Settings()
    add("gates", nargs="+", help="gate files")
    add("--model", help="checkpoint file, diffusers folder or hub id")
    add("--data", help="the images that the fits held a part of out")
    add("--demo", action="store_true", help="the embedded demo model and faces")
    add("--samples", type=int, default=96, help="held-out samples (images × timesteps)")
    add("--seed", type=int, default=1000, help="of noise and timesteps")
    add("--resolution", type=int, help="pixels (default: the model's own)")
    add("--precision", choices=list(DTYPES), default="fp32")
    add("--device", default="cpu")
    add("--output", metavar="PREFIX", help="write PREFIX.md, .json, .png and .grid.png")
    images = found.add_argument_group("images")
    add = images.add_argument
    add("--images", metavar="FOLDER", help="draw images of every model there and compare them")
    add("--prompts", help="a text file, a prompt per line (default: nine faces)")
    add("--seeds", type=int, default=1, help="images per prompt (1)")
    add("--steps", type=int, default=drawn.steps, help="of the images")
    add("--guidance", type=float, default=drawn.guidance)
    add("--reference", help="folder or data set for FID, KID, CMMD, precision, recall (--data)")
    add("--inception", metavar="FILE", help=f"{INCEPTION.name}: {INCEPTION.metrics}")
    add("--vgg", metavar="FILE", help=f"{VGG.name}: {VGG.metrics}")
    add("--clip", metavar="FOLDER", help=f"a CLIP of transformers: {CLIP.metrics}")
    add("--cache", metavar="FOLDER", help="of the reference's features (the user's cache)")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = parser()
    given = options.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "diffusers", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if given.demo:
        given.model = given.model or DEMO_SETTINGS["model"]
        given.data = given.data or DEMO_SETTINGS["data"]
    if given.model is None or given.data is None:
        options.error("--model and --data are missing; or use --demo")
    try:
        check(given)
        gates, prompts = named_gates(given.gates), read_prompts(given.prompts)
        folder = Path(given.cache or default_cache())
        networks = None
        if given.images is not None:  # a wrong path shows before anything is computed
            images = open_dataset(given.reference or given.data)
            networks = load_networks(
                given.inception, given.vgg, given.clip, folder / "metrics", given.device
            )
        model = load_model(given.model, dtype=DTYPES[given.precision], device=given.device)
        result = evaluate(model, given.data, gates, given.samples, given.seed, given.resolution)
        paths: dict[str, list[Path]] = {}
        if networks is not None:
            images.resolution = model.resolution
            shots = shots_of(prompts, given.seeds)
            settings = Settings(given.steps, given.guidance)
            paths = sample(model, {DENSE: None, **gates}, shots, settings, Path(given.images))
            found = compare_images(paths, prompts, networks, Reference(images, folder))
            result |= {"images": found.single, "sets": found.sets}
            result["notes"] += found.notes
            result["reference"] = {
                "source": Path(images.source).name,
                "images": len(images) - len(images.broken),
                "resolution": model.resolution,
            }
        print(render(result))
        if given.output is not None:
            first = {name: files[: len(prompts)] for name, files in paths.items()}
            save(result, first, prompts, given.output)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def check(given: argparse.Namespace) -> None:
    """Raises UserError for options that can't work, before anything expensive starts."""
    for name in ("samples", "seeds", "steps"):
        if getattr(given, name) < 1:
            raise UserError(f"--{name} is {getattr(given, name)}.", "1 or more", f"change --{name}")
    of_images = ("prompts", "reference", "inception", "vgg", "clip")
    named = [f"--{name}" for name in of_images if getattr(given, name) is not None]
    if named and given.images is None:
        raise UserError(
            f"{', '.join(named)} given without --images.",
            "a folder to draw images into",
            "add --images FOLDER",
        )


def shots_of(prompts: Sequence[str], seeds: int) -> list[Shot]:
    """Every prompt ``seeds`` times, in turn, each time with a seed of its own.

    So that more seeds add images to those that are there.
    """
    return [Shot(prompts[n % len(prompts)], 42 + n) for n in range(seeds * len(prompts))]


def save(
    result: Mapping[str, Any],
    paths: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    prefix: str,
) -> None:
    """Write the report, its numbers and its pictures."""
    files = {
        ".md": render(result).encode("utf-8"),
        ".json": (json.dumps(result, indent=1) + "\n").encode("utf-8"),
        ".png": plot(result["rows"]),
    }
    if paths:
        buffer = io.BytesIO()
        grid(paths, prompts).save(buffer, format="png", optimize=True)
        files[".grid.png"] = buffer.getvalue()
    for suffix, content in files.items():
        write_atomically(Path(prefix + suffix), content)
    print(f"written: {', '.join(prefix + suffix for suffix in files)}")


if __name__ == "__main__":
    sys.exit(main())
