"""SDXL and SD2 in training: what the U-Net is told, and the commands from their command lines."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from families import diffusers_unet
from PIL import Image
from test_replay import plain, saving
from test_resume import assert_same, fail_at

from ldcp_core import PrunedSite, Topology, load_gates
from ldcp_core.diffusers import topology_of
from training import evaluate, fit, score
from training.criteria import noise_loss
from training.data.encoding import Batch, CachedImages, FreshImages
from training.data.images import open_dataset
from training.learning import sample_sheet
from training.learning.sample_sheet import SampleSheet
from training.model.encode import embed_prompts
from training.model.load import DiffusionModel
from training.sample import pipeline_of
from training.step.denoising import Denoising, FixedProblems, Problem

QUICK = ["--samples", "2", "--timesteps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of different sizes, each with a caption."""
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for name, size in (("a", (40, 20)), ("b", (24, 48)), ("c", (16, 16))):
        pixels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}")
    return folder


#: original height and width, crop top and left in the scaled image, target height and width:
#: 40 x 20 becomes 32 x 16, of which 8 are cut off at the left; 24 x 48 becomes 16 x 32
SIZES = [
    [20.0, 40.0, 0.0, 8.0, 16.0, 16.0],
    [48.0, 24.0, 8.0, 0.0, 16.0, 16.0],
    [16.0, 16.0, 0.0, 0.0, 16.0, 16.0],
]


@pytest.fixture
def batch(model_xl: DiffusionModel, photos: Path) -> Batch:
    data = open_dataset(str(photos), resolution=16)
    return next(FreshImages(data, model_xl).batches(range(3), 3))


@pytest.fixture
def problem(model_xl: DiffusionModel, batch: Batch) -> Problem:
    return Denoising(model_xl, 0).problem(batch)


# --- what the U-Net is told -----------------------------------------------------------------------


def test_prompts_are_embedded_as_diffusers_does(model_xl: DiffusionModel) -> None:
    prompts = ["a cat", "a very long text " * 40, ""]
    context, pooled = embed_prompts(model_xl, prompts)
    assert context.shape == (3, 77, 48) and pooled.shape == (3, 16)
    states, _, text, _ = pipeline_of(model_xl).encode_prompt(
        prompts, device="cpu", do_classifier_free_guidance=False
    )
    assert torch.equal(context, states) and torch.equal(pooled, text)


def test_a_batch_tells_the_sizes_of_each_image(batch: Batch) -> None:
    assert batch.ids == ["a.png", "b.png", "c.png"]
    assert batch.added["time_ids"].tolist() == SIZES
    assert batch.added["text_embeds"].shape == (3, 16)


def test_a_cached_batch_tells_the_same_to_the_bit(
    model_xl: DiffusionModel, photos: Path, batch: Batch, tmp_path: Path
) -> None:
    for _ in range(2):  # computed, then read
        data = open_dataset(str(photos), resolution=16)
        cached = CachedImages(data, model_xl, tmp_path)
        cached.build(model_xl)
        found = next(cached.batches(range(3), 3))
        assert torch.equal(found.latents, batch.latents)
        assert torch.equal(found.context, batch.context)
        assert found.added.keys() == batch.added.keys()
        assert all(torch.equal(found.added[name], batch.added[name]) for name in batch.added)


def test_a_cache_tells_the_encodings_of_the_families_apart(
    model: DiffusionModel, model_xl: DiffusionModel, photos: Path, tmp_path: Path
) -> None:
    data = open_dataset(str(photos), resolution=16)
    folders = [CachedImages(data, m, tmp_path).embeddings._folder for m in (model, model_xl)]
    assert folders[0] != folders[1]


def test_latents_are_scaled_by_the_vaes_own_factor(
    model_xl: DiffusionModel, photos: Path, batch: Batch
) -> None:
    pixels = open_dataset(str(photos), resolution=16).pixels(0)
    with torch.no_grad():
        mean = model_xl.vae.encode(pixels[None]).latent_dist.mean[0]
    assert torch.equal(batch.latents[0], mean * 0.13025)


def test_text_and_sizes_reach_the_u_net(model_xl: DiffusionModel, problem: Problem) -> None:
    denoising = Denoising(model_xl, 0)
    expected = denoising.dense(problem)
    for name in ("text_embeds", "time_ids"):
        changed = dict(problem.added, **{name: problem.added[name] + 1})
        other = Problem(**{**vars(problem), "added": changed})
        assert not torch.allclose(denoising.dense(other), expected, rtol=1e-3)


@pytest.mark.parametrize("scope", ["mid", "all", "ff", "up_blocks.1.resnets.2.conv1"])
def test_what_saves_work_changes_no_bit(
    model_xl: DiffusionModel, problem: Problem, scope: str
) -> None:
    expected = plain(model_xl, problem, scope, "zero")
    found = saving(model_xl, problem, scope, "zero")
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert expected[0] > 0 and all(bool(gradient.any()) for gradient in expected[3:])


def test_text_and_sizes_are_embedded_once(model_xl: DiffusionModel, problem: Problem) -> None:
    denoising = Denoising(model_xl, 0)
    answered = denoising.answered(problem, ["mid_block.resnets.0.conv1"])
    assert "add_embedding" in answered.shared


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(pipeline_xl: Path, images: Path) -> list[str]:
    return ["--model", str(pipeline_xl), "--data", str(images)]


@pytest.fixture(scope="module")
def half(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates of SDXL that prune half of all layers."""
    path = tmp_path_factory.mktemp("gates") / "half.safetensors"
    options = ["--criterion", "taylor", "--scope", "all+ff+heads", "--target-sparsity", "0.5"]
    assert score.main([*source, *QUICK, *options, "--output", str(path)]) == 0
    return path


def test_a_fit_meets_its_target_and_a_resumed_one_ends_with_its_bits(
    source: list[str],
    tmp_path: Path,
    short_fits: None,
    no_pictures: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = ["--batch-size", "2", "--gradient-accumulation", "1", "--max-steps", "4"]
    target = ["--scope", "mid+ff+heads", "--target-sparsity", "0.4", "--checkpoint-every", "2"]
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    given = [*source, *steps, *target, "--output"]
    assert fit.main([*given, str(whole)]) == 0
    gates = load_gates(whole)
    assert gates.topology.family == "SDXL"
    assert gates.sparsity == pytest.approx(0.4, abs=0.01)
    with monkeypatch.context() as patch:
        fail_at(patch, 3, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            fit.main([*given, str(cut)])
    assert fit.main([*given, str(cut), "--resume"]) == 0
    assert_same(whole, cut)


@pytest.mark.parametrize("criterion", ["diff-pruning", "diversity", "flap", "own-effect"])
def test_criteria_measure_sdxl(source: list[str], tmp_path: Path, criterion: str) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", criterion, "--scope", "mid+ff+heads", "--directions", "1"]
    assert score.main([*source, *QUICK, *options, "--output", str(output)]) == 0
    assert load_gates(output).topology.family == "SDXL"


def test_gates_are_evaluated_and_drawn(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a face\n", encoding="utf-8")
    drawing = ["--images", str(tmp_path / "i"), "--prompts", str(prompts), "--steps", "2"]
    given = [str(half), *source, *drawing, "--samples", "2", "--precision", "fp32", "bf16"]
    assert evaluate.main([*given, "--output", str(tmp_path / "e")]) == 0
    rows = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["dense", "half", "dense-bf16", "half-bf16"]
    assert rows[1]["deviation"]["mean"] > 10 * rows[2]["deviation"]["mean"] > 0
    dense, pruned = (tmp_path / "i" / name / "000_42.png" for name in ("dense", "half"))
    assert dense.read_bytes() != pruned.read_bytes()


def test_samples_are_those_of_diffusers_pipeline(
    model_xl: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_sheet, "STEPS", 5)
    samples = SampleSheet(model_xl, ["a face"], 16)
    sites = topology_of(model_xl.unet).sites("mid")
    pruned = {s.name: PrunedSite(torch.zeros(s.channels, dtype=torch.bool)) for s in sites}
    with Image.open(io.BytesIO(samples.picture(pruned))) as sheet:
        ours = np.asarray(sheet.crop((0, 0, 16, 16)), dtype=float)
    pipe = pipeline_of(model_xl)
    theirs = pipe(
        "a face",
        negative_prompt="",
        num_inference_steps=5,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert abs(ours - np.asarray(theirs, dtype=float)).max() <= 1


def test_gates_of_another_family_are_refused_with_both_named(
    half: Path, pipeline: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(half), "--model", str(pipeline), "--data", str(images)]
    assert evaluate.main(given) == 1
    said = capsys.readouterr().err
    assert "made for SDXL" in said and "gates for Stable Diffusion 1.5" in said


@pytest.mark.parametrize("mid", [(0,), ()])
def test_derivatives_with_fewer_blocks_are_learned_on(
    pipeline_xl: Path, images: Path, tmp_path: Path, mid: tuple[int, ...],
    short_fits: None, no_pictures: None,
) -> None:  # fmt: skip
    topology = Topology(
        widths=(32, 64, 96),
        down=((0, 0), (1, 1), (2, 2)),
        mid=mid,
        up=((2, 2, 3), (2, 1, 1), (0, 0, 0)),
        context_width=48,
        pooled_width=64,
        linear_projections=True,
        heads=(0, 4, 4),
    )
    folder, output = tmp_path / "derivative", tmp_path / "gates.safetensors"
    shutil.copytree(pipeline_xl, folder)
    unet = diffusers_unet(topology, "cpu")
    unet.register_to_config(sample_size=16)
    unet.save_pretrained(folder / "unet")
    given = ["--model", str(folder), "--data", str(images), "--output", str(output)]
    steps = ["--batch-size", "2", "--gradient-accumulation", "1", "--max-steps", "2"]
    assert fit.main([*given, *steps, "--scope", "up"]) == 0
    assert load_gates(output).topology == topology


def test_sd2_that_predicts_v_is_measured_and_evaluated(
    pipeline: Path, images: Path, tmp_path: Path
) -> None:
    folder, output = tmp_path / "sd2", tmp_path / "gates.safetensors"
    shutil.copytree(pipeline, folder)
    config = UNet2DConditionModel.load_config(folder / "unet") | {"use_linear_projection": True}
    UNet2DConditionModel.from_config(config).save_pretrained(folder / "unet")
    scheduler = DDPMScheduler.from_pretrained(folder / "scheduler", prediction_type="v_prediction")
    scheduler.save_pretrained(folder / "scheduler")
    source = ["--model", str(folder), "--data", str(images)]
    options = ["--criterion", "taylor", "--scope", "all+ff", "--output", str(output)]
    assert score.main([*source, *QUICK, *options]) == 0
    assert load_gates(output).topology.family == "Stable Diffusion 2"
    assert evaluate.main([str(output), *source, "--samples", "2"]) == 0


# --- models that predict v ------------------------------------------------------------------------


@pytest.fixture(params=["epsilon", "v_prediction"])
def predicting(request: pytest.FixtureRequest, model_xl: DiffusionModel) -> Denoising:
    config = model_xl.scheduler.config
    scheduler = DDPMScheduler.from_config(config, prediction_type=request.param)
    return Denoising(replace(model_xl, scheduler=scheduler), 0)


def test_the_target_is_what_the_model_was_trained_to_answer(
    predicting: Denoising, batch: Batch
) -> None:
    problem, scheduler = predicting.problem(batch), predicting.model.scheduler
    expected = problem.noise
    if scheduler.config.prediction_type == "v_prediction":
        expected = scheduler.get_velocity(batch.latents, problem.noise, problem.timesteps)
        assert not torch.allclose(expected, problem.noise, rtol=1e-2)
    assert torch.allclose(problem.target, expected, rtol=1e-5, atol=1e-6)


def test_the_right_answer_gives_the_clean_image(predicting: Denoising, batch: Batch) -> None:
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(0))
    noisy, target = predicting.noised(batch.latents, noise, torch.tensor([500] * 3))
    clean = predicting.clean(noisy, target, 500)
    assert torch.allclose(clean, batch.latents, rtol=1e-4, atol=1e-4)


def test_the_losses_are_those_against_the_target(
    predicting: Denoising, photos: Path, model_xl: DiffusionModel
) -> None:
    images = FreshImages(open_dataset(str(photos), resolution=16), model_xl)
    held_out = FixedProblems(predicting, images.batches(range(3), 3), 3, seed=0)
    (problem,) = held_out._problems
    expected = (predicting.dense(problem) - problem.target).square().mean((1, 2, 3))
    assert torch.allclose(held_out.dense_losses, expected)
    assert torch.allclose(held_out.as_it_is("dense")[1], expected)
    in_parts = FixedProblems(predicting, images.batches(range(3), 3), 3, seed=0, at_once=2)
    assert [len(part) for part in in_parts._problems] == [2, 1]
    assert torch.equal(in_parts.timesteps, held_out.timesteps)
    assert torch.allclose(in_parts.dense_losses, expected)
    assert float(noise_loss(problem)(problem.target)) == 0.0
