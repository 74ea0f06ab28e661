"""Where training images come from: every layout, every way to lead nowhere, and their captions."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from pictures import RED, draw, ids, png, read

from training.data.files import CAPTION_LIMIT, FILE_LIMIT
from training.data.images import ImageData, open_dataset
from training.data.sources import as_caption, open_stream
from training.errors import UserError


@pytest.fixture(autouse=True)
def cache_in_tmp_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))


def captions(data: ImageData) -> dict[str, str]:
    return {record.id: record.caption() for record in data.records}


def colours(data: ImageData) -> list[tuple[int, ...]]:
    data.resolution = 2
    pixels = [data.pixels(i)[:, 0, 0] for i in range(len(data))]
    return [tuple(((p + 1) * 127.5).round().int().tolist()) for p in pixels]


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
    assert data.pixels(0).shape == (3, 8, 8)
    assert data.pixels(0).dtype == torch.float32


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


def test_a_folder_that_cannot_be_entered_is_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "locked/b.png"):
        draw(tmp_path / name)
    scandir = os.scandir

    def refuse(folder: str) -> object:
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    assert ids(open_dataset(str(tmp_path))) == ["a.png"]
    assert "Skipping the folder" in caplog.text
    assert "locked" in caplog.text


def test_a_name_that_is_not_utf_8_gets_a_printable_id(tmp_path: Path) -> None:
    try:
        draw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff.png")))
    except OSError:  # APFS and NTFS: such a name can't come up there
        pytest.skip("this file system takes UTF-8 names only")
    draw(tmp_path / "g.png")
    data = open_dataset(str(tmp_path), resolution=8)
    assert ids(data) == ["f\\udcff.png", "g.png"]
    training, validation = data.split(0.5, seed=0)
    assert sorted(training + validation) == [0, 1]
    assert data.records[0].id.encode() == b"f\\udcff.png"


def test_one_image_file_is_a_data_set(tmp_path: Path) -> None:
    draw(tmp_path / "other.png")
    path = draw(tmp_path / "face.png")
    path.with_suffix(".txt").write_text("a face")
    assert captions(open_dataset(str(path))) == {"face.png": "a face"}


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    draw(tmp_path / "a" / "1.png")
    try:
        (tmp_path / "a" / "again").symlink_to(tmp_path, target_is_directory=True)
    except OSError:  # Windows without developer mode
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


def test_a_broken_row_of_a_table_is_skipped(tmp_path: Path) -> None:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [{"bytes": b"junk", "path": None}, None, {"bytes": png(), "path": None}]
    datasets.Dataset.from_dict({"image": rows}, features=features).to_parquet(
        tmp_path / "a.parquet"
    )
    data = open_dataset(str(tmp_path), resolution=8)
    assert list(read(data, range(3), 3)) == [["row 2"]]
    assert data.broken == {
        "row 0": "not a png, jpg, webp, bmp or tiff image, whatever its name says",
        "row 1": "the row has no image",
    }


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


# --- files that are not the data set's -----------------------------------------------------------


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:  # Windows without developer mode
        pytest.skip("links need a privilege here")


def broken(data: ImageData) -> dict[str, str]:
    data.resolution = 8
    list(read(data, range(len(data)), 99))
    return data.broken


def table_of_paths(folder: Path, paths: list[str]) -> Path:
    rows = [{"bytes": None, "path": path} for path in paths]
    kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
    folder.mkdir(exist_ok=True)
    table = pyarrow.table({"image": pyarrow.array(rows, kind)})
    pyarrow.parquet.write_table(table, folder / "a.parquet")
    return folder


def test_a_row_may_name_a_file_of_the_data_set_and_no_other(tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret.png")
    folder = tmp_path / "faces"
    draw(folder / "pics" / "b.dat.png").rename(folder / "pics" / "b.dat")
    paths = ["pics/b.dat", "../secret.png", str(secret), str(folder / "pics" / "b.dat")]
    paths += [f"file://{secret}", "http://localhost/a.png", "reference://a::data:,{}", "pics", ""]
    paths += ["a\0b", "gone.png"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "fifo")
        link(folder / "link", secret)
        paths += ["fifo", "link", "/dev/zero"]
    table_of_paths(folder, paths)
    expected = {f"row {i}" for i in range(1, len(paths))}
    reasons = broken(open_dataset(str(folder)))
    assert set(reasons) == expected
    assert "save_to_disk" in reasons["row 2"] and "save_to_disk" in reasons["row 3"]
    stream = open_stream(str(folder))
    found = 0
    for row in stream.rows(stream.table):
        try:
            assert stream.read(row) == secret.read_bytes()
            found += 1
        except (OSError, ValueError):
            pass
    assert found == 1


def test_a_table_of_paths_alone_says_how_to_save_images(tmp_path: Path) -> None:
    secret = draw(tmp_path / "secret.png")
    data = open_dataset(str(table_of_paths(tmp_path / "faces", [str(secret)])), resolution=8)
    with pytest.raises(UserError, match=r"None of the 1 image.*save_to_disk"):
        next(read(data, [0], 1))


def test_a_hub_data_set_of_image_files_is_read_from_its_part_of_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    mine = draw(tmp_path / "hub" / "datasets--owner--faces" / "snapshots" / "1" / "a.png")
    other = draw(tmp_path / "hub" / "datasets--other--faces" / "snapshots" / "1" / "a.png")
    rows = {"image": [str(mine), str(other)]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    monkeypatch.setattr(datasets, "load_dataset", lambda source: table)
    assert set(broken(open_dataset("owner/faces"))) == {"row 1"}


def test_a_column_of_captions_opens_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    features = datasets.Features({
        "image": datasets.Image(), "text": datasets.Image(), "caption": datasets.Value("string")
    })  # fmt: skip
    rows = {"image": [png()], "text": [str(draw(tmp_path / "secret.png"))], "caption": ["a face"]}
    (tmp_path / "faces").mkdir()
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(tmp_path / "faces" / "a.parquet")
    assert captions(open_dataset(str(tmp_path / "faces"))) == {"row 0": "a face"}
    assert "No captions from the column text" in caplog.text


def test_a_saved_data_set_names_no_file_outside_itself(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"png": [png()]})
    for name in ("mine", "other"):
        table.save_to_disk(tmp_path / name)
    state = tmp_path / "mine" / "state.json"
    content = state.read_text().replace("data-0", "../other/data-0")
    state.write_text(content)
    with pytest.raises(UserError, match=r"can't be read \(\.\./other/data.*outside the data set"):
        open_dataset(str(tmp_path / "mine"))


@pytest.mark.skipif(os.name == "nt", reason="such names can't come up there")
def test_no_part_of_a_path_is_taken_for_an_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table_of_paths(tmp_path / "reference::data:,x", ["a.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'::' in the path of a table"):
        open_dataset(".")


def test_what_a_link_leads_to_outside_the_folder_is_not_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = draw(tmp_path / "other" / "secret.png")
    root = tmp_path / "faces"
    draw(root / "a.png")
    link(root / "inside.png", root / "a.png")
    link(root / "link.png", secret)
    link(root / "more", secret.parent)
    reasons = broken(open_dataset(str(root)))
    assert set(reasons) == {"link.png"} and "outside the data set" in reasons["link.png"]
    assert "Skipping the folder" in caplog.text and "a link out of" in caplog.text
    link(tmp_path / "all", root)
    assert ids(open_dataset(str(tmp_path / "all"))) == ["a.png", "inside.png", "link.png"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
def test_a_fifo_does_not_stop_a_run(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")
    os.mkfifo(tmp_path / "b.txt")
    reasons = broken(open_dataset(str(tmp_path)))
    assert reasons == {
        "b.png": "its caption b.txt: not a regular file",
        "c.png": "not a regular file",
    }
    os.mkfifo(tmp_path / "metadata.jsonl")
    with pytest.raises(UserError, match=r"metadata\.jsonl can't be read \(not a regular file"):
        open_dataset(str(tmp_path))


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    for name in ("a.png", "c.png"):
        draw(tmp_path / name)
    (tmp_path / "a.txt").write_text("x" * (CAPTION_LIMIT + 1))
    with (tmp_path / "b.png").open("wb") as file:
        file.truncate(FILE_LIMIT + 1)
    assert broken(open_dataset(str(tmp_path))) == {
        "a.png": "its caption a.txt: 65,537 bytes; at most 65,536 are read",
        "b.png": "268,435,457 bytes; at most 268,435,456 are read",
    }
    (tmp_path / "a.txt").write_text("a face")
    (tmp_path / "b.png").rename(tmp_path / "metadata.csv")
    with pytest.raises(UserError, match=r"metadata\.csv can't be read \(268,435,457 bytes"):
        open_dataset(str(tmp_path))


@pytest.mark.skipif(os.name == "nt", reason="such names can't come up there")
def test_no_name_reaches_a_terminal_as_a_code(tmp_path: Path) -> None:
    draw(tmp_path / "a\x1b[2J\n.png")
    assert ids(open_dataset(str(tmp_path))) == ["a\\x1b[2J\\n.png"]


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


def test_what_is_not_read_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.png", "a.txt", "b.gif", "c.gif", "other.txt", "metadata.csv"):
        (tmp_path / name).write_text("file_name,text\na.png,a face\n")
    open_dataset(str(tmp_path))
    assert "2 .gif, 1 .txt. Images are png, jpg, webp, bmp or tiff" in caplog.text
    caplog.clear()
    (tmp_path / "a.png").unlink()
    datasets.Dataset.from_dict({"png": [png()]}).to_parquet(tmp_path / "a.parquet")
    open_dataset(str(tmp_path))
    assert "2 .gif" in caplog.text


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


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.jsonl", b'{"file_name": "a.png"}\n\n{"file_name"', "line 3: Expecting ':'"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n[["text", "x"]]', "line 2: a JSON list"),
        ("metadata.jsonl", b"{}\n" + b"[" * 99999, "line 2: "),
        ("metadata.jsonl", b'{}\n{"text": "\xff"}', "line 2: not UTF-8"),
        ("metadata.csv", b'file_name,text\na.png,"' + b"x" * 200_000, "line 2: field larger"),
    ],
)
def test_a_bad_line_of_metadata_is_named(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    draw(tmp_path / "a.png")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{name} can't be read ({said}")):
        open_dataset(str(tmp_path))


def test_metadata_that_names_missing_images_says_how_many(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw(tmp_path / "a.png")
    # Two captions of one image are two rows, and neither of them is missing.
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,x\na.png,y\ngone.png,z\n")
    open_dataset(str(tmp_path))
    assert "names 1 image(s) that do not exist" in caplog.text


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
    assert as_caption({"caption": ["first", "second"]}) == "first"
    assert as_caption([["first", "second"]]) == "first"
    assert as_caption("half \ud800 of it") == "half \ufffd of it"
    with pytest.raises(ValueError, match="a caption of 70,000 characters"):
        as_caption("x" * 70_000)
    assert as_caption([]) == as_caption(None) == as_caption({"width": 3}) == ""
