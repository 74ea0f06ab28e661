"""The Markdown report of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.evaluation.statistics import PARTS


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
    if any(result.get("sets", {}).values()):
        lines += ["", *_set_table(result["sets"], result["reference"])]
    lines += [f"\n{note}." for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _image_table(images: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = [
        "Images against the dense model's of the same prompt and seed; CLIP score against the "
        "prompt; diversity between the images of a prompt:",
        "",
        "| gates | metric | mean | median | min | max | std |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, metrics in images.items():
        for metric, s in metrics.items():
            values = (s["mean"], s["median"], s["minimum"], s["maximum"], s["deviation"])
            lines.append(f"| {name} | {metric} | {' | '.join(f'{v:.4g}' for v in values)} |")
    return lines


def _set_table(sets: Mapping[str, Mapping[str, float]], reference: Mapping[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(metric for found in sets.values() for metric in found))
    lines = [
        f"All images of a model against the {reference['images']:,} of {reference['source']} at "
        f"{reference['resolution']} pixels:",
        "",
        f"| gates | {' | '.join(metrics)} |",
        f"|---|{'---|' * len(metrics)}",
    ]
    for name, found in sets.items():
        shown = [f"{found[metric]:.4g}" if metric in found else "" for metric in metrics]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return lines
