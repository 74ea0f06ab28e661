"""Time the U-Net dense, pruned and otherwise made cheaper: one run, one machine, one clock.

    python -m training.benchmark --quick
    python -m training.benchmark --device cuda --precision fp16 --output benchmark
    python -m training.benchmark launches
    python -m training.benchmark --gates gates.safetensors --model v1-5-pruned-emaonly.safetensors

Without --model the U-Net has SD1.5's size and random weights, which take as long as trained ones.
Two tables: one evaluation of the whole U-Net, and (for scope mid) one mid-block ResBlock by
itself. Speed is compared within rounds, and a ratio that does not rise above the noise is
refused.
"""

from __future__ import annotations

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ldcp_core import (
    DEFAULT_SCOPE,
    PADDINGS,
    Latent,
    Padding,
    load_gates,
    savings,
)
from ldcp_core.diffusers import topology_of
from training.benchmarking import machine
from training.benchmarking.markdown import render
from training.benchmarking.timing import (
    CRITERION,
    DENSE,
    Variant,
    interleaved,
    stopwatch,
    summary,
)
from training.benchmarking.variants import (
    BLOCK,
    PIXELS_PER_LATENT,
    Inputs,
    Pruning,
    block_variants,
    layer_bytes,
    pruned_name,
    random_pruning,
    random_unet,
    unet_bytes,
    unet_variants,
)
from training.console import explaining, log_progress
from training.errors import UserError
from training.model.load import DTYPES, load_model, usable_device
from training.options import (
    COUNT,
    SEED,
    WITHIN_ONE,
    Bound,
    Options,
    Precision,
    built,
    option,
    parser_of,
)
from training.output import output_files, report_of, write
from training.sample import check_one_stage

log = logging.getLogger("training.benchmark")

#: what --quick stands for; options that are given still count
QUICK: dict[str, Any] = {
    "resolution": 64,
    "rounds": 6,
    "sparsity": (0.5,),
    "padding": ("zero",),
}
#: side of the mid block's map at 512 pixels
BLOCK_MAP = 8
#: a block takes milliseconds, so it can have more rounds than the U-Net
BLOCK_ROUNDS = 4

EPILOG = """\
On a CPU under Linux, glibc may give every block of memory above 32 MB back at once and have it
zeroed again at the next call. The convolutions of the mid block need such blocks when dense; pruned
ones are computed in pieces that stay below that limit, so that pruning can look twice as good as
the work it saves.
To time the work alone, start with
  MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184
in the environment; the report says whether the first of them was set.
"""


SIDE = Bound(lambda value: value >= 64 and value % 64 == 0, "pixels, a multiple of 64")


@dataclass(frozen=True)
class BenchmarkConfig(Options):
    """The options of one run.

    Random keep-sets stand in where no gate file is given, and in the block tables always.
    """

    model: str | None = option("time this model's U-Net (folder, checkpoint or hub id)", None)
    gates: str | None = option("prune the whole U-Net by this gate file, not at random", None)
    scope: str = option("which layers of the U-Net, as in training.fit", DEFAULT_SCOPE)
    resolution: int = option("pixels", 512, SIDE)
    batch: int = option("two are one image with guidance", 2, COUNT)
    precision: Precision = option("of the U-Net", "fp32")
    device: str = option("cpu, cuda or mps", "cpu")
    threads: int | None = option("CPU threads (default: PyTorch's choice)", None, COUNT)
    sparsity: tuple[float, ...] = option("shares pruned at random", (0.3, 0.5), WITHIN_ONE)
    padding: tuple[Padding, ...] | None = option("(default: both, or the gate file's)", None)
    rounds: int = option("at least 6 for ratios", 12, COUNT)
    output: str | None = option("write PREFIX.json and PREFIX.md", None, metavar="PREFIX")
    seed: int = option("weights, inputs, order", 0, SEED)


def check(config: BenchmarkConfig) -> None:
    """Raises UserError for what is not there, before anything expensive starts."""
    usable_device(config.device)
    if config.gates is not None and not Path(config.gates).is_file():
        raise UserError(
            f"There is no file {config.gates}.",
            "a gate file made by training.fit",
            f"check the spelling; the path is taken from {Path.cwd()}",
        )
    if config.output is not None:
        kinds = report_of("ldcp.benchmark")
        output_files("--output", config.output, kinds, (config.model, config.gates))


def load_unet(config: BenchmarkConfig) -> UNet2DConditionModel:
    """The U-Net to time, on its device and in its precision."""
    device, dtype = torch.device(config.device), DTYPES[config.precision]
    if config.model is not None:
        return load_model(config.model, dtype=dtype, device=device).unet
    return random_unet(config.seed, dtype, device)


def chosen_prunings(
    config: BenchmarkConfig, unet: UNet2DConditionModel
) -> tuple[list[Pruning], tuple[Padding, ...]]:
    """What the U-Net table prunes and under which padding rules: a gate file, or random keep-sets.

    Raises UserError when the gate file was made for another model.
    """
    if config.gates is None:
        sites = topology_of(unet).sites(config.scope)
        prunings = [random_pruning(sites, share, config.seed) for share in config.sparsity]
        return prunings, config.padding or PADDINGS
    gates = load_gates(config.gates)
    check_one_stage(config.gates, gates)
    if not topology_of(unet).fits(gates.topology):
        raise UserError(
            f"{config.gates} was made for {gates.topology}.",
            f"gates for {topology_of(unet)}",
            "pass the model of these gates with --model",
        )
    constants = {site: gates.constant(site) for site in gates.scores}
    pruning = Pruning(f"{gates.sparsity:.1%}", gates.keep_sets(), constants)
    return [pruning], config.padding or (gates.padding,)


def benchmark(config: BenchmarkConfig, unet: UNet2DConditionModel, command: str) -> dict[str, Any]:
    """Everything a report needs, JSON-able: raw times, summaries, machine and options.

    Raises UserError when the gate file does not fit ``unet``.
    """
    inputs = Inputs.random(unet, config.batch, config.resolution // PIXELS_PER_LATENT, config.seed)
    result = {
        "format": "ldcp.benchmark",
        "version": 1,
        "command": command,
        "machine": machine.describe(unet.device),
        "options": asdict(config) | {"padding": config.padding and list(config.padding)},
        "model": config.model or "SD1.5's U-Net with random weights",
        "gates": config.gates or f"random channels of scope {config.scope}, zero constants",
        "criterion": CRITERION,
        "unet": _time_unet(config, unet, inputs),
    }
    if config.scope != DEFAULT_SCOPE:
        return result
    return result | {"block": _time_block(config, unet)}


def _time_unet(
    config: BenchmarkConfig, unet: UNet2DConditionModel, inputs: Inputs
) -> dict[str, Any]:
    prunings, paddings = chosen_prunings(config, unet)
    start = time.perf_counter()
    variants = unet_variants(unet, inputs, prunings, paddings)
    selection = (time.perf_counter() - start) / (1 + len(prunings) * len(paddings))
    gated = layer_bytes(unet, prunings[0].blocks)
    facts = _facts(variants, unet, unet_bytes(unet) - gated)
    side = config.resolution // PIXELS_PER_LATENT
    latent = Latent(side, side, config.batch)
    for pruning, padding in product(prunings, paddings):
        cost = savings(topology_of(unet), pruning.kept, padding, latent)
        facts[pruned_name(pruning, padding)]["flops_left"] = 1 - cost.flop_share
    log.info("the whole U-Net, %d variants", len(variants))
    times = interleaved(variants, config.rounds, config.seed, stopwatch(unet.device))
    return {"rows": _rows(times, facts), "selection_seconds": selection}


def _facts(
    variants: Sequence[Variant], unet: UNet2DConditionModel, elsewhere: int
) -> dict[str, dict[str, Any]]:
    """What is not a time: bytes, and whether the output is dense's. Also warms everything up."""
    facts: dict[str, dict[str, Any]] = {}
    for variant in variants:
        with variant.prepare():
            with variant.park():
                output, memory = machine.with_memory(variant.evaluate, unet.device)
        if variant.name == DENSE:  # which comes first
            reference = output
        facts[variant.name] = {
            "changes": variant.changes,
            "weight_bytes": variant.weight_bytes,
            "unet_bytes": elsewhere + variant.weight_bytes,
            "memory_bytes": memory,
            "identical": torch.equal(output, reference),
        }
    return facts


def _time_block(config: BenchmarkConfig, unet: UNet2DConditionModel) -> dict[str, Any]:
    sites = topology_of(unet).sites(f"{BLOCK}.conv1")
    prunings = [random_pruning(sites, share, config.seed) for share in config.sparsity]
    shape = (config.batch, BLOCK_MAP, BLOCK_MAP)
    variants = block_variants(unet, prunings, config.padding or PADDINGS, shape, config.seed)
    seconds = stopwatch(unet.device)
    for variant in variants:
        seconds(variant)
    times = interleaved(variants, BLOCK_ROUNDS * config.rounds, config.seed, seconds)
    channels = sites[0].channels
    return {"name": BLOCK, "channels": channels, "map": BLOCK_MAP, "rows": _rows(times, {})}


def _rows(times: dict[str, list[float]], facts: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": name, **facts.get(name, {}), **row} for name, row in summary(times).items()]


def save(result: dict[str, Any], prefix: str) -> list[Path]:
    """Write ``prefix``.json (everything) and ``prefix``.md (the tables); returns both paths."""
    texts = {".json": json.dumps(result, indent=1) + "\n", ".md": render(result)}
    paths = [Path(prefix + suffix) for suffix in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write(path, text.encode("utf-8"))
    return paths


def parse(argv: Sequence[str] | None) -> BenchmarkConfig:
    """The options of a command line."""
    parser = parser_of(BenchmarkConfig, "benchmark", __doc__, epilog=EPILOG)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a look, within two minutes on two CPU cores, at 64 pixels, where weights count for "
        "more than at 512: --resolution 64 --rounds 6 --sparsity 0.5 --padding zero",
    )
    given = vars(parser.parse_args(argv))
    if given.pop("quick", False):
        given = QUICK | given
    for name in ("sparsity", "padding"):
        if name in given:
            given[name] = tuple(dict.fromkeys(given[name]))
    return built(parser, BenchmarkConfig, given)


@explaining
def main(argv: Sequence[str] | None = None) -> int:
    typed = sys.argv[1:] if argv is None else argv
    if typed[:1] == ["launches"]:
        from training.benchmarking import launches

        return launches.main(typed[1:])
    config = parse(argv)
    log_progress()
    command = shlex.join(["python", "-m", "training.benchmark", *typed])
    check(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    unet = load_unet(config)
    log.info("%d MiB of weights ready", unet_bytes(unet) >> 20)
    result = benchmark(config, unet, command)
    print(render(result))
    if config.output is not None:
        print(f"written: {', '.join(map(str, save(result, config.output)))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
