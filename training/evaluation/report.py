"""The Markdown report of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldcp_core import markdown
from training.console import table
from training.evaluation.images import DISTANCES
from training.evaluation.statistics import SECTIONS

#: so that nothing is divided by zero
TINY = 1e-30
SHARES = ("channels_pruned", "parameters_left", "flops_left", "sparsity")
COLUMNS = (
    "gates",
    "precision",
    "criterion",
    "scope",
    "channels pruned",
    "parameters left",
    "FLOPs left",
    "sparsity",
    "MiB",
    "ms",
    "deviation from dense",
    "of rounding alone",
    "median",
    "min",
    "max",
    "std",
    "loss",
    "rank",
)


def render(result: Mapping[str, Any]) -> str:
    """The Markdown report of a result."""
    machine = result["machine"]
    lines = [
        f"Held out: {result['samples']} samples of {result['held_out']} images that none of the "
        f"gates were trained on, the same images, noise and timesteps for all; deviation is the "
        f"mean squared distance of the U-Net's output from the dense model's in "
        f"{result['reference_precision']}, with a 95% bootstrap interval. Equal ranks: the paired "
        f"difference may be zero. Parameters and FLOPs are counted, at {result['resolution']} "
        f"pixels with guidance. MiB are those of the tensors that the U-Net consists of, and ms "
        f"the median of a few evaluations, batch 2, both measured ({machine['gpu'] or ''}"
        f"{'' if machine['gpu'] else machine['cpu']}, {machine['threads']} threads, torch "
        f"{machine['packages']['torch']}). What is pruned is pruned first, then cast or quantized.",
        "",
        *table(COLUMNS, map(_row, result["rows"])),
    ]
    if any(r["zeroed"] for r in result["rows"]):
        lines += [
            "",
            "Unstructured pruning sets single weights to zero where they are: it saves neither "
            "time nor memory, as ms and MiB show beside those of dense. Sparsity is the share of "
            "the U-Net's parameters that is left out or zero; every layer's is in the JSON file.",
        ]
    for name in dict.fromkeys(r["beside"] for r in result["rows"] if r["beside"]):
        lines += ["", *_table_beside(name, result["rows"], result.get("images", {}))]
    edges = [f"{p / SECTIONS:.0%} to {(p + 1) / SECTIONS:.0%}" for p in range(SECTIONS)]
    lines += ["", "Denoising loss by part of the timestep schedule (0 is the clean end):", ""]
    losses = (
        [markdown(r["name"]), *("" if v is None else f"{v:.5f}" for v in r["loss_by_timestep"])]
        for r in result["rows"]
    )
    lines += table(["gates", *edges], losses)
    if result.get("images"):
        lines += ["", *_image_table(result["images"])]
    if any(result.get("sets", {}).values()):
        lines += ["", *_set_table(result["sets"], result["reference"])]
    lines += [f"\n{note}." for note in result["notes"]]
    return "\n".join(lines) + "\n"


def _row(r: Mapping[str, Any]) -> list[str]:
    shown = [markdown(r[word]) for word in ("name", "precision", "criterion", "scope")]
    shown += [f"{r[share]:.1%}" for share in SHARES]
    shown += [f"{r['bytes'] / 2**20:.1f}", f"{1000 * r['seconds']:.0f}"]
    if "deviation" in r:
        d = r["deviation"]
        shown += [_deviation(r), f"{r['rounding']:.1e}" if "rounding" in r else ""]
        shown += [f"{d[name]:.1e}" for name in ("median", "minimum", "maximum", "deviation")]
    else:
        shown += ["0", "", "", "", "", ""]
    return [*shown, f"{r['loss']['mean']:.5f}", str(r.get("rank", ""))]


def _deviation(r: Mapping[str, Any]) -> str:
    low, high = r["deviation_interval"]
    return f"{r['deviation']['mean']:.2e} ({low:.1e} to {high:.1e})"


def _table_beside(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, Mapping[str, Mapping[str, Any]]],
) -> list[str]:
    learned = next(r for r in rows if r["name"] == name)
    distances = [metric for metric in DISTANCES if metric in images.get(name, {})]
    heads = ["chosen by", "weights left", "deviation from dense", "× learned", "rank", *distances]
    rows_beside = []
    for r in [learned, *(r for r in rows if r["beside"] == name)]:
        times = r["deviation"]["mean"] / max(learned["deviation"]["mean"], TINY)
        shown = [markdown(r["criterion"]), f"{r['parameters_left']:.1%}", _deviation(r)]
        shown += [f"{times:.2f}", str(r["rank"])]
        found = (images[r["name"]][metric] for metric in distances)
        rows_beside.append([*shown, *(f"{_mean(s)}, {s['rank']}" for s in found)])
    return [
        f"Beside {markdown(name)}: as many channels chosen by cheaper means, with the same "
        "constants; per site: as many at each site as learned; together: over all sites. What "
        "lies between own-effect together and per site is how much each layer gives; between that "
        "and learned, which channels. obs and structural remove channels for good, and leave as "
        "many weights; per layer: the same share of each; global: shared out as learned. Images "
        "are those of full sampling with guidance against the dense model's, with intervals and "
        "ranks as well:",
        "",
        *table(heads, rows_beside),
    ]


def _mean(s: Mapping[str, Any]) -> str:
    """The mean, with its interval where there is one."""
    if "interval" not in s:
        return f"{s['mean']:.4g}"
    low, high = s["interval"]
    return f"{s['mean']:.4g} ({low:.2g} to {high:.2g})"


def _image_table(images: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    values = ("median", "minimum", "maximum", "deviation")
    rows = (
        [markdown(name), metric, _mean(s), *(f"{s[value]:.4g}" for value in values)]
        for name, metrics in images.items()
        for metric, s in metrics.items()
    )
    return [
        "Images against the dense model's of the same prompt and seed; CLIP score against the "
        "prompt; diversity between the images of a prompt. Means against dense ones have 95% "
        "bootstrap intervals over the images:",
        "",
        *table(["gates", "metric", "mean", "median", "min", "max", "std"], rows),
    ]


def _set_table(sets: Mapping[str, Mapping[str, float]], reference: Mapping[str, Any]) -> list[str]:
    metrics = list(dict.fromkeys(metric for found in sets.values() for metric in found))
    rows = (
        [markdown(name), *(f"{found[m]:.4g}" if m in found else "" for m in metrics)]
        for name, found in sets.items()
    )
    return [
        f"All images of a model against the {reference['images']:,} of "
        f"{markdown(reference['source'])} at {reference['resolution']} pixels:",
        "",
        *table(["gates", *metrics], rows),
    ]
