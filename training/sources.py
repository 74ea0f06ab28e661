"""Find training images wherever they are: folders in any layout, tables, hub data sets.

Folders of images are listed here directly instead of through `datasets`' imagefolder, which treats
subfolders called train or test as splits (dropping the rest), can't use one `.txt` caption per
image, ends a run at the first unreadable file and writes an index of the folder into the user's
cache. Everything that is a table (a hub id, `save_to_disk`, parquet, arrow, webdataset tars) goes
through `datasets`. Nothing is decoded here (see `training.data`).
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.errors import UserError

log = logging.getLogger(__name__)

EXPECTED = (
    "a folder with png, jpg or webp images (such as FFHQ), a data set saved by `datasets`, "
    "parquet, arrow or webdataset tar files, or a hub data set id"
)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt", "description")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
METADATA = ("metadata.jsonl", "metadata.csv")
# An FFHQ tree holds every picture up to three times; the first of these that is there is used.
FFHQ_RENDITIONS = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")
#: bytes read at each of three places of a file, to tell its content
STAMP_SAMPLE = 4096
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})


@dataclass(frozen=True)
class Record:
    """One listed image: a stable id, how to get its bytes, and its caption (often empty).

    ``stamp`` tells its content apart from another one, cheaply: without reading all of it.
    """

    id: str
    read: Callable[[], bytes]
    caption: Callable[[], str]
    stamp: Callable[[], str]


def list_images(source: str) -> Sequence[Record]:
    """List the images of `source` without decoding any.

    Captions come from `metadata.jsonl` or `metadata.csv`, else from a `.txt` file of the image's
    name, else they are empty; of a table, from its first column named in `CAPTION_COLUMNS`.

    Args:
        source: see `EXPECTED`. Folders are searched to any depth.

    Raises:
        UserError: there is nothing at `source`, it can't be reached, or holds no images.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        records = _list_folder(path)
    elif path.is_file():
        records = _list_file(path)
    else:
        records = _list_hub(source)
    if not records:
        raise UserError(f"{source} holds no images.", EXPECTED, "check the path")
    return records


# --- files ----------------------------------------------------------------------------------------


def _list_folder(root: Path) -> Sequence[Record]:
    if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
        return _list_saved(root)
    other = _other_renditions(root)
    files = [file for file in _walk(root) if file.relative_to(root).parts[0] not in other]
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    if images:
        captions = _read_captions(files, set(images))
        return [_file_record(root, file, captions) for file in images]
    for suffix in _TABLES:
        tables = [file for file in files if file.suffix.lower() == suffix]
        if tables:
            return _list_tables(tables)
    found = ", ".join(sorted({file.suffix.lower() or file.name for file in files})[:6])
    raise UserError(
        f"{root} holds no images ({f'only {found} files' if found else 'no files at all'}).",
        EXPECTED,
        "unpack archives first, and pass the folder that contains the images",
    )


def _list_file(path: Path) -> Sequence[Record]:
    if path.suffix.lower() in SUFFIXES:
        return [_file_record(path.parent, path, {})]
    if path.suffix.lower() in _TABLES:
        return _list_tables([path])
    raise UserError(
        f"{path} is a {path.suffix or 'nameless'} file.", EXPECTED, "unpack archives, pass a folder"
    )


def _other_renditions(root: Path) -> list[str]:
    """Return the folders to leave out so that no FFHQ picture comes twice."""
    there = [name for name in FFHQ_RENDITIONS if (root / name).is_dir()]
    if len(there) > 1:
        log.warning(
            "%s holds the same pictures as %s; using %s. Pass one of these folders to choose.",
            root,
            ", ".join(there),
            there[0],
        )
    return there[1:]


def _walk(root: Path) -> Iterator[Path]:
    """Yield files in an order that is the same on every platform, following links once."""

    def mention(error: OSError) -> None:
        log.warning("Skipping the folder %s: %s", error.filename, error.strerror)

    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=mention, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if n[0] != "." and n not in _SYSTEM_FOLDERS)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


# --- captions -------------------------------------------------------------------------------------


def _file_record(root: Path, file: Path, captions: Mapping[Path, str]) -> Record:
    def caption() -> str:
        if file in captions:
            return captions[file]
        text = file.with_suffix(".txt")
        if not text.is_file():
            return ""
        return text.read_text(encoding="utf-8-sig", errors="replace").strip()

    name = file.relative_to(root).as_posix()
    printable = name.encode(errors="backslashreplace").decode()  # POSIX names may not be UTF-8
    return Record(printable, file.read_bytes, caption, lambda: file_stamp(file))


def file_stamp(file: Path) -> str:
    """Size and a hash of three samples, of a file's start, middle and end.

    Of the content alone, so that it is the same for a copy elsewhere. The end of a PNG holds a
    checksum of all its pixels.
    """
    found = hashlib.sha256()
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            for start in (0, size // 2, max(size - STAMP_SAMPLE, 0)):
                stream.seek(start)
                found.update(stream.read(STAMP_SAMPLE))
    except OSError as error:
        return f"unreadable: {error}"
    return f"{size} {found.hexdigest()}"


def _read_captions(files: Sequence[Path], images: set[Path]) -> dict[Path, str]:
    """Return captions from metadata files; a file name in one is relative to its folder."""
    captions: dict[Path, str] = {}
    for file in files:
        if file.name not in METADATA:
            continue
        rows = _read_rows(file)
        columns = {key for row in rows for key in row if isinstance(key, str)}
        name = next((column for column in FILE_COLUMNS if column in columns), None)
        text = next((column for column in CAPTION_COLUMNS if column in columns), None)
        if name is None or text is None:
            log.warning(
                "%s gives no captions: its columns are %s, expected one of %s and one of %s.",
                file,
                ", ".join(sorted(columns)) or "none",
                "/".join(FILE_COLUMNS),
                "/".join(CAPTION_COLUMNS),
            )
            continue
        paths = [file.parent / str(row.get(name, "")).replace("\\", "/") for row in rows]
        known = {
            path: as_caption(row.get(text))
            for path, row in zip(paths, rows, strict=True)
            if path in images
        }
        if not known:
            raise UserError(
                f"None of the {len(rows)} images named in {file} exists.",
                f"paths relative to {file.parent} in the column {name}",
                f"correct the column {name}, or remove the file",
            )
        if missing := sum(path not in images for path in paths):
            log.warning("%s names %d image(s) that do not exist.", file, missing)
        captions |= known
    return captions


def _read_rows(file: Path) -> list[dict[str, Any]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix == ".csv":
                return list(csv.DictReader(stream))
            return [dict(json.loads(line)) for line in stream if line.strip()]
    except (ValueError, TypeError, csv.Error) as error:
        raise UserError(
            f"{file} can't be read ({error}).",
            "one JSON object per line, or a CSV file with a header, in UTF-8",
            "correct the file, or remove it to train without its captions",
        ) from error


def as_caption(value: object) -> str:
    """Return one caption from whatever a column holds.

    >>> as_caption(["a face", "a person"]), as_caption(b"a cat "), as_caption(None)
    ('a face', 'a cat', '')
    """
    if isinstance(value, (list, tuple)):
        return as_caption(value[0] if value else None)
    if isinstance(value, Mapping):
        return as_caption(next((value[name] for name in CAPTION_COLUMNS if value.get(name)), None))
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    return str(value).strip() if value is not None else ""


# --- tables, through `datasets` -------------------------------------------------------------------


def _list_saved(root: Path) -> Sequence[Record]:
    import datasets

    try:
        return _list_rows(str(root), _choose_split(datasets.load_from_disk(str(root))))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{root} is a saved data set that can't be read ({error}).", EXPECTED, "save it again"
        ) from error


def _list_tables(files: Sequence[Path]) -> Sequence[Record]:
    return _list_rows(str(files[0].parent), _load_tables(files))


def _load_tables(files: Sequence[Path], streaming: bool = False) -> Any:
    import datasets

    kind = _TABLES[files[0].suffix.lower()]
    try:
        return datasets.load_dataset(
            kind, data_files=[str(f) for f in files], split="train", streaming=streaming
        )
    except Exception as error:  # builders wrap whatever their file format raises
        raise UserError(
            f"{files[0]} ({len(files)} {kind} file(s)) can't be read: {error.__cause__ or error}.",
            EXPECTED,
            "download or pack the files again",
        ) from error


def _list_hub(source: str) -> Sequence[Record]:
    return _list_rows(source, _load_hub(source))


def _load_hub(source: str, **options: Any) -> Any:
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) or Path(source).suffix.lower() in SUFFIXES:
        raise UserError(
            f"There is no file or folder {source}.",
            EXPECTED,
            f"check the spelling; the path is taken from {Path.cwd()}",
        )
    import datasets

    try:
        return _choose_split(datasets.load_dataset(source, **options))
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"There is no data set {source} on the hub that you may read, and no such path here.",
            EXPECTED,
            "check the spelling; for a gated or private one run `hf auth login`",
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"The hub could not be reached for the data set {source}, and there is no such path "
            f"here ({error}).",
            EXPECTED,
            "check the connection and HF_HUB_OFFLINE, or pass a local folder",
        ) from error
    except Exception as error:  # several configurations, scripts, odd formats: `datasets` says it
        raise UserError(
            f"The data set {source} can't be opened: {error}",
            EXPECTED,
            "download it and pass the local folder",
        ) from error


@dataclass(frozen=True)
class Stream:
    """A table that is read as it comes: ``table`` is an `IterableDataset` of undecoded images."""

    table: Any
    image: str
    text: str | None

    def table_at(self, epoch: int, state: Mapping[str, Any] | None) -> Any:
        """The table, to be read from where ``state`` was taken, or from its start."""
        table = copy.deepcopy(self.table)
        table.set_epoch(epoch)
        if state is not None:
            table.load_state_dict(dict(state))
        return table

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of a row's image; raises ValueError where it has none."""
        return _image_bytes(row[self.image])

    def caption(self, row: Mapping[str, Any]) -> str:
        return as_caption(row[self.text]) if self.text else ""


def open_stream(source: str) -> Stream:
    """Open a hub data set, or tables in a local folder, without downloading or converting it.

    Raises UserError as `list_images`, and for a folder of image files, which needs no streaming.
    """
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        table = _local_tables(path)
    else:
        table = _load_hub(source, streaming=True)
    features = table.features or table._resolve_features().features or {}
    image, text = _columns(source, features)
    columns = [image, text] if text else [image]
    return Stream(_undecoded(source, table.select_columns(columns), image), image, text)


def _local_tables(path: Path) -> Any:
    files = sorted(_walk(path)) if path.is_dir() else [path]
    for suffix in _TABLES:
        if tables := [file for file in files if file.suffix.lower() == suffix]:
            return _load_tables(tables, streaming=True)
    raise UserError(
        f"--streaming was given, and {path} holds no tables.",
        f"a hub data set, or files that end in {', '.join(_TABLES)}",
        "leave out --streaming: single images are read from where they are",
    )


def _choose_split(data: Any) -> Any:
    """Return the train split, or the first one; a single table is returned as it is."""
    if not isinstance(data, dict):
        return data
    name = "train" if "train" in data else next(iter(data))
    if len(data) > 1:
        log.warning("Using the split %s of %s.", name, ", ".join(data))
    return data[name]


def _list_rows(source: str, table: Any) -> Sequence[Record]:
    column, text = _columns(source, table.features)
    images = _undecoded(source, table.select_columns([column]), column)
    captions = table.select_columns([text]) if text else None

    def record(row: int) -> Record:
        def read() -> bytes:
            return _image_bytes(images[row][column])

        def caption() -> str:
            return as_caption(captions[row][text]) if captions is not None else ""

        return Record(f"row {row}", read, caption, lambda: f"{table._fingerprint} {row}")

    return [record(row) for row in range(len(table))]


def _columns(source: str, features: Mapping[str, Any]) -> tuple[str, str | None]:
    """The names of the columns of images and of captions."""
    import datasets

    column = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    column = column or next((name for name in IMAGE_COLUMNS if name in features), None)
    if column is None:
        raise UserError(
            f"{source} has no image column, only {', '.join(features)}.",
            f"a column of type Image, or named {'/'.join(IMAGE_COLUMNS)}",
            "rename the column",
        )
    text = next((name for name in (*CAPTION_COLUMNS, "json") if name in features), None)
    return column, text


def _undecoded(source: str, table: Any, column: str) -> Any:
    """The table, whose images come as bytes or as a path."""
    import datasets

    try:
        return table.cast_column(column, datasets.Image(decode=False))
    except Exception as error:  # arrow's own errors differ between versions
        raise UserError(
            f"The column {column} of {source} holds {table.features[column]}.",
            "images",
            "convert it",
        ) from error


def _image_bytes(value: Mapping[str, Any] | None) -> bytes:
    if value is None:
        raise ValueError("the row has no image")
    if value["bytes"]:
        return bytes(value["bytes"])
    import fsspec

    with fsspec.open(value["path"], "rb") as file:
        return bytes(file.read())
