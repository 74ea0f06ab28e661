"""Reading and writing gate files: one .safetensors that says everything about its gates.

Tensors: ``<site>.score`` float32 [C] in [0, 1] and, optionally, ``<site>.constant`` float32 [C]
and ``<site>.importance`` float32 [C], what a criterion measured before it became a score.
Metadata: ``format``, ``version``, ``gates`` (a JSON object with the U-Net's topology, the padding
rule and free-form provenance) and ``checksum`` over that JSON and the tensors. A reader accepts a
file whole or not at all; every refusal names the file, what was found, what was expected and what
to do.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .gates import PADDINGS, Gates
from .sites import Topology

FORMAT = "ldcp.gates"
VERSION = 1
#: more than ten times the file of a U-Net with every channel gated
MAX_BYTES = 64 * 1024 * 1024
#: weights sampled per convolution for the fingerprint
FINGERPRINT_SAMPLES = 4096


class GateFileError(ValueError):
    """A file that is not a usable gate file."""


def save_gates(gates: Gates, path: str | Path) -> None:
    """Write ``gates`` to ``path`` atomically: a reader sees the old file or the whole new one.

    Raises GateFileError when the gates are not valid (they would not be read back), OSError when
    the disk refuses.
    """
    path = Path(path)
    tensors = {f"{site}.score": score for site, score in gates.scores.items()}
    tensors |= {f"{site}.constant": constant for site, constant in gates.constants.items()}
    tensors |= {f"{site}.importance": raw for site, raw in gates.importances.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    description = {
        "topology": gates.topology.to_json(),
        "padding": gates.padding,
        "info": dict(gates.info),
    }
    _validated(tensors, description, path)
    metadata = {"format": FORMAT, "version": str(VERSION), "gates": json.dumps(description)}
    metadata["checksum"] = _checksum(metadata["gates"], tensors)
    write_atomically(path, _serialized(tensors, metadata))


def load_gates(path: str | Path) -> Gates:
    """Read and validate a gate file.

    Raises GateFileError for anything that is not exactly what `save_gates` writes, and
    FileNotFoundError when there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise GateFileError(
            f"{path}: this is a folder; choose a gate file (.safetensors) inside it"
        )
    if path.stat().st_size > MAX_BYTES:
        raise GateFileError(
            f"{path}: {path.stat().st_size:,} bytes is too large for a gate file (at most "
            f"{MAX_BYTES:,}); this may be a model checkpoint, choose a file made by training.fit"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            description = _description(metadata, path)
            # cloned: the originals are a view of the file, and would change when it is overwritten
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  # no dict
    except SafetensorError as error:
        raise GateFileError(
            f"{path}: not a readable .safetensors file ({error}); it may be truncated or a web "
            "page saved under this name, download or copy it again"
        ) from error
    gates = _validated(tensors, description, path)
    if metadata.get("checksum") != _checksum(metadata["gates"], tensors):
        raise _damaged(path, "its checksum does not match its contents")
    return gates


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that at any moment its name holds the old content or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would hide the file from other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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


def _description(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    found = metadata.get("format")
    if found != FORMAT:
        raise GateFileError(
            f"{path}: this is not a gate file (format {found!r}, expected {FORMAT!r}); gate files "
            "are made by training.fit, and belong in models/ldcp_gates"
        )
    if metadata.get("version") != str(VERSION):
        raise GateFileError(
            f"{path}: gate file version {metadata.get('version')!r}, this LDCP reads version "
            f"{VERSION}; update the node pack or train the gates again"
        )
    try:
        description = json.loads(metadata.get("gates", ""))
    except (ValueError, RecursionError) as error:  # ValueError: also a number of 5,000 digits
        raise _damaged(path, f"its description is not valid JSON ({error})") from error
    if not isinstance(description, dict):
        raise _damaged(path, f"its description is {type(description).__name__}, not an object")
    return description


def _validated(tensors: Mapping[str, Tensor], description: dict[str, Any], path: Path) -> Gates:
    try:
        topology = Topology.from_json(description.get("topology"))
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    padding, info = description.get("padding"), description.get("info")
    if padding not in PADDINGS:
        raise _damaged(path, f"padding rule {padding!r}, expected one of {', '.join(PADDINGS)}")
    if not isinstance(info, dict):
        raise _damaged(path, "the 'info' object is missing")

    widths = {site.name: site.channels for site in topology.all_sites()}
    found: dict[str, dict[str, Tensor]] = {"score": {}, "constant": {}, "importance": {}}
    for name, tensor in tensors.items():
        site, _, part = name.rpartition(".")
        if part not in found or site not in widths:
            raise GateFileError(
                f"{path}: unknown tensor {name!r}; expected names such as "
                "'mid_block.resnets.0.conv1.score'. The file may be made by a newer version: "
                "update the node pack"
            )
        found[part][site] = _checked(tensor, name, part, widths[site], path)
    scores = found["score"]
    if not scores:
        raise _damaged(path, "it holds no scores")
    orphans = sorted({site for part in found.values() for site in part} - set(scores))
    if orphans:
        raise _damaged(path, f"constants without scores for {', '.join(orphans)}")

    def ordered(part: str) -> dict[str, Tensor]:
        return {site: found[part][site] for site in widths if site in found[part]}

    return Gates(
        ordered("score"), ordered("constant"), padding, topology, info, ordered("importance")
    )


def _checked(tensor: Tensor, name: str, part: str, width: int, path: Path) -> Tensor:
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != (width,):
        raise _damaged(
            path,
            f"tensor {name!r} is {tensor.dtype} {list(tensor.shape)}, expected torch.float32 "
            f"[{width}] as its own topology says",
        )
    if not bool(torch.isfinite(tensor).all()):
        raise _damaged(path, f"tensor {name!r} holds NaN or infinite values")
    if part == "score" and not bool(((tensor >= 0) & (tensor <= 1)).all()):
        raise _damaged(
            path,
            f"tensor {name!r} has values from {tensor.min():g} to {tensor.max():g}, expected "
            "scores in [0, 1]",
        )
    return tensor


def _damaged(path: Path, what: str) -> GateFileError:
    return GateFileError(f"{path}: {what}; copy the file again or train the gates again")
