"""recover: what stands in for pruned channels is trained, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldcp_core import Correction, Gates, load_gates, save_gates
from training import recover
from training.learning.recovery import StandIns, recovered
from training.model.load import DiffusionModel
from training.step.denoising import Denoising, Problem, without_prompts


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "CLOSED_FORM_SAMPLES", 20)


QUICK = ["--steps", "8", "--batch-size", "2", "--samples", "8", "--correction-rank", "4"]


def deviations(gates: Gates) -> list[float]:
    found = gates.info["recovered"]
    return [found[key] for key in ("deviation", "closed_form", "recovered")]


def test_the_same_channels_deviate_less_afterwards(
    source: list[str], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "recovered.safetensors"
    assert recover.main([str(given), *source, *QUICK, "--output", str(output)]) == 0
    before, after = load_gates(given), load_gates(output)
    assert after.scores.keys() == before.scores.keys()
    assert all(torch.equal(after.scores[site], before.scores[site]) for site in before.scores)
    assert after.info["criterion"] == "random" and after.info["recovered"]["steps"] == 8
    plain, closed, recovered = deviations(after)
    assert recovered < closed < plain
    assert any(not torch.equal(after.constants[s], before.constants[s]) for s in before.constants)
    assert "recovered (" in capsys.readouterr().out


def test_it_goes_on_from_corrections_that_are_there(
    source: list[str], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = recover.without_prompts
    monkeypatch.setattr(recover, "without_prompts", lambda *a: (drawn.append(a[-1]), draw(*a))[1])
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert recover.main([str(given), *source, *QUICK, "--output", str(first)]) == 0
    assert len(drawn) > 8
    drawn.clear()
    assert recover.main([str(first), *source, *QUICK, "--output", str(second)]) == 0
    assert len(drawn) == 8  # one per step, and none for corrections that are there
    found = deviations(load_gates(second))
    assert found[0] == found[1] == pytest.approx(deviations(load_gates(first))[2], rel=0.02)
    assert found[2] < found[0]


def test_held_out_images_meet_other_noise_than_those_learned_from(
    source: list[str], given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    met: list[Tensor] = []
    draw = Denoising.problem

    def problem(self: Denoising, *of: Any) -> Problem:
        found = draw(self, *of)
        met.extend(found.noise)
        return found

    monkeypatch.setattr(Denoising, "problem", problem)
    options = [*QUICK, "--output", str(tmp_path / "recovered.safetensors")]
    assert recover.main([str(given), *source, *options]) == 0
    assert not any(torch.equal(a, b) for a, b in combinations(met, 2))


def test_what_does_not_help_is_not_written(
    source: list[str], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "worse.safetensors"
    wild = [*QUICK, "--learning-rate", "100", "--output", str(output)]
    assert recover.main([str(given), *source, *wild]) == 1
    assert not output.exists()
    assert "did not fall" in capsys.readouterr().err


def test_gates_that_prune_nothing_have_nothing_to_recover(
    source: list[str], given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates = load_gates(given)
    dense = replace(gates, scores={site: torch.ones_like(s) for site, s in gates.scores.items()})
    save_gates(dense, tmp_path / "dense.safetensors")
    output = tmp_path / "recovered.safetensors"
    options = [*source, *QUICK, "--output", str(output)]
    assert recover.main([str(tmp_path / "dense.safetensors"), *options]) == 1
    assert "prunes nothing" in capsys.readouterr().err and not output.exists()


def test_a_fit_that_prunes_nothing_recovers_nothing(model: DiffusionModel, given: Path) -> None:
    gates = load_gates(given)
    dense = replace(gates, scores={site: torch.ones_like(s) for site, s in gates.scores.items()})
    assert recovered(Denoising(model, 0), lambda: [], dense) is dense


def test_the_gates_that_training_starts_from_stay_what_they_are(given: Path) -> None:
    site = next(name for name, keep in load_gates(given).keep_sets().items() if not keep.all())
    correction = Correction(torch.ones(3, 2), torch.ones(2, 5), torch.ones(3))
    gates = replace(load_gates(given), corrections={site: correction})
    before = gates.constant(site).clone()
    with torch.no_grad():
        for parameter in StandIns(gates).parameters():
            parameter += 1
    assert all(bool((part == 1).all()) for part in vars(correction).values())
    assert torch.equal(gates.constant(site), before)


def test_it_never_writes_over_the_gates_it_was_given(
    source: list[str], given: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = given.read_bytes()
    assert recover.main([str(given), *source, *QUICK, "--output", str(given)]) == 1
    assert given.read_bytes() == before
    assert "--output" in capsys.readouterr().err


def test_every_second_prompt_is_the_empty_one() -> None:
    context, text = (
        torch.ones(3, 2, 5),
        {"text_embeds": torch.ones(3, 4), "time_ids": torch.ones(3, 6)},
    )
    zeros = torch.zeros(3, 4, 2, 2)
    problem = Problem(zeros, torch.zeros(3), context, zeros, zeros, text)
    found = without_prompts(problem, torch.zeros(1, 2, 5), torch.zeros(1, 4))
    assert found.context.amax((1, 2)).tolist() == [1, 0, 1]
    later = without_prompts(problem, torch.zeros(1, 2, 5), torch.zeros(1, 4), first=1)
    assert later.context.amax((1, 2)).tolist() == [0, 1, 0]
    assert found.added["text_embeds"].amax(1).tolist() == [1, 0, 1]
    assert found.added["time_ids"].all() and context.all() and text["text_embeds"].all()
