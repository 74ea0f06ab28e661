"""sweep, from its command line."""

from __future__ import annotations

import io
import json
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ldcp_core import load_gates, save_gates
from training import recover, score, stages, sweep
from training.config import FitConfig
from training.evaluation.plots import Cell, heat_map
from training.learning.loop import Learning
from training.provenance import derived
from training.score import ScoreConfig

Config = FitConfig | ScoreConfig
INNER = "mid_block.resnets.0.conv1"


@pytest.fixture(autouse=True)
def quick(short_fits: None, no_pictures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a fit measures and draws is not what is tested, nor on how many images a score is."""
    whole = sweep.config_of

    def short(*given: Any) -> Config:
        found = whole(*given)
        few = {"samples": 4, "timesteps": 5}
        return replace(found, **few) if isinstance(found, ScoreConfig) else found

    monkeypatch.setattr(sweep, "config_of", short)


def test_a_sweep_makes_what_is_missing_and_ends_in_one_table(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--criteria", "learned", "random", "--targets", "0.3", "--budget", "channels"]
    options += ["--weights", "0.01", "--max-steps", "3", "--samples", "2"]
    options += ["--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["learned_0.01_mid_30.safetensors", "random_global_mid_30.safetensors"]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in result["rows"]][1:] == [Path(name).stem for name in files]
    assert result["rows"][0]["parameters_left"] == 1 > result["rows"][2]["parameters_left"]
    assert (tmp_path / "evaluation.png").stat().st_size > 10_000
    assert "| random_global_mid_30 | fp32 | random | mid |" in capsys.readouterr().out

    assert sweep.main([*source, *options]) == 0  # everything is there
    assert {p: p.stat().st_mtime_ns for p in times} == times
    options[options.index("0.3")] = "0.5"
    assert sweep.main([*source, *options]) == 0
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_sweep_stopped_within_a_fit_goes_on_with_it(
    source: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps: list[int] = []
    advance = Learning.advance

    def stopped(self: Learning) -> None:
        if not steps:
            signal.raise_signal(signal.SIGINT)
        steps.append(self.step)
        advance(self)

    monkeypatch.setattr(Learning, "advance", stopped)
    monkeypatch.setattr(sweep.evaluate, "main", lambda _: 0)
    options = [*source, "--max-steps", "3", "--output", str(tmp_path)]
    assert sweep.main(options) == 130
    error = capsys.readouterr().err.rstrip()
    assert error.endswith("Stopped after step 1 of 3. The same command goes on.")
    assert sweep.main(options) == 0
    assert steps == [0, 1, 2] and (tmp_path / "learned_mid_30.safetensors").is_file()


def test_all_of_a_sweep_has_the_device_and_resolution_asked_for(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(sweep, "make", lambda config, _: made.append(config))
    monkeypatch.setattr(sweep.evaluate, "main", lambda _: 0)
    monkeypatch.setattr(recover, "recover", made.append)
    monkeypatch.setattr(stages, "stage", made.append)
    options = ["--criteria", "learned", "random", "--variants", "recovered", "stages"]
    options += ["--output", str(tmp_path), "--device", "cpu:0", "--resolution", "64"]
    assert sweep.main([*source, *options]) == 0
    fitted, scored, recovered, staged = made
    assert [config.device for config in made] == ["cpu:0"] * 4
    sizes = [config.resolution for config in (fitted, scored, recovered, staged.settings)]
    assert sizes == [64] * 4


def test_what_is_asked_for_twice_is_made_and_compared_once(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[list[str]] = []
    monkeypatch.setattr(sweep, "make", lambda *_: None)
    monkeypatch.setattr(sweep, "make_variant", lambda kind, of, *_: sweep.variant_of(kind, of))
    monkeypatch.setattr(sweep.evaluate, "main", lambda argv: compared.append(argv) or 0)
    options = ["--criteria", "learned", "learned", "--targets", "0.3", "0.30"]
    options += ["--variants", "plain", "plain", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    files = [Path(word).name for word in compared[0] if word.endswith(".safetensors")]
    assert files == ["learned_mid_30.safetensors", "learned_mid_30_plain.safetensors"]


def test_variants_of_learned_gates_stand_in_the_same_table(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[float] = []

    def in_two(config: stages.StagesConfig) -> None:
        searched.append(config.settings.guidance)
        found = stages.in_stages(load_gates(config.gates), (0.1, 0.5))
        save_gates(replace(found, info={**found.info, "stages": derived(config)}), config.output)

    quickly = partial(recover.RecoverConfig, steps=2, samples=32)
    monkeypatch.setattr(recover, "RecoverConfig", quickly)
    monkeypatch.setattr(recover, "CLOSED_FORM_SAMPLES", 20)
    monkeypatch.setattr(stages, "stage", in_two)
    options = ["--scopes", "mid+ff", "--max-steps", "3", "--samples", "4"]
    options += ["--variants", "plain", "recovered", "stages-recovered", "stages"]
    options += ["--correction-rank", "4", "--seed", "2", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 0
    result = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))
    names = [row["name"].removeprefix("learned_mid+ff_30") for row in result["rows"]]
    assert names == ["dense", "", "_plain", "_recovered", "_stages-recovered", "_stages"]
    learned, plain, recovered, both, staged = (
        load_gates(tmp_path / f"learned_mid+ff_30{name}.safetensors") for name in names[1:]
    )
    assert recovered.corrections and not plain.corrections
    assert torch.equal(plain.constants[INNER], learned.constants[INNER])
    assert "recovered" in recovered.info and "recovered" not in learned.info
    for made in (recovered.info["recovered"], staged.info["stages"]):
        assert made["correction_rank"] == 4 and made["seed"] == 2
    assert staged.stages == both.stages != () and "recovered" in both.info
    for site, constant in staged.constants.items():  # all stages share them
        assert torch.equal(constant, both.constants[site])

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert sweep.main([*source, *options]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    cut = tmp_path / "learned_mid+ff_30_plain.safetensors"
    cut.write_bytes(cut.read_bytes()[:-8])
    assert sweep.main([*source, *options]) == 0
    assert torch.equal(load_gates(cut).constants[INNER], plain.constants[INNER])
    assert sweep.main([*source, *options, "--guidance", "2"]) == 0
    assert searched == [7.5, 2.0]  # stages are of how images are drawn


def test_stages_that_can_not_be_drawn_are_refused_before_anything_is_made(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--variants", "stages-recovered", "--precision", "fp32", "int8"]
    options += ["--images", str(tmp_path / "images"), "--output", str(tmp_path / "sweep")]
    assert sweep.main([*source, *options]) == 1
    assert "can't be drawn with in int8" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Settings of a sweep whose gate files come from `random` in no time."""
    found: list[Config] = []

    def make(config: Config, measured: object) -> None:
        found.append(config)
        output = ["--output", config.output, "--scope", config.scope]
        share = ["--target-sparsity", str(config.target_sparsity), "--seed", str(len(found))]
        options = ["--criterion", "random", "--samples", "2", "--timesteps", "1", *share, *output]
        assert score.main(["--model", config.model, "--data", config.data, *options]) == 0

    monkeypatch.setattr(sweep, "make", make)
    return found


def test_targets_times_weights_give_a_heat_map(
    source: list[str], tmp_path: Path, made: list[Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(sweep, "heat_map", lambda cells: drawn.append(cells) or heat_map(cells))
    options = ["--targets", "0.3", "0.5", "--weights", "0.01", "0.02", "--samples", "2"]
    assert sweep.main([*source, *options, "--output", str(tmp_path)]) == 0
    assert len(made) == 4
    with Image.open(tmp_path / "heatmap.png") as picture:
        assert picture.width > 300 and picture.height > 200
    rows = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    (cells,) = drawn
    assert [(cell.target, cell.weight) for cell in cells] == [
        (0.3, 0.01),
        (0.3, 0.02),
        (0.5, 0.01),
        (0.5, 0.02),
    ]
    assert [cell.deviation for cell in cells] == [row["deviation"]["mean"] for row in rows[1:]]


def test_one_target_gives_no_heat_map(
    source: list[str], tmp_path: Path, made: list[Config]
) -> None:
    options = ["--weights", "0.01", "0.02", "--samples", "2", "--unstructured", "l1=0.3"]
    assert sweep.main([*source, *options, "--output", str(tmp_path)]) == 0
    assert not (tmp_path / "heatmap.png").exists()
    rows = json.loads((tmp_path / "evaluation.json").read_text(encoding="utf-8"))["rows"]
    assert rows[-1]["name"] == "unstructured-l1-0.3"  # the evaluation's options go through


def test_a_heat_map_of_several_scopes_is_one_picture() -> None:
    cells = [
        Cell(scope, target, weight, 10 ** -(5 * target), target)
        for scope in ("mid", "all+ff")
        for target in (0.1, 0.3, 0.5)
        for weight in (0.003, 0.01)
        if (scope, target) != ("mid", 0.5)  # a hole stays a hole
    ]
    with Image.open(io.BytesIO(heat_map(cells))) as picture:
        assert picture.width > picture.height


@pytest.mark.parametrize("deviation", [0.0, 1e-5])
def test_gates_that_prune_nothing_have_a_place_in_the_heat_map(deviation: float) -> None:
    cells = [Cell("mid", 0.0, 0.01, 0.0, 0.0), Cell("mid", 0.3, 0.01, deviation, 0.3)]
    with Image.open(io.BytesIO(heat_map(cells))) as picture:
        assert picture.width > 100


def test_thresholds_stand_in_for_targets(
    source: list[str], tmp_path: Path, made: list[Config]
) -> None:
    options = ["--criteria", "sensitivity", "random", "--targets", "0.3", "0.5", "--samples", "2"]
    options += ["--thresholds", "sensitivity=0.5,0.75", "--rankings", "per layer", "global"]
    assert sweep.main([*source, *options, "--output", str(tmp_path)]) == 0
    assert [(of.criterion, of.threshold, of.target_sparsity) for of in made] == [
        ("sensitivity", 0.5, 0.3),
        ("sensitivity", 0.75, 0.3),
        *[("random", None, target) for target in (0.3, 0.3, 0.5, 0.5)],
    ]
    assert Path(made[0].output).stem == "sensitivity_at-0.5_mid"


def test_a_threshold_reaches_the_score(source: list[str], tmp_path: Path) -> None:
    options = ["--criteria", "percentage", "--thresholds", "percentage=25", "--samples", "2"]
    assert sweep.main([*source, *options, "--output", str(tmp_path)]) == 0
    gates = load_gates(tmp_path / "percentage_at-25_mid.safetensors")
    assert all(int(keep.sum()) == 24 for keep in gates.keep_sets().values())  # of 32 channels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--criteria", "taylor", "--thresholds", "sensitivity=1"], "one of --criteria"),
        (["--criteria", "taylor", "--thresholds", "taylor=1"], "that has a threshold"),
        (["--criteria", "percentage", "--thresholds", "percentage=120"], "above 0 and below 100"),
        (["--seeds", "3", "--reference", "x"], "--reference given without --images"),
        (["--criteria", "random", "learned", "--max-steps", "0"], "--max-steps is 0"),
        (["--criteria", "random", "--targets", "0.3", "1.5"], "--target-sparsity is 1.5"),
    ],
)
def test_bad_options_are_answered_before_anything_is_made(
    source: list[str],
    tmp_path: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert sweep.main([*source, *options, "--output", str(tmp_path / "s")]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("s/*"))


def test_what_a_fit_would_write_over_is_answered_before_anything_is_made(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "learned_mid_30.html"
    page.write_text("somebody's page")
    options = ["--criteria", "random", "learned", "--output", str(tmp_path)]
    assert sweep.main([*source, *options]) == 1
    assert f"{page} is there already" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [page]


@pytest.mark.parametrize("options", [["--rankings", "best"], ["--no-such-option"]])
def test_unknown_options_are_refused(
    source: list[str], tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        sweep.main([*source, *options, "--output", str(tmp_path / "s")])
    assert options[0] in capsys.readouterr().err and not (tmp_path / "s").exists()


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
    options += ["--samples", "4", "--timesteps", "5"]
    assert score.main([*source, *options, "--ranking", "per layer", "--output", str(alone)]) == 0
    swept = load_gates(tmp_path / "flap_per-layer_mid_50.safetensors")
    for site, scores in load_gates(alone).scores.items():
        assert torch.equal(scores, swept.scores[site])
