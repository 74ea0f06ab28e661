"""Make pruned gates better without choosing others: distil what stands in for pruned channels.

    python -m training.recover gates.safetensors --demo --output recovered.safetensors
    python -m training.recover gates.safetensors --model sd15.safetensors --data ffhq/ \\
        --output recovered.safetensors --steps 1000

The channels that are kept, and all weights of the model, stay what they are. Corrections of the
layers that read pruned channels, and the constants, are trained together so that the pruned model
answers as the dense one does, with the prompt and without it, as guidance asks it. Corrections
begin at their closed form. The result prunes as much and runs as fast.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from ldcp_core import HELD_OUT_EVERY, RANK, Gates, gates_report, load_gates, save_gates
from training.console import explaining, log_progress
from training.data.encoding import FreshImages
from training.data.images import open_dataset
from training.data.splits import Split, unseen
from training.errors import UserError
from training.learning.corrections import corrections
from training.learning.recovery import LEARNING_RATE, STEPS, recovered
from training.model.encode import embed_prompts
from training.model.gating import compacted
from training.options import COUNT, POSITIVE, SEED, Bound, Options, device, option, parsed
from training.output import claimed, gate_output
from training.provenance import derived
from training.sample import check_fits
from training.session import fit_to, frozen_model
from training.step.denoising import Denoising, FixedProblems, Problem, without_prompts

log = logging.getLogger("training.recover")

#: problems that the closed form is computed from
CLOSED_FORM_SAMPLES = 128


@dataclass(frozen=True)
class RecoverConfig(Options):
    """What to recover, on what, and for how long."""

    gates: str = option("gate file by training.fit or training.score", positional=True)
    model: str = option("checkpoint file, diffusers folder or hub id")
    data: str = option("folder of images in any of FFHQ's layouts, or a data set")
    output: str = option("the gate file to write (.safetensors)")
    steps: int = option("of Adam", STEPS, COUNT)
    learning_rate: float = option("of Adam, falling to zero", LEARNING_RATE, POSITIVE)
    correction_rank: int = option(
        "of corrections that the gate file does not have",
        RANK,
        Bound(range(1, 65).__contains__, "1 to 64"),
    )
    batch_size: int = option("images per step", 8, COUNT)
    samples: int = option("held-out samples (images × timesteps) to compare on", 64, COUNT)
    resolution: int | None = option("pixels (default: the model's own)", None, COUNT)
    device: str = device()
    seed: int = option("of everything random", 0, SEED)


def recover(config: RecoverConfig) -> Gates:
    """Distil and write; raises UserError for everything a user can put right.

    Where the held-out deviation does not fall, nothing is written.
    """
    output = gate_output(config.output, (config.gates, config.model, config.data))
    with claimed(output):
        return _recover(config, output)


def _recover(config: RecoverConfig, output: Path) -> Gates:
    gates = load_gates(config.gates)
    if not gates.sparsity:
        raise UserError(f"{config.gates} prunes nothing.", "gates that prune channels")
    data = open_dataset(config.data)
    seen, held_out = unseen(data, [Split.of_file(gates.info, config.gates)])
    model = frozen_model(config.model, "fp32", config.device)
    check_fits(model, gates)
    fit_to(model, data, config.resolution)
    denoising, images = Denoising(model, config.seed), FreshImages(data, model)
    other = config.seed + 1  # as in a fit: not the noise that is learned from
    aside = images.batches(held_out, config.batch_size, epochs=None)
    heldout = FixedProblems(denoising, aside, config.samples, other)
    stream = images.batches(seen, config.batch_size, seed=config.seed, epochs=None)
    unconditional = embed_prompts(model, [""])

    turn = count()

    def problem() -> Problem:
        return without_prompts(denoising.problem(next(stream)), *unconditional, next(turn))

    before = _deviation(model.unet, heldout, gates, "as given")
    start = gates
    if not gates.corrections:
        needed = -(-CLOSED_FORM_SAMPLES // config.batch_size)
        problems = [problem() for _ in range(max(needed, HELD_OUT_EVERY))]
        start = replace(
            gates, corrections=corrections(denoising, problems, gates, config.correction_rank)
        )
    if gates.stages and not start.corrections:
        raise UserError(
            f"{config.gates} has stages, and no layer for which a correction helps.",
            "gates without stages, or with corrections to train",
            "recover the gates that the stages were made of",
        )
    closed = _deviation(model.unet, heldout, start, "closed form")
    found = recovered(denoising, lambda: [problem()], start, config.steps, config.learning_rate)
    after = _deviation(model.unet, heldout, found, "recovered")
    print(
        f"held-out deviation from dense (MSE): {before:.3g} as given, {closed:.3g} in closed form, "
        f"{after:.3g} recovered ({after / before:.2f} of what it was)"
    )
    if not after < before:
        raise UserError(
            "The held-out deviation did not fall, so nothing was written.",
            "a lower one",
            "give it more --steps, a lower --learning-rate, or more images",
        )
    best = {"deviation": before, "closed_form": closed, "recovered": after}
    found = replace(found, info={**gates.info, "recovered": {**derived(config), **best}})
    save_gates(found, output)
    print(gates_report(found).text())
    print(f"wrote {output}")
    return found


def _deviation(unet: Any, heldout: FixedProblems, gates: Gates, label: str) -> float:
    with compacted(unet, gates.pruned()):
        return heldout.as_it_is(f"held-out images, {label}")[0].mean().item()


def parse_arguments(argv: list[str] | None) -> RecoverConfig:
    return parsed(RecoverConfig, argv, "recover", __doc__, demo=("model", "data", "output"))


@explaining
def main(argv: list[str] | None = None) -> int:
    log_progress()
    recover(parse_arguments(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
