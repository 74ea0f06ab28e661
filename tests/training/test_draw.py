"""Faces drawn in FFHQ's layout: as a fit reads them, and only once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.data.images import open_dataset
from training.demo import draw as module
from training.demo.draw import main


def run(folder: Path, images: int) -> int:
    return main(["--images", str(images), "--output", str(folder), "--size", "8", "--workers", "1"])


def test_a_fit_finds_the_faces_with_their_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PER_FOLDER", 2)
    assert run(tmp_path / "faces", 3) == 0
    data = open_dataset(str(tmp_path / "faces"), resolution=8)
    assert [record.id for record in data.records] == [
        "00000/00000.png", "00000/00001.png", "00002/00002.png",
    ]  # fmt: skip
    assert all(data.captions().values())
    assert len({data.pixels(i).sum().item() for i in range(3)}) == 3


def test_only_what_is_missing_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 2) == 0
    first = tmp_path / "00000" / "00000.png"
    first.write_bytes(b"left as it is")
    (tmp_path / "00000" / "00001.png").unlink()
    assert run(tmp_path, 3) == 0
    assert first.read_bytes() == b"left as it is"
    assert len(list(tmp_path.rglob("*.png"))) == 3
    assert (tmp_path / "metadata.jsonl").read_text().count("\n") == 3
    assert "3 images in" in capsys.readouterr().out


def test_grain_is_noise_of_that_size_and_always_the_same(tmp_path: Path) -> None:
    for name, grain in [("plain", "0"), ("grainy", "3"), ("again", "3")]:
        options = ["--output", str(tmp_path / name), "--grain", grain]
        assert main(["--images", "1", "--size", "64", "--workers", "1", *options]) == 0
    plain, grainy, again = (
        np.asarray(Image.open(tmp_path / name / "00000" / "00000.png"), np.float64)
        for name in ("plain", "grainy", "again")
    )
    assert np.array_equal(grainy, again)
    apart = (grainy - plain)[(plain > 16) & (plain < 239)]  # away from where it is cut off
    assert abs(apart.mean()) < 0.2 and apart.std() == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("option", [("--images", "0"), ("--grain", "-1"), ("--grain", "nan")])
def test_a_number_that_cannot_work(
    option: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--images", "1", "--output", str(tmp_path), *option]) == 1
    assert f"{option[0]} is {option[1]}" in capsys.readouterr().err
