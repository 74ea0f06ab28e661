"""Kill a fit at random moments, again and again, and see that it ends as if nothing had happened.

    python tests/training/kill_loop.py PIPELINE IMAGES FOLDER KILLS

A script of its own, so that it can fork a warm process (models loaded, nothing running) instead of
starting Python for every kill. Prints one line of JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from training import fit
from training.config import FitConfig, RunOptions
from training.learning import result as outcome
from training.model.load import DiffusionModel, load_model

STEPS = 16


def main(pipeline: str, images: str, folder: Path, kills: int) -> dict[str, float]:
    torch.set_num_threads(1)
    model = load_model(pipeline)
    config = FitConfig(
        model=pipeline, data=images, output=str(folder / "whole.safetensors"),
        batch_size=2, gradient_accumulation=1, max_steps=STEPS, calibration_batches=1,
        validation_samples=4, correction_samples=10, run=RunOptions(checkpoint_every=1),
    )  # fmt: skip
    start = time.monotonic()
    assert os.waitpid(forked(config, model), 0)[1] == 0
    duration = time.monotonic() - start
    expected = gates(Path(config.output))

    config = replace(config, output=str(folder / "cut.safetensors"))
    output, checkpoints = Path(config.output), folder / "cut.checkpoints"
    chance = random.Random(0)
    killed, runs, equal, started, steps = 0, 0, 0, 0, set()
    while killed < kills or started:
        resume = any(checkpoints.glob("step-*"))
        process = forked(replace(config, run=replace(config.run, resume=resume)), model)
        started += 1
        moment, step = 60.0, STEPS + 1  # the last run may end in peace
        if (
            killed < kills and killed % 2
        ):  # at any moment, and a few steps on, however long it takes
            step = done(checkpoints) + chance.randint(1, 4)
        elif killed < kills:
            moment = chance.uniform(0, 0.75 * duration)
        if not ended(process, moment, lambda step=step: done(checkpoints) >= step):
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            killed += 1
            steps.add(done(checkpoints))
            if output.exists():  # of the run before, or whole
                assert same(gates(output), expected)
            continue
        runs, started = runs + 1, 0
        equal += same(gates(output), expected)
    return {"kills": killed, "runs": runs, "equal": equal, "steps_when_killed": len(steps)}


def forked(config: FitConfig, model: DiffusionModel) -> int:
    """The id of a process that runs the fit, without pictures, on the model already loaded."""
    process = os.fork()
    if process:
        return process
    try:
        log = os.open(Path(config.output).with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        fit.frozen_model = lambda *_, **__: model
        outcome.curves_png = outcome.scores_png = lambda *_: b""
        fit.fit(config)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def ended(process: int, seconds: float, enough: Callable[[], bool]) -> bool:
    """Whether the process ended, well, within so many seconds and before it is ``enough``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not enough():
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            assert status == 0, f"the run failed by itself: status {status}"
            return True
        time.sleep(0.002)
    return False


def done(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(file.stem[5:]) for file in folder.glob("step-*")), default=0)


def gates(file: Path) -> dict[str, torch.Tensor]:
    from ldcp_core import load_gates

    found = load_gates(file)
    tensors = {**found.scores, **{f"constant of {k}": v for k, v in found.constants.items()}}
    for site, correction in found.corrections.items():
        tensors |= {f"{part} of {site}": value for part, value in vars(correction).items()}
    return tensors


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))))
