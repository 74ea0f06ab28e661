"""Dense against any number of gate files: quality and cost in one table, with their uncertainty.

    python -m training.evaluate a.safetensors b.safetensors --demo --output evaluation
    python -m training.evaluate a.safetensors --model sd15.safetensors --data ffhq/ \\
        --images images/ --output evaluation

All gate files meet the same held-out images, noise and timesteps. Where the held-out deviations of
two files overlap, they share a rank. With --images, pictures are drawn from every model with the
same prompts and seeds and compared with the dense ones. Writes PREFIX.md, PREFIX.json, PREFIX.png
(quality against cost) and PREFIX.grid.png.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ldcp_core import Gates, Latent, Savings, savings, write_atomically
from training.data import open_dataset
from training.denoising import Denoising, HeldOut
from training.errors import UserError
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

#: parts of the timestep schedule whose losses are reported by themselves
PARTS = 5
RESAMPLES = 2000
CONFIDENCE = 0.95


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


def summary(values: np.ndarray) -> dict[str, float]:
    """Mean, median, minimum, maximum and standard deviation."""
    return {
        "mean": float(values.mean()),
        "median": float(np.median(values)),
        "minimum": float(values.min()),
        "maximum": float(values.max()),
        "deviation": float(values.std(ddof=1)) if len(values) > 1 else 0.0,
    }


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron & Tibshirani 1993, §13.3)."""
    generator = np.random.default_rng(seed)
    draws = generator.integers(0, len(values), (RESAMPLES, len(values)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values[draws].mean(1), [tail, 100 - tail])
    return float(low), float(high)


def ranks(deviations: Mapping[str, np.ndarray], seed: int = 0) -> dict[str, int]:
    """1 for the best; a file whose paired difference to the best of a rank may be zero shares it.

    The samples are the same for all files, so it is the mean of the differences that is
    bootstrapped.
    """
    ordered = sorted(deviations, key=lambda name: float(deviations[name].mean()))
    found: dict[str, int] = {}
    best = None
    for place, name in enumerate(ordered, 1):
        if best is not None:
            low, _ = bootstrap(deviations[name] - deviations[best], seed)
            if low <= 0:
                found[name] = found[best]
                continue
        best, found[name] = name, place
    return found


def by_timestep(values: np.ndarray, timesteps: np.ndarray, steps: int) -> list[float | None]:
    """Mean of ``values`` in each of `PARTS` equal parts of the schedule; None where none fell."""
    part = np.minimum(timesteps * PARTS // steps, PARTS - 1)
    return [float(values[part == p].mean()) if (part == p).any() else None for p in range(PARTS)]


# --- images ---------------------------------------------------------------------------------------


def image_metrics() -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], list[str]]:
    """Metrics of one image [1, 3, H, W] in [0, 1] against another, and why some are missing."""
    try:
        from torchmetrics.functional import image as metrics
    except ImportError:
        return {}, ["image metrics: torchmetrics is not installed; pip install torchmetrics"]

    def multi_scale(a: Tensor, b: Tensor) -> Tensor:
        return metrics.multiscale_structural_similarity_index_measure(a, b, data_range=1.0)

    return {
        "PSNR": lambda a, b: metrics.peak_signal_noise_ratio(a, b, data_range=1.0),
        "SSIM": lambda a, b: metrics.structural_similarity_index_measure(a, b, data_range=1.0),
        "MS-SSIM": multi_scale,
        "UQI": metrics.universal_image_quality_index,
        "L1": lambda a, b: (a - b).abs().mean(),
    }, []


def compare_images(
    paths: Mapping[str, Sequence[Path]],
) -> tuple[dict[str, dict[str, dict[str, float]]], list[str]]:
    """Metric -> summary over the images of every pruned model against the dense ones."""
    metrics, notes = image_metrics()
    dense = [_pixels(path) for path in paths[DENSE]]
    if dense and min(dense[0].shape[-2:]) <= 160 and "MS-SSIM" in metrics:
        metrics.pop("MS-SSIM")
        notes.append("MS-SSIM needs images of more than 160 pixels: left out")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, files in paths.items():
        if name == DENSE:
            continue
        images = [_pixels(path) for path in files]
        found[name] = {}
        for metric, of in metrics.items():
            values = [float(of(a, b)) for a, b in zip(images, dense, strict=True)]
            found[name][metric] = summary(np.array(values))
    return found, notes


def _pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1)[None]


def grid(paths: Mapping[str, Sequence[Path]], prompts: Sequence[str]) -> Image.Image:
    """One row per model and one column per image, each row labelled with its model."""
    rows = {
        name: [Image.open(path).convert("RGB") for path in files] for name, files in paths.items()
    }
    side, label, head = next(iter(rows.values()))[0].width, 18, 20
    sheet = Image.new(
        "RGB", (side * len(prompts), head + (side + label) * len(rows)), (255, 255, 255)
    )
    canvas = ImageDraw.Draw(sheet)
    for column, prompt in enumerate(prompts):
        text = prompt
        while text and canvas.textlength(text) > side - 4:
            text = text[:-1]
        canvas.text((column * side + 2, 4), text, (0, 0, 0))
    for row, (name, images) in enumerate(rows.items()):
        y = head + row * (side + label)
        canvas.text((2, y + 2), name, (0, 0, 0))
        for column, image in enumerate(images):
            sheet.paste(image, (column * side, y + label))
    return sheet


# --- the report -----------------------------------------------------------------------------------


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


def render(result: Mapping[str, Any]) -> str:
    """The Markdown report of a result."""
    lines = [
        f"Held out: {result['samples']} samples, the same images, noise and timesteps for all; "
        f"deviation is the mean squared distance of the U-Net's output from the dense model's, "
        f"with a 95% bootstrap interval. Equal ranks: the paired difference may be zero. Costs are "
        f"counted, at {result['resolution']} pixels with guidance.",
        "",
        "| gates | criterion | scope | channels pruned | parameters left | FLOPs left | "
        "deviation from dense | median | min | max | std | loss | rank |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in result["rows"]:
        head = (
            f"| {r['name']} | {r['criterion']} | {r['scope']} | {r['channels_pruned']:.1%} | "
            f"{r['parameters_left']:.1%} | {r['flops_left']:.1%} | "
        )
        if "deviation" not in r:
            lines.append(f"{head}0 | | | | | {r['loss']['mean']:.5f} | |")
            continue
        d, (low, high) = r["deviation"], r["deviation_interval"]
        lines.append(
            f"{head}{d['mean']:.2e} ({low:.1e} to {high:.1e}) | {d['median']:.1e} | "
            f"{d['minimum']:.1e} | {d['maximum']:.1e} | {d['deviation']:.1e} | "
            f"{r['loss']['mean']:.5f} | {r['rank']} |"
        )
    edges = [f"{p / PARTS:.0%} to {(p + 1) / PARTS:.0%}" for p in range(PARTS)]
    lines += ["", "Denoising loss by part of the timestep schedule (0 is the clean end):", ""]
    lines += [f"| gates | {' | '.join(edges)} |", f"|---|{'---|' * PARTS}"]
    for r in result["rows"]:
        shown = ["" if v is None else f"{v:.5f}" for v in r["loss_by_timestep"]]
        lines.append(f"| {r['name']} | {' | '.join(shown)} |")
    if result.get("images"):
        lines += ["", *_image_table(result["images"])]
    lines += [f"\n{note}." for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _image_table(images: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = [
        "Images against the dense model's of the same prompt and seed:",
        "",
        "| gates | metric | mean | median | min | max | std |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, metrics in images.items():
        for metric, s in metrics.items():
            values = (s["mean"], s["median"], s["minimum"], s["maximum"], s["deviation"])
            lines.append(f"| {name} | {metric} | {' | '.join(f'{v:.4g}' for v in values)} |")
    return lines


def plot(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Deviation against parameters and FLOPs left, a line per criterion and scope, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for r in rows:
        if "deviation" in r:
            groups.setdefault((r["scope"], r["criterion"]), []).append(r)
    scopes = list(dict.fromkeys(scope for scope, _ in groups))
    figure, axes = plt.subplots(1, len(scopes), figsize=(6 * len(scopes), 4.5), squeeze=False)
    for axis, scope in zip(axes[0], scopes, strict=True):
        for (of, criterion), members in groups.items():
            if of != scope:
                continue
            members = sorted(members, key=lambda r: r["parameters_left"])
            x = [100 * r["parameters_left"] for r in members]
            y = [r["deviation"]["mean"] for r in members]
            low = [m - r["deviation_interval"][0] for m, r in zip(y, members, strict=True)]
            high = [r["deviation_interval"][1] - m for m, r in zip(y, members, strict=True)]
            axis.errorbar(x, y, yerr=[low, high], marker="o", capsize=3, label=criterion)
        axis.set(
            title=f"scope {scope}",
            xlabel="parameters of the U-Net left, %",
            ylabel="deviation from dense (MSE, held out)",
            yscale="log",
        )
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    return buffer.getvalue()


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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, drawn = parser.add_argument, Settings()
    add("gates", nargs="+", help="gate files")
    add("--model", help="checkpoint file, diffusers folder or hub id")
    add("--data", help="the images that the fits held a part of out")
    add("--demo", action="store_true", help="the embedded demo model and faces")
    add("--samples", type=int, default=96, help="held-out samples (images × timesteps)")
    add("--seed", type=int, default=1000, help="of noise and timesteps")
    add("--resolution", type=int, help="pixels (default: the model's own)")
    add("--precision", choices=list(DTYPES), default="fp32")
    add("--device", default="cpu")
    add("--images", metavar="FOLDER", help="draw images of every model there and compare them")
    add("--prompts", help="a text file, a prompt per line (default: nine faces)")
    add("--steps", type=int, default=drawn.steps, help="of the images")
    add("--guidance", type=float, default=drawn.guidance)
    add("--output", metavar="PREFIX", help="write PREFIX.md, .json, .png and .grid.png")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "diffusers", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    source = given.model or (DEMO_SETTINGS["model"] if given.demo else None)
    data = given.data or (DEMO_SETTINGS["data"] if given.demo else None)
    if source is None or data is None:
        parser.error("--model and --data are missing; or use --demo")
    try:
        gates, prompts = named_gates(given.gates), read_prompts(given.prompts)
        model = load_model(source, dtype=DTYPES[given.precision], device=given.device)
        result = evaluate(model, data, gates, given.samples, given.seed, given.resolution)
        paths: dict[str, list[Path]] = {}
        if given.images is not None:
            shots = [Shot(prompt, 42 + number) for number, prompt in enumerate(prompts)]
            settings = Settings(given.steps, given.guidance)
            folder = Path(given.images)
            paths = sample(model, {DENSE: None, **gates}, shots, settings, folder)
            result["images"], notes = compare_images(paths)
            result["notes"] += notes
        print(render(result))
        if given.output is not None:
            save(result, paths, prompts, given.output)
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


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
