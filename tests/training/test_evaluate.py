"""evaluate, from its command line, and what it says about numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldcp_core import SD15, Gates, save_gates
from training import evaluate, sample, score
from training.evaluation.statistics import bootstrap, by_timestep, ranks

QUICK = ["--samples", "2", "--timesteps", "2", "--batch-size", "2"]


@pytest.fixture(scope="module")
def source(pipeline: Path, images: Path) -> list[str]:
    return ["--model", str(pipeline), "--data", str(images)]


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


def test_gates_of_another_model_are_refused(
    source: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "full.safetensors"
    save_gates(Gates({s.name: torch.ones(s.channels) for s in SD15.sites()}), path)
    assert evaluate.main([str(path), *source, "--samples", "2"]) == 1
    assert "The gates were made for Topology(widths=(320" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds is 0"),
        (["--reference", "x"], "--reference given without --images"),
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
