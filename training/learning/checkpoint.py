"""Checkpoints of a fit: everything that changes from step to step, in files that survive a crash.

A checkpoint is one `.safetensors` file: the tensors of a nested state, and beside them, as JSON in
the metadata, the state itself with a reference in each tensor's place, so that reading one never
unpickles. A checksum covers both, files are written whole or not at all, and the last few are kept,
so that a damaged one costs an interval and not the run. The folder exists exactly while a run is
unfinished.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from ldcp_core import write_atomically
from training.errors import UserError

log = logging.getLogger(__name__)

FORMAT = "ldcp.checkpoint"
VERSION = 3
_PATTERN = "step-*.safetensors"
_TENSOR = "tensor"


@dataclass(frozen=True)
class Checkpoint:
    """What was read: the step it was taken after, what the run is, and its state."""

    path: Path
    step: int
    identity: dict[str, Any]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run in ``folder``, of which the last ``keep`` stay."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self._keep = keep
        self._saved: int | None = None

    @classmethod
    def beside(cls, output: Path, keep: int) -> Checkpoints:
        """Those of the run that writes ``output``."""
        return cls(output.with_suffix(".checkpoints"), keep)

    def save(self, step: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> Path:
        """Write the state after ``step`` steps; raises OSError when the disk refuses."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"step-{step:08d}.safetensors"
        write_atomically(path, to_bytes(step, identity, state))
        self._saved = step
        for old in self.paths()[self._keep :]:
            old.unlink(missing_ok=True)
        return path

    def paths(self) -> list[Path]:
        """The files there are, the newest first."""
        return sorted(self.folder.glob(_PATTERN), reverse=True)

    def load(self) -> Checkpoint:
        """The newest checkpoint that is whole; damaged ones are named in the log.

        Raises UserError where there is none.
        """
        damaged = []
        for path in self.paths():
            try:
                found = read(path)
            except (ValueError, OSError) as error:
                log.warning("%s is no usable checkpoint (%s); trying the one before.", path, error)
                damaged.append(path.name)
                continue
            self._saved = found.step
            return found
        what = f"only damaged ones ({', '.join(damaged)})" if damaged else "none"
        raise UserError(
            f"--resume needs a checkpoint, and in {self.folder} there is {what}.",
            "a checkpoint of an unfinished run with the same --output",
            "check --output, or leave out --resume to start from the beginning",
        )

    def refuse_overwriting(self) -> None:
        """Raises UserError when an unfinished run left checkpoints that a new run would replace."""
        if paths := self.paths():
            raise UserError(
                f"{self.folder} holds checkpoints of an unfinished run (the last one: "
                f"{paths[0].name}).",
                "no checkpoints where a new run starts",
                "add --resume to go on with that run, or delete the folder to give it up",
            )

    def clear(self) -> None:
        """Remove the files, those of killed writes too, and the folder: the run is finished."""
        for path in (*self.paths(), *self.folder.glob(f".{_PATTERN}.*")):
            path.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def advice(self) -> str:
        """What is safe, and how to go on."""
        if self._saved is None:
            return "No checkpoint was written yet: start the same command again."
        return (
            f"All up to step {self._saved} is safe in {self.folder}, from where training.fit "
            "--resume goes on."
        )


def check_identity(saved: Checkpoint, identity: Mapping[str, Any]) -> None:
    """Raises UserError when the run that wrote ``saved`` is not the one described by ``identity``.

    Both map the name of a setting to its value.
    """
    names = [*identity, *(name for name in saved.identity if name not in identity)]
    different = [name for name in names if saved.identity.get(name) != identity.get(name)]
    if different:
        raise UserError(
            f"{saved.path} was written with other settings: "
            + ", ".join(f"{name} {identity.get(name)!r} is asked for now" for name in different)
            + ".",
            ", ".join(f"{name} {saved.identity.get(name)!r}" for name in different),
            "resume with the settings the run began with, or leave out --resume and give another "
            "--output to start a new one",
        )


def to_bytes(step: int, identity: Mapping[str, Any], state: Mapping[str, Any]) -> bytes:
    """The file's content; the inverse of `read`."""
    tensors: dict[str, Tensor] = {}
    content = json.dumps({"step": step, "identity": identity, "state": _packed(state, tensors)})
    metadata = {"format": FORMAT, "version": str(VERSION), "content": content}
    metadata["checksum"] = _checksum(content, tensors)
    return serialize(tensors, metadata)


def read(path: Path) -> Checkpoint:
    """Raises ValueError for anything that `to_bytes` did not write, OSError where it can't read."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"not a readable .safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{metadata.get('format')} version {metadata.get('version')}, expected {FORMAT} "
            f"version {VERSION}"
        )
    text = metadata.get("content", "")
    if metadata.get("checksum") != _checksum(text, tensors):
        raise ValueError("its checksum does not match its contents")
    try:
        content = json.loads(text)
        state = _unpacked(content["state"], tensors)
        return Checkpoint(path, content["step"], content["identity"], state)
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"its contents are none of a checkpoint: {error!r}") from error


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """``value`` as JSON: tensors moved to ``tensors``, mappings as pairs (keys may be numbers)."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _packed(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_packed(item, tensors) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint can't hold a {type(value).__name__}")


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(item, tensors) for item in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        return {key: _unpacked(item, tensors) for key, item in value["pairs"]}
    return value


def _checksum(content: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
