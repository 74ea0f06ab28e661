"""score, sample, evaluate and sweep, from their command lines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldcp_core import load_gates
from training import evaluate, sample, score, sweep
from training.criteria import CRITERIA

QUICK = ["--samples", "2", "--timesteps", "2", "--batch-size", "2", "--directions", "1"]


@pytest.fixture(scope="module")
def source(pipeline: Path, images: Path) -> list[str]:
    return ["--model", str(pipeline), "--data", str(images)]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_writes_a_gate_file_with_its_importances(
    source: list[str], tmp_path: Path, criterion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", criterion, "--scope", "mid+ff", "--output", str(output)]
    assert score.main([*source, *options, *QUICK, "--target-sparsity", "0.5"]) == 0
    gates = load_gates(output)
    assert gates.sparsity == pytest.approx(0.5, abs=0.05)
    assert gates.info["criterion"] == criterion and len(gates.scores) == 5
    assert set(gates.importances) == set(gates.scores) == set(gates.constants)
    for site, values in gates.importances.items():  # within a site the order is the criterion's
        order = gates.scores[site][values.argsort()]
        assert bool((order[1:] >= order[:-1]).all())
    printed = capsys.readouterr().out
    assert str(output) in printed
    table = "| layer | type | parameters | non-zero | sparsity |"
    assert (table in printed) == (criterion in ("sensitivity", "percentage"))


@pytest.mark.parametrize("budget", ["parameters", "flops"])
def test_a_budget_is_met(source: list[str], tmp_path: Path, budget: str) -> None:
    output = tmp_path / "gates.safetensors"
    options = ["--criterion", "random", "--scope", "all+ff", "--budget", budget]
    assert score.main([*source, *options, *QUICK, "--output", str(output)]) == 0
    assert load_gates(output).info["achieved_budget"] == pytest.approx(0.3, abs=0.03)


def test_a_threshold_decides_instead_of_a_target(source: list[str], tmp_path: Path) -> None:
    found = []
    for criterion, threshold in (("sensitivity", "0.8"), ("percentage", "25")):
        output = tmp_path / f"{criterion}.safetensors"
        options = ["--criterion", criterion, "--threshold", threshold, "--output", str(output)]
        assert score.main([*source, *options, *QUICK]) == 0
        found.append(load_gates(output))
    assert all(int(keep.sum()) == 24 for keep in found[1].keep_sets().values())  # 32 channels
    wanted = sum(int((v >= 0.8).sum()) for v in found[0].importances.values())
    kept = sum(int(keep.sum()) for keep in found[0].keep_sets().values())
    assert abs(kept - wanted) <= 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criterion", "taylor", "--threshold", "1"], "only with criterion sensitivity"),
        (["--criterion", "taylor", "--scope", "sides"], "unknown scope or site 'sides'"),
        (["--criterion", "taylor", "--target-sparsity", "1.5"], "from 0 up to 1"),
        (["--criterion", "taylor", "--output", "gates.txt"], "ending in .safetensors"),
    ],
)
def test_bad_options_are_answered(
    source: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*source, *QUICK, *options]
    given += [] if "--output" in options else ["--output", "unused.safetensors"]
    assert score.main(given) == 1
    assert message in capsys.readouterr().err
    assert not Path("unused.safetensors").exists()


def test_ranks_share_a_place_where_the_difference_may_be_chance() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(200)
    close = base + generator.normal(0, 0.1, 200)
    found = evaluate.ranks({"far": base + 1, "a": base, "b": close - close.mean() + base.mean()})
    assert found["a"] == found["b"] == 1 and found["far"] == 3


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = evaluate.bootstrap(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_losses_are_told_by_part_of_the_schedule() -> None:
    values, timesteps = np.array([1.0, 3.0, 10.0]), np.array([0, 199, 999])
    assert evaluate.by_timestep(values, timesteps, 1000) == [2.0, None, None, None, 10.0]


def test_image_metrics_agree_with_scikit_image() -> None:
    pytest.importorskip("torchmetrics")
    metrics = pytest.importorskip("skimage.metrics")
    generator = np.random.default_rng(0)
    one = generator.random((64, 48, 3)).astype(np.float32)
    two = np.clip(one + 0.1 * generator.normal(size=one.shape), 0, 1).astype(np.float32)
    of, _ = evaluate.image_metrics()
    a, b = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in (one, two))
    psnr = metrics.peak_signal_noise_ratio(two, one, data_range=1)
    assert float(of["PSNR"](a, b)) == pytest.approx(psnr, rel=1e-4)
    ssim = metrics.structural_similarity(
        one,
        two,
        channel_axis=2,
        data_range=1,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert float(of["SSIM"](a, b)) == pytest.approx(ssim, abs=2e-3)


def test_a_sweep_makes_what_is_missing_and_ends_in_one_table(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--criteria", "learned", "random", "--targets", "0.3", "--budget", "channels"]
    options += ["--weights", "0.01", "--steps", "3", "--samples", "2", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["learned_0.01_mid_30.safetensors", "random_global_mid_30.safetensors"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]][1:] == [Path(name).stem for name in files]
    assert result["rows"][0]["parameters_left"] == 1 > result["rows"][2]["parameters_left"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    assert "| random_global_mid_30 | random | mid |" in capsys.readouterr().out

    assert sweep.main([*source, *options]) == 0  # everything is there
    assert {p: p.stat().st_mtime_ns for p in times} == times
    options[options.index("0.3")] = "0.5"
    assert sweep.main([*source, *options]) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_images_are_drawn_once_and_compared(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gates, folder = tmp_path / "half.safetensors", tmp_path / "images"
    options = ["--criterion", "random", "--scope", "all+ff", "--target-sparsity", "0.5"]
    assert score.main([*source, *QUICK, *options, "--output", str(gates)]) == 0
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a face\n\na dog's face\n", encoding="utf-8")
    drawing = ["--images", str(folder), "--prompts", str(prompts), "--steps", "2"]
    given = [str(gates), *source, *drawing, "--samples", "2", "--output", str(tmp_path / "e")]
    assert evaluate.main(given) == 0
    paths = sorted(folder.glob("*/*.png"))
    assert [str(p.relative_to(folder).as_posix()) for p in paths] == [
        "dense/000_42.png",
        "dense/001_43.png",
        "half/000_42.png",
        "half/001_43.png",
    ]
    with Image.open(paths[3]) as image:
        assert image.text["prompt"] == "a dog's face" and image.text["gates"] == "half"
    assert paths[0].read_bytes() != paths[2].read_bytes()
    assert (tmp_path / "e.grid.png").exists()
    if evaluate.image_metrics()[0]:
        assert "| half | PSNR |" in capsys.readouterr().out

    stamps = [path.stat().st_mtime_ns for path in paths]
    shared = ["--gates", str(gates), "--prompts", str(prompts), "--output", str(folder)]
    assert sample.main([*source[:2], *shared, "--seeds", "42", "--steps", "2"]) == 0
    assert paths[0].stat().st_mtime_ns == stamps[0]  # prompt 0 with seed 42 is there already


def test_gates_of_another_model_are_refused(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ldcp_core import SD15, Gates, save_gates

    path = tmp_path / "full.safetensors"
    save_gates(Gates({s.name: torch.ones(s.channels) for s in SD15.sites()}), path)
    assert evaluate.main([str(path), *source, "--samples", "2"]) == 1
    assert "The gates were made for Topology(widths=(320" in capsys.readouterr().err


def test_a_sweep_measures_once_for_all_cuts(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], score.measure
    monkeypatch.setattr(sweep, "measure", lambda config: measured.append(config) or measure(config))
    options = ["--criteria", "flap", "--targets", "0.3", "0.5", "--rankings", "global", "per layer"]
    options += ["--samples", "2", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    assert len(measured) == 1 and len(list(tmp_path.glob("*.safetensors"))) == 4
    alone = tmp_path / "alone.safetensors"
    options = ["--criterion", "flap", "--target-sparsity", "0.5", "--budget", "parameters"]
    assert score.main([*source, *options, "--ranking", "per layer", "--output", str(alone)]) == 0
    swept = load_gates(tmp_path / "flap_per-layer_mid_50.safetensors")
    for site, scores in load_gates(alone).scores.items():
        assert torch.equal(scores, swept.scores[site])
