"""The whole fit on a small random model: what it writes, what it says, what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ldcp_core import Gates, load_gates
from ldcp_core.diffusers import topology_of
from training.data.encoding import Batch, FreshImages, Images
from training.data.images import open_dataset
from training.errors import UserError
from training.fit import fit, main, parse_arguments
from training.learning import result as outcome
from training.learning.learner import GateLearner
from training.model.load import DiffusionModel, load_model
from training.step.denoising import Denoising

QUICK = ["--batch-size", "4", "--gradient-accumulation", "1", "--max-steps", "30"]


def arguments(pipeline: Path, images: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model", str(pipeline), "--data", str(images), "--output", str(output), *QUICK, *more,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_a_fit_meets_its_target_and_says_how_far_it_is_and_what_it_did(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    short_fits: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    output = tmp_path / "gates.safetensors"
    assert main(arguments(pipeline, images, output, "--target-sparsity", "0.5")) == 0
    gates = load_gates(output)
    assert gates.sparsity == pytest.approx(0.5, abs=0.01)
    counts = [int(keep.sum()) for keep in gates.keep_sets().values()]
    assert all(count % 8 == 0 for count in counts)
    assert gates.info["criterion"] == "learned"
    assert gates.info["config"]["target_sparsity"] == 0.5
    assert set(gates.constants) == set(gates.scores)
    for suffix in (".curves.png", ".scores.png"):
        assert output.with_suffix(suffix).read_bytes().startswith(b"\x89PNG")
    said, progress = capsys.readouterr()
    assert "than the target" not in said
    assert "mid_block.resnets.1.conv2" in said and "share of the whole U-Net" in said
    assert "of 128 channels changed state through learning since the start" in said
    assert "bring the sparsity to between" not in caplog.text  # 30 steps are not too short
    for what in (
        "calibrating",
        "own effect",
        "learning gates: 30/30",
        "held-out images, pruned",
    ):
        assert what in progress  # whatever lasts shows how far it is
    assert len(progress) < 4000 and "\r" not in progress  # a bar would take more


def validated(model: DiffusionModel, images: Path, gates: Gates) -> float:
    """The held-out deviation that a fit on ``model`` reports, of four samples in two batches."""
    config = replace(
        parse_arguments(["--model", "m", "--data", "d", "--output", "o.safetensors"]),
        validation_samples=4,
        batch_size=2,
    )
    data = open_dataset(str(images), resolution=16)
    images_of = FreshImages(data, model)
    return outcome._validated(config, Denoising(model, 0), images_of, [0, 1, 2, 3], {"": gates})[1]


def test_a_deviation_in_bf16_is_not_that_of_rounding(
    pipeline: Path, images: Path, no_pictures: None
) -> None:
    rounded = load_model(str(pipeline), dtype=torch.bfloat16)
    topology = topology_of(rounded.unet)
    scores = {site.name: torch.ones(site.channels) for site in topology.sites()}
    next(iter(scores.values()))[0] = 0.0  # one channel of 128
    gates = Gates(scores, topology=topology)
    before = {name: p.data_ptr() for name, p in rounded.unet.named_parameters()}
    found = validated(rounded, images, gates)
    assert {name: p.data_ptr() for name, p in rounded.unet.named_parameters()} == before
    rounded.unet.float()  # the same weights
    assert found == pytest.approx(validated(rounded, images, gates), rel=1e-2)


def test_held_out_problems_meet_the_gated_model_once(model: DiffusionModel, images: Path) -> None:
    seen = []
    hook = model.unet.conv_in.register_forward_hook(lambda *_: seen.append(1))
    try:
        validated(model, images, Gates({"mid_block.resnets.0.conv1": torch.zeros(32)},
                                       topology=topology_of(model.unet)))  # fmt: skip
    finally:
        hook.remove()
    assert len(seen) == 2 * 2  # two batches, dense and pruned


@pytest.mark.parametrize("idle", [0, 1])
def test_counts_are_aligned_where_that_moves_the_output_least(
    pipeline: Path, images: Path, idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "FEW_SITES", 1)
    model = load_model(str(pipeline), dtype=torch.bfloat16)
    torch.nn.init.zeros_(model.unet.mid_block.resnets[idle].conv2.weight)  # conv1 does nothing
    topology = topology_of(model.unet)
    sites = [site for site in topology.sites("mid") if site.name.endswith("conv1")]
    learner = GateLearner(sites, 0)
    for gate in learner.gate_of.values():
        gate.logits.data = 19.5 - torch.arange(32.0)  # 20 kept
    gates = Gates(learner.scores(), topology=topology)
    config = parse_arguments(
        ["--model", "m", "--data", "d", "--output", "o.safetensors", "--target-sparsity", "none"]
    )
    data = FreshImages(open_dataset(str(images), resolution=16), model)
    found, moved = outcome._aligned(config, learner, gates, Denoising(model, 0), data, range(8))
    counts = [int(keep.sum()) for keep in found.keep_sets().values()]
    assert counts == ([16, 24] if idle == 0 else [24, 16])
    assert moved == 8


def test_nothing_is_chosen_by_held_out_images(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    short_fits: None,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    taken: list[set[int]] = []
    batches = Images.batches

    def see(self: Images, indices: list[int], *others: Any, **options: Any) -> Iterator[Batch]:
        taken.append(set(indices))
        return batches(self, indices, *others, **options)

    monkeypatch.setattr(Images, "batches", see)
    output = tmp_path / "gates.safetensors"
    assert main(arguments(pipeline, images, output, "--scope", "all", "--max-steps", "1")) == 0
    assert "aligning: trying counts" in capsys.readouterr().err
    held_out = set(open_dataset(str(images)).split(0.1, 0)[1])
    looked_at, learned_from, aligned_by, validated_by = taken
    assert looked_at == validated_by == held_out
    assert learned_from == aligned_by and not aligned_by & held_out


def test_the_same_seed_gives_the_same_file(
    pipeline: Path, images: Path, tmp_path: Path, short_fits: None, no_pictures: None
) -> None:
    files = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    scores = []
    for file in files:
        result = fit(
            parse_arguments(arguments(pipeline, images, file, "--max-steps", "3", "--seed", "3"))
        )
        scores.append(torch.cat(list(result.gates.scores.values())))
    assert torch.equal(*scores)


@pytest.mark.parametrize(
    "more",
    [
        ["--padding", "extend", "--constant", "zero", "--gradient-accumulation", "2"],
        ["--reconstruction", "noise", "--precision", "bf16", "--epochs", "1"],
        ["--preset", "quality", "--validation-fraction", "0"],
        ["--target-sparsity", "none", "--resolution", "24"],
    ],
)
def test_every_option_runs(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    short_fits: None,
    no_pictures: None,
    more: list[str],
) -> None:
    output = tmp_path / "gates.safetensors"
    assert main(arguments(pipeline, images, output, "--max-steps", "3", *more)) == 0
    gates = load_gates(output)
    assert (gates.padding == "extend") == ("extend" in more)
    assert bool(gates.constants) == ("zero" not in more)


def test_a_run_too_short_for_its_target_says_so_at_the_start(
    pipeline: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    no_pictures: None, short_fits: None,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    more = ["--max-steps", "3", "--learning-rate", "0.01"]
    assert main(arguments(pipeline, images, tmp_path / "gates.safetensors", *more)) == 0
    said = "3 steps bring the sparsity to between 0.0 and 0.0%, and the target is 30.0%"
    assert caplog.text.index(said) < caplog.text.index("learning ended at a sparsity of 0.0%")


@pytest.mark.parametrize(
    ("achieved", "direction", "change"), [(0.35, "more", "Lower"), (0.2, "less", "Raise")]
)
def test_the_advice_matches_the_direction_of_the_miss(
    achieved: float, direction: str, change: str
) -> None:
    said = outcome.advice(0.3, achieved)
    assert f"a point {direction} than the target of 30.0%" in said
    assert f"{change} --target-sparsity" in said


def test_presets_are_those_of_the_original_and_typed_values_win() -> None:
    base = ["--model", "m", "--data", "d", "--output", "o.safetensors"]
    quality = parse_arguments([*base, "--preset", "quality"])
    assert (quality.target_sparsity, quality.sparsity_weight) == (0.1, 0.003)
    balanced = parse_arguments([*base, "--preset", "balanced", "--sparsity-weight", "0.5"])
    assert (balanced.target_sparsity, balanced.sparsity_weight) == (0.3, 0.5)
    assert parse_arguments([*base, "--target-sparsity", "none"]).target_sparsity is None


@pytest.mark.parametrize(
    ("option", "message"),
    [("--target-sparsity", "'x' is neither a share nor 'none'"), ("--seed", "invalid int value")],
)
def test_a_word_for_a_number_is_told_in_words(
    option: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--demo", option, "x"])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--target-sparsity", "1.5"], "--target-sparsity is 1.5"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--resolution", "33"], "a multiple of 8"),
        (["--resolution", "0"], "--resolution is 0"),
        (["--resolution", str(2**30)], "at most 8192"),
        (["--max-steps", "9" * 30], "1 or more, below 2**31"),
        (["--output", "gates.pt"], "ending in .safetensors"),
        (["--model", "/no/such/model.safetensors"], "no file or folder"),
        (["--model", "a" * 300], "no file or folder"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "--device meta"),
        (["--seed", str(2**70)], f"--seed is {2**70}"),
        (["--seed", "-1"], "--seed is -1"),
        (["--epochs", "inf"], "--epochs is inf"),
        (["--no-cache", "--cache", "somewhere"], "--cache somewhere and --no-cache were given"),
        (["--learning-rate", "inf"], "--learning-rate is inf"),
        (["--sparsity-weight", "inf"], "--sparsity-weight is inf"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_in_words(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    assert main([*arguments(pipeline, images, tmp_path / "gates.safetensors"), *more]) == 1
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_images_is_an_error_before_the_model_loads(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    config = parse_arguments(
        arguments(tmp_path / "no-model", tmp_path / "empty", tmp_path / "g.safetensors")
    )
    with pytest.raises(UserError, match="holds no images"):
        fit(config)


def first_of(images: Path, count: int, folder: Path) -> Path:
    """The first images, in a folder of their own."""
    folder.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))[:count]):
        (folder / f"{i}.png").write_bytes(file.read_bytes())
    return folder


def test_a_broken_image_is_skipped_and_named(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    short_fits: None,
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = first_of(images, 8, tmp_path / "data")
    (data / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    output = tmp_path / "gates.safetensors"
    assert main(arguments(pipeline, data, output, "--max-steps", "3")) == 0
    assert "1 of 9 images could not be read and were skipped" in capsys.readouterr().out


def test_held_out_images_that_are_all_broken_are_answered_before_anything_is_learned(
    pipeline: Path,
    images: Path,
    tmp_path: Path,
    short_fits: None,
    no_pictures: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = first_of(images, 4, tmp_path / "data")
    found = open_dataset(str(data))
    (lost,) = found.split(0.1, 0)[1]
    (data / found.records[lost].id).write_bytes(b"broken")
    assert main(arguments(pipeline, data, tmp_path / "gates.safetensors", "--max-steps", "3")) == 1
    assert "None of the 1 image(s) chosen from" in capsys.readouterr().err
    assert not list(tmp_path.glob("gates*"))
