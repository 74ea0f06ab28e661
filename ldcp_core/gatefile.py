"""Reading and writing gate files: one .safetensors that says everything about its gates.

Tensors: for each site those of `PARTS`. Metadata: ``format``, ``version``, ``gates`` (a JSON object
with the U-Net's topology, the padding rule, the floor and free-form provenance) and ``checksum``
over that JSON and the tensors. Files of version 3 know no stages; those of version 2 do not say how
many heads attention has either; those of version 1 describe SD1.5's topologies alone, and have the
floor in the provenance. A reader accepts a file whole or not at all; every refusal names the file,
what was found, what was expected and what to do.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save as serialize
from torch import Tensor

from .blocks import PADDINGS, Site
from .correction import MAX_RANK, Correction
from .files import write_atomically
from .gates import THRESHOLD, Gates, Stage
from .sites import Topology
from .text import PATH, QUOTED, one_line

FORMAT = "ldcp.gates"
VERSION, VERSIONS = 4, ("1", "2", "3", "4")


@dataclass(frozen=True)
class Part:
    """What a gate file may hold for a site: finite values in a range.

    ``field`` is that of `Gates`, or of `Correction` where ``corrects``. The sizes in ``shape`` are
    C, the site's channels; O, the outputs of the layer that reads them; K, its weights per output
    that read kept channels; and R, the correction's rank.
    """

    field: str
    least: float = -math.inf
    most: float = math.inf
    shape: str = "C"
    dtype: torch.dtype = torch.float32
    corrects: bool = False


#: ending of a tensor's name -> what it is; a site without the first has none of the others, and of
#: a correction all parts or none
PARTS: Mapping[str, Part] = {
    "score": Part("scores", 0.0, 1.0),
    "constant": Part("constants"),
    "importance": Part("importances"),
    "correction_left": Part("left", shape="OR", dtype=torch.float16, corrects=True),
    "correction_right": Part("right", shape="RK", dtype=torch.float16, corrects=True),
    "correction_bias": Part("bias", shape="O", corrects=True),
}
SCORE = "score"
#: safetensors' name of a dtype -> numpy's, and the dtype
DTYPES = {"F32": ("<f4", torch.float32), "F16": ("<f2", torch.float16)}
#: an SDXL U-Net with every channel and head gated and corrections of rank 16 takes 34 MiB
MAX_BYTES = 48 * 2**20
#: of the description: its length as JSON, and how deep its lists and objects may be nested
MAX_DESCRIPTION, MAX_DEPTH = 2**20, 64
#: twice as many as an SDXL U-Net has sites and parts
MAX_TENSORS = 3000
#: the description is JSON inside JSON, which at most doubles it; a tensor's entry is far shorter
MAX_HEADER = 2 * MAX_DESCRIPTION + 256 * MAX_TENSORS
MAX_STAGES = 16
#: weights sampled per layer for the fingerprint
FINGERPRINT_SAMPLES = 4096
#: strict JSON for what Python writes as constants of its own
CONSTANTS = {"NaN": "null", "Infinity": "1e999", "-Infinity": "-1e999"}


class GateFileError(ValueError):
    """A file that is not a usable gate file."""


def save_gates(gates: Gates, path: str | Path, overwrite: bool = True) -> None:
    """Write ``gates`` to ``path`` atomically: a reader sees the old file or the whole new one.

    Raises GateFileError when the gates are not valid (they would not be read back),
    FileExistsError when the name is taken and not to be overwritten, OSError when the disk refuses.
    """
    path = Path(path)
    tensors = {
        f"{site}.{ending}": values.detach().cpu().contiguous()
        for ending, part in PARTS.items()
        for site, values in _values(gates, part).items()
    }
    description = {
        "topology": gates.topology.to_json(),
        "padding": gates.padding,
        "floor": gates.floor,
        "stages": [[stage.start, stage.sparsity] for stage in gates.stages],
        "info": dict(gates.info),
    }
    metadata = {"format": FORMAT, "version": str(VERSION), "gates": _strict_json(description)}
    metadata["checksum"] = _checksum(metadata["gates"], tensors)
    data = _serialized(tensors, metadata)
    if len(data) > MAX_BYTES:
        raise _refused(
            path,
            f"{len(data):,} bytes is too large for a gate file (at most {MAX_BYTES:,}); make "
            "corrections of a lower rank",
        )
    _gates(data, path)
    write_atomically(path, data, overwrite)


def _values(gates: Gates, part: Part) -> Mapping[str, Tensor]:
    """Site -> what the gates have of this part."""
    if not part.corrects:
        found: Mapping[str, Tensor] = getattr(gates, part.field)
        return found
    return {site: getattr(found, part.field) for site, found in gates.corrections.items()}


def load_gates(path: str | Path) -> Gates:
    """Read and validate a gate file.

    Raises GateFileError for anything that is not exactly what `save_gates` writes, and
    FileNotFoundError when there is no such file.
    """
    path = Path(path)
    return _gates(_content(path), path)


def content_digest(path: str | Path) -> str:
    """A hash of what `load_gates` reads; raises what that raises for a file it does not read."""
    return hashlib.sha256(_content(Path(path))).hexdigest()


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash of the gated layers' base weights, to recognise the model.

    Sampled evenly and rounded to float16, so that a float32 model and its float16 copy agree.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        flat = weights[name].detach().flatten()
        stride = max(1, flat.numel() // FINGERPRINT_SAMPLES)
        sample = flat[::stride].to("cpu", torch.float16).numpy().astype("<f2")
        digest.update(name.encode() + b"\0" + sample.tobytes())
    return digest.hexdigest()[:32]


def _serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The .safetensors bytes, with the metadata in its own order (the library shuffles it)."""
    data = serialize(dict(tensors), dict(metadata))
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8:end]), "__metadata__": metadata}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _checksum(description: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(description.encode() + b"\0")
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name].numpy())
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()


def _strict_json(value: Any) -> str:
    """JSON that every reader of JSON takes: NaN becomes null, infinity a number too large."""
    tokens = r'"(?:[^"\\]|\\.)*"|NaN|-?Infinity'
    return re.sub(tokens, lambda token: CONSTANTS.get(token[0], token[0]), json.dumps(value))


def _content(path: Path) -> bytes:
    """The file's bytes, read once: whatever happens to the file later, they stay as they are."""
    if path.is_dir():
        raise _refused(path, "this is a folder; choose a gate file (.safetensors) inside it")
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _refused(
                path, "this is not a regular file; choose a gate file made by training.fit"
            )
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise _refused(
            path,
            f"{max(status.st_size, len(data)):,} bytes is too large for a gate file (at most "
            f"{MAX_BYTES:,}); this may be a model checkpoint, choose a file made by training.fit",
        )
    return data


def _without_waiting(path: str, flags: int) -> int:
    """To open a pipe would wait for a writer."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _gates(data: bytes, path: Path) -> Gates:
    """The gates in the bytes of a file; raises GateFileError."""
    end = 8 + int.from_bytes(data[:8], "little")
    if 8 + MAX_HEADER < end <= len(data):
        raise _damaged(path, f"its header of {end - 8:,} bytes is too large for a gate file")
    # an object and two lists for each tensor
    if _brackets(data[8 : min(end, 8 + MAX_HEADER)]) > 3 * MAX_TENSORS + 2:
        raise _damaged(path, "its header holds more lists and objects than that of a gate file")
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = json.loads(data[8:end], object_pairs_hook=_unique)
    except (SafetensorError, ValueError, RecursionError) as error:
        raise _refused(
            path,
            f"not a readable .safetensors file ({one_line(error)}); it may be truncated or a web "
            "page saved under this name, download or copy it again",
        ) from error
    metadata = header.get("__metadata__") or {}
    description = _description(metadata, path)
    if len(tensors) > MAX_TENSORS:
        raise _damaged(path, f"{len(tensors):,} tensors are more than a U-Net has sites")
    gates, tensors = _validated(tensors, description, metadata["version"], path)
    if metadata.get("checksum") != _checksum(metadata["gates"], tensors):
        raise _damaged(path, "its checksum does not match its contents")
    return gates


def _brackets(text: bytes) -> int:
    """How many lists and objects JSON holds, without reading it, which would take memory."""
    plain = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    outside = re.sub(rb'"[^"]*"', b"", plain)
    return outside.count(b"[") + outside.count(b"{")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a key that is there twice, readers disagree which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _description(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    found = metadata.get("format")
    if found != FORMAT:
        raise _refused(
            path,
            f"this is not a gate file (format {one_line(repr(found))}, expected {FORMAT!r}); "
            "gate files are made by training.fit, and belong in models/ldcp_gates",
        )
    version = metadata.get("version")
    if version not in VERSIONS:
        raise _refused(
            path,
            f"gate file version {one_line(repr(version))}, this LDCP reads versions "
            f"{', '.join(VERSIONS)}; update the node pack or train the gates again",
        )
    text = metadata.get("gates", "")
    if len(text.encode()) > MAX_DESCRIPTION:
        raise _damaged(
            path,
            f"its description of {len(text.encode()):,} bytes is too large (at most "
            f"{MAX_DESCRIPTION:,})",
        )
    try:
        description = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise _damaged(path, f"its description is not valid JSON ({one_line(error)})") from error
    if not isinstance(description, dict):
        raise _damaged(path, f"its description is {type(description).__name__}, not an object")
    if _deeper_than(description, MAX_DEPTH):
        raise _damaged(path, f"its description is nested more than {MAX_DEPTH} levels deep")
    return description


def _deeper_than(value: Any, levels: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(_deeper_than(item, levels - 1) for item in inner)


def _validated(
    entries: Mapping[str, dict[str, Any]], description: dict[str, Any], version: str, path: Path
) -> tuple[Gates, dict[str, Tensor]]:
    """The gates, and their tensors by their names in the file."""
    read = {"1": Topology.from_version_1, "2": Topology.from_version_2}
    try:
        topology = read.get(version, Topology.from_json)(description.get("topology"))
    except ValueError as error:
        raise _damaged(path, one_line(error, 2 * QUOTED)) from error
    padding, info = description.get("padding"), description.get("info")
    floor = description.get("floor")
    if padding not in PADDINGS:
        expected = ", ".join(PADDINGS)
        raise _damaged(path, f"padding rule {one_line(repr(padding))}, expected one of {expected}")
    if not isinstance(info, dict):
        raise _damaged(path, "the 'info' object is missing")

    if version == "1":
        floor = info.get("floor")
        floor = floor if _is_floor(floor) else 0.0
    if not _is_floor(floor):
        raise _damaged(path, f"floor {one_line(repr(floor))}, expected a number from 0 up to 1")

    stages = _stages(description.get("stages"), path) if version == "4" else ()

    sites = {site.name: site for site in topology.all_sites()}
    named = {name: name.rpartition(".")[::2] for name in entries}
    for name, (site, ending) in named.items():
        if site not in sites or ending not in _parts_of(sites[site]):
            raise _refused(
                path,
                f"unknown tensor {one_line(repr(name))}; expected names such as "
                "'mid_block.resnets.0.conv1.score'. The file may be made by a newer version: "
                "update the node pack",
            )
    scored = {site for site, ending in named.values() if ending == SCORE}
    if not scored:
        raise _damaged(path, "it holds no scores")
    orphans = sorted({site for site, _ in named.values()} - scored)
    if orphans:
        raise _damaged(path, f"constants without scores for {one_line(', '.join(orphans))}")

    tensors: dict[str, Tensor] = {}
    found: dict[str, dict[str, Tensor]] = {ending: {} for ending in PARTS}
    order = list(PARTS)  # a score says how many channels are kept
    for name, (site, ending) in sorted(named.items(), key=lambda item: order.index(item[1][1])):
        sizes = _sizes(sites[site], {part: found[part].get(site) for part in PARTS})
        tensors[name] = _checked(entries[name], name, PARTS[ending], sizes, path)
        found[ending][site] = tensors[name]
        if ending == SCORE and not _is_shared(tensors[name], sites[site].group):
            raise _damaged(path, f"tensor {name!r} has several scores for one attention head")
    corrects = [found[ending] for ending, part in PARTS.items() if part.corrects]
    if any(part.keys() != corrects[0].keys() for part in corrects):
        raise _damaged(path, "it holds a part of a correction without the others")
    fields: dict[str, Any] = {
        part.field: {site: found[ending][site] for site in sites if site in found[ending]}
        for ending, part in PARTS.items()
        if not part.corrects
    }
    corrections = {
        site: Correction(*(part[site] for part in corrects))
        for site in sites
        if site in corrects[0]
    }
    gates = Gates(
        padding=padding,
        topology=topology,
        info=info,
        floor=floor,
        corrections=corrections,
        stages=stages,
        **fields,
    )
    return gates, tensors


def _stages(found: Any, path: Path) -> tuple[Stage, ...]:
    """The stages of a description: pairs of a start and a sparsity (null: as learned), in order."""
    pairs: Any = found if isinstance(found, list) and len(found) <= MAX_STAGES else [None]
    if all(map(_is_stage, pairs)):
        stages = tuple(Stage(start, sparsity) for start, sparsity in pairs)
        starts = [stage.start for stage in stages]
        if starts == sorted(set(starts)) and starts[:1] in ([], [0.0]):
            return stages
    raise _damaged(
        path,
        f"stages {one_line(repr(found))}, expected at most {MAX_STAGES} pairs of a start from 0 up "
        "to 1, in rising order, the first 0, and a sparsity from 0 to 1 or null",
    )


def _is_stage(pair: Any) -> bool:
    if not isinstance(pair, list) or len(pair) != 2:
        return False
    start, sparsity = pair
    return _is_floor(start) and (sparsity is None or _is_share(sparsity))


def _is_shared(score: Tensor, group: int) -> bool:
    """Whether the channels of each group have one score."""
    groups = score.view(-1, group)
    return bool((groups == groups[:, :1]).all())


def _parts_of(site: Site) -> list[str]:
    """What a file may hold for a site: no correction of a layer where a sum reads the channels."""
    return [ending for ending, part in PARTS.items() if site.reader or not part.corrects]


def _sizes(site: Site, found: Mapping[str, Tensor | None]) -> dict[str, int]:
    """The sizes in the shapes of a site's parts; R is 0 before the first part says it."""
    score, left = found[SCORE], found["correction_left"]
    kept = 0 if score is None else int((score > THRESHOLD).sum())
    return {
        "C": site.channels,
        "O": site.block.outputs(),
        "K": kept * site.kind.reader_taps,
        "R": 0 if left is None else left.shape[1],
    }


def _is_share(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value <= 1.0


def _is_floor(value: Any) -> TypeGuard[float]:
    return _is_share(value) and value < 1.0


def _checked(
    entry: dict[str, Any], name: str, part: Part, sizes: Mapping[str, int], path: Path
) -> Tensor:
    shape, expected = entry["shape"], [sizes[axis] for axis in part.shape]
    if part.shape == "OR" and len(shape) == 2:
        expected[1] = min(max(shape[1], 1), MAX_RANK)
    wanted = next(key for key, (_, dtype) in DTYPES.items() if dtype == part.dtype)
    if (entry["dtype"], shape) != (wanted, expected):
        raise _damaged(
            path,
            f"tensor {name!r} is {entry['dtype']} {one_line(shape)}, expected {wanted} {expected} "
            "as its own topology says",
        )
    numbers = DTYPES[wanted][0]
    array = np.frombuffer(entry["data"], numbers).astype(numbers[1:])
    tensor = torch.from_numpy(array).view(shape)
    if not bool(torch.isfinite(tensor).all()):
        raise _damaged(path, f"tensor {name!r} holds NaN or infinite values")
    if not bool(((tensor >= part.least) & (tensor <= part.most)).all()):
        raise _damaged(
            path,
            f"tensor {name!r} has values from {tensor.min():g} to {tensor.max():g}, expected "
            f"{part.field} in [{part.least:g}, {part.most:g}]",
        )
    return tensor


def _damaged(path: Path, what: str) -> GateFileError:
    return _refused(path, f"{what}; copy the file again or train the gates again")


def _refused(path: Path, what: str) -> GateFileError:
    return GateFileError(f"{one_line(path, PATH)}: {what}")
