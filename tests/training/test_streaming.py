"""Tables read as they come: which images, for which process, and on from where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import pytest
import torch
from pictures import draw, png
from test_resume import assert_same, fail_at

from training import fit
from training.data import encoding, streaming
from training.data.encoding import Batch, FreshImages
from training.data.images import Position, open_dataset
from training.data.streaming import StreamedImages
from training.errors import UserError
from training.model.load import DiffusionModel
from training.step.denoising import Denoising

ROWS = 14


@pytest.fixture(autouse=True)
def cache_in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))


def parquet(root: Path, broken: tuple[int, ...] = ()) -> Path:
    """Fourteen captioned images in three shards."""
    root.mkdir()
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "text": datasets.Value("string")}
    )
    for shard, rows in enumerate((range(5), range(5, 10), range(10, ROWS))):
        content = [b"junk" if i in broken else png((17 * i, 0, 255 - 17 * i)) for i in rows]
        images = [{"bytes": data, "path": None} for data in content]
        table = {"image": images, "text": [f"face {i % 3}" for i in rows]}
        file = root / f"train-{shard:05d}-of-00003.parquet"
        datasets.Dataset.from_dict(table, features=features).to_parquet(file)
    return root


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    return parquet(tmp_path / "faces")


def streamed(source: Path, model: DiffusionModel, held_out: int = 2) -> StreamedImages:
    found = StreamedImages(str(source), held_out)
    found.resolution = 16
    found.encode_with(model)
    return found


def rows_of(batches: list[Batch]) -> list[list[int]]:
    return [[int(id.split()[1]) for id in batch.ids] for batch in batches]


def test_images_come_in_order_and_the_first_are_held_out(
    faces: Path, model: DiffusionModel
) -> None:
    data = streamed(faces, model)
    train, held_out = data.split()
    assert rows_of(list(data.batches(train, 5))) == [[2, 3, 4, 5, 6], [7, 8, 9, 10, 11], [12, 13]]
    twice = list(islice(data.batches(held_out, 4, epochs=None), 2))
    assert rows_of(twice) == [[0, 1], [0, 1]]
    endless = data.batches(train, 7, epochs=None)
    assert rows_of(list(islice(endless, 4))) == rows_of(list(data.batches(train, 7))) * 2


@pytest.mark.parametrize("family", ["model", "model_xl"])
def test_what_is_encoded_is_that_of_a_table_on_disk(
    faces: Path, family: str, request: pytest.FixtureRequest
) -> None:
    model: DiffusionModel = request.getfixturevalue(family)
    plain = open_dataset(str(faces), resolution=16)
    data = streamed(faces, model)
    expected = FreshImages(plain, model).batches(range(ROWS), 5)
    found = list(data.batches(range(ROWS), 5))
    for fresh, batch in zip(expected, found, strict=True):
        assert torch.equal(batch.latents, fresh.latents)
        assert torch.equal(batch.context, fresh.context)
        assert batch.added.keys() == fresh.added.keys()
        assert all(torch.equal(batch.added[name], fresh.added[name]) for name in fresh.added)
    assert bool(fresh.added) == (family == "model_xl")
    assert data.captions([0, 1]) == {0: "face 0", 1: "face 1"}


def test_processes_have_rows_of_their_own(faces: Path, model: DiffusionModel) -> None:
    whole = list(streamed(faces, model).batches(range(2, ROWS), 4))
    parts = [
        list(
            streamed(faces, model).batches(
                range(2, ROWS), 4, share=lambda n, r=rank: slice(n * r // 2, n * (r + 1) // 2)
            )
        )
        for rank in range(2)
    ]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert batch.ids == shares[0].ids + shares[1].ids
        assert torch.equal(batch.latents, torch.cat([share.latents for share in shares]))
        assert [share.total for share in shares] == [4, 4]


def test_every_epoch_holds_out_the_same_images(faces: Path, model: DiffusionModel) -> None:
    data = streamed(faces, model, held_out=5)  # the first of three shards
    batches = list(data.batches(data.split()[0], 9, epochs=4))
    assert rows_of(batches) == [list(range(5, ROWS))] * 4
    assert all(torch.equal(batch.latents, batches[0].latents) for batch in batches)


@pytest.mark.parametrize("taken", range(1, 8))
def test_a_position_leads_to_the_very_next_image(
    faces: Path, model: DiffusionModel, taken: int
) -> None:
    position = Position()
    batches = streamed(faces, model).batches(range(2, ROWS), 5, epochs=None, position=position)
    list(islice(batches, taken))  # epochs of 5, 5 and 2
    kept = deepcopy(position)
    again = streamed(faces, model).batches(range(2, ROWS), 5, epochs=None, position=kept)
    for expected, found in islice(zip(batches, again, strict=False), 4):
        assert found.ids == expected.ids and torch.equal(found.latents, expected.latents)


def test_a_broken_image_leaves_its_place_empty(tmp_path: Path, model: DiffusionModel) -> None:
    data = streamed(parquet(tmp_path / "some", broken=(3, 7, 8)), model)
    batches = list(data.batches(range(2, 9), 2))
    assert rows_of(batches) == [[2], [4, 5], [6], []]
    assert set(data.broken) == {"row 3", "row 7", "row 8"}
    assert "3 streamed images could not be read" in data.broken_report()
    problems = [Denoising(model, 0).problem(batch) for batch in batches]
    assert [problem.share for problem in problems] == [0.5, 1, 0.5, 0]
    # the noise of an image does not depend on whether another one can be read
    intact = next(streamed(parquet(tmp_path / "all"), model).batches(range(2, 9), 2))
    noise = Denoising(model, 0).problem(intact).noise
    assert torch.equal(problems[0].noise, noise[:1])


@pytest.mark.parametrize(("enough", "said"), [(6, 6), (64, 12)])  # after so many, or an epoch
def test_a_stream_without_a_single_image_is_an_error(
    tmp_path: Path, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch, enough: int, said: int
) -> None:
    monkeypatch.setattr(streaming, "UNREADABLE", enough)
    data = streamed(parquet(tmp_path / "none", broken=tuple(range(ROWS))), model)
    with pytest.raises(UserError, match=f"None of the first {said} images"):
        list(islice(data.batches(range(2, ROWS), 2, epochs=None), 99))


def test_a_stream_that_breaks_is_explained(faces: Path, model: DiffusionModel) -> None:
    file = sorted(faces.iterdir())[1]
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 3] = bytes(len(content) // 3 - 4)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"The stream of .* broke: "):
        list(streamed(faces, model).batches(range(2, ROWS), 2))


# --- a fit ----------------------------------------------------------------------------------------


@pytest.fixture
def run(
    pipeline: Path, faces: Path, tmp_path: Path, no_pictures: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    parse = fit.parse_arguments
    few = {"calibration_batches": 1, "validation_samples": 2, "correction_samples": 15}
    monkeypatch.setattr(fit, "parse_arguments", lambda argv: replace(parse(argv), **few))

    def run(name: str, *more: str) -> int:
        return fit.main([
            "--model", str(pipeline), "--data", str(faces), "--streaming", "--max-steps", "6",
            "--batch-size", "3", "--gradient-accumulation", "1", "--checkpoint-every", "2",
            "--output", str(tmp_path / name), *more,
        ])  # fmt: skip

    return run


def test_a_row_without_an_image_is_skipped_and_named(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [None, *({"bytes": png((17 * i, 0, 0)), "path": None} for i in range(8)), None]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    (tmp_path / "some").mkdir()
    table = datasets.Dataset.from_dict({"image": rows}, features=features)
    table.to_parquet(tmp_path / "some" / "a.parquet")
    assert run("a.safetensors", "--data", str(tmp_path / "some")) == 0
    said = capsys.readouterr().out
    assert "row 0: the row has no image" in said and "row 9: the row has no image" in said


def test_rows_that_are_batches_of_their_own_may_be_broken(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = fit.measure_start
    monkeypatch.setattr(
        fit,
        "measure_start",
        lambda config, *rest: measure(replace(config, calibration_batches=4), *rest),
    )
    broken = parquet(tmp_path / "some", broken=(1, 2))  # one held out, and the first to learn from
    assert run("a.safetensors", "--data", str(broken), "--batch-size", "1") == 0


def test_held_out_rows_without_an_image_are_answered_before_anything_is_learned(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = parquet(tmp_path / "some", broken=(0, 1))
    assert run("a.safetensors", "--data", str(broken)) == 1
    assert "None of the first 2 images" in capsys.readouterr().err
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.parametrize("reuse", ["1", "2"])
def test_a_streamed_fit_resumes_to_the_bit_and_keeps_no_cache(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reuse: str
) -> None:
    monkeypatch.setattr(encoding, "TensorCache", lambda *_: pytest.fail("a cache was opened"))
    assert run("whole.safetensors", "--reuse", reuse) == 0
    with monkeypatch.context() as patch:
        fail_at(patch, 5, RuntimeError("a defect"))
        with pytest.raises(RuntimeError):
            run("cut.safetensors", "--reuse", reuse)
    assert run("cut.safetensors", "--reuse", reuse, "--resume") == 0
    assert_same(tmp_path / "whole.safetensors", tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--epochs", "2"], "nobody knows how many images a stream has"),
        (["--cache", "somewhere"], "a stream is encoded as it comes"),
    ],
)
def test_options_that_cannot_work_with_a_stream_are_refused(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    assert run("a.safetensors", *more) == 1
    assert said in capsys.readouterr().err


def test_single_images_need_no_streaming(tmp_path: Path) -> None:
    draw(tmp_path / "folder" / "a.png")
    with pytest.raises(UserError, match=r"holds no tables(.|\n)*leave out --streaming"):
        StreamedImages(str(tmp_path / "folder"), 0)


def test_a_stream_that_is_held_out_whole_is_an_error(faces: Path, model: DiffusionModel) -> None:
    data = streamed(faces, model, held_out=ROWS)
    with pytest.raises(UserError, match="no images beyond the first 14"):
        next(data.batches(data.split()[0], 2))


def test_a_hub_data_set_is_asked_for_as_a_stream(
    faces: Path, model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, asked = datasets.load_dataset, []

    def watched(source: str, **options: object) -> object:
        asked.append((source, options))
        files = [str(file) for file in sorted(faces.iterdir())]
        return load("parquet", data_files={"test": files[:1], "train": files}, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    found = streamed(Path("owner/faces"), model)
    assert asked == [("owner/faces", {"streaming": True})]
    assert rows_of(list(found.batches(range(9, 12), 3))) == [[9, 10, 11]]
