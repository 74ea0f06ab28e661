"""Two processes learn what one does at the same global batch, each on images of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ldcp_core import Gates, load_gates
from training import fit
from training.data.encoding import CachedImages
from training.data.images import open_dataset
from training.learning import result
from training.learning.processes import Processes
from training.model.load import DiffusionModel
from training.step.denoising import Denoising

ROOT = Path(__file__).parents[2]


class Pretend(Processes):
    """One process of several, without the others."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        self.rank, self.world = rank, world


@pytest.mark.parametrize(("count", "world"), [(8, 2), (5, 2), (1, 3), (7, 3), (3, 1)])
def test_shares_are_disjoint_and_complete(count: int, world: int) -> None:
    rows = [list(range(count))[Pretend(rank, world).share(count)] for rank in range(world)]
    assert sum(rows, []) == list(range(count))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_the_problems_of_two_processes_are_halves_of_the_one(
    model: DiffusionModel, images: Path, cache: Path
) -> None:
    encoded = CachedImages(open_dataset(str(images), resolution=16), model, cache)
    encoded.build(model)
    # 20 images in batches of 6: the last one of an epoch has 2
    whole, parts = [], []
    for share in (slice, Pretend(0, 3).share, Pretend(1, 3).share, Pretend(2, 3).share):
        denoising = Denoising(model, 0)
        batches = encoded.batches(range(20), 6, seed=0, epochs=2, share=share)
        found = [(batch.ids, denoising.problem(batch)) for batch in batches]
        (whole if share is slice else parts).append(found)
    for k, (ids, problem) in enumerate(whole[0]):
        mine = [part[k] for part in parts]
        assert sum((own for own, _ in mine), []) == ids
        for name in ("noisy", "timesteps", "context", "noise"):
            joined = torch.cat([getattr(own, name) for _, own in mine])
            assert torch.equal(joined, getattr(problem, name))
        assert sum(own.share for _, own in mine) == pytest.approx(1)
    assert [len(own) for _, own in (part[3] for part in parts)] == [0, 1, 1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def launched(processes: int, arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` of a fit on so many CPU processes, as the README says."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes",
        str(processes), "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
        "--main_process_port", str(free_port()), "-m", "training.fit", *arguments,
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "LDCP_CACHE": str(cache),
    }  # fmt: skip
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )


def test_two_processes_equal_one_at_the_same_global_batch(
    pipeline: Path, images: Path, tmp_path: Path, no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    common = [
        "--model", str(pipeline), "--data", str(images), "--device", "cpu", "--max-steps", "4",
        "--gradient-accumulation", "2", "--validation-fraction", "0.15",
    ]  # fmt: skip
    two, one = tmp_path / "two.safetensors", tmp_path / "one.safetensors"
    done = launched(2, [*common, "--batch-size", "3", "--output", str(two)], tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"wrote {two}") == 1  # one of them talks

    def first(*given: Any) -> tuple[Gates, float]:  # what comes after learning is not compared
        return next(iter(given[-1].values())), 0.0

    monkeypatch.setattr(result, "_validated", first)
    common += ["--correction-rank", "0"]
    assert fit.main([*common, "--batch-size", "6", "--output", str(one)]) == 0
    found, expected = load_gates(two), load_gates(one)
    for site, score in expected.scores.items():
        torch.testing.assert_close(found.scores[site], score, atol=1e-4, rtol=0)
        torch.testing.assert_close(found.constants[site], expected.constants[site])
    # far from one process at half the batch, which is what not talking to each other gives
    half = tmp_path / "half.safetensors"
    assert fit.main([*common, "--batch-size", "3", "--output", str(half)]) == 0
    apart = max((load_gates(half).scores[s] - expected.scores[s]).abs().max() for s in found.scores)
    assert apart > 1e-2
    for name in ("reconstruction", "l1", "sparsity"):
        courses = [
            [row[name] for row in gates.info["history"]["course"]] for gates in (found, expected)
        ]
        assert courses[0] == pytest.approx(courses[1], rel=1e-3)


def test_several_processes_need_the_cache(
    pipeline: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(fit.Processes, "launched", classmethod(lambda cls, cpu: Pretend(0, 2)))
    arguments = ["--model", str(pipeline), "--data", str(images)]
    assert fit.main([*arguments, "--output", str(tmp_path / "a.safetensors"), "--no-cache"]) == 1
    assert "--no-cache was given to 2 processes" in capsys.readouterr().err
