"""Does a fit keep its pace as images grow in number: the cache's build, and the steps after it.

    python -m training.demo.draw --images 10000 --output faces/
    python -m training.benchmark throughput --data faces/ --images 100 1000 10000

Each number of images is a process of its own with an empty cache, so that its peak of memory is its
own: once for the build, and once for a fixed number of steps on what was built.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from training.allocator import give_back_memory, keep_freed_memory
from training.arguments import DEMO_SETTINGS
from training.benchmarking import machine
from training.benchmarking.training import MIB, new_learning, opened
from training.config import FitConfig
from training.console import explaining
from training.encoding import EncodedImages
from training.errors import UserError


def measure(config: FitConfig, count: int, steps: int, cache: Path) -> dict[str, Any]:
    """Seconds, peak bytes and images of the cache build of ``count`` images, and of the steps."""
    model, data = opened(config)
    if count > len(data):
        raise UserError(
            f"--images is {count}, and {config.data} holds {len(data)}.",
            "as many images as the largest number",
            f"python -m training.demo.draw --images {count} --output faces/",
        )
    data.records = data.records[:count]
    images = EncodedImages(data, model, cache)
    build = _timed(partial(images.build, model))
    size = sum(file.stat().st_size for file in cache.rglob("*.safetensors"))
    model = model.without_encoders()
    give_back_memory()
    keep_freed_memory()
    learning = new_learning(config, model, images)

    def learn() -> None:
        for _ in range(steps):
            learning.advance()

    return {
        "build": {**build, "images": count},
        "steps": {**_timed(learn), "images": steps * config.batch_size},
        "cache": size,
    }


def _timed(work: Callable[[], object]) -> dict[str, Any]:
    machine.reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": cpu, "wall": wall, "peak": machine.peak(), "own": machine.own_memory()}


def render(found: dict[int, dict[str, Any]]) -> str:
    """Markdown: a row per number of images."""
    lines = [
        "| images | build, s | images/s (CPU) | build peak | cache | training, images/s (CPU) | "
        "training peak | without mapped files, at its end |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for count, result in found.items():
        build, steps = result["build"], result["steps"]
        rates = [part["images"] / part["cpu"] for part in (build, steps)]
        build_peak, steps_peak, own = (
            f"{size / MIB:,.0f} MiB" if size else "unknown"
            for size in (build["peak"], steps["peak"], steps["own"])
        )
        lines.append(
            f"| {count:,} | {build['wall']:.1f} | {rates[0]:.1f} | {build_peak} | "
            f"{result['cache'] / MIB:,.1f} MiB | {rates[1]:.2f} | {steps_peak} | {own} |"
        )
    return "\n".join(lines)


@explaining
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark throughput")
    add = parser.add_argument
    add("--model", default=DEMO_SETTINGS["model"], help="(the embedded demo)")
    add("--data", required=True, help="at least as many images as the largest number")
    add("--images", type=int, nargs="+", default=[100, 1000, 10000], help="(100 1000 10000)")
    add("--batch", type=int, default=4, help="images per step (4)")
    add("--steps", type=int, default=64, help="of learning, for each number (64)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(PyTorch's choice)")
    add("--cache", help=argparse.SUPPRESS)  # one measurement, as JSON
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = FitConfig(
        model=arguments.model,
        data=arguments.data,
        output="",
        batch_size=arguments.batch,
        gradient_accumulation=1,
    )
    if arguments.cache:
        found = measure(config, arguments.images[0], arguments.steps, Path(arguments.cache))
        print(json.dumps(found))
        return 0
    results = {count: _in_a_process(count, arguments) for count in arguments.images}
    facts = machine.describe(torch.device("cpu"))
    print(f"Measured on: {facts['cpu']}, {facts['threads']} thread(s), {facts['cores']} cores.")
    print(f"{arguments.model}, {arguments.steps} steps of batch {arguments.batch}, fp32.\n")
    print(render(results))
    return 0


def _in_a_process(count: int, arguments: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "data", "batch", "steps", "threads")
    options = [f"--{name}={getattr(arguments, name)}" for name in names]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "training.benchmarking.throughput", *options]
        command += [f"--images={count}", f"--cache={cache}"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"Measuring {count} images failed:\n{done.stderr.strip()}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
