"""Training images: every layout they come in, every way a file can be bad, and their order."""

from __future__ import annotations

import io
import json
import logging
import socket
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from training.data import BrokenImage, ImageData, as_caption, decode_image, open_dataset, to_pixels
from training.errors import UserError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))


RED = (255, 0, 0)


def draw(path: Path, colour: object = RED, size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def png(colour: object = RED, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, colour).save(stream, "PNG")
    return stream.getvalue()


def ids(data: ImageData) -> list[str]:
    return [record.id for record in data.records]


def captions(data: ImageData) -> dict[str, str]:
    return {record.id: record.caption() for record in data.records}


def colours(data: ImageData) -> list[tuple[int, ...]]:
    data.resolution = 2
    return [tuple(((d.pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()) for d in data]


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ["images1024x1024/00000/00000.png", "images1024x1024/01000/01000.png"],
        ["thumbnails128x128/00000.png", "thumbnails128x128/00001.png"],
        ["00000.png", "1.jpg", "2.jpeg", "3.webp", "4.PNG"],
        ["a/b/c/d/face.jpg", "train/1.png", "test/1.png", "val/1.png"],
    ],
)
def test_every_layout_is_listed_to_any_depth(names: list[str], tmp_path: Path) -> None:
    for name in reversed(names):
        draw(tmp_path / name)
    data = open_dataset(str(tmp_path), resolution=8)
    assert sorted(ids(data)) == sorted(names)
    assert len(data) == len(names)
    assert data[0].pixels.shape == (3, 8, 8)
    assert data[0].pixels.dtype == torch.float32


def test_an_ffhq_tree_with_several_renditions_gives_each_picture_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("images1024x1024/00000/0.png", "thumbnails128x128/00000/0.png"):
        draw(tmp_path / name)
    assert ids(open_dataset(str(tmp_path))) == ["images1024x1024/00000/0.png"]
    assert "using images1024x1024" in caplog.text


def test_hidden_and_system_files_are_ignored(tmp_path: Path) -> None:
    for name in ("a.png", ".b.png", "._a.png", ".hidden/c.png", "__MACOSX/d.png", "s/@eaDir/e.png"):
        draw(tmp_path / name)
    assert ids(open_dataset(str(tmp_path))) == ["a.png"]


def test_the_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    for name in ("b/2.png", "a/9.png", "c.png", "b/10.png", "a.png"):
        draw(tmp_path / name)
    assert ids(open_dataset(str(tmp_path))) == [
        "a.png",
        "c.png",
        "a/9.png",
        "b/10.png",
        "b/2.png",
    ]


def test_one_image_file_is_a_data_set(tmp_path: Path) -> None:
    draw(tmp_path / "other.png")
    path = draw(tmp_path / "face.png")
    path.with_suffix(".txt").write_text("a face")
    assert captions(open_dataset(str(path))) == {"face.png": "a face"}


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    try:
        (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("links need a privilege here")
    assert ids(open_dataset(str(tmp_path))) == ["a/1.png"]


def test_a_saved_data_set_opens(tmp_path: Path) -> None:
    rows = {"image": [png(RED), png((0, 255, 0))], "text": ["red", "green"]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(test=table.select([1]), train=table).save_to_disk(tmp_path / "many")
    for name in ("one", "many"):
        data = open_dataset(str(tmp_path / name))
        assert captions(data) == {"row 0": "red", "row 1": "green"}
        assert colours(data) == [(255, 0, 0), (0, 255, 0)]


@pytest.mark.parametrize("column", ["image", "jpg", "picture"])
def test_parquet_files_open_and_the_image_column_is_found(column: str, tmp_path: Path) -> None:
    features = datasets.Features({"id": datasets.Value("int64"), column: datasets.Image()})
    table = datasets.Dataset.from_dict({"id": [1], column: [png((0, 0, 255))]}, features=features)
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    data = open_dataset(str(tmp_path))
    assert captions(data) == {"row 0": ""}
    assert colours(data) == [(0, 0, 255)]


def test_plain_bytes_in_parquet_count_as_images(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"png": [png(RED)], "caption": ["red"]})
    table.to_parquet(tmp_path / "a.parquet")
    data = open_dataset(str(tmp_path / "a.parquet"))
    assert captions(data) == {"row 0": "red"}
    assert colours(data) == [(255, 0, 0)]


def test_webdataset_tars_open(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for i in range(3):
            for suffix, content in (("png", png((i, 0, 0))), ("txt", f"face {i}".encode())):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    data = open_dataset(str(tmp_path))
    assert list(captions(data).values()) == ["face 0", "face 1", "face 2"]
    assert colours(data) == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_a_table_without_an_image_column_is_refused(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"a": [1], "b": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no image column, only a, b"):
        open_dataset(str(tmp_path))


def test_a_hub_data_set_takes_its_train_split(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def table(colour: object) -> datasets.Dataset:
        rows = {"image": [png(colour)], "prompt": ["a face"]}
        return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())

    splits = datasets.DatasetDict(test=table((0, 0, 255)), train=table(RED))
    monkeypatch.setattr(datasets, "load_dataset", lambda source: splits)
    data = open_dataset("owner/faces")
    assert colours(data) == [(255, 0, 0)]
    assert captions(data) == {"row 0": "a face"}
    assert "Using the split train" in caplog.text


# --- sources that lead nowhere --------------------------------------------------------------------


def test_no_images_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no files at all"):
        open_dataset(str(tmp_path))
    (tmp_path / "faces.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"only \.zip files"):
        open_dataset(str(tmp_path))
    with pytest.raises(UserError, match=r"is a \.zip file"):
        open_dataset(str(tmp_path / "faces.zip"))


@pytest.mark.parametrize("source", ["./faces", "faces", "a/b/c", "data\\faces", "a/face.png"])
def test_a_missing_path_is_not_taken_for_a_hub_id(source: str) -> None:
    with pytest.raises(UserError, match="There is no file or folder"):
        open_dataset(source)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (datasets.exceptions.DatasetNotFoundError("x"), "There is no data set owner/faces"),
        (ConnectionError("Couldn't reach it"), "The hub could not be reached"),
        (ValueError("Config name is missing."), "can't be opened: Config name is missing"),
    ],
)
def test_what_the_hub_answers_is_told_apart(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(source: str) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", answer)
    with pytest.raises(UserError, match=message):
        open_dataset("owner/faces")


def test_damaged_tables_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match=r"a\.parquet .*can't be read"):
        open_dataset(str(tmp_path))


# --- captions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_captions_come_from_metadata_then_from_text_files(column: str, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png", "deep/d.png"):
        draw(tmp_path / name)
    lines = [
        json.dumps({"file_name": "a.png", column: "from jsonl \u00e9"}),
        "",
        json.dumps({"file_name": "deep/d.png", column: "deep"}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text("not used")
    (tmp_path / "b.txt").write_text("\ufefffrom a text file\n", encoding="utf-8")
    assert captions(open_dataset(str(tmp_path))) == {
        "a.png": "from jsonl \u00e9",
        "b.png": "from a text file",
        "c.png": "",
        "deep/d.png": "deep",
    }


def test_captions_come_from_csv_beside_the_images(tmp_path: Path) -> None:
    for name in ("s/a.png", "s/t/b.png"):
        draw(tmp_path / name)
    (tmp_path / "s" / "metadata.csv").write_text(
        'file_name,age,caption\na.png,3,"a face, smiling"\nt\\b.png,4,other\ngone.png,5,x\n'
    )
    assert captions(open_dataset(str(tmp_path))) == {
        "s/a.png": "a face, smiling",
        "s/t/b.png": "other",
    }


def test_metadata_that_fits_no_image_is_an_error(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nb.png,x\n")
    with pytest.raises(UserError, match="None of the 1 images named in"):
        open_dataset(str(tmp_path))
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text"')
    with pytest.raises(UserError, match=r"metadata\.jsonl can't be read"):
        open_dataset(str(tmp_path))


def test_metadata_without_captions_is_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,age\na.png,3\n")
    assert captions(open_dataset(str(tmp_path))) == {"a.png": ""}
    assert "gives no captions: its columns are age, file_name" in caplog.text


def test_captions_of_any_kind_become_text() -> None:
    assert as_caption({"caption": "a face"}) == "a face"
    assert as_caption(["first", "second"]) == "first"
    assert as_caption([]) == as_caption(None) == as_caption({"width": 3}) == ""


# --- decoding -------------------------------------------------------------------------------------


def pixel(image: Image.Image) -> list[float]:
    return to_pixels(image, 1).flatten().tolist()


def test_values_and_the_centre_crop() -> None:
    # 6 x 2 pixels: black, red, black in squares of 2; the centre square is the red one.
    image = Image.new("RGB", (6, 2))
    image.paste(RED, (2, 0, 4, 2))
    assert to_pixels(image, 2).tolist() == [[[1.0] * 2] * 2, [[-1.0] * 2] * 2, [[-1.0] * 2] * 2]
    assert to_pixels(image.transpose(Image.Transpose.ROTATE_90), 2)[0].tolist() == [[1.0] * 2] * 2


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("L", 51, [-0.6, -0.6, -0.6]),  # 51 / 127.5 - 1
        ("1", 1, [1, 1, 1]),
        ("LA", (0, 0), [1, 1, 1]),  # fully transparent: white
        ("RGBA", (255, 0, 0, 255), [1, -1, -1]),
        ("RGBA", (255, 0, 0, 0), [1, 1, 1]),
        ("I;16", 65535, [1, 1, 1]),
        ("I;16", 13107, [-0.6, -0.6, -0.6]),  # a fifth of 65535, as 51 is of 255
        ("P", 0, [-1, -1, -1]),
    ],
)
def test_every_png_mode_becomes_rgb(mode: str, colour: object, expected: list[float]) -> None:
    found = pixel(decode_image(png(colour, mode)))
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_transparent_palette_becomes_white() -> None:
    image = Image.new("P", (4, 4), 7)
    image.putpalette([0] * 21 + [255, 0, 0])
    stream = io.BytesIO()
    image.save(stream, "PNG", transparency=7)
    assert pixel(decode_image(stream.getvalue())) == [1, 1, 1]


def test_cmyk_becomes_rgb() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(stream, "JPEG", quality=100)
    assert pixel(decode_image(stream.getvalue())) == pytest.approx([1, -1, -1], abs=0.03)


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 4, 4))  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view: the left half comes to the top
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    upright = decode_image(stream.getvalue())
    assert upright.size == (4, 8)
    assert upright.getpixel((2, 1)) == (255, 255, 255)
    assert upright.getpixel((2, 6)) == (0, 0, 0)


def _truncated_png() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()[:5000]


def _truncated_jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "JPEG")
    return stream.getvalue()[:2000]


BROKEN = {
    "truncated png": (_truncated_png(), "truncated"),
    "truncated jpeg": (_truncated_jpeg(), "truncated"),
    "empty": (b"", "the file is empty"),
    "text": (b"hello", "not an image"),
    "web page": (b"<!DOCTYPE html><html></html>", "not an image"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "png of nothing": (png()[:20], ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_skipped_counted_and_named(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content, reason = BROKEN[name]
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    (tmp_path / "c.png").write_bytes(content)
    draw(tmp_path / "d.png")
    data = open_dataset(str(tmp_path), resolution=8)
    assert data.broken_report() == ""
    assert [b.ids for b in data.batches(range(4), 2, epochs=2)] == [["a.png", "d.png"]] * 2
    assert list(data.broken) == ["b.png", "c.png"]
    assert reason in data.broken["b.png"]
    assert data.broken_report().startswith("2 of 4 images could not be read")
    assert "c.png" in data.broken_report()
    assert caplog.text.count("Skipping the broken image b.png") == 1  # at once, the first time only
    with pytest.raises(BrokenImage, match="b.png"):
        data[1]


def test_only_broken_images_end_the_run_instead_of_looping(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    data = open_dataset(str(tmp_path), resolution=8)
    with pytest.raises(UserError, match=r"None of the 1 image\(s\).*a\.png: the file is empty"):
        next(data.batches([0], 1, seed=0, epochs=None))


def test_a_broken_row_of_a_table_is_skipped(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"bytes": b"junk", "path": None}, None, {"bytes": png(), "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    data = open_dataset(str(tmp_path), resolution=8)
    assert [b.ids for b in data.batches(range(3), 3)] == [["row 2"]]
    assert data.broken == {
        "row 0": "not an image, whatever its name says",
        "row 1": "the row has no image",
    }


def test_small_images_are_enlarged_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.png"):
        draw(tmp_path / name, size=(8, 6))
    data = open_dataset(str(tmp_path), resolution=16)
    assert data[0].pixels.shape == data[1].pixels.shape == (3, 16, 16)
    assert caplog.text.count("smaller than 16") == 1


def test_the_resolution_must_be_known_before_reading(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    with pytest.raises(ValueError, match="resolution"):
        open_dataset(str(tmp_path))[0]


# --- split and order ------------------------------------------------------------------------------


@pytest.fixture
def faces(tmp_path: Path) -> ImageData:
    for i in range(20):
        draw(tmp_path / "faces" / f"{i:02d}.png", (i, i, i))
    return open_dataset(str(tmp_path / "faces"), resolution=4)


@pytest.mark.parametrize(
    ("fraction", "held_out"), [(0.1, 2), (0.01, 1), (0.5, 10), (0.94, 19), (0.0, 0)]
)
def test_the_split_is_disjoint_complete_and_of_the_right_size(
    fraction: float, held_out: int, faces: ImageData
) -> None:
    training, validation = faces.split(fraction, seed=0)
    assert len(validation) == held_out
    assert sorted(training + validation) == list(range(20))


def test_the_split_follows_the_seed_and_the_names_alone(faces: ImageData) -> None:
    assert faces.split(0.3, seed=1) == faces.split(0.3, seed=1)
    assert faces.split(0.3, seed=1) != faces.split(0.3, seed=2)
    # Written down once, so that another platform or version splits the same way.
    assert faces.split(0.1, seed=0)[1] == [12, 13]


def test_too_few_images_for_a_split_is_an_error(tmp_path: Path, faces: ImageData) -> None:
    draw(tmp_path / "one" / "a.png")
    data = open_dataset(str(tmp_path / "one"))
    with pytest.raises(UserError, match="leaves none to train on"):
        data.split(0.1, seed=0)
    assert data.split(0, seed=0) == ([0], [])
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match="validation fraction is"):
            faces.split(fraction, seed=0)


def seen(data: ImageData, **options: object) -> list[str]:
    return [id for batch in data.batches(range(len(data)), 3, **options) for id in batch.ids]


def test_batches_repeat_exactly_with_a_seed_and_differ_between_epochs(faces: ImageData) -> None:
    first, again = (seen(faces, seed=5, epochs=2) for _ in range(2))
    assert first == again != seen(faces, seed=6, epochs=2)
    assert sorted(first[:20]) == sorted(first[20:]) == ids(faces)
    assert first[:20] != first[20:]
    assert seen(faces) == ids(faces)  # no seed: the order given


def test_batches_have_the_size_asked_for_and_the_last_holds_the_rest(faces: ImageData) -> None:
    batches = list(faces.batches(range(20), 8, seed=0))
    assert [batch.pixels.shape for batch in batches] == [(8, 3, 4, 4), (8, 3, 4, 4), (4, 3, 4, 4)]
    # Image i is drawn in grey level i, so pixels and ids must tell the same story.
    for batch in batches:
        levels = ((batch.pixels[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
        assert batch.ids == [f"{level:02d}.png" for level in levels]


def test_an_endless_iterator_goes_on_past_the_first_epoch(faces: ImageData) -> None:
    endless = faces.batches([3, 4], 1, seed=0, epochs=None)
    assert len([next(endless) for _ in range(9)]) == 9
    assert list(faces.batches([], 1, epochs=None)) == []


def test_a_broken_image_does_not_disturb_the_others(faces: ImageData, tmp_path: Path) -> None:
    before = seen(faces, seed=5)
    (tmp_path / "faces" / "07.png").write_bytes(b"broken")
    assert seen(faces, seed=5) == [id for id in before if id != "07.png"]


def test_warnings_go_through_logging(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="training.data"), pytest.raises(BrokenImage):
        open_dataset(str(tmp_path), resolution=4)[0]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
