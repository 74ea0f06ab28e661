"""Faces drawn in FFHQ's layout: as a fit reads them, and only once."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.data import open_dataset
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
    assert len({data[i].pixels.sum().item() for i in range(3)}) == 3


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


def test_a_number_that_cannot_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, 0) == 1
    assert "--images is 0" in capsys.readouterr().err
