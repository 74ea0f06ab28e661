"""A benchmark as Markdown, ready for a README; made from the JSON and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldcp_core import markdown, one_line
from training.console import table

MIB = 2**20


def render(result: Mapping[str, Any]) -> str:
    """Markdown of a result as `training.benchmark.benchmark` returns it or its JSON file holds."""
    sections = [_conditions(result), _unet_section(result)]
    if "block" in result:  # of the scope mid only
        sections.append(_block_section(result["block"]))
    return "\n\n".join([*sections, f"**Ratios.** {result['criterion']}"]) + "\n"


def shown_ratio(row: Mapping[str, Any]) -> str:
    """The ratio to dense with its interval, or why there is none.

    >>> shown_ratio({"name": "pruned", "ratio": 0.5, "interval": [0.48, 0.52]})
    '0.500 (0.480 to 0.520)'
    >>> shown_ratio({"name": "pruned", "ratio": None, "interval": [0.97, 1.02]})
    'within noise (±3.0%)'
    """
    if row["name"] == "dense":
        return "1"
    if row["interval"] is None:
        return "too few rounds (six are needed)"
    low, high = row["interval"]
    if row["ratio"] is None:
        return f"within noise (±{max(1 - low, high - 1):.1%})"
    return f"{row['ratio']:.3f} ({low:.3f} to {high:.3f})"


def _conditions(result: Mapping[str, Any]) -> str:
    machine, options = result["machine"], result["options"]
    place = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s)"
    if machine["gpu"]:
        place = f"{machine['gpu']} (driver {machine['driver'] or 'unknown'}), {place}"
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    lines = [
        f"Measured on: {place}; {machine['system']}, Python {machine['python']}, {packages}.",
        f"{options['resolution']} px, batch {options['batch']} (a batch of 2 is one image with "
        f"guidance), {options['precision']}, {options['rounds']} rounds, seed {options['seed']}; "
        f"model: {markdown(result['model'])}; gates: {markdown(result['gates'])}.",
    ]
    if options["device"] == "cpu" and machine["system"].startswith("Linux"):
        threshold = machine["malloc_mmap_threshold"] or "not set"
        lines.append(f"Allocator: MALLOC_MMAP_THRESHOLD_ is {threshold}.")
    return "\n".join(lines) + f"\n\n    {one_line(result['command'], 4000)}"


def _unet_section(result: Mapping[str, Any]) -> str:
    section = result["unet"]
    process = "peak on the GPU" if result["machine"]["gpu"] else "whole process"
    heads = ["variant", "ms per step", "±", "× dense", "FLOPs left, counted"]
    heads += ["gated blocks, MiB counted", "U-Net, MiB counted", f"{process}, MiB measured"]
    rows = [
        [
            row["name"],
            f"{row['median'] * 1e3:.1f}",
            f"{row['deviation'] * 1e3:.1f}",
            shown_ratio(row),
            f"{row['flops_left']:.1%}" if "flops_left" in row else "",
            *(f"{row[f'{of}_bytes'] / MIB:,.1f}" for of in ("weight", "unet", "memory")),
            "yes" if row["identical"] else "no",
            row["changes"],
        ]
        for row in section["rows"]
    ]
    shown = table([*heads, "same bits as dense", "what it changes"], rows)
    lines = ["### One U-Net evaluation", "", *shown]
    notes = [
        "ms: median and median absolute deviation over the rounds.",
        "*Counted* bytes are those of the live tensors a variant needs on the compute device; for "
        "`pruned on` that is without the full weights of the gated blocks, which may be moved "
        "away while pruning is on.",
    ]
    if result["machine"]["gpu"]:
        notes.append("The peak of `pruned on` is measured with those weights moved to the CPU.")
    else:
        notes.append(
            "*Measured* on a CPU is the resident size of the whole process, which holds the full "
            "weights and the copies of all variants at once: it shows no variant's saving."
        )
    notes += [
        "`pruned off` puts the overrides in and takes them out again on the clock, then runs the "
        "untouched U-Net.",
        "`mask-only` computes everything and multiplies the gated layers' outputs by 0 or 1.",
        f"Selecting the kept weights, once per run, took {section['selection_seconds'] * 1e3:.0f} "
        "ms and is not part of a step.",
    ]
    return "\n".join(lines) + "\n\n" + " ".join(notes)


def _block_section(section: Mapping[str, Any]) -> str:
    side = section["map"]
    rows = [
        [row["name"], *(f"{row[of] * 1e3:.2f}" for of in ("median", "deviation")), shown_ratio(row)]
        for row in section["rows"]
    ]
    lines = [
        f"### {section['name']} by itself",
        "",
        f"{section['channels']} channels, {side}×{side} map, inner gates only.",
        "",
        *table(["variant", "ms", "±", "× dense"], rows),
    ]
    return "\n".join(lines)
