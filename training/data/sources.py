"""Find training images wherever they are: folders in any layout, tables, hub data sets.

Folders of images are listed here directly instead of through `datasets`' imagefolder, which treats
subfolders called train or test as splits (dropping the rest), can't use one `.txt` caption per
image, ends a run at the first unreadable file and writes an index of the folder into the user's
cache. Everything that is a table (a hub id, `save_to_disk`, parquet, arrow, webdataset tars) goes
through `datasets`. Nothing is decoded here (see `training.data.images`), and no file is opened but
those of the data set (see `training.data.files`).
"""

from __future__ import annotations

import copy
import csv
import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ldcp_core import printable
from training.data.cache import digest
from training.data.files import CAPTION_LIMIT, checked, read_inside
from training.data.stamps import FileStamps
from training.errors import UserError, refuse_unless_hub_id

log = logging.getLogger(__name__)

KINDS = "png, jpg, webp, bmp or tiff"
EXPECTED = (
    f"a folder with {KINDS} images (such as FFHQ), a data set saved by `datasets`, parquet, arrow "
    "or webdataset tar files, or a hub data set id"
)
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt", "description")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path")
METADATA = ("metadata.jsonl", "metadata.csv")
# An FFHQ tree holds every picture up to three times; the first of these that is there is used.
FFHQ_RENDITIONS = ("images1024x1024", "thumbnails128x128", "in-the-wild-images")
_TABLES = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir"})


@dataclass(frozen=True)
class Record:
    """One listed image: a stable id, how to get its bytes, and its caption (often empty).

    ``read`` and ``caption`` raise ValueError or OSError, which say why there is none. ``stamp``
    tells the image's content apart from another one (see `training.data.stamps`).
    """

    id: str
    read: Callable[[], bytes]
    caption: Callable[[], str]
    stamp: Callable[[FileStamps], str]


def list_images(source: str) -> Sequence[Record]:
    """List the images of `source` without decoding any.

    Captions come from `metadata.jsonl` or `metadata.csv`, else from a `.txt` file of the image's
    name, else they are empty; of a table, from its first column of text that `CAPTION_COLUMNS`
    names. An image file has at most `FILE_LIMIT` bytes, a caption `CAPTION_LIMIT`
    (`training.data.files`), and links that lead out of the folder are not followed.

    Args:
        source: see `EXPECTED`. Folders are searched to any depth.

    Raises:
        UserError: there is nothing at `source`, it can't be reached, or holds no images.
    """
    path = Path(source).expanduser()
    if os.path.isdir(path):
        records = _list_folder(path)
    elif os.path.isfile(path):
        records = _list_file(path.resolve())
    else:
        records = _list_rows(source, _hub_folder(source), _load_hub(source))
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
        captions = _read_captions(root, files, set(images))
        named = {image.with_suffix("") for image in images}
        text = {file for file in files if file.suffix == ".txt" and file.with_suffix("") in named}
        text |= {file for file in files if file.name in METADATA}
        _mention_left_out(root, files, text.union(images))
        return [_file_record(root, file, captions) for file in images]
    if tables := _tables(files):
        _mention_left_out(root, files, set(tables))
        return _list_rows(str(root), root, _load_tables(root, tables))
    found = ", ".join(sorted({_kind(file) for file in files})[:6])
    raise UserError(
        f"{root} holds no images ({f'only {found} files' if found else 'no files at all'}).",
        EXPECTED,
        "unpack archives first, and pass the folder that contains the images",
    )


def _list_file(path: Path) -> Sequence[Record]:
    if path.suffix.lower() in SUFFIXES:
        return [_file_record(path.parent, path, {})]
    if path.suffix.lower() in _TABLES:
        return _list_rows(str(path), path.parent, _load_tables(path.parent, [path]))
    raise UserError(
        f"{path} is a {path.suffix or 'nameless'} file.", EXPECTED, "unpack archives, pass a folder"
    )


def _tables(files: Sequence[Path]) -> list[Path]:
    """The files of the first kind of table that there is."""
    for suffix in _TABLES:
        if tables := [file for file in files if file.suffix.lower() == suffix]:
            return tables
    return []


def _kind(file: Path) -> str:
    return printable(file.suffix.lower() or file.name)


def _mention_left_out(root: Path, files: Iterable[Path], used: set[Path]) -> None:
    kinds = Counter(_kind(file) for file in files if file not in used)
    if kinds:
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        log.warning("Not read in %s: %s. Images are %s.", root, found, KINDS)


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
    """Yield files in an order that is the same on every platform, following links once.

    Links to folders outside ``root`` are not followed.
    """

    def mention(error: OSError) -> None:
        log.warning("Skipping the folder %s: %s", printable(error.filename), error.strerror)

    seen: set[str] = set()
    inside = os.path.realpath(root)
    for folder, folders, files in os.walk(root, onerror=mention, followlinks=True):
        real = os.path.realpath(folder)
        if not Path(real).is_relative_to(inside):
            where = printable(folder)
            log.warning("Skipping the folder %s: a link out of %s (copy it there).", where, root)
        if real in seen or not Path(real).is_relative_to(inside):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(n for n in folders if n[0] != "." and n not in _SYSTEM_FOLDERS)
        for name in sorted(files):
            if not name.startswith("."):
                yield Path(folder, name)


# --- captions -------------------------------------------------------------------------------------


def _file_record(root: Path, file: Path, captions: Mapping[Path, object]) -> Record:
    def caption() -> str:
        if file in captions:
            return as_caption(captions[file])
        text = file.with_suffix(".txt")
        if not os.path.lexists(text):
            return ""
        try:
            content = read_inside(root, text, CAPTION_LIMIT)
        except (OSError, ValueError) as error:
            raise ValueError(f"its caption {printable(text.name)}: {error}") from error
        return as_caption(content.decode("utf-8-sig", errors="replace"))

    return Record(
        printable(file.relative_to(root).as_posix()),
        lambda: read_inside(root, file),
        caption,
        lambda stamps: stamps(root, file),
    )


def _read_captions(root: Path, files: Sequence[Path], images: set[Path]) -> dict[Path, object]:
    """Return captions from metadata files; a file name in one is relative to its folder."""
    captions: dict[Path, object] = {}
    for file in files:
        if file.name not in METADATA:
            continue
        rows = _read_rows(root, file)
        columns = {key for row in rows for key in row if isinstance(key, str)}
        name = next((column for column in FILE_COLUMNS if column in columns), None)
        text = next((column for column in CAPTION_COLUMNS if column in columns), None)
        if name is None or text is None:
            log.warning(
                "%s gives no captions: its columns are %s, expected one of %s and one of %s.",
                file,
                printable(", ".join(sorted(columns))) or "none",
                "/".join(FILE_COLUMNS),
                "/".join(CAPTION_COLUMNS),
            )
            continue
        paths = [file.parent / str(row.get(name, "")).replace("\\", "/") for row in rows]
        known = {
            path: row.get(text) for path, row in zip(paths, rows, strict=True) if path in images
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


def _read_rows(root: Path, file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    line = ""
    try:
        content = read_inside(root, file)
        text = io.StringIO(_utf_8(content), newline="")
        if file.suffix == ".csv":
            table = csv.DictReader(text)
            line = f"line {1 + bool(table.fieldnames)}: "
            for row in table:
                rows.append(row)
                line = f"line {table.line_num + 1}: "
        else:
            for number, found in enumerate(text, 1):
                line = f"line {number}: "
                if found.strip():
                    rows.append(_json_object(found))
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise UserError(
            f"{printable(str(file))} can't be read ({line}{error}).",
            "one JSON object per line, or a CSV file with a header, in UTF-8",
            "correct the file, or remove it to train without its captions",
        ) from error
    return rows


def _utf_8(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: not UTF-8") from error


def _json_object(line: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:  # which calls it line 1
        raise ValueError(f"{error.msg} at character {error.colno}") from error
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}")
    return found


def as_caption(value: object) -> str:
    """Return one caption from whatever a column holds; halves of a character become U+FFFD.

    Raises ValueError for one of more than `CAPTION_LIMIT` characters.

    >>> as_caption(["a face", "a person"]), as_caption(b"a cat "), as_caption(None)
    ('a face', 'a cat', '')
    """
    if isinstance(value, (list, tuple)):
        return as_caption(value[0] if value else None)
    if isinstance(value, Mapping):
        return as_caption(next((value[name] for name in CAPTION_COLUMNS if value.get(name)), None))
    if isinstance(value, bytes):
        value = value.decode("utf-8", errors="replace")
    text = re.sub("[\ud800-\udfff]", "\ufffd", str(value)).strip() if value is not None else ""
    if len(text) > CAPTION_LIMIT:
        raise ValueError(f"a caption of {len(text):,} characters; at most {CAPTION_LIMIT:,}")
    return text


# --- tables, through `datasets` -------------------------------------------------------------------


def _list_saved(root: Path) -> Sequence[Record]:
    import datasets

    try:
        _check_saved(root)
        table = _choose_split(datasets.load_from_disk(str(root.absolute())))
    except Exception as error:  # `datasets` takes files at their word, whatever they hold
        raise UserError(
            f"{root} is a saved data set that can't be read ({error}).", EXPECTED, "save it again"
        ) from error
    files = [Path(file["filename"]) for file in table.cache_files]
    return _list_rows(str(root), root, table, files)


def _check_saved(root: Path) -> None:
    """Raises ValueError or OSError where a file of a saved data set is not one (see `checked`)."""
    if "::" in str(root.absolute()):
        raise ValueError("'::' in a path has a meaning of its own")
    parts = [root]
    if (root / "dataset_dict.json").is_file():
        parts = [root / name for name in _read_json(root, root / "dataset_dict.json")["splits"]]
    for part in parts:
        _read_json(root, part / "dataset_info.json")
        for entry in _read_json(root, part / "state.json")["_data_files"]:
            try:
                checked(root, part / entry["filename"], None)
            except ValueError as error:
                raise ValueError(f"{printable(entry['filename'])}: {error}") from error


def _read_json(root: Path, file: Path) -> Any:
    try:
        return json.loads(read_inside(root, file))
    except ValueError as error:
        raise ValueError(f"{printable(file.name)}: {error}") from error


def _load_tables(root: Path, files: Sequence[Path], streaming: bool = False) -> Any:
    import datasets

    kind = _TABLES[files[0].suffix.lower()]
    for file in files:
        try:
            checked(root, file, None)
        except (OSError, ValueError) as error:
            found = f"{printable(str(file))} can't be read: {error}."
            raise UserError(found, EXPECTED, "remove it") from error
        if special := re.search(r"::|[*?\[\]]", str(file.absolute())):
            raise UserError(
                f"{printable(str(file))} can't be opened: {special.group()!r} in the path of a "
                "table has a meaning of its own.",
                "a path without *, ?, [, ] and ::",
                "rename the file or folder",
            )
    try:
        return datasets.load_dataset(
            kind, data_files=[str(f.absolute()) for f in files], split="train", streaming=streaming
        )
    except Exception as error:  # builders wrap whatever their file format raises
        raise UserError(
            f"{files[0]} ({len(files)} {kind} file(s)) can't be read: {error.__cause__ or error}.",
            EXPECTED,
            "download or pack the files again",
        ) from error


def _hub_folder(source: str) -> Path:
    """Where the files of a hub data set lie once they are downloaded."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE, f"datasets--{source.replace('/', '--')}")


def _load_hub(source: str, **options: Any) -> Any:
    refuse_unless_hub_id(source, SUFFIXES, EXPECTED)
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
    """A table that is read as it comes: ``table`` is an `IterableDataset` of undecoded images.

    ``folder`` holds the files that rows may name.
    """

    source: str
    table: Any
    image: str
    text: str | None
    folder: Path

    def table_at(self, state: Mapping[str, Any] | None) -> Any:
        """The table, to be read from where ``state`` was taken, or from its start.

        It is not told the epoch: in all but the first `datasets` would shuffle its files, and rows
        that are held out would be learned from.
        """
        table = copy.deepcopy(self.table)
        if state is not None:
            table.load_state_dict(dict(state))
        return table

    def rows(self, table: Any) -> Iterator[Mapping[str, Any]]:
        """The rows of `table_at`; raises UserError where the table ends in damage or silence."""
        try:
            yield from table
        except Exception as error:  # of arrow, of tar, of the network
            raise UserError(
                f"The stream of {self.source} broke: {printable(str(error))}.",
                "intact tables, and a connection to the hub for one of its data sets",
                "try again, with --resume where the run has a checkpoint; if it breaks again, "
                "download or pack the files again",
            ) from error

    def read(self, row: Mapping[str, Any]) -> bytes:
        """The bytes of a row's image; raises ValueError or OSError where it has none."""
        return _image_bytes(row[self.image], self.folder)

    def caption(self, row: Mapping[str, Any]) -> str:
        """A row's caption; raises ValueError where it is too long."""
        return as_caption(row[self.text]) if self.text else ""


def open_stream(source: str) -> Stream:
    """Open a hub data set, or tables in a local folder, without downloading or converting it.

    Raises UserError as `list_images`, and for a folder of image files, which needs no streaming.
    """
    path = Path(source).expanduser()
    if os.path.isdir(path):
        folder, table = path, _local_tables(path)
    elif os.path.isfile(path):
        folder, table = path.resolve().parent, _local_tables(path.resolve())
    else:
        folder, table = _hub_folder(source), _load_hub(source, streaming=True)
    image, text = _columns(source, _features(source, table))
    columns = [image, text] if text else [image]
    undecoded = _undecoded(source, table.select_columns(columns), image)
    return Stream(source, undecoded, image, text, folder)


def _features(source: str, table: Any) -> Mapping[str, Any]:
    try:
        return table.features or table._resolve_features().features or {}
    except Exception as error:  # the first rows are read for it
        raise UserError(
            f"The data set {source} can't be read: {printable(str(error))}.", EXPECTED, "try again"
        ) from error


def _local_tables(path: Path) -> Any:
    root, files = (path, list(_walk(path))) if path.is_dir() else (path.parent, [path])
    if tables := _tables(files):
        _mention_left_out(root, files, set(tables))
        return _load_tables(root, tables, streaming=True)
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


def _list_rows(
    source: str, folder: Path, table: Any, files: Sequence[Path] = ()
) -> Sequence[Record]:
    """The rows of a table, which may name files in ``folder``.

    ``files`` are those it is made of, where its own fingerprint does not tell that one was edited.
    """
    import pyarrow.compute

    column, text = _columns(source, table.features)
    table = table.with_format(None)
    images = _undecoded(source, table.select_columns([column]), column)
    captions = table.select_columns([text]) if text else None
    stored = pyarrow.compute.struct_field(images.data.column(column), "bytes").is_valid()

    @lru_cache(maxsize=1)
    def version(stamps: FileStamps) -> str:
        parts = [stamps(folder, file, None) for file in files]
        return digest([table._fingerprint, *parts])

    def record(row: int) -> Record:
        def read() -> bytes:
            return _image_bytes(images[row][column], folder)

        def caption() -> str:
            return as_caption(captions[row][text]) if captions is not None else ""

        def stamp(stamps: FileStamps) -> str:
            if stored[row].as_py():
                return f"{version(stamps)} {row}"
            try:
                return stamps(folder, _named_file(images[row][column], folder))
            except ValueError as error:
                return f"unreadable: {error}"

        return Record(f"row {row}", read, caption, stamp)

    return [record(row) for row in range(len(table))]


def _columns(source: str, features: Mapping[str, Any]) -> tuple[str, str | None]:
    """The names of the columns of images and of captions."""
    import datasets

    column = next((n for n, f in features.items() if isinstance(f, datasets.Image)), None)
    column = column or next((name for name in IMAGE_COLUMNS if name in features), None)
    if column is None:
        raise UserError(
            f"{source} has no image column, only {printable(', '.join(features))}.",
            f"a column of type Image, or named {'/'.join(IMAGE_COLUMNS)}",
            "rename the column",
        )
    for name in (*CAPTION_COLUMNS, "json"):
        if name in features and _is_text(features[name]):
            return column, name
        if name in features:
            log.warning("No captions from the column %s of %s: it is no text.", name, source)
    return column, None


def _is_text(feature: Any) -> bool:
    """Whether a column is read as it is stored; `datasets` opens files to decode others."""
    import datasets

    if isinstance(feature, Mapping):
        return all(map(_is_text, feature.values()))
    if isinstance(feature, (list, tuple)):
        return all(map(_is_text, feature))
    inner = getattr(feature, "feature", None)  # lists
    return isinstance(feature, datasets.Value) or (inner is not None and _is_text(inner))


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


def _image_bytes(value: Mapping[str, Any] | None, folder: Path) -> bytes:
    """The bytes that a row holds, or those of the file that it names in ``folder``.

    Raises ValueError or OSError where there are none.
    """
    if value is not None and value["bytes"] is not None:
        return bytes(value["bytes"])
    return read_inside(folder, _named_file(value, folder))


def _named_file(value: Mapping[str, Any] | None, folder: Path) -> Path:
    """The file that a row names instead of holding an image; raises ValueError where it may not.

    Only a hub data set of image files, whose rows `datasets` writes, may name them absolutely: in
    that data set's own part of the hub's cache.
    """
    from huggingface_hub.constants import HF_HUB_CACHE

    if value is None or not value["path"]:
        raise ValueError("the row has no image")
    path = Path(value["path"])
    if path.is_absolute() and folder.parent != Path(HF_HUB_CACHE):
        raise ValueError(
            "the row names a file outside the data set instead of holding the image (a table saved "
            "by `save_to_disk` holds its images)"
        )
    return folder / path
