"""Time the loop of a fit against the loop it grew out of: same model, images, batch and machine.

    python -m training.benchmark training
    python -m training.benchmark training --model v1-5-pruned-emaonly.safetensors --data ffhq/

The original read, encoded and embedded its images again in every step, and its graph spanned the
whole U-Net. Whether it also computed gradients of the weights depends on whether they were frozen,
so both are timed. Each measurement is a process of its own, so that its peak of memory is its own;
the processes take turns, and a time is the median over all steps of all rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ldcp_core import SoftGate
from training.arguments import DEMO_SETTINGS
from training.benchmarking import machine
from training.budget import Budget
from training.cache import default_cache
from training.calibration import Calibration
from training.config import FitConfig
from training.data import Position, open_dataset
from training.denoising import Denoising, Problem
from training.encoding import EncodedImages
from training.errors import UserError
from training.gating import deviation, topology_of
from training.learning import GateLearner, new_optimizer, noise_scale
from training.loop import Learning
from training.models import embed_prompts, encode_images, load_model
from training.processes import Processes

LOOPS = {
    "ours": "this repository's loop, latents and embeddings from the cache",
    "original": "encode and embed every step, the graph spans the whole U-Net",
    "original, weights": "the same, with gradients of all weights of the U-Net",
}
#: steps before the clock starts
WARM_UP = 2
MIB = 2**20


class Clock:
    """Seconds per part of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = defaultdict(float)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.parts[name] += time.perf_counter() - start

    def timed(self, name: Callable[[], str], function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, on the clock under what ``name`` says when it is called."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with self.part(name()):
                return function(*arguments, **options)

        return wrapped


def measure(loop: str, config: FitConfig, steps: int) -> dict[str, Any]:
    """Seconds of each of ``steps`` steps, seconds per part, and peak memory in bytes while so."""
    clock = Clock()
    step = (_ours if loop == "ours" else _original)(config, clock, loop)
    for _ in range(WARM_UP):
        step()
    clock.parts.clear()
    _reset_peak()
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "parts": dict(clock.parts), "peak": _peak()}


def _ours(config: FitConfig, clock: Clock, loop: str) -> Callable[[], None]:
    """One step of `Learning`, with its evaluations of the U-Net and its backward on the clock."""
    model = load_model(config.model)
    data = open_dataset(config.data, resolution=config.resolution or model.resolution)
    images = EncodedImages(data, model, Path(config.run.cache or default_cache()))
    images.build(model)
    model = model.without_encoders()
    sites = topology_of(model.unet).sites(config.scope)
    denoising = Denoising(model, config.seed)
    position = Position()
    stream = images.batches(
        range(len(data)), config.batch_size, seed=0, epochs=None, position=position
    )
    learner = GateLearner(sites, config.seed, Budget("channels", sites))
    steps = config.max_steps
    learning = Learning(config, denoising, learner, stream, position, steps, Processes())
    zeros = {site.name: torch.zeros(site.channels) for site in sites}
    learning.begin(Calibration(zeros, 1.0, {name: zero + 1 for name, zero in zeros.items()}))
    predict = denoising._predict
    denoising._predict = clock.timed(  # type: ignore[method-assign]
        lambda: "gated forward" if torch.is_grad_enabled() else "dense forward", predict
    )
    backward = torch.Tensor.backward

    def step() -> None:
        torch.Tensor.backward = clock.timed(lambda: "backward", backward)
        try:
            learning.advance()
        finally:
            torch.Tensor.backward = backward

    return step


def _original(config: FitConfig, clock: Clock, loop: str) -> Callable[[], None]:
    """One step as the original project took it."""
    model = load_model(config.model)
    data = open_dataset(config.data, resolution=config.resolution or model.resolution)
    unet = model.unet
    sites = topology_of(unet).sites(config.scope)
    denoising = Denoising(model, config.seed)
    learner = GateLearner(sites, config.seed, Budget("channels", sites))
    optimizer = new_optimizer(learner, 0.1, config.sparsity_weight)
    stream = data.batches(range(len(data)), config.batch_size, seed=0, epochs=None)
    unet.requires_grad_(loop.endswith("weights"))
    alphas = model.alphas_cumprod

    def step() -> None:
        for _ in range(config.gradient_accumulation):
            with clock.part("read and decode"):
                batch = next(stream)
            with clock.part("VAE"):
                latents = encode_images(model, batch.pixels)
            with clock.part("text encoder"):
                context = embed_prompts(model, batch.captions)
            timesteps = torch.randint(0, len(alphas), (len(latents),))
            noise = torch.randn_like(latents)
            alpha = alphas[timesteps][:, None, None, None]
            noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
            with clock.part("dense forward"):
                dense = denoising.dense(Problem(noisy, timesteps, context, noise))
            noisy = noisy.detach().requires_grad_()  # the graph begins with the U-Net
            masks = learner.masks(noise_scale(0, 1))
            gates = {
                site: SoftGate(mask, torch.zeros_like(mask.detach()))
                for site, mask in masks.items()
            }
            with clock.part("gated forward"):
                output = denoising.gated(
                    Problem(noisy, timesteps, context, noise), gates, config.padding
                )
            loss = deviation(output, dense) + config.sparsity_weight * learner.penalty()
            with clock.part("backward"):
                (loss / config.gradient_accumulation).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        unet.zero_grad(set_to_none=True)

    return step


def _reset_peak() -> None:
    """Let the kernel count the peak from now on (Linux; elsewhere it is that of the process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


def _peak() -> int | None:
    """Peak resident bytes since `_reset_peak`; None where the system doesn't tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def compare(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Each loop in turn, ``rounds`` times, each time in a fresh process; results by loop."""
    found: dict[str, dict[str, Any]] = {
        loop: {"seconds": [], "parts": defaultdict(float), "peak": 0} for loop in LOOPS
    }
    for _ in range(arguments.rounds):
        for loop, total in found.items():
            result = _in_a_process(loop, arguments)
            total["seconds"] += result["seconds"]
            total["peak"] = max(total["peak"], result["peak"] or 0)
            for name, seconds in result["parts"].items():
                total["parts"][name] += seconds
    return found


def _in_a_process(loop: str, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name}={getattr(arguments, name)}" for name in ("model", "data", "steps")]
    options += [f"--batch={arguments.batch}", f"--threads={arguments.threads}", f"--loop={loop}"]
    if arguments.resolution:
        options.append(f"--resolution={arguments.resolution}")
    command = [sys.executable, "-m", "training.benchmarking.training", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"The loop {loop!r} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def render(found: dict[str, dict[str, Any]], batch: int) -> str:
    """Markdown: a row per loop, and where the time of a step goes."""
    median = {loop: statistics.median(result["seconds"]) for loop, result in found.items()}
    lines = [
        "| loop | images/s | s per step | × ours | peak resident |",
        "|---|---|---|---|---|",
    ]
    for loop, result in found.items():
        peak = f"{result['peak'] / MIB:,.0f} MiB" if result["peak"] else "unknown"
        lines.append(
            f"| {loop} | {batch / median[loop]:.2f} | {median[loop]:.3f} | "
            f"{median[loop] / median['ours']:.2f} | {peak} |"
        )
    parts = list(dict.fromkeys(name for result in found.values() for name in result["parts"]))
    head = f"| share of a step | {' | '.join(parts)} | rest |"
    lines += ["", head, f"|{'---|' * (len(parts) + 2)}"]
    for loop, result in found.items():
        whole = sum(result["seconds"])
        shares = [result["parts"].get(name, 0.0) / whole for name in parts]
        cells = " | ".join(f"{share:.1%}" for share in [*shares, 1 - sum(shares)])
        lines.append(f"| {loop} | {cells} |")
    return "\n".join([*lines, "", *(f"- {loop}: {what}" for loop, what in LOOPS.items())])


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.benchmark training")
    add = parser.add_argument
    add("--model", default=DEMO_SETTINGS["model"], help="(the embedded demo)")
    add("--data", default=DEMO_SETTINGS["data"], help="(the embedded demo's drawn faces)")
    add("--resolution", type=int, help="pixels (the model's own)")
    add("--batch", type=int, default=4, help="images per step (4)")
    add("--steps", type=int, default=6, help="timed steps per round (6)")
    add("--rounds", type=int, default=3, help="(3)")
    add("--threads", type=int, default=torch.get_num_threads(), help="(PyTorch's choice)")
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
    )
    try:
        if arguments.loop:
            print(json.dumps(measure(arguments.loop, config, arguments.steps)))
            return 0
        found = compare(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    facts = machine.describe(torch.device("cpu"))
    packages = ", ".join(f"{name} {number}" for name, number in facts["packages"].items())
    print(f"Measured on: {facts['cpu']}, {facts['threads']} thread(s); {packages}.")
    print(
        f"{arguments.model}, batch {arguments.batch}, float32, {arguments.rounds} rounds of "
        f"{arguments.steps} steps.\n"
    )
    print(render(found, arguments.batch))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
