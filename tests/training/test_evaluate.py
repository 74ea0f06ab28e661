"""evaluate, from its command line, and what it says about numbers."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from ldcp_core import SD15, Gates, Stage, load_gates, save_gates
from training import evaluate, fit, sample, score
from training.data.encoding import FreshImages
from training.data.images import open_dataset
from training.errors import UserError
from training.evaluation.plots import panels_of
from training.evaluation.report import COLUMNS
from training.evaluation.statistics import SECTIONS, bootstrap, by_timestep, ranks

QUICK = ["--samples", "2", "--timesteps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def half(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates that prune half of all layers at random."""
    path = tmp_path_factory.mktemp("gates") / "half.safetensors"
    options = ["--criterion", "random", "--scope", "all+ff", "--target-sparsity", "0.5"]
    assert score.main([*source, *QUICK, *options, "--output", str(path)]) == 0
    return path


def test_ranks_share_a_place_where_the_difference_may_be_chance() -> None:
    generator = np.random.default_rng(0)
    base = generator.random(200)
    close = base + generator.normal(0, 0.1, 200)
    found = ranks({"far": base + 1, "a": base, "b": close - close.mean() + base.mean()})
    assert found["a"] == found["b"] == 1 and found["far"] == 3


def test_the_interval_of_a_mean_is_about_two_standard_errors() -> None:
    values = np.random.default_rng(1).normal(5, 2, 400)
    low, high = bootstrap(values)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)


def test_losses_are_told_by_part_of_the_schedule() -> None:
    values, timesteps = np.array([1.0, 3.0, 10.0]), np.array([0, 199, 999])
    assert by_timestep(values, timesteps, 1000) == [2.0, None, None, None, 10.0]


def test_images_are_drawn_once_and_compared(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, prompts = tmp_path / "images", tmp_path / "prompts.txt"
    prompts.write_text("a face\n\na dog's face\n", encoding="utf-8")
    drawing = ["--images", str(folder), "--prompts", str(prompts), "--steps", "2"]
    given = [str(half), *source, *drawing, "--samples", "2", "--output", str(tmp_path / "e")]
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
    printed = capsys.readouterr().out
    assert "| half | L1 |" in printed and "diversity within a prompt needs --seeds 2" in printed

    stamps = [path.stat().st_mtime_ns for path in paths]
    shared = ["--gates", str(half), "--prompts", str(prompts), "--output", str(folder)]
    assert sample.main([*source[:2], *shared, "--seeds", "42", "--steps", "2"]) == 0
    assert paths[0].stat().st_mtime_ns == stamps[0]  # prompt 0 with seed 42 is there already


def test_more_seeds_add_images_and_show_diversity(
    source: list[str], half: Path, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a face\na dog's face\n", encoding="utf-8")
    drawing = ["--images", str(tmp_path / "i"), "--prompts", str(prompts), "--steps", "1"]
    given = [str(half), *source, *drawing, "--samples", "2", "--output", str(tmp_path / "e")]
    assert evaluate.main(given) == 0
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "i").glob("*/*.png")}
    assert evaluate.main([*given, "--seeds", "2"]) == 0
    names = sorted(path.name for path in (tmp_path / "i" / "half").glob("*.png"))
    assert names == ["000_42.png", "001_43.png", "002_44.png", "003_45.png"]
    assert all(path.stat().st_mtime_ns == when for path, when in first.items())
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    of_dense = found["images"]["dense"]["diversity (L1)"]

    def pixels(name: str) -> np.ndarray:
        with Image.open(tmp_path / "i" / "dense" / name) as image:
            return np.asarray(image, dtype=float) / 255

    face, dog = (abs(pixels(names[i]) - pixels(names[i + 2])).mean() for i in (0, 1))
    assert of_dense["minimum"] == pytest.approx(min(face, dog), rel=1e-5)
    assert of_dense["mean"] == pytest.approx((face + dog) / 2, rel=1e-5)
    with Image.open(tmp_path / "e.grid.png") as grid:
        assert grid.width == 2 * 16  # a column per prompt, however many seeds


def test_every_model_is_measured_in_every_precision_against_dense_in_the_first(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torchao")
    output = ["--samples", "2", "--output", str(tmp_path / "e")]
    precisions = ["--precision", "fp32", "bf16", "fp8", "int8"]
    assert evaluate.main([str(half), *source, *precisions, *output]) == 0
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in found["rows"]}
    others = [f"{name}-{p}" for p in ("bf16", "fp8", "int8") for name in ("dense", "half")]
    assert list(rows) == ["dense", "half", *others]
    assert "deviation" not in rows["dense"] and found["reference_precision"] == "fp32"
    for p in ("bf16", "fp8", "int8"):
        dense, pruned = rows[f"dense-{p}"], rows[f"half-{p}"]
        assert 0 < dense["deviation"]["mean"] < pruned["deviation"]["mean"]
        assert pruned["bytes"] < dense["bytes"] < rows["dense"]["bytes"]
        assert pruned["bytes"] < rows["half"]["bytes"]
        assert pruned["parameters_left"] == rows["half"]["parameters_left"] < 1
    assert all(row["seconds"] > 0 for row in rows.values())
    printed = capsys.readouterr().out
    assert "| half-int8 | int8 | random | all+ff |" in printed
    assert "pruned first, then cast or quantized" in printed


def test_the_first_precision_is_the_reference(source: list[str], tmp_path: Path) -> None:
    found = []
    for precisions in (["fp32", "fp8"], ["fp8", "fp32"]):
        output = ["--samples", "2", "--output", str(tmp_path / "e"), "--precision", *precisions]
        assert evaluate.main([*source, *output]) == 0
        rows = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["rows"]
        assert rows[0]["precision"] == precisions[0] and "deviation" not in rows[0]
        found.append(rows[1]["deviation"]["mean"])
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0  # either way the same


def test_unstructured_pruning_stands_beside_the_gates(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--samples", "2", "--output", str(tmp_path / "e")]
    kinds = ["--unstructured", "l1=0.3", "sensitivity=0.5,1"]
    assert evaluate.main([str(half), *source, *kinds, *output]) == 0
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    dense, gates, l1, low, high = found["rows"]
    assert l1["name"] == "unstructured-l1-0.3" and l1["sparsity"] == pytest.approx(0.3, abs=0.02)
    assert l1["parameters_left"] == 1 and l1["bytes"] == dense["bytes"] > gates["bytes"]
    assert gates["sparsity"] == 1 - gates["parameters_left"] > 0
    assert 0 < low["sparsity"] < high["sparsity"]
    assert 0 < low["deviation"]["mean"] < high["deviation"]["mean"]
    zeros = sum(row["parameters"] - row["nonzero"] for row in l1["layers"])
    assert zeros == pytest.approx(0.3 * sum(row["parameters"] for row in l1["layers"]), abs=1)
    assert {row["rank"] for row in found["rows"][1:]} <= {1, 2, 3, 4}
    assert "saves neither time nor memory" in capsys.readouterr().out


def test_what_a_gate_file_says_and_is_called_forges_no_row_and_draws_no_formula(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "x | | dense | fp32 | 0 | [a](http://b) <b> `c` $\\frac{$" + "y" * 9000
    gates = load_gates(half)
    name = "a|b\x1b[31m\n**c**" if os.name == "posix" else "a"
    path = tmp_path / f"{name}.safetensors"
    save_gates(replace(gates, info={**gates.info, "criterion": bad, "scope": bad}), path)
    output = tmp_path / "found"
    options = ["--samples", "2", "--output", str(output)]
    assert evaluate.main([str(path), *source, *options]) == 0
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert capsys.readouterr().out.startswith(text)
    lines = text.split("\n")
    assert all(line.isprintable() and len(line) < 2000 for line in lines)
    rows = [re.split(r"(?<!\\)\|", line) for line in lines if line.startswith("|")]
    assert [len(row) for row in rows] == [len(COLUMNS) + 2] * 4 + [SECTIONS + 3] * 4
    assert not re.search(r"(?<!\\)[<`\[*]", text.partition("| gates |")[2].partition("%)")[0])
    save_gates(replace(gates, info={**gates.info, "criterion": f"{bad}\n\x1b[2J"}), path)
    assert evaluate.main([str(path), *source, *options]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "says that its criterion is" in said[-3]
    assert all(line.isprintable() and len(line) < 500 for line in said[-3:])


def test_gates_that_say_nothing_of_themselves_are_evaluated(
    source: list[str], half: Path, tmp_path: Path
) -> None:
    path, output = tmp_path / "bare.safetensors", tmp_path / "found"
    save_gates(replace(load_gates(half), info={}), path)
    assert evaluate.main([str(path), *source, "--samples", "2", "--output", str(output)]) == 0
    assert "| bare | fp32 | unknown | unknown |" in output.with_suffix(".md").read_text("utf-8")


def test_panels_show_equal_sparsity_and_bytes() -> None:
    def row(criterion: str, scope: str, precision: str, zeroed: bool = False) -> dict[str, object]:
        words = {"criterion": criterion, "scope": scope, "precision": precision}
        return {**words, "zeroed": zeroed, "sparsity": 0.3, "parameters_left": 0.7, "bytes": 2**20}

    found = panels_of(
        [row("taylor", "mid", "fp32"), row("unstructured l1", "", "fp32", True)], False
    )
    assert [panel.title for panel in found] == ["scope mid", "structured beside unstructured"]
    assert list(found[0].lines) == ["taylor"]
    assert list(found[1].lines) == ["taylor mid", "unstructured l1"]
    assert {found[1].x(r) for of in found[1].lines.values() for r in of} == {30}
    found = panels_of([row("taylor", "mid", "fp32"), row("dense", "", "int8")], True)
    assert [panel.title for panel in found] == ["scope mid", "pruned, then cast or quantized"]
    assert list(found[1].lines) == ["taylor mid fp32", "dense int8"]
    assert found[1].x(row("taylor", "mid", "fp32")) == 1


def test_images_of_other_gates_of_the_same_name_are_drawn_again(
    source: list[str], half: Path, tmp_path: Path
) -> None:
    drawing = ["--steps", "1", "--output", str(tmp_path), "--prompts", str(tmp_path / "p.txt")]
    (tmp_path / "p.txt").write_text("a face\n", encoding="utf-8")
    image = tmp_path / "half" / "000_42.png"
    assert sample.main([*source[:2], "--gates", str(half), *drawing]) == 0
    first = image.read_bytes()
    assert sample.main([*source[:2], "--gates", str(half), *drawing, "--precision", "fp8"]) == 0
    second = image.read_bytes()
    assert second != first
    other = tmp_path / "half.safetensors"
    options = ["--criterion", "random", "--seed", "1", "--output", str(other)]
    assert score.main([*source, *QUICK, *options]) == 0
    assert sample.main([*source[:2], "--gates", str(other), *drawing, "--precision", "fp8"]) == 0
    assert image.read_bytes() != second


def test_images_of_another_model_of_the_same_name_are_drawn_again(
    pipeline: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a face\n", encoding="utf-8")
    drawing = ["--steps", "1", "--output", str(tmp_path), "--prompts", str(tmp_path / "p.txt")]
    other = shutil.copytree(pipeline, tmp_path / pipeline.name)
    unet = UNet2DConditionModel.from_pretrained(other / "unet")
    with torch.no_grad():
        unet.conv_out.bias += 1
    unet.save_pretrained(other / "unet")
    found = []
    for model in (pipeline, other):
        assert sample.main(["--model", str(model), *drawing]) == 0
        found.append((tmp_path / "dense" / "000_42.png").read_bytes())
    assert found[0] != found[1]


def test_images_are_drawn_and_compared_at_the_resolution_asked_for(
    source: list[str], half: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("a face\n", encoding="utf-8")
    drawing = ["--steps", "1", "--prompts", str(tmp_path / "p.txt")]
    options = [*drawing, "--images", str(tmp_path / "i"), "--samples", "2"]
    options += ["--output", str(tmp_path / "e")]
    image = tmp_path / "i" / "half" / "000_42.png"
    for asked, side in (([], 16), (["--resolution", "32"], 32)):
        assert evaluate.main([str(half), *source, *options, *asked]) == 0
        found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
        assert Image.open(image).size == (side, side)
        assert found["reference"]["resolution"] == side
    there = ["--gates", str(half), *drawing, "--output", str(tmp_path / "i")]
    assert sample.main([*source[:2], *there, "--resolution", "33"]) == 1
    assert sample.main([*source[:2], *there]) == 0  # not those of another size
    assert Image.open(image).size == (16, 16)


def test_each_of_several_processes_draws_on_a_device_of_its_own(
    source: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    class Second:
        device = torch.device("cuda", 1)

    def load(model: str, device: object) -> None:
        asked.append(device)
        raise UserError("loaded")

    monkeypatch.setattr(sample.Processes, "launched", classmethod(lambda cls, cpu: Second))
    monkeypatch.setattr(sample, "load_model", load)
    assert sample.main([*source[:2], "--output", str(tmp_path)]) == 1
    assert asked == [Second.device]


def test_gates_of_another_model_are_refused(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "full.safetensors"
    save_gates(Gates({s.name: torch.ones(s.channels) for s in SD15.sites()}), path)
    assert evaluate.main([str(path), *source, "--samples", "2"]) == 1
    assert "The gates were made for Stable Diffusion 1.5 (widths 320" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--resolution", "0"], "--resolution is 0"),
        (["--guidance", "nan"], "--guidance is nan"),
        (["--unstructured", "l2"], "l1, sensitivity, percentage"),
        (["--reference", "x"], "--reference given without --images"),
        (["--resolution", "33"], "--resolution is 33"),
        (["--baselines"], "--baselines was given without learned gates"),
        (["--rivals", "obs"], "--rivals was given without learned gates"),
        (["--images", "i", "--inception", "no.pt"], "There is no no.pt."),
        (["--images", "i", "--reference", "no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_options_are_answered(
    source: list[str],
    half: Path,
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert evaluate.main([str(half), *source, *options]) == 1
    assert message in capsys.readouterr().err
    assert not Path("i").exists()


@pytest.fixture
def held_out(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Which images evaluations take; without evaluating anything."""
    found: list[list[int]] = []

    def see(self: FreshImages, indices: list[int], *_: object, **options: object) -> None:
        found.append(list(indices))
        raise ValueError("seen")

    monkeypatch.setattr(FreshImages, "batches", see)
    return found


def test_gates_of_several_seeds_meet_images_that_none_was_trained_on(
    source: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    short_fits: None,
    no_pictures: None,
    held_out: list[list[int]],
) -> None:
    trained: list[set[int]] = []
    opened = fit._opened

    def see(config: object) -> object:
        data, train, rest = opened(config)
        trained.append(set(train))
        return data, train, []  # nothing to validate

    monkeypatch.setattr(fit, "_opened", see)
    files = [str(tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    for seed, file in enumerate(files, 1):
        short = ["--max-steps", "1", "--seed", str(seed), "--output", file]
        assert fit.main([*source, "--batch-size", "2", *short]) == 0
    assert evaluate.main([*files, *source]) == 1
    assert held_out[0] and not set(held_out[0]) & (trained[0] | trained[1])


def described(half: Path, path: Path, info: dict[str, object]) -> str:
    """The same gates with another description."""
    save_gates(replace(load_gates(half), info=info), path)
    return str(path)


def test_the_split_is_that_of_the_gates_own_settings(
    source: list[str],
    half: Path,
    tmp_path: Path,
    held_out: list[list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = open_dataset(source[3])

    def file(name: str, info: dict[str, object]) -> str:
        return described(half, tmp_path / f"{name}.safetensors", info)

    seeded = file("a", {"config": {"seed": 3, "validation_fraction": 0.4}})
    written = file("b", {"held_out": {"fraction": 0.4, "seed": 0}, "config": {"seed": 9}})
    streamed = file("c", {"held_out": {"rows": 5}})
    stream = {"streaming": True, "validation_fraction": 0, "validation_samples": 64}
    whole = file("f", {"config": stream})
    nobody = file("d", {})
    everything = file("e", {"config": {"validation_fraction": 0}})
    for files in ([seeded], [written], [streamed], [nobody], [seeded, written]):
        assert evaluate.main([*files, *source]) == 1
    by_seed, by_word = images.split(0.4, 3)[1], images.split(0.4, 0)[1]
    both = sorted(set(by_seed) & set(by_word))
    assert held_out == [by_seed, by_word, [0, 1, 2, 3, 4], images.split(0.1, 0)[1], both]
    for files in ([seeded, everything], [whole]):
        assert evaluate.main([*files, *source]) == 1
        assert "was held out by all of these gates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"config": [1]}, "its config is [1]"),
        ({"config": {"validation_fraction": "a"}}, "its fraction is 'a'"),
        ({"config": {"validation_fraction": 2}}, "its fraction is 2"),
        ({"config": {"seed": [0]}}, "its seed is [0]"),
        ({"held_out": {"rows": -1}}, "its rows is -1"),
        ({"scope": ["mid"]}, "its scope is ['mid']"),
        ({"criterion": "taylor\n| forged | row |"}, r"its criterion is 'taylor\n| forged"),
        ({"target_sparsity": "x" * 10**5}, "its target_sparsity is 'xxxxxxxxxxxx...xxx"),
    ],
)
def test_what_a_file_says_of_itself_is_checked_like_an_argument(
    source: list[str],
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    info: dict[str, object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    file = described(half, tmp_path / "odd.safetensors", info)
    assert evaluate.main([file, *source]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and len(said) < 500


def test_a_files_words_make_no_cells(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = {"criterion": "a | b <img src=x>", "config": {"resolution": 20000}}
    file = described(half, tmp_path / "odd.safetensors", info)
    assert evaluate.main([file, *source, "--samples", "2"]) == 0
    assert r"| odd | fp32 | a \| b \<img src=x\> |" in capsys.readouterr().out


def test_a_deviation_that_rounding_makes_is_said_to_be_one(
    source: list[str], half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = {site: torch.ones_like(score) for site, score in load_gates(half).scores.items()}
    scores["mid_block.resnets.0.conv1"][0] = 0.0  # one channel of all
    gates = replace(load_gates(half), scores=scores, importances={}, corrections={})
    save_gates(gates, tmp_path / "little.safetensors")
    files = [str(half), str(tmp_path / "little.safetensors")]
    for precisions in (["bf16"], ["fp32", "bf16"]):
        output = ["--precision", *precisions, "--samples", "2", "--output", str(tmp_path / "e")]
        assert evaluate.main([*files, *source, *output]) == 0
        found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
        rounded = [row for row in found["rows"] if row["precision"] == "bf16" and row["scope"]]
        assert len(rounded) == 2 and all(row["rounding"] > 0 for row in rounded)
        (note,) = found["notes"]
        assert note.startswith(rounded[1]["name"]) and "compare in fp32" in note
        assert note in capsys.readouterr().out


def test_cheap_choices_stand_beside_learned_gates(
    source: list[str],
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.evaluation.baselines.SAMPLES", 4)
    info = {**load_gates(given).info, "criterion": "learned"}
    file = described(given, tmp_path / "mine.safetensors", info)
    output = ["--samples", "2", "--output", str(tmp_path / "e"), "--baselines"]
    assert evaluate.main([file, *source, *output]) == 0
    rows = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["rows"]
    cheap = [row for row in rows if row["beside"] == "mine"]
    assert len(cheap) == 8 and cheap[0]["criterion"] == "own-effect, per site"
    assert {row["channels_pruned"] for row in cheap} == {rows[1]["channels_pruned"]}
    times = cheap[0]["deviation"]["mean"] / rows[1]["deviation"]["mean"]
    printed = capsys.readouterr().out
    assert "Beside mine: as many channels chosen by cheaper means" in printed
    line = next(x for x in printed.splitlines() if x.startswith("| own-effect, per site |"))
    assert line.endswith(f"| {times:.2f} | {cheap[0]['rank']} |")


def test_rivals_stand_in_the_table_with_their_images(
    source: list[str],
    given: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("training.evaluation.rivals.SAMPLES", 4)
    monkeypatch.setattr("training.evaluation.rivals.TIMESTEPS", 2)
    file = described(given, tmp_path / "mine.safetensors", {"criterion": "learned", "scope": "all"})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a face\na dog's face\n", encoding="utf-8")
    drawing = ["--images", str(tmp_path / "i"), "--prompts", str(prompts), "--steps", "2"]
    asked = ["--rivals", "structural", "obs", "--fine-tune-steps", "1", "--samples", "2"]
    output = ["--output", str(tmp_path / "e")]
    assert evaluate.main([file, *source, *drawing, *asked, *output]) == 0
    found = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))
    mine = found["rows"][1]
    others = [row for row in found["rows"] if row["beside"] == "mine"]
    kinds = [f"{kind}, {how}" for how in ("per layer", "global") for kind in ("structural", "obs")]
    assert [row["criterion"] for row in others] == kinds
    for row in others:
        assert row["parameters_left"] == pytest.approx(mine["parameters_left"], abs=0.01)
        assert row["deviation"]["mean"] > 0 and row["bytes"] < found["rows"][0]["bytes"]
        assert found["images"][row["name"]]["L1"]["mean"] > 0
    printed = capsys.readouterr().out
    lines = [x for x in printed.splitlines() if x.startswith(("| obs, ", "| structural, "))]
    assert len(lines) == 4 and all(line.count("|") == 8 for line in lines)
    assert "| rank | L1 | VAE features |" in printed
    with Image.open(tmp_path / "e.grid.png") as grid:
        assert grid.height == 20 + 6 * (16 + 18)  # dense, mine and four rivals


def test_nothing_to_compare_is_answered(
    source: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate.main(source) == 1
    assert "nothing to compare the dense model with" in capsys.readouterr().err


def test_gates_with_stages_are_measured_stage_by_stage(
    source: list[str], half: Path, tmp_path: Path
) -> None:
    gates = replace(load_gates(half), importances={}, corrections={})
    early, late = Stage(0.0, 0.25), Stage(0.4, None)
    variants = {"quarter": (replace(early, start=0.0),), "half": (), "staged": (early, late)}
    files = []
    for name, stages in variants.items():
        files.append(str(tmp_path / f"{name}.safetensors"))
        save_gates(replace(gates, stages=stages), Path(files[-1]))
    output = ["--samples", "12", "--output", str(tmp_path / "e")]
    assert evaluate.main([*files, *source, *output]) == 0
    rows = json.loads((tmp_path / "e.json").read_text(encoding="utf-8"))["rows"]
    quarter, whole, staged = rows[1:]
    times = np.array([quarter["deviation_by_timestep"], whole["deviation_by_timestep"]], float)
    # fifths of the schedule from the image on: three in the late stage, two in the early one
    assert staged["deviation_by_timestep"] == [*times[1, :3], *times[0, 3:]]
    assert staged["bytes"] == quarter["bytes"] > whole["bytes"]
    for cost in ("channels_pruned", "flops_left"):
        assert staged[cost] == pytest.approx(0.4 * quarter[cost] + 0.6 * whole[cost])
    assert staged["parameters_left"] == quarter["parameters_left"]


def test_what_can_not_be_drawn_is_refused_before_anything_is_measured(
    source: list[str],
    half: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "load_model", lambda *_, **__: pytest.fail("too late"))
    gates = replace(load_gates(half), stages=(Stage(0.0, 0.25), Stage(0.5, None)))
    staged = tmp_path / "staged.safetensors"
    save_gates(gates, staged)
    options = ["--precision", "fp32", "fp8", "--images", str(tmp_path / "images")]
    assert evaluate.main([str(staged), *source, *options]) == 1
    assert "staged-fp8 has stages, and can't be drawn" in capsys.readouterr().err


def test_what_keeps_the_same_channels_is_compared_with_others_once(half: Path) -> None:
    gates = load_gates(half)
    learned = replace(gates, info={"criterion": "learned"})
    other = {site: score.flip(0) for site, score in gates.scores.items()}
    given = {
        "cheap": gates,
        "a": learned,
        "a recovered": replace(learned, corrections={}, constants={}),
        "in stages": replace(learned, stages=(Stage(0.0, None), Stage(0.5, 0.7))),
        "b": replace(learned, scores=other),
    }
    assert evaluate.to_stand_beside(given) == ["a", "b"]
