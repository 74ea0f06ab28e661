"""What can be seen of a run, while it goes and afterwards; and that looking changes nothing."""

from __future__ import annotations

import csv
import errno
import io
import sys
import types
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldcp_core import Gates, PrunedSite, gates_report, load_gates
from training import fit
from training.learning import curves as report
from training.learning import recorders
from training.learning.loop import Learning
from training.learning.page import html_report
from training.learning.sample_sheet import SampleSheet
from training.model.load import DiffusionModel

STEPS = 6
Run = Callable[..., int]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are drawn in few steps: how they look is not what is tested."""
    monkeypatch.setattr("training.learning.sample_sheet.STEPS", 3)


@pytest.fixture
def run(pipeline: Path, images: Path, tmp_path: Path, short_fits: None, no_pictures: None) -> Run:
    def run(name: str, *more: str) -> int:
        return fit.main([
            "--model", str(pipeline), "--data", str(images), "--max-steps", str(STEPS),
            "--batch-size", "2", "--gradient-accumulation", "1",
            "--output", str(tmp_path / name), *more,
        ])  # fmt: skip

    return run


def rows(file: Path) -> list[dict[str, float]]:
    with file.open(newline="") as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


# --- CSV ------------------------------------------------------------------------------------------


def test_every_step_is_in_the_csv_as_soon_as_it_is_done(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Learning.advance, []

    def advance(self: Learning) -> None:
        seen.append(len(rows(tmp_path / "a.history.csv")))
        whole(self)

    monkeypatch.setattr(Learning, "advance", advance)
    assert run("a.safetensors") == 0
    assert seen == list(range(STEPS))
    found = rows(tmp_path / "a.history.csv")
    course = load_gates(tmp_path / "a.safetensors").info["history"]["course"]
    for row, expected in zip(found, course, strict=True):
        for name in ("step", "reconstruction", "weight", "sparsity"):
            assert row[name] == expected[name]
        assert row["mean_score"] == expected["l1"]
    assert 0.5 < found[0]["mean_score"] < 1  # all channels start kept


def test_after_a_resume_the_csv_tells_one_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("whole.safetensors") == 0
    whole = Learning.advance

    def advance(self: Learning) -> None:
        if self.step == 5:
            raise RuntimeError("a defect")
        whole(self)

    with monkeypatch.context() as patch:
        patch.setattr(Learning, "advance", advance)
        with pytest.raises(RuntimeError):
            run("cut.safetensors", "--checkpoint-every", "3")
    assert len(rows(tmp_path / "cut.history.csv")) == 5  # two more than the checkpoint knows
    assert run("cut.safetensors", "--resume") == 0
    assert rows(tmp_path / "cut.history.csv") == rows(tmp_path / "whole.history.csv")


def test_a_full_disk_costs_the_csv_and_not_the_run(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    record = recorders.CsvHistory.record

    def full(self: recorders.CsvHistory, learning: Learning) -> None:
        if learning.step == 3:
            self._file = Full()
        record(self, learning)

    monkeypatch.setattr(recorders.CsvHistory, "record", full)
    assert run("a.safetensors") == 0
    assert "No space left" in caplog.text and "going on without it" in caplog.text


# --- TensorBoard ----------------------------------------------------------------------------------


class Writer:
    """Stands in for TensorBoard's writer, which need not be installed."""

    made: list[Writer] = []

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: dict[tuple[str, int], float] = {}
        self.histograms: dict[tuple[str, int], torch.Tensor] = {}
        self.closed = False
        Writer.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name, step] = value

    def add_histogram(self, name: str, values: torch.Tensor, step: int) -> None:
        self.histograms[name, step] = values.clone()

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_scalars_and_histograms(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    Writer.made.clear()
    assert run("a.safetensors", "--tensorboard") == 0
    (writer,) = Writer.made
    assert writer.folder == str(tmp_path / "a.tensorboard") and writer.closed
    found = rows(tmp_path / "a.history.csv")
    assert writer.scalars["reconstruction", 1] == found[0]["reconstruction"]
    assert {step for _, step in writer.scalars} == set(range(1, STEPS + 1))
    assert writer.histograms["scores/mid_block.resnets.0.conv1", STEPS].shape == (32,)


def test_without_tensorboard_the_option_is_refused_before_anything_is_computed(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    monkeypatch.setattr(fit, "frozen_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run("a.safetensors", "--tensorboard") == 1
    assert "pip install tensorboard" in capsys.readouterr().err


# --- samples --------------------------------------------------------------------------------------


def halves(png: bytes) -> tuple[np.ndarray, np.ndarray]:
    above, below = np.split(np.asarray(Image.open(io.BytesIO(png))), 2)
    return above, below


def test_samples_show_the_dense_model_above_the_pruned_one(model: DiffusionModel) -> None:
    sites = ["mid_block.resnets.0.conv2", "mid_block.resnets.1.conv2"]
    constant = torch.full((32,), 1000.0)
    samples = SampleSheet(model, ["a face", ""], 16)
    kept = {site: PrunedSite(torch.ones(32, dtype=torch.bool), constant) for site in sites}
    above, below = halves(samples.picture(kept))
    assert above.shape == (16, 32, 3) and np.array_equal(above, below)  # nothing is pruned
    assert not np.array_equal(above[:, :16], above[:, 16:])  # another seed and prompt
    pruned = {site: PrunedSite(torch.zeros(32, dtype=torch.bool), constant) for site in sites}
    again, below = halves(samples.picture(pruned))
    assert np.array_equal(again, above)
    assert np.abs(below.astype(int) - above).mean() > 1
    fresh = SampleSheet(model, ["a face", ""], 16).picture(pruned)
    assert np.array_equal(halves(fresh)[1], below)  # fixed seeds


def test_drawing_samples_changes_nothing_that_is_learned(run: Run, tmp_path: Path) -> None:
    assert run("plain.safetensors") == 0
    assert run("seen.safetensors", "--sample-every", "2") == 0
    names = sorted(file.name for file in (tmp_path / "seen.samples").iterdir())
    assert names == [f"step-{step:08d}.png" for step in (2, 4, 6)]
    plain, seen = (load_gates(tmp_path / f"{n}.safetensors") for n in ("plain", "seen"))
    assert all(torch.equal(plain.scores[site], seen.scores[site]) for site in plain.scores)
    assert (tmp_path / "seen.html").read_text().count("data:image/png") == 3
    assert "None were drawn" in (tmp_path / "plain.html").read_text()


# --- the page -------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Checks that tags are balanced, and collects the cells of the tables and all addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


def test_the_page_is_whole_and_says_what_the_report_says() -> None:
    scores = {"mid_block.resnets.0.conv1": torch.tensor([0.9] * 960 + [0.1] * 320)}
    info: dict[str, Any] = {
        "config": {"data": "<b>faces</b>", "seed": 3, "model": "a\x1b[2J\n\u202eb" + "c" * 9000},
        "history": {"course": []},
    }
    gates = Gates(scores, info=info)
    page = Page()
    page.feed(html_report(gates, b"curves", b"scores", b"samples", ["a & b\n\x9b"]))
    assert page.open == []
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert len(page.addresses) == 3
    saved = gates_report(gates).savings.saved
    row = ["mid_block.resnets.0.conv1", "960 of 1280", "25.0%", f"{saved.parameters:,}"]
    assert row in [found[:4] for found in page.rows]
    assert ["data", "<b>faces</b>"] in page.rows and ["seed", "3"] in page.rows
    assert page.text.replace("\n", "").isprintable()  # but for the page's own lines
    (model,) = (row[1] for row in page.rows if row[0] == "model")
    assert model.startswith("a\\x1b[2J\\n\\u202ebccc") and len(model) <= 4000


def test_scores_are_drawn_as_shapes_and_not_channel_by_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(report, "png", lambda figure: drawn.append(figure) or b"")
    scores = {
        "mid_block.resnets.0.conv1": torch.tensor([0.9] * 960 + [0.1] * 320),
        "mid_block.resnets.0.conv2": torch.ones(1280),
    }
    report.scores_png(Gates(scores))
    half, whole = drawn[0].axes
    assert len(half.patches) == 2 and len(whole.patches) == 1  # what is kept, what is pruned
    assert [len(patch.get_data().values) for patch in half.patches] == [960, 320]


def test_a_fit_writes_its_page(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("a.safetensors") == 0
    page = Page()
    page.feed((tmp_path / "a.html").read_text())
    assert page.open == [] and len(page.addresses) == 2
    assert f"wrote {tmp_path / 'a.html'}" in capsys.readouterr().out
    assert ["criterion", "learned"] in page.rows
