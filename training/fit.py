"""Learn which channels of a Stable Diffusion 1.5 U-Net to keep, and write a gate file.

    python -m training.fit --demo
    python -m training.fit --model v1-5-pruned-emaonly.safetensors --data ffhq/ \\
        --output gates.safetensors --target-sparsity 0.3

U-Net, VAE and text encoder are frozen; one score per channel is learned from two competing losses,
the MSE against the dense model's output and the L1 of the scores (see `training.learning`).
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from ldcp_core import (
    PADDINGS,
    SCOPES,
    Gates,
    Latent,
    Site,
    SoftGate,
    Topology,
    fingerprint,
    gates_report,
    least_kept,
    save_gates,
)
from training.budget import Budget, BudgetKind
from training.config import PRESETS, Constant, FitConfig, Precision, Reconstruction
from training.criteria import own_effect
from training.data import Batch, ImageData, open_dataset
from training.denoising import Denoising, HeldOut
from training.errors import UserError
from training.gating import ChannelMeans, deviation, hard_gates, topology_of
from training.learning import (
    TARGET_TOLERANCE,
    TRAVEL,
    Alignment,
    GateLearner,
    Landing,
    SparsityController,
    aligned_scores,
    default_learning_rate,
    learning_rate_factor,
    new_optimizer,
    noise_scale,
)
from training.models import DTYPES, load_model
from training.report import History, plot_curves, plot_scores

log = logging.getLogger("training.fit")

DEMO = Path(__file__).parent / "demo"
#: what --demo stands for; every option can still be given
DEMO_SETTINGS: dict[str, Any] = {
    "model": str(DEMO / "pipeline"),
    "data": str(DEMO / "images"),
    "output": "gates.safetensors",
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_steps": 150,
}


@dataclass(frozen=True)
class FitResult:
    """The gates as written, the course of the run, and the held-out deviation from dense."""

    gates: Gates
    history: History
    heldout_deviation: float | None


def fit(config: FitConfig) -> FitResult:
    """Run a whole fit; raises UserError for everything a user can put right."""
    output = _checked_output(config.output)
    data = open_dataset(config.data)  # first, and cheap: a wrong path shows before a model loads
    train, held_out = data.split(config.validation_fraction, config.seed)
    device = _device(config.device)
    model = load_model(config.model, dtype=DTYPES[config.precision], device=device)
    model.vae.float()  # half precision would cost quality in the one pass they make
    model.text_encoder.float()
    data.resolution = config.resolution or model.resolution
    _check_resolution(data.resolution, model.vae_scale_factor)

    topology = topology_of(model.unet)
    sites = _sites(topology, config.scope)
    side = data.resolution // model.vae_scale_factor
    budget = Budget(config.budget, sites, config.padding, Latent(side, side))
    _check_target(config, budget, sites)
    denoising = Denoising(model, config.seed)
    stream = data.batches(train, config.batch_size, seed=config.seed, epochs=None)

    log.info("%s: %d images to learn from, %d held out", data.source, len(train), len(held_out))
    constants, effect, effects = _calibrate(config, denoising, sites, stream)
    log.info(
        "%d channels at %d sites; pruning all of them moves the output by %.3g (MSE)",
        sum(site.channels for site in sites),
        len(sites),
        effect,
    )
    learner = GateLearner(sites, config.seed, budget, config.floor, effects).to(device)
    history = _learn(config, denoising, learner, constants, effect, stream, len(train))

    alignment = aligned_scores(learner.scores(), config.target_sparsity, budget, learner.least)
    gates = Gates(
        alignment.scores,
        constants if config.constant == "mean" else {},
        config.padding,
        topology,
        _info(config, data, history, model.unet, sites, budget, alignment.scores),
    )
    heldout = None
    if held_out:
        heldout = _validate(config, denoising, data, held_out, gates)
        history.heldout_deviation = heldout
    gates = replace(gates, info={**gates.info, "history": history.to_json()})
    save_gates(gates, output)
    plot_curves(history, output.with_suffix(".curves.png"))
    plot_scores(gates, output.with_suffix(".scores.png"))
    _say_result(config, gates, history, alignment, budget, output, data)
    return FitResult(gates, history, heldout)


def _learn(
    config: FitConfig,
    denoising: Denoising,
    learner: GateLearner,
    constants: dict[str, Tensor],
    effect: float,
    stream: Iterator[Batch],
    images: int,
) -> History:
    """The loop: two losses, one optimizer, one controller."""
    steps = _optimizer_steps(config, images)
    rate = config.learning_rate or default_learning_rate(steps)
    optimizer = new_optimizer(learner, rate, config.sparsity_weight)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps)
    )
    scaler = torch.amp.GradScaler(
        denoising.model.unet.device.type, enabled=config.precision == "fp16"
    )
    controller = SparsityController(config.sparsity_weight, config.target_sparsity, steps)
    landing = Landing(learner, config.target_sparsity, steps)
    history = History(target=config.target_sparsity)
    start = learner.keep_sets()

    bar = tqdm(range(steps), desc="learning gates", unit="step", dynamic_ncols=True)
    for step in bar:
        reconstruction = 0.0
        for _ in range(config.gradient_accumulation):
            problem = denoising.problem(next(stream))
            target = problem.noise if config.reconstruction == "noise" else denoising.dense(problem)
            masks = learner.masks(noise_scale(step, steps))
            gates = {site: SoftGate(mask, constants[site]) for site, mask in masks.items()}
            mse = deviation(denoising.gated(problem, gates, config.padding), target) / effect
            scaler.scale(mse / config.gradient_accumulation).backward()
            reconstruction += mse.item() / config.gradient_accumulation
        if not math.isfinite(reconstruction):
            raise UserError(
                f"The reconstruction loss became {reconstruction} at step {step}.",
                "a finite loss",
                "use --precision fp32 or bf16, or look for damaged model weights",
            )
        penalty = learner.penalty()
        scaler.scale(controller.weight * penalty).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        learner.clamp_()

        sparsity = learner.sparsity()
        history.add(reconstruction, penalty.item(), controller.weight, sparsity)
        controller.update(step, sparsity)
        landing.watch(step, sparsity)
        bar.set_postfix(
            mse=f"{reconstruction:.2e}",
            l1=f"{penalty.item():.3f}",
            λ=f"{controller.weight:.1e}",
            sparsity=f"{sparsity:.1%}",
        )
    landing.settle_()
    end = learner.keep_sets()
    history.changed = sum(int((start[site] != end[site]).sum()) for site in start)
    return history


def _calibrate(
    config: FitConfig, denoising: Denoising, sites: list[Site], stream: Iterator[Batch]
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """What stands in for pruned channels, the effect of closing all gates, and of closing each.

    The first is the channels' mean over the data, or zero; the second, the deviation from dense
    with every gate closed, is the unit of the reconstruction loss; the third is where learning
    starts (see `training.criteria.own_effect`).
    """
    problems = [denoising.problem(next(stream)) for _ in range(config.calibration_batches)]
    with ChannelMeans(denoising.model.unet, sites) as means:
        dense = [denoising.dense(problem) for problem in problems]
    constants = means.constants()
    if config.constant == "zero":
        constants = {site: torch.zeros_like(mean) for site, mean in constants.items()}

    closed = {site.name: torch.zeros(site.channels, dtype=torch.bool) for site in sites}
    gates = hard_gates(closed, constants)
    with torch.no_grad():
        deviations = [
            deviation(denoising.gated(problem, gates, config.padding), target).item()
            for problem, target in zip(problems, dense, strict=True)
        ]
    effect = math.fsum(deviations) / len(deviations)
    if not effect > 0 or not math.isfinite(effect):
        raise UserError(
            f"Pruning all of scope {config.scope!r} moves the model's output by {effect}.",
            "a scope that does something",
            "check that the model's weights are intact",
        )
    effects = own_effect(denoising, problems, sites, constants, config.padding, config.seed)
    return constants, effect, effects


def _validate(
    config: FitConfig, denoising: Denoising, data: ImageData, indices: list[int], gates: Gates
) -> float:
    """Held-out deviation from dense and denoising loss of the gates as they will be written."""
    heldout = HeldOut(
        denoising, data, indices, config.validation_samples, config.batch_size, config.seed + 1
    )
    constants = {site: gates.constant(site) for site in gates.scores}
    masks = hard_gates(gates.keep_sets(), constants)
    deviations = heldout.deviations(masks, gates.padding)
    dense, pruned = (
        heldout.noise_loss(None, gates.padding),
        heldout.noise_loss(masks, gates.padding),
    )
    error = deviations.std().item() / math.sqrt(len(deviations)) if len(deviations) > 1 else 0.0
    log.info(
        "held out: deviation from dense %.3g ± %.1g (MSE); loss %.5f, dense %.5f (%+.2f%%)",
        deviations.mean().item(),
        error,
        pruned,
        dense,
        100 * (pruned / dense - 1),
    )
    return deviations.mean().item()


def _say_result(
    config: FitConfig,
    gates: Gates,
    history: History,
    alignment: Alignment,
    budget: Budget,
    output: Path,
    data: ImageData,
) -> None:
    target, channels = config.target_sparsity, gates.channels
    print(gates_report(gates).text())
    print(
        f"{history.changed} of {channels} channels changed state through learning since the start "
        f"(all kept); alignment to multiples of 8 moved {alignment.moved} more."
    )
    achieved = budget.pruned(gates.keep_sets())
    if budget.kind != "channels":
        print(f"Of the gated layers' {budget.kind} {achieved:.1%} are pruned.")
    if target is not None and abs(achieved - target) > TARGET_TOLERANCE:
        print(
            f"The sparsity is {achieved:.1%}, not within one point of the target "
            f"{target:.1%}: learning ended at {alignment.learned:.1%}. Give it more --max-steps "
            "(or a larger --learning-rate); if the widths are small, multiples of 8 may not allow "
            "a closer value."
        )
    if broken := data.broken_report():
        print(broken)
    for path in (output, output.with_suffix(".curves.png"), output.with_suffix(".scores.png")):
        print(f"wrote {path}")


def _info(
    config: FitConfig,
    data: ImageData,
    history: History,
    unet: torch.nn.Module,
    sites: list[Site],
    budget: Budget,
    scores: dict[str, Tensor],
) -> dict[str, Any]:
    """Everything needed to know later what the gate file is."""
    gates = Gates(scores)
    weights = {site.name: unet.get_parameter(site.weight) for site in sites}
    packages = ("torch", "diffusers", "transformers", "datasets", "safetensors", "numpy")
    return {
        "criterion": "learned",
        "scope": config.scope,
        "target_sparsity": config.target_sparsity,
        "achieved_sparsity": gates.sparsity,
        "budget": config.budget,
        "achieved_budget": budget.pruned(gates.keep_sets()),
        "floor": config.floor,
        "steps": len(history.sparsity),
        "changed_channels": history.changed,
        "seed": config.seed,
        "data": {"source": Path(data.source).name, "images": len(data)},
        "config": {
            **config.to_json(),
            "model": Path(config.model).name,
            "data": Path(config.data).name,
            "output": Path(config.output).name,
        },
        "fingerprint": fingerprint(weights),
        "versions": {name: version(name) for name in packages},
        "created": time.strftime("%Y-%m-%d"),
    }


def _sites(topology: Topology, scope: str) -> list[Site]:
    try:
        return topology.sites(scope)
    except ValueError as error:
        raise UserError(f"--scope is {scope!r}: {error}.", "", "change --scope") from error


def _check_target(config: FitConfig, budget: Budget, sites: list[Site]) -> None:
    """The target must leave every site its floor (and rule ``zero`` its pruned columns)."""
    most = budget.most({site.name: least_kept(site.channels, config.floor) for site in sites})
    if config.target_sparsity is not None and config.target_sparsity > most:
        raise UserError(
            f"--target-sparsity is {config.target_sparsity:g}, but with --floor {config.floor:g} "
            f"at most {most:.1%} of the {config.budget} of scope {config.scope!r} can be pruned.",
            f"a target up to {math.floor(100 * most) / 100:g}",
            "lower --target-sparsity or --floor",
        )


def _optimizer_steps(config: FitConfig, images: int) -> int:
    if config.epochs is None:
        return config.max_steps
    per_epoch = images / (config.batch_size * config.gradient_accumulation)
    return max(1, min(config.max_steps, round(config.epochs * per_epoch)))


def _checked_output(output: str) -> Path:
    path = Path(output)
    if path.suffix != ".safetensors" or path.is_dir():
        raise UserError(
            f"--output is {output}.", "a file name ending in .safetensors", "change --output"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path.parent} can't be created: {error}.", "", "change --output"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path.parent.resolve()} is not writable.", "", "change --output")
    return path


def _check_resolution(resolution: int, vae_scale_factor: int) -> None:
    multiple = 8 * vae_scale_factor  # three halvings between the latent and the mid block
    if resolution < multiple or resolution % multiple:
        raise UserError(
            f"--resolution is {resolution}.",
            f"a multiple of {multiple} pixels for this model",
            f"use --resolution {max(multiple, resolution // multiple * multiple)}",
        )


def _device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.zeros(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"--device {name} can't be used: {error}", "auto, cpu, cuda or mps", ""
            ) from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def parse_arguments(argv: list[str] | None = None) -> FitConfig:
    """Command line to settings: defaults < --demo < --preset < what was typed."""
    defaults = {f.name: f.default for f in fields(FitConfig) if f.default is not MISSING}
    parser = argparse.ArgumentParser(
        prog="python -m training.fit",
        description="Learn which channels of a Stable Diffusion 1.5 U-Net to keep.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model", help="hub id, diffusers folder, or single-file SD1.5 checkpoint")
    add("--data", help="folder of images (FFHQ in any layout), or a hub data set")
    add("--output", help="the gate file to write (.safetensors)")
    add("--demo", action="store_true", help="use the embedded demo model and drawn faces")
    add("--preset", choices=PRESETS, help="target sparsity and λ of the original project")
    add(
        "--target-sparsity",
        type=_sparsity,
        help="share of channels to prune; 'none' leaves λ fixed (default 0.3)",
    )
    add("--sparsity-weight", type=float, help="λ of the L1 penalty (default 0.01)")
    add(
        "--scope",
        help=f"which layers: {', '.join(SCOPES)}, or site names separated by commas, in which * "
        f"stands for anything (default {defaults['scope']})",
    )
    add("--budget", choices=get_args(BudgetKind), help="what the target is a share of (channels)")
    add("--floor", type=float, help=f"share of each layer that stays ({defaults['floor']})")
    add("--padding", choices=PADDINGS, help="how constants meet the border (default zero)")
    add("--constant", choices=get_args(Constant), help="stand-in of a pruned channel (mean)")
    add("--reconstruction", choices=get_args(Reconstruction), help="MSE target (teacher)")
    add("--resolution", type=int, help="pixels (default: the model's own)")
    add("--batch-size", type=int, help=f"images per forward ({defaults['batch_size']})")
    add("--gradient-accumulation", type=int, help="batches per step (4)")
    add("--learning-rate", type=float, help=f"of the logits ({TRAVEL:g} / steps)")
    add("--epochs", type=float, help="end after so many passes over the images")
    add("--max-steps", type=int, help=f"end after so many steps ({defaults['max_steps']})")
    add("--precision", choices=get_args(Precision), help="of the frozen U-Net (fp32)")
    add("--device", help="auto, cpu, cuda, mps (auto)")
    add("--validation-fraction", type=float, help="share of images held out (0.1)")
    add("--seed", type=int, help="of everything random (0)")
    given = vars(parser.parse_args(argv))

    settings = dict(DEMO_SETTINGS) if given.pop("demo", False) else {}
    if preset := given.pop("preset", None):
        settings |= PRESETS[preset]
    settings |= given
    missing = [f"--{name}" for name in ("model", "data", "output") if name not in settings]
    if missing:
        parser.error(f"{', '.join(missing)} missing; or try --demo, which needs nothing")
    return FitConfig(**settings)


def _sparsity(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "diffusers", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        fit(parse_arguments(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: no gate file was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
