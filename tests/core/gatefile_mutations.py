"""Malformed gate files from a seed, and a reader of its own to judge them.

    python tests/core/gatefile_mutations.py 20000 FOLDER

reads that many in one process that may neither grow by more than `MEMORY` bytes nor take longer
than `SECONDS` over one file, and prints how many were refused, what the process grew to, and the
length of the longest refusal.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldcp_core import Correction, GateFileError, Gates, Stage, Topology, load_gates, save_gates

GOLDEN = Path(__file__).parent / "golden" / "gates_v1.safetensors"
TINY = Topology(widths=(8, 8, 16, 16), context_width=8)
SITES = {
    f"mid_block.resnets.{r}.conv{c}": 16 for r in (0, 1) for c in (1, 2)
}  # of the originals; mutations may name others
CORRECTED = "mid_block.resnets.0.conv1"
MEMORY = 200 * 2**20
SECONDS = 5
MESSAGE = 500  # characters of a refusal
#: of the format, see docs/gate_file.md
DESCRIPTION, DEPTH, HEADER = 2**20, 64, 2 * 2**20 + 768_000


# --- the originals --------------------------------------------------------------------------------


def originals() -> list[bytes]:
    """The golden file, and one with every part: four sites, a correction of one, notes."""
    g = torch.Generator().manual_seed(0)
    scores = {site: torch.rand(width, generator=g) for site, width in SITES.items()}
    constants = {site: torch.randn(width, generator=g) for site, width in SITES.items()}
    info = {"criterion": "learned", "loss": [0.5, 0.25], "seed": 3, "note": "größer als ½"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gates.safetensors"
        importances = {site: 100 * score for site, score in scores.items()}
        gates = Gates(scores, constants, "extend", TINY, info, importances)
        kept = 9 * int((scores[CORRECTED] > 0.5).sum())
        drawn = [torch.randn(*shape, generator=g) for shape in ((16, 2), (2, kept), (16,))]
        correction = Correction(drawn[0].half(), drawn[1].half(), drawn[2])
        stages = (Stage(0.0, 0.25), Stage(0.5, None))
        gates = replace(gates, corrections={CORRECTED: correction}, stages=stages)
        save_gates(gates, path)
        return [GOLDEN.read_bytes(), path.read_bytes()]


# --- a file in pieces -----------------------------------------------------------------------------


class Parts:
    """Header and tensors of a file, to be changed and put together again."""

    def __init__(self, data: bytes) -> None:
        end = 8 + struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8:end])
        self.metadata: dict[str, Any] = header.pop("__metadata__")
        self.description: Any = json.loads(self.metadata["gates"])
        self.tensors: dict[str, np.ndarray] = {}
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            values = np.frombuffer(data[end:][first:last], FORMATS[entry["dtype"]]).copy()
            self.tensors[name] = values.reshape(entry["shape"])

    def pack(self, text: str | None = None) -> bytes:
        """With a fresh, correct checksum; ``text`` in place of the description."""
        text = json.dumps(self.description) if text is None else text
        metadata = {**self.metadata, "gates": text, "checksum": checksum(text, self.tensors)}
        return assemble(metadata, self.tensors)


FORMATS = {"F32": "<f4", "F16": "<f2"}
NAMES = {"float32": "F32", "float64": "F64", "float16": "F16", "int32": "I32", "uint8": "U8"}


def assemble(
    metadata: Any, tensors: dict[str, np.ndarray], entries: dict[str, Any] | None = None
) -> bytes:
    header, body = {"__metadata__": metadata}, b""
    for name, values in tensors.items():
        raw = values.tobytes()
        header[name] = {
            "dtype": NAMES[str(values.dtype)],
            "shape": list(values.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    header |= entries or {}
    return prefixed(json.dumps(header).encode(), body)


def prefixed(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + body


def checksum(text: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass") + b"\0")
    for name in sorted(tensors):
        values = tensors[name]
        described = f"{name}\0{values.dtype}\0{values.shape}\0"
        digest.update(described.encode("utf-8", "surrogatepass") + values.tobytes())
    return digest.hexdigest()


# --- mutations ------------------------------------------------------------------------------------

Mutation = Callable[[bytes, random.Random], bytes]


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flipped_bits(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """Another printable character, so that the JSON often stays JSON."""
    out = bytearray(data)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.choice([1, 1, 2, 4])):
        out[rng.randrange(8, end)] = rng.choice(b'0123456789"{}[],:.-aeFI_ \\/')
    return bytes(out)


def harmless_header(data: bytes, rng: random.Random) -> bytes:
    """The same header in other words: order and spaces."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    items = list(json.loads(data[8:end]).items())
    rng.shuffle(items)
    text = json.dumps(dict(items), indent=rng.choice([None, 1, 3]), ensure_ascii=rng.random() < 0.5)
    return prefixed(text.encode() + b" " * rng.randrange(9), data[end:])


def inserted(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + rng.randbytes(rng.choice([1, 4, 64, 1000])) + data[at:]


def wrong_length(data: bytes, rng: random.Random) -> bytes:
    true = struct.unpack("<Q", data[:8])[0]
    huge = [2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 100_000_001]
    wrong = [0, 1, 7, true - 1, true + 1, true + 8, len(data), rng.randrange(4096), *huge]
    return struct.pack("<Q", rng.choice(wrong)) + data[8:]


def huge_sizes(data: bytes, rng: random.Random) -> bytes:
    """Declared shapes and offsets far beyond the file, that overflow, or that overlap."""
    parts = Parts(data)
    name = rng.choice(list(parts.tensors))
    dimensions = [2**31, 2**32, 2**62, 2**63, 2**64 - 1, 10**30, 1, 0, 4, -1, 1.5, "16", None]
    shape = [rng.choice(dimensions) for _ in range(rng.choice([1, 1, 2, 8, 2000]))]
    offsets = [rng.choice([0, 1, 64, 128, 2**40, 2**63, 2**64, -64]) for _ in range(2)]
    real = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    entry = rng.choice(
        [{**real, "shape": shape}, {**real, "data_offsets": offsets}, {**real, "shape": [16, 1]}]
    )
    entries = {rng.choice([name, f"{name}.copy", "mid_block.resnets.1.conv1.score"]): entry}
    metadata = {**parts.metadata, "checksum": checksum(parts.metadata["gates"], parts.tensors)}
    return assemble(metadata, parts.tensors, entries)


def not_finite(data: bytes, rng: random.Random) -> bytes:
    parts = Parts(data)
    values = parts.tensors[rng.choice(list(parts.tensors))].reshape(-1)
    values[rng.randrange(values.size)] = rng.choice([math.nan, math.inf, -math.inf])
    return parts.pack()


def out_of_range(data: bytes, rng: random.Random) -> bytes:
    parts = Parts(data)
    name = rng.choice([name for name in parts.tensors if name.endswith("score")])
    wrong = [1 + 2**-23, -1e-45, -1.0, 2.0, 3e38, -3e38]
    parts.tensors[name][rng.randrange(16)] = rng.choice(wrong)
    return parts.pack()


def wrong_dtype(data: bytes, rng: random.Random) -> bytes:
    parts = Parts(data)
    name = rng.choice(list(parts.tensors))
    other = rng.choice([d for d in NAMES if d != str(parts.tensors[name].dtype)])
    parts.tensors[name] = parts.tensors[name].astype(other)
    return parts.pack()


def wrong_shape(data: bytes, rng: random.Random) -> bytes:
    parts = Parts(data)
    name = rng.choice(list(parts.tensors))
    shapes = [(16, 1), (1, 16), (4, 4), (15,), (17,), (0,), (), (16, 0), (1280,), (16, 65)]
    shape = rng.choice(shapes)
    parts.tensors[name] = np.zeros(shape, parts.tensors[name].dtype)
    return parts.pack()


PATHS = ("../", "../../", "/etc/", "C:\\", "\\\\server\\share\\", "file:///", "~/", "\0", "%2e%2e/")


def tricky_names(data: bytes, rng: random.Random) -> bytes:
    """Unknown keys: paths, other sites, other parts, very long, not ASCII."""
    parts = Parts(data)
    name = rng.choice(list(parts.tensors))
    site, _, part = name.rpartition(".")
    others = [
        rng.choice(PATHS) + name,
        f"{site}/../{site}.{part}",
        f"{site}.{rng.choice(['weight', 'Score', 'score ', 'score.score', '__class__', ''])}",
        f"{rng.choice(['mid_block.resnets.2.conv1', 'mid_block', '', 'x' * 70_000])}.{part}",
        name.replace("conv", rng.choice(["cönv", "ｃonv", "c\u200bonv", "CONV"])),
        f"up_blocks.{rng.choice([0, 3, 4, 99, '0.resnets.0'])}.conv1.{part}",
    ]
    new = rng.choice(others)
    values = parts.tensors[name]
    if rng.random() < 0.5:
        del parts.tensors[name]
    parts.tensors[new] = values
    return parts.pack()


WIDTHS = [[8, 8, 16], [8, 8, 16, 0], [8, 8, 16, -16], [8, 8, 16, 16.0], [8, 8, 16, "16"]]
WIDTHS += [[8, 8, 16, 10**12], [True] * 4, "8888", {}, None, [[8], [8], [16], [16]], [8] * 10_000]


def wrong_description(data: bytes, rng: random.Random) -> bytes:
    """Valid JSON with a correct checksum, that describes something else, or nothing."""
    parts = Parts(data)
    description, topology = parts.description, parts.description["topology"]
    junk = rng.choice([None, 1, -1, 1e400, math.nan, True, "zero", "x" * 50_000, [], {}, [[]] * 99])
    kind = rng.randrange(9)
    if kind == 8:
        pairs = [
            [0, 0.2],
            [0.5, None],
            [0.5, 1],
            [0.25],
            [1, 0],
            [0, -1],
            [0, junk],
            junk,
            [junk, 0],
        ]
        description["stages"] = rng.sample(pairs, rng.randrange(4)) * rng.choice([1, 1, 9])
    elif kind == 0:
        topology["widths"] = rng.choice(WIDTHS)
    elif kind == 1:
        topology[rng.choice(list(topology))] = junk
    elif kind == 2:
        del topology[rng.choice(list(topology))]
    elif kind == 3:
        description[rng.choice(list(description))] = junk
    elif kind == 4:
        del description[rng.choice(list(description))]
    elif kind == 5:
        parts.description = junk
    elif kind == 6:
        topology["layers_per_block"] = rng.choice([0, 1, True, 9, 2**31, 2.0])
    else:
        description["padding"] = rng.choice(["ZERO", "zero ", "wrap", ["zero"], 0, "../zero"])
    return parts.pack()


def broken_description(data: bytes, rng: random.Random) -> bytes:
    """No JSON object, or one that costs more than it looks."""
    parts = Parts(data)
    text = json.dumps(parts.description)
    depth = rng.choice([100, 990, 20_000])
    return parts.pack(
        rng.choice(
            [
                text[: rng.randrange(len(text))],
                text + text,
                "",
                "[" * depth + "]" * depth,
                '{"a":' * depth + "1" + "}" * depth,
                "9" * 5000,
                "\ufeff" + text,
                text.replace('"info": {', '"info": {"deep": ' + "[" * depth + "]" * depth + ", "),
                "\\ud800",
            ]
        )
    )


def wrong_metadata(data: bytes, rng: random.Random) -> bytes:
    parts = Parts(data)
    text = json.dumps(parts.description)
    metadata = {**parts.metadata, "gates": text, "checksum": checksum(text, parts.tensors)}
    key = rng.choice(list(metadata))
    values = ["", "2", "01", "1 ", "0" * 64, None, 1, {}, [], "ldcp", "../../gates", "x" * 50_000]
    wrong: Any = {**metadata, key: rng.choice(values)}
    less = {k: v for k, v in metadata.items() if k != key}
    return assemble(rng.choice([wrong, less, {}, None, []]), parts.tensors)


#: a line break, an escape sequence, a control of 8 bits, a turned direction, Markdown
HOSTILE = ["a\n| forged | row |", "\x1b[2J\x1b]0;title\x07", "\x9b31m", "\u202egnp.exe", "\u2028"]
HOSTILE += ["**[x](http://y)** `z`", "<script>alert(1)</script>", "\0", "\r", "\ud800", "\b" * 9000]


def hostile_text(data: bytes, rng: random.Random) -> bytes:
    """What a terminal obeys and what forges a row of a table, wherever a file has words."""
    parts = Parts(data)
    text, kind = rng.choice(HOSTILE) * rng.choice([1, 1, 50]), rng.randrange(6)
    if kind == 0:
        parts.metadata[rng.choice(["format", "version", text])] = text
    elif kind == 1:
        parts.description[rng.choice(["padding", "info", text])] = text
    elif kind == 2:
        topology = parts.description["topology"]
        topology[rng.choice([*topology, text])] = rng.choice([text, [text] * 4])
    elif kind == 3:
        name = rng.choice(list(parts.tensors))
        parts.tensors[rng.choice([text, f"{text}.score", f"{name}{text}"])] = parts.tensors[name]
    elif kind == 4:
        return parts.pack(text)
    else:
        parts.description["info"] = {"criterion": text, text: [text, {text: math.inf}]}
    return parts.pack()


def twice(data: bytes, rng: random.Random) -> bytes:
    """A key that is there twice, in the header or in the description: readers would disagree."""
    parts = Parts(data)
    text = json.dumps(parts.description)
    if rng.random() < 0.5:
        key = rng.choice(["padding", "info", "topology", "note"])
        return parts.pack(text[:-1] + f', "{key}": {json.dumps(parts.description.get(key))}}}')
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    key = rng.choice(list(header))
    again = f"{data[8:end].decode().rstrip()[:-1]},{json.dumps(key)}:{json.dumps(header[key])}}}"
    return prefixed(again.encode(), data[end:])


COSTLY = ["[],", "{},", "[[]],", '{"a":{}},', "1e9,", '"",', "[[[[[[[[]]]]]]]],", "null,"]


def costly(data: bytes, rng: random.Random) -> bytes:
    """Notes and headers around the bounds, of what takes the most memory for its length."""
    parts, item = Parts(data), rng.choice(COSTLY).encode()
    sizes = [2_000, 20_000, 50_000] * 4 + [10**6, 2**20, 2_300_000]
    items = b"[" + item * (rng.choice(sizes) // len(item)) + b"0]"
    text = json.dumps(parts.description)[:-1] + ', "more": '
    kind = rng.randrange(4)
    if kind == 0:
        return parts.pack(text + items.decode() + "}")
    if kind == 1:
        room = DESCRIPTION - len(text) - 3
        return parts.pack(f'{text}"{"x" * (room + rng.choice([-1, 0, 1]))}"}}')
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if kind == 2:
        entry = b',"more":{"dtype":"F32","shape":[0],"data_offsets":[0,0],"x":' + items + b"}}"
        return prefixed(data[8:end].rstrip()[:-1] + entry, data[end:])
    return data + bytes(rng.choice([10**5, 10**5, 10**5, 48 * 2**20]))


def missing_parts(data: bytes, rng: random.Random) -> bytes:
    """Without some tensors: an orphaned constant is refused, fewer sites are another valid file."""
    parts = Parts(data)
    for name in rng.sample(list(parts.tensors), rng.randrange(1, len(parts.tensors) + 1)):
        del parts.tensors[name]
    return parts.pack()


def other_values(data: bytes, rng: random.Random) -> bytes:
    """Another valid file: other scores, constants, notes, padding."""
    parts = Parts(data)
    for name in [name for name in parts.tensors if "correction" in name]:
        del parts.tensors[name]  # it is for the channels that were kept
    for name, values in parts.tensors.items():
        drawn = [rng.random() if name.endswith("score") else rng.gauss(0, 1) for _ in values]
        values[:] = np.array(drawn, np.float32)
    parts.description["padding"] = rng.choice(["zero", "extend"])
    parts.description["info"] = {"note": rng.randbytes(8).hex(), "nested": [{"a": [1.5, None]}]}
    return parts.pack()


def another_kind(data: bytes, rng: random.Random) -> bytes:
    """Files of other programs, and noise."""
    return rng.choice(
        [
            b"",
            rng.randbytes(rng.choice([1, 8, 9, 100, 5000])),
            b"\x80\x04\x95" + rng.randbytes(50),
            b"PK\x03\x04" + rng.randbytes(200),
            b"<!DOCTYPE html><html></html>",
            b"GGUF" + rng.randbytes(100),
            struct.pack("<Q", 2) + b"{}",
            struct.pack("<Q", 8) + b"[1,2,3] ",
            bytes(rng.randrange(2, 3000)),
            data[::-1],
        ]
    )


KINDS: dict[str, Mutation] = {
    f.__name__: f
    for f in (
        truncated,
        flipped_bits,
        changed_header,
        harmless_header,
        inserted,
        wrong_length,
        huge_sizes,
        not_finite,
        out_of_range,
        wrong_dtype,
        wrong_shape,
        tricky_names,
        wrong_description,
        broken_description,
        wrong_metadata,
        hostile_text,
        twice,
        costly,
        missing_parts,
        other_values,
        another_kind,
    )
}
#: kinds that make valid files only
HARMLESS = {"harmless_header", "other_values"}


def files(count: int, seed: int = 0, kinds: tuple[str, ...] = tuple(KINDS)) -> Iterator[bytes]:
    rng, sources = random.Random(seed), originals()
    for number in range(count):
        yield KINDS[kinds[number % len(kinds)]](rng.choice(sources), rng)


def many_tensors(count: int) -> bytes:
    """A file of nothing but names."""
    parts = Parts(GOLDEN.read_bytes())
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    entries = {f"mid_block.resnets.0.conv1.{n}": entry for n in range(count)}
    return assemble(parts.metadata, {}, entries)


# --- the independent reader -----------------------------------------------------------------------

Contents = tuple[str, float, str, str, str, dict[str, bytes]]


def contents(gates: Gates) -> Contents:
    """Padding, floor, stages, topology, notes and the bytes of every tensor."""
    tensors = {f"{site}.score": t.numpy().tobytes() for site, t in gates.scores.items()}
    tensors |= {f"{site}.constant": t.numpy().tobytes() for site, t in gates.constants.items()}
    tensors |= {f"{site}.importance": t.numpy().tobytes() for site, t in gates.importances.items()}
    for site, correction in gates.corrections.items():
        for part in ("left", "right", "bias"):
            tensors[f"{site}.correction_{part}"] = getattr(correction, part).numpy().tobytes()
    topology = as_text(gates.topology.to_json())
    stages = as_text([[float(s.start), s.sparsity] for s in gates.stages])
    return gates.padding, float(gates.floor), stages, topology, as_text(gates.info), tensors


def as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def independently_read(data: bytes) -> Contents | None:
    """What a valid gate file holds, by docs/gate_file.md; None: not valid."""
    try:
        return _read(data)
    except (ValueError, LookupError, TypeError, AttributeError, struct.error, RecursionError):
        return None


def _read(data: bytes) -> Contents | None:
    end = 8 + struct.unpack("<Q", data[:8])[0]
    if end > len(data):
        return None
    if end > 8 + HEADER:
        return None
    header = json.loads(data[8:end].decode(), object_pairs_hook=every_key_once)
    json.dumps(header, ensure_ascii=False).encode()  # no half of a surrogate pair
    metadata, body = header.pop("__metadata__"), data[end:]
    if len(metadata["gates"].encode()) > DESCRIPTION:
        return None
    description = json.loads(metadata["gates"], object_pairs_hook=every_key_once)
    if depth(description) > DEPTH:
        return None
    version, info = metadata["version"], description["info"]
    if metadata["format"] != "ldcp.gates" or version not in ("1", "2", "3", "4"):
        return None
    topology = plain_topology(version, description["topology"])
    floor = info.get("floor", 0.0) if version == "1" else description["floor"]
    if type(floor) not in (int, float) or not 0 <= floor < 1:
        if version != "1":
            return None
        floor = 0.0
    if description["padding"] not in ("zero", "extend") or not isinstance(info, dict):
        return None
    stages = description["stages"] if version == "4" else []
    if not are_stages(stages):
        return None
    stages = [[float(start), sparsity] for start, sparsity in stages]
    tensors: dict[str, np.ndarray] = {}
    used = []
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        site, _, part = name.rpartition(".")
        if topology is None or not has_16_channels(site, topology):
            return None
        if min(entry["shape"], default=0) < 0:  # numpy would work it out
            return None
        values = np.frombuffer(body[first:last], FORMATS[entry["dtype"]]).reshape(entry["shape"])
        used.append((first, last))
        tensors[name] = values
        if values.dtype != ("<f2" if part in ("correction_left", "correction_right") else "<f4"):
            return None
        if not np.isfinite(values).all():
            return None
        if part == "score" and not ((values >= 0) & (values <= 1)).all():
            return None
        if part in ("score", "constant", "importance", "correction_bias"):
            if values.shape != (16,):
                return None
        elif part not in ("correction_left", "correction_right"):
            return None
        if f"{site}.score" not in header:
            return None
    if not tensors or not all(fits(name, tensors) for name in tensors):
        return None
    ends = [0, *(last for _, last in sorted(used))]
    if [first for first, _ in sorted(used)] != ends[:-1] or len(body) != ends[-1]:
        return None
    if metadata["checksum"] != checksum(metadata["gates"], tensors):
        return None
    raw = {name: values.tobytes() for name, values in tensors.items()}
    found = description["padding"], float(floor), as_text(stages)
    return *found, as_text(topology), as_text(info), raw


def are_stages(stages: Any) -> bool:
    """Whether these are at most 16 stages, from 0 on, each with a share or none."""
    if not isinstance(stages, list) or len(stages) > 16:
        return False
    last = -1.0
    for place, (start, sparsity) in enumerate(stages):
        if type(start) not in (int, float) or not last < start < 1 or (place == 0 and start != 0):
            return False
        if sparsity is not None:
            if type(sparsity) not in (int, float) or not 0 <= sparsity <= 1:
                return False
        last = start
    return True


def fits(name: str, tensors: dict[str, np.ndarray]) -> bool:
    """Whether a part of a correction has the other parts, a layer to correct, and their sizes."""
    site, _, part = name.rpartition(".")
    if not part.startswith("correction_"):
        return True
    left, right, _ = (tensors[f"{site}.correction_{end}"] for end in ("left", "right", "bias"))
    kept = 9 * int((tensors[f"{site}.score"] > 0.5).sum())
    rank = left.shape[-1] if left.ndim else 0
    return (
        site.endswith("conv1")
        and left.shape == (16, rank)
        and right.shape == (rank, kept)
        and 0 < rank <= 64
    )


def every_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def depth(value: Any) -> int:
    """How many lists and objects lie in one another."""
    if not isinstance(value, (dict, list)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((depth(item) for item in inner), default=0)


def has_16_channels(site: str, topology: dict[str, Any]) -> bool:
    """Whether a convolution of the two deepest levels, the only ones this wide, has this name."""
    stages = r"(down_blocks\.[23]|mid_block|up_blocks\.[01])"
    found = re.fullmatch(stages + r"\.resnets\.(\d)\.conv[12]", site)
    if not found:
        return False
    stage = found[1].split(".")[0]
    layers = len(topology["down"][0])
    mid = len(topology["mid"])
    return int(found[2]) < {"down_blocks": layers, "mid_block": mid, "up_blocks": layers + 1}[stage]


def plain_topology(version: str, topology: dict[str, Any]) -> dict[str, Any] | None:
    """In the words of version 4, as far as the mutations go: with the widths the tensors have."""
    known = ("widths", "context_width", "in_channels", "out_channels")
    if version == "1":
        layers, attention = topology["layers_per_block"], topology["attention"]
        if type(layers) is not int or not 0 < layers <= 8 or not isinstance(attention, list):
            return None
        if len(attention) != 4 or not all(type(a) is bool for a in attention):
            return None
        topology = {key: topology[key] for key in known} | {
            "family": "Stable Diffusion 1.5",
            "down": [[int(a)] * layers for a in attention],
            "mid": [1, 0],
            "up": [[int(a)] * (layers + 1) for a in reversed(attention)],
            "pooled_width": 0,
            "linear_projections": False,
        }
    if version in ("1", "2"):
        if "heads" in topology:
            return None
        topology = {**topology, "heads": []}
    if topology["heads"] != []:
        return None
    rest = ("family", "down", "mid", "up", "pooled_width", "linear_projections", "heads")
    if set(topology) != {*known, *rest} or topology["family"] != "Stable Diffusion 1.5":
        return None
    pooled, linear = topology["pooled_width"], topology["linear_projections"]
    if type(pooled) is not int or not 0 <= pooled <= 65536 or linear is not False:
        return None
    widths, down, mid, up = (topology[key] for key in ("widths", "down", "mid", "up"))
    numbers = [topology[key] for key in known[1:]]
    if not all(isinstance(level, list) for level in (widths, down, mid, up, *down, *up)):
        return None
    layers = len(down[0])
    depths = [depth for level in (*down, mid, *up) for depth in level]
    valid = (
        all(type(n) is int and 0 < n <= 65536 for n in [*numbers, *widths])
        and all(type(n) is int and 0 <= n <= 24 for n in depths)
        and len(widths) == len(down) == len(up) == 4
        and widths[-1] == 16
        and 0 < layers <= 8
        and len(mid) <= 2
        and all(len(level) == layers for level in down)
        and all(len(level) == layers + 1 for level in up)
    )
    return topology if valid else None


# --- the run --------------------------------------------------------------------------------------


def judge(path: Path, data: bytes, known: list[Contents | None]) -> tuple[str, int]:
    """What became of one file, and the length of the message; raises when that is not right."""
    path.write_bytes(data)
    try:
        found = contents(load_gates(path))
    except GateFileError as error:
        message = str(error)
        if not message.startswith(f"{path}: ") or len(message) > MESSAGE:
            raise AssertionError(f"a refusal of {len(message)} characters: {message!r}") from error
        if not message.isprintable():
            raise AssertionError(f"a refusal that is not printable: {message!r}") from error
        if independently_read(data) is not None:
            raise AssertionError(f"a valid file was refused: {error}"[:500]) from error
        return "refused", len(message)
    expected = independently_read(data)
    if found != expected:
        raise AssertionError(f"taken for something else: {found}, {expected}"[:2000])
    return "same" if found in known else "another valid file", 0


def main(count: int, folder: Path) -> None:
    import resource
    import signal

    known = [independently_read(data) for data in originals()]
    pages = [int(found) for found in Path("/proc/self/statm").read_text().split()[:2]]
    used, resident = (count * resource.getpagesize() for count in pages)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    counts: Counter[str] = Counter()
    longest, start = 0, time.monotonic()
    path = folder / "gates.safetensors"
    for number, data in enumerate(files(count)):
        # of computing, whatever else the machine does; ends the process, also inside a library
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            verdict, length = judge(path, data, known)
        except BaseException as error:
            kind = list(KINDS)[number % len(KINDS)]
            raise SystemExit(f"file {number} ({kind}): {error!r}") from error
        signal.setitimer(signal.ITIMER_PROF, 0)
        counts[verdict] += 1
        longest = max(longest, length)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident
    print(f"{grown / 2**20:.0f} MiB more at the peak, {longest} characters in the longest message,")
    print(f"{time.monotonic() - start:.0f} seconds")
    print(json.dumps(counts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), Path(sys.argv[2]))
