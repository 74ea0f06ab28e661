"""Time the loop of a fit against the loop it grew out of: same model, images, batch and machine.

    python -m training.benchmark training
    python -m training.benchmark training --model v1-5-pruned-emaonly.safetensors --data ffhq/

The original read, encoded and embedded its images again in every step, and its graph spanned the
whole U-Net. Whether it also computed gradients of the weights depends on whether they were frozen,
so both are timed. Each measurement is a process of its own, so that its peak of memory is its own;
the processes take turns. Times are averaged over the steps of a round, by the clock and in CPU
seconds of the process, which other work on the machine moves less; the round of the median CPU time
counts.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ldcp_core import SoftGate
from ldcp_core.diffusers import topology_of
from training.arguments import DEMO_SETTINGS, parse_count
from training.benchmarking import machine
from training.config import FitConfig
from training.console import explaining
from training.data.cache import default_cache
from training.data.encoding import EncodedImages
from training.data.images import ImageData, Position, open_dataset
from training.errors import UserError
from training.learning.budget import Budget
from training.learning.calibration import Calibration
from training.learning.learner import GateLearner, new_optimizer, noise_scale
from training.learning.loop import Learning
from training.learning.processes import Processes
from training.model.gating import deviation, masked
from training.model.load import (
    DTYPES,
    DiffusionModel,
    embed_prompts,
    encode_images,
    load_model,
)
from training.step.denoising import Denoising
from training.step.reuse import WINDOW

LOOPS = {
    "ours": "this repository's loop, latents and embeddings from the cache",
    "ours, no reuse": "the same with new images, noise and timesteps in every step (`--reuse 1`)",
    "original": "encode and embed every step, the graph spans the whole U-Net",
    "original, weights": "the same, with gradients of all weights of the U-Net",
}
#: steps before the clock starts
WARM_UP = 2
MIB = 2**20


def measure(loop: str, config: FitConfig, steps: int) -> dict[str, Any]:
    """CPU and wall seconds per step, and the peak of memory in bytes meanwhile.

    Over ``steps`` steps, or as many more as it takes until all problems were met equally often.
    """
    if loop == "ours, no reuse":
        config = replace(config, reuse=1)
    if loop.startswith("ours"):
        cycle = 1 if config.reuse == 1 else WINDOW * config.reuse
        steps = math.ceil(steps / cycle) * cycle
        step = _ours(config)
    else:
        step = _original(config, gradients=loop.endswith("weights"))
    for _ in range(WARM_UP):
        step()
    machine.reset_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu": cpu / steps, "wall": wall / steps, "peak": machine.peak()}


def _ours(config: FitConfig) -> Callable[[], None]:
    """One step of `Learning`, on made-up constants and effects: they take no time in a step."""
    model, data = _opened(config)
    images = EncodedImages(data, model, Path(config.run.cache or default_cache()))
    images.build(model)
    model = model.without_encoders()
    sites = topology_of(model.unet).sites(config.scope)
    position = Position()
    stream = images.batches(
        range(len(images)), config.batch_size, seed=0, epochs=None, position=position
    )
    learner = GateLearner(sites, config.seed, Budget("channels", sites))
    denoising, steps = Denoising(model, config.seed), config.max_steps
    learning = Learning(config, denoising, learner, stream, position, steps, Processes())
    zeros = {site.name: torch.zeros(site.channels) for site in sites}
    learning.begin(Calibration(zeros, 1.0, {name: zero + 1 for name, zero in zeros.items()}))
    return learning.advance


def _opened(config: FitConfig) -> tuple[DiffusionModel, ImageData]:
    model = load_model(config.model, dtype=DTYPES[config.precision])
    return model, open_dataset(config.data, resolution=config.resolution or model.resolution)


def _original(config: FitConfig, gradients: bool) -> Callable[[], None]:
    """One step as the original project took it, with ``gradients`` of the weights or without."""
    model, data = _opened(config)
    unet = model.unet
    sites = topology_of(unet).sites(config.scope)
    learner = GateLearner(sites, config.seed, Budget("channels", sites))
    optimizer = new_optimizer(learner, 0.1, config.sparsity_weight)
    stream = data.batches(range(len(data)), config.batch_size, seed=0, epochs=None)
    unet.requires_grad_(gradients)
    alphas = model.alphas_cumprod

    def predict(noisy: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> Any:
        return unet(noisy, timesteps, encoder_hidden_states=context).sample

    def step() -> None:
        for _ in range(config.gradient_accumulation):
            batch = next(stream)
            latents = encode_images(model, batch.pixels)
            context = embed_prompts(model, batch.captions)
            timesteps = torch.randint(0, len(alphas), (len(latents),))
            noise = torch.randn_like(latents)
            alpha = alphas[timesteps][:, None, None, None].to(latents)
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            with torch.no_grad():
                dense = predict(noisy, timesteps, context)
            noisy = noisy.detach().requires_grad_()  # the graph begins with the U-Net
            masks = learner.masks(noise_scale(0, 1))
            gates = {
                site: SoftGate(mask, torch.zeros_like(mask.detach()))
                for site, mask in masks.items()
            }
            with masked(unet, gates, config.padding):
                output = predict(noisy, timesteps, context)
            loss = deviation(output, dense) + config.sparsity_weight * learner.penalty()
            (loss / config.gradient_accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        unet.zero_grad(set_to_none=True)

    return step


def compare(argv: Sequence[str], rounds: int) -> dict[str, dict[str, Any]]:
    """Each loop in turn, ``rounds`` times, each time in a fresh process with these options.

    The result of a loop is its round of median CPU time, with the highest peak of all rounds.
    """
    found: dict[str, list[dict[str, Any]]] = {loop: [] for loop in LOOPS}
    for _ in range(rounds):
        for loop, results in found.items():
            results.append(_in_a_process(loop, argv))
    return {loop: _median(results) for loop, results in found.items()}


def _median(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    ordered = sorted(results, key=lambda result: result["cpu"])
    most = max(result["peak"] or 0 for result in results)
    return {**ordered[len(ordered) // 2], "peak": most}


def _in_a_process(loop: str, argv: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "training.benchmarking.training", *argv, f"--loop={loop}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The loop {loop!r} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def render(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: a row per loop."""
    lines = [
        "| loop | s per step | × ours | CPU s per step | × ours | peak resident |",
        "|---|---|---|---|---|---|",
    ]
    ours = found["ours"]
    for loop, result in found.items():
        most = f"{result['peak'] / MIB:,.0f} MiB" if result["peak"] else "unknown"
        times = " | ".join(
            f"{result[clock]:.3f} | {result[clock] / ours[clock]:.2f}" for clock in ("wall", "cpu")
        )
        lines.append(f"| {loop} | {times} | {most} |")
    return "\n".join([*lines, "", *(f"- {loop}: {what}" for loop, what in LOOPS.items())])


@explaining
def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark training")
    add = parser.add_argument
    add("--model", default=DEMO_SETTINGS["model"], help="(the embedded demo)")
    add("--data", default=DEMO_SETTINGS["data"], help="(the embedded demo's drawn faces)")
    add("--resolution", type=parse_count, help="pixels (the model's own)")
    add("--batch", type=parse_count, default=4, help="images per step (4)")
    add("--steps", type=parse_count, default=6, help="timed steps per round, at least (6)")
    add("--precision", choices=DTYPES, default="fp32", help="of the U-Net, in all loops (fp32)")
    add("--rounds", type=parse_count, default=3, help="(3)")
    add("--threads", type=parse_count, default=torch.get_num_threads(), help="(PyTorch's choice)")
    add("--loop", choices=LOOPS, help=argparse.SUPPRESS)  # one measurement, as JSON
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    config = FitConfig(
        model=arguments.model,
        data=arguments.data,
        output="",
        resolution=arguments.resolution,
        batch_size=arguments.batch,
        gradient_accumulation=1,
        precision=arguments.precision,
    )
    if arguments.loop:
        print(json.dumps(measure(arguments.loop, config, arguments.steps)))
        return 0
    found = compare(argv, arguments.rounds)
    facts = machine.describe(torch.device("cpu"))
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    print(f"Measured on: {facts['cpu']}, {facts['threads']} thread(s); {packages}.")
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.precision}, the median of "
        f"{arguments.rounds} rounds; {machine.MMAP_THRESHOLD}={facts['malloc_mmap_threshold']}.\n"
    )
    print(render(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
