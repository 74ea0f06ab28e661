"""Corrections of a model's own layers: they bring it nearer to dense, or are not written."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldcp_core import HELD_OUT_EVERY, PADDINGS, Gates, Padding, load_gates
from ldcp_core.diffusers import topology_of
from training import fit, score
from training.learning import corrections as made
from training.learning import result
from training.learning.corrections import corrections
from training.model.gating import compacted, deviation, hard_gates, masked
from training.model.load import DiffusionModel
from training.step.denoising import Denoising, Problem, without_prompts

INNER = "mid_block.resnets.0.conv1"
HIDDEN = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"


def problems(denoising: Denoising, count: int, seed: int = 0) -> list[Problem]:
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        latents, noise = torch.randn(2, 2, 4, 16, 16, generator=g)
        context = torch.randn(2, 7, 16, generator=g)
        steps = torch.randint(0, 1000, (2,), generator=g)
        noisy, target = denoising.noised(latents, noise, steps)
        found.append(Problem(noisy, steps, context, noise, target))
    return found


@pytest.fixture(scope="module")
def redundant(model: DiffusionModel) -> Denoising:
    """A U-Net in which the odd channels of two sites copy the even ones."""
    model = copy.deepcopy(model)
    resnet = model.unet.mid_block.resnets[0]
    proj = model.unet.get_submodule(HIDDEN).proj
    with torch.no_grad():
        for layer in (resnet.conv1, resnet.time_emb_proj, resnet.norm2, proj):
            for values in layer.parameters():
                values[1::2] = values[::2]
        for layer in (resnet.conv2, model.unet.get_submodule(HIDDEN[:-1] + "2")):
            layer.weight.mul_(5)
    return Denoising(model, 0)


def gates_of(denoising: Denoising, padding: Padding = "zero") -> Gates:
    """The copies pruned at the two sites, and some residual channels of the first block."""
    topology = topology_of(denoising.model.unet)
    widths = {site.name: site.channels for site in topology.all_sites()}
    residual = "mid_block.resnets.0.conv2"
    scores = {site: (torch.arange(widths[site]) % 2 == 0).float() for site in (INNER, HIDDEN)}
    scores[residual] = (torch.arange(widths[residual]) % 4 > 0).float()
    return Gates(scores, {}, padding, topology)


def distance(denoising: Denoising, gates: Gates) -> float:
    found = []
    for problem in problems(denoising, 4, seed=9):
        dense = denoising.dense(problem)
        with compacted(denoising.model.unet, gates.pruned()):
            found.append(deviation(denoising.dense(problem), dense).item())
    return sum(found) / len(found)


@pytest.mark.parametrize("padding", PADDINGS)
def test_what_the_kept_channels_repeat_is_made_up_for(
    redundant: Denoising, padding: Padding
) -> None:
    gates = gates_of(redundant, padding)
    found = corrections(redundant, problems(redundant, 40), gates, 32)
    assert set(found) == {INNER, HIDDEN}
    for site in (INNER, HIDDEN):
        alone = replace(gates, scores={site: gates.scores[site]})
        corrected = replace(alone, corrections={site: found[site]})
        # all of a feed-forward's copies; a norm comes between a convolution's and their reader
        share = 0.01 if site == HIDDEN else 0.5
        assert distance(redundant, corrected) < share * distance(redundant, alone)


@torch.no_grad()
def test_the_compact_form_is_the_masked_reference_with_them(redundant: Denoising) -> None:
    gates, unet = gates_of(redundant), redundant.model.unet
    found = corrections(redundant, problems(redundant, 10), gates, 4)
    gates = replace(gates, corrections=found)
    problem = problems(redundant, 1, seed=3)[0]
    with masked(unet, hard_gates(gates.pruned()), "zero"):
        reference = redundant.dense(problem)
    with compacted(unet, gates.pruned()):
        compact = redundant.dense(problem)
    plain = replace(gates, corrections={})
    with compacted(unet, plain.pruned()):
        without = redundant.dense(problem)
    assert (compact - reference).abs().max() < 1e-5 * reference.abs().max()
    assert (without - reference).abs().max() > 1e-3 * reference.abs().max()


def test_several_passes_find_the_same_as_one(
    redundant: Denoising, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, given = gates_of(redundant), problems(redundant, 10)
    once = corrections(redundant, given, gates, 4)
    monkeypatch.setattr(made, "PASS_BYTES", 1)
    again = corrections(redundant, given, gates, 4)
    assert set(once) == set(again)
    for site, correction in once.items():
        assert torch.equal(correction.bias, again[site].bias)


def test_nothing_stays_on_the_model(redundant: Denoising) -> None:
    corrections(redundant, problems(redundant, 5), gates_of(redundant), 4)
    for module in redundant.model.unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


@pytest.mark.parametrize("rank", [0, 4])
def test_fit_writes_corrections_of_the_rank_that_is_asked_for(
    source: list[str], tmp_path: Path, short_fits: None, no_pictures: None, rank: int
) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--scope", "mid+ff", "--max-steps", "2", "--correction-rank", str(rank)]
    assert fit.main([*source, *options, "--output", str(output), "--device", "cpu"]) == 0
    found = load_gates(output).corrections
    assert all(correction.left.shape[1] <= rank for correction in found.values())
    assert rank or not found


@pytest.mark.usefixtures("short_fits", "no_pictures")
def test_a_fit_leaves_corrections_out_that_make_the_whole_worse(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def harmful(*given: object) -> dict[str, object]:
        found = corrections(*given)  # type: ignore[arg-type]
        return {site: replace(one, bias=one.bias + 10) for site, one in found.items()}

    monkeypatch.setattr(result, "corrections", harmful)
    output = tmp_path / "gates.safetensors"
    options = ["--scope", "mid+ff", "--max-steps", "2", "--output", str(output)]
    assert fit.main([*source, *options, "--device", "cpu"]) == 0
    assert not load_gates(output).corrections


def deviation_of(gates: Gates) -> float:
    found: float = gates.info["history"]["heldout_deviation"]
    return found


@pytest.mark.usefixtures("short_fits", "no_pictures")
def test_a_fit_recovers_what_it_has_learned(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(result, "RECOVERY_SAMPLES", 4)
    monkeypatch.setattr(
        result, "recovered", partial(result.recovered, steps=30, learning_rate=5e-4)
    )
    given = [*source, "--scope", "mid+ff", "--max-steps", "2", "--correction-rank", "4"]
    given += ["--device", "cpu"]
    found = []
    for more in ([], ["--recover"]):
        output = tmp_path / f"gates{len(more)}.safetensors"
        assert fit.main([*given, *more, "--output", str(output)]) == 0
        found.append(load_gates(output))
    plain, recovered = found
    assert recovered.info["config"]["recover"] and not plain.info["config"]["recover"]
    assert all(torch.equal(plain.scores[site], recovered.scores[site]) for site in plain.scores)
    assert deviation_of(recovered) < 0.99 * deviation_of(plain)


@pytest.mark.usefixtures("short_fits", "no_pictures")
def test_a_fit_recovers_in_float32_from_prompts_and_the_empty_one_in_turn(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the fit computed in, with blocks evaluated again, and with one image per step."""
    seen: list[tuple[torch.dtype, int]] = []

    def watching(problem: Problem, context: Tensor, pooled: Tensor, first: int) -> Problem:
        seen.append((problem.noisy.dtype, first))
        return without_prompts(problem, context, pooled, first)

    monkeypatch.setattr(result, "RECOVERY_SAMPLES", 1)
    monkeypatch.setattr(result, "without_prompts", watching)
    monkeypatch.setattr(result, "recovered", partial(result.recovered, steps=3))
    given = [*source, "--scope", "mid+ff", "--max-steps", "2", "--batch-size", "1", "--recover"]
    given += ["--precision", "bf16", "--gradient-checkpointing", "--device", "cpu"]
    assert fit.main([*given, "--output", str(tmp_path / "gates.safetensors")]) == 0
    assert seen == [(torch.float32, number) for number in range(3)]


@pytest.mark.usefixtures("short_fits", "no_pictures")
def test_corrections_of_a_fit_are_checked_whatever_the_batch_size(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []

    def counting(denoising: Denoising, problems: list[Problem], *given: object) -> object:
        counts.append(len(problems))
        return {}

    monkeypatch.setattr(result, "corrections", counting)
    given = [*source, "--max-steps", "2", "--batch-size", "8", "--device", "cpu"]
    assert fit.main([*given, "--output", str(tmp_path / "gates.safetensors")]) == 0
    assert counts == [HELD_OUT_EVERY]


@pytest.mark.parametrize("rank", [0, 4])
def test_score_writes_them_too(source: list[str], tmp_path: Path, rank: int) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", "random", "--scope", "all+ff", "--samples", "4", "--timesteps", "5"]
    options += ["--correction-rank", str(rank), "--output", str(output)]
    assert score.main([*source, *options]) == 0
    found = load_gates(output).corrections
    assert bool(found) == bool(rank)
    assert all(correction.left.shape[1] <= rank for correction in found.values())


def test_a_rank_that_no_file_holds_is_refused(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--criterion",
        "random",
        "--correction-rank",
        "65",
        "--output",
        str(tmp_path / "g.x"),
    ]
    assert score.main([*source, *options]) == 1
    assert "--correction-rank is 65" in capsys.readouterr().err
