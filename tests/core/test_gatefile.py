"""Gate files: what is written is read back bit for bit, and nothing else is ever accepted."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gatefile_mutations
import pytest
import torch
from families import SMALL_XL
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ldcp_core import (
    MAX_RANK,
    PADDINGS,
    SD15,
    Correction,
    GateFileError,
    Gates,
    Site,
    Stage,
    Topology,
    fingerprint,
    load_gates,
    remove_abandoned,
    save_gates,
    write_atomically,
)
from ldcp_core.files import YOUNG
from ldcp_core.gatefile import (
    FINGERPRINT_SAMPLES,
    FORMAT,
    MAX_BYTES,
    MAX_DEPTH,
    MAX_DESCRIPTION,
    _strict_json,
)

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden" / "gates_v1.safetensors"
TINY = Topology(widths=(8, 8, 16, 16), context_width=8)
SITE, OTHER = "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2"
HEADS_SITE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_v"

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX only")


def small_gates(seed: int = 0) -> Gates:
    g = torch.Generator().manual_seed(seed)
    return Gates(
        {SITE: torch.rand(16, generator=g), OTHER: torch.rand(16, generator=g)},
        {SITE: torch.randn(16, generator=g)},
        "extend",
        TINY,
        {"criterion": "learned", "loss": [0.5, 0.25], "seed": seed},
    )


def corrected(
    site: str,
    left: tuple[int, ...],
    right: tuple[int, ...],
    bias: tuple[int, ...],
    dtype: torch.dtype = torch.float16,
) -> Gates:
    """Gates that keep all 16 channels of a site, with a correction of these shapes."""
    correction = Correction(
        torch.ones(left, dtype=dtype), torch.ones(right, dtype=dtype), torch.ones(bias)
    )
    return Gates({site: torch.ones(16)}, topology=TINY, corrections={site: correction})


def test_a_correction_of_the_right_shapes_is_taken(tmp_path: Path) -> None:
    gates = corrected(SITE, (16, 2), (2, 144), (16,))
    save_gates(gates, tmp_path / "gates.safetensors")
    assert same(load_gates(tmp_path / "gates.safetensors"), gates)


def same(a: Gates, b: Gates) -> bool:
    """Equal to the last bit and of one order, site by site."""

    def bits(tensors: Any) -> list[tuple[str, bytes]]:
        return sorted((name, t.numpy().tobytes()) for name, t in tensors.items())

    return (
        bits(a.scores) == bits(b.scores)
        and bits(a.constants) == bits(b.constants)
        and list(a.corrections) == list(b.corrections)
        and all(
            bits(vars(a.corrections[site])) == bits(vars(b.corrections[site]))
            for site in a.corrections
        )
        and (a.padding, a.topology, a.stages) == (b.padding, b.topology, b.stages)
        and dict(a.info) == dict(b.info)
    )


# --- round trip -----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def any_gates(draw: st.DrawFn) -> Gates:
    sites = draw(st.lists(st.sampled_from(TINY.all_sites()), min_size=1, max_size=4, unique=True))
    value = st.floats(0, 1, width=32)
    finite = st.floats(allow_nan=False, allow_infinity=False, width=32)
    scores, constants = {}, {}
    for site in sites:
        # a few drawn values in every order, so that signs of zero and denormals come along
        few = draw(st.lists(value, min_size=1, max_size=4))
        scores[site.name] = torch.tensor((few * site.channels)[: site.channels])
        if draw(st.booleans()):
            few = draw(st.lists(finite, min_size=1, max_size=4))
            constants[site.name] = torch.tensor((few * site.channels)[: site.channels])
    info = draw(st.dictionaries(st.text(max_size=6), json_values, max_size=3))
    gates = Gates(scores, constants, draw(st.sampled_from(PADDINGS)), TINY, info)
    read = [site for site in TINY.all_sites() if site.name in scores and site.reader]
    corrected = {site.name: any_correction(site, gates) for site in read if draw(st.booleans())}
    share = st.floats(0, 1)
    starts = draw(st.sets(st.floats(0.01, 0.99), max_size=3))
    stages = [Stage(start, draw(st.none() | share)) for start in (0.0, *sorted(starts))]
    return replace(gates, corrections=corrected, stages=tuple(stages if starts else ()))


def any_correction(site: Site, gates: Gates, rank: int = 3) -> Correction:
    kept, outputs = int(gates.keep_sets()[site.name].sum()), site.block.outputs()
    right = torch.randn(rank, kept * site.kind.reader_taps).half()
    return Correction(torch.randn(outputs, rank).half(), right, torch.randn(outputs))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gates")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(gates=any_gates())
def test_what_is_saved_is_loaded_bit_for_bit(gates: Gates, folder: Path) -> None:
    path = folder / "round.safetensors"
    save_gates(gates, path)
    loaded = load_gates(path)
    assert same(loaded, gates)
    order = [site.name for site in TINY.all_sites()]
    assert list(loaded.scores) == sorted(gates.scores, key=order.index)


def test_the_same_gates_give_the_same_bytes(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_gates(small_gates(), one)
    save_gates(load_gates(one), two)
    assert one.read_bytes() == two.read_bytes()
    save_gates(small_gates(1), two)
    assert one.read_bytes() != two.read_bytes()


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = str(tmp_path / "gates.safetensors")
    save_gates(small_gates(), path)
    assert same(load_gates(path), small_gates())


def test_parameters_and_views_can_be_saved(tmp_path: Path) -> None:
    score = torch.nn.Parameter(torch.linspace(0, 1, 32))[::2]
    save_gates(Gates({SITE: score}, topology=TINY), tmp_path / "g.safetensors")
    assert torch.equal(load_gates(tmp_path / "g.safetensors").scores[SITE], score.detach())


def test_loaded_gates_do_not_change_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    save_gates(small_gates(), path)
    loaded = load_gates(path)
    with path.open("r+b") as file:  # in place: the same inode that was read
        file.write(b"\xff" * path.stat().st_size)
    assert same(loaded, small_gates())


@pytest.mark.parametrize(
    "gates",
    [
        Gates({SITE: torch.rand(15)}, topology=TINY),
        Gates({SITE: torch.rand(16).double()}, topology=TINY),
        Gates({SITE: torch.full((16,), 1.5)}, topology=TINY),
        Gates({SITE: torch.full((16,), torch.nan)}, topology=TINY),
        Gates({"mid_block.resnets.7.conv1": torch.rand(16)}, topology=TINY),
        Gates({}, topology=TINY),
        Gates({SITE: torch.rand(16)}, {OTHER: torch.rand(16)}, topology=TINY),
        Gates({SITE: torch.rand(16)}, padding="reflect", topology=TINY),  # type: ignore[arg-type]
        corrected(SITE, (16, 2), (2, 9), (16,)),
        corrected(SITE, (16, 2), (3, 144), (16,)),
        corrected(SITE, (16, MAX_RANK + 1), (MAX_RANK + 1, 144), (16,)),
        corrected(SITE, (16, 0), (0, 144), (16,)),
        corrected(SITE, (16, 2), (2, 144), (15,)),
        corrected(SITE, (16, 2), (2, 144), (16,), torch.float32),
        corrected(OTHER, (16, 2), (2, 144), (16,)),  # a sum reads its channels
    ],
)
def test_gates_that_would_not_be_read_back_are_not_written(gates: Gates, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    save_gates(small_gates(), path)
    with pytest.raises(GateFileError):
        save_gates(gates, path)
    assert same(load_gates(path), small_gates())
    assert list(tmp_path.iterdir()) == [path]


def test_a_description_is_taken_up_to_its_bound_and_never_written_beyond(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    small = replace(small_gates(), info={"note": ""})
    described = {"topology": TINY.to_json(), "padding": "extend", "floor": 0.0, "stages": []}
    rest = MAX_DESCRIPTION - len(_strict_json(described))
    note = '"' * ((rest - len(', "info": {"note": ""}')) // 2)  # what doubles in the header as well
    save_gates(replace(small, info={"note": note}), path)
    assert load_gates(path).info["note"] == note
    with pytest.raises(GateFileError, match="its description of 1,048,57[78] bytes is too large"):
        save_gates(replace(small, info={"note": note + "''"}), path)
    assert load_gates(path).info["note"] == note


def test_notes_are_taken_up_to_a_depth_and_never_written_beyond(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    deep: Any = 0
    for _ in range(MAX_DEPTH - 2):  # the description and its "info" are two levels
        deep = [deep]
    save_gates(replace(small_gates(), info={"deep": deep}), path)
    assert load_gates(path).info["deep"] == deep
    with pytest.raises(GateFileError, match="nested more than 64 levels deep"):
        save_gates(replace(small_gates(), info={"deep": [deep]}), path)


def test_what_is_written_is_json_for_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    odd = {"NaN": math.nan, "note": 'a "NaN" \\', "range": [-math.inf, math.inf]}
    save_gates(replace(small_gates(), info=odd), path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = path.read_bytes()
    header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]], parse_constant=refuse)
    written = json.loads(header["__metadata__"]["gates"], parse_constant=refuse)["info"]
    assert written == load_gates(path).info == {**odd, "NaN": None}


# --- the golden file ------------------------------------------------------------------------------


def test_the_golden_file_of_version_1_keeps_loading() -> None:
    """Never regenerate it: a change that breaks this test needs a new version.."""
    gates = load_gates(GOLDEN)
    assert gates.topology == TINY and gates.padding == "zero"
    assert dict(gates.info) == {"criterion": "golden", "note": "größer als ½", "steps": 3}
    assert list(gates.scores) == [SITE, OTHER]
    # k/15 for k = 0..15 is kept from 8/15 on; then 0.5 itself and its two neighbours in float32
    assert torch.equal(gates.scores[SITE], torch.arange(16) / 15)
    keep = gates.keep_sets()
    assert keep[SITE].nonzero()[:, 0].tolist() == list(range(8, 16))
    assert keep[OTHER].tolist() == [False, True, False] + [True] * 13
    assert gates.scores[OTHER][:3].tolist() == [0.5, 0.5 + 2**-24, 0.5 - 2**-25]
    assert list(gates.constants) == [OTHER]
    assert gates.constants[OTHER].tolist() == [c / 8 for c in range(-8, 8)]


@pytest.mark.parametrize(
    ("found", "floor"), [(0.1, 0.1), (None, 0.0), ("x", 0.0), (2, 0.0), (-1, 0.0), (True, 0.0)]
)
def test_the_floor_of_version_1_is_in_its_notes(
    found: object, floor: float, tmp_path: Path
) -> None:
    parts = gatefile_mutations.Parts(GOLDEN.read_bytes())
    parts.description["info"]["floor"] = found
    path = tmp_path / "gates.safetensors"
    path.write_bytes(parts.pack())
    assert load_gates(path).floor == floor


GOLDEN_2 = GOLDEN.with_name("gates_v2.safetensors")


def test_the_golden_file_of_version_2_keeps_loading() -> None:
    """Never regenerate it: a change that breaks this test needs a new version."""
    gates = load_gates(GOLDEN_2)
    assert gates.topology == replace(SMALL_XL, heads=()) and gates.topology.fits(SMALL_XL)
    assert gates.padding == "extend" and gates.floor == 0.05
    assert dict(gates.info) == {"criterion": "golden", "note": "größer als ½"}
    hidden = "mid_block.attentions.0.transformer_blocks.2.ff.net.0"
    assert list(gates.scores) == ["mid_block.resnets.0.conv1", hidden]
    assert torch.equal(gates.scores[hidden], torch.arange(384) / 383)
    assert gates.constants[hidden].tolist() == [c / 8 for c in range(-192, 192)]
    assert torch.equal(gates.importances[hidden], torch.arange(384) / 4)


GOLDEN_3 = GOLDEN.with_name("gates_v3.safetensors")


def test_the_golden_file_of_version_3_keeps_loading() -> None:
    """Never regenerate it: a change that breaks this test needs a new version."""
    gates = load_gates(GOLDEN_3)
    assert gates.topology == SMALL_XL and gates.padding == "zero" and gates.floor == 0.05
    assert dict(gates.info) == {"criterion": "golden", "note": "größer als ½"}
    heads = "mid_block.attentions.0.transformer_blocks.2.attn2.to_v"
    assert list(gates.scores) == [heads]
    assert gates.scores[heads].tolist() == [0.25] * 24 + [0.75] * 48 + [0.5] * 24
    assert gates.constants[heads].tolist() == [c / 8 for c in range(-48, 48)]
    correction = gates.corrections[heads]
    assert torch.equal(correction.left, (torch.arange(96 * 2).view(96, 2) / 64).half())
    assert torch.equal(correction.right, (torch.arange(2 * 48).view(2, 48) / 32).half())
    assert torch.equal(correction.bias, torch.arange(96) / 4)


GOLDEN_4 = GOLDEN.with_name("gates_v4.safetensors")


def test_the_golden_file_of_version_4_keeps_loading() -> None:
    """Never regenerate it: a change that breaks this test needs a new version."""
    gates = load_gates(GOLDEN_4)
    assert gates.topology == TINY and gates.padding == "zero" and gates.floor == 0.05
    assert dict(gates.info) == {"criterion": "golden", "note": "größer als ½"}
    assert gates.stages == (Stage(0.0, 0.25), Stage(0.5, None), Stage(0.75, 0.5))
    assert torch.equal(gates.scores[SITE], torch.arange(16) / 15)


# --- atomic writing -------------------------------------------------------------------------------

SAVE_FOREVER = """
import os, random, signal, sys, time
import torch
from ldcp_core import SD15, Gates, load_gates, save_gates

torch.set_num_threads(1)
path = sys.argv[1]
sites = SD15.all_sites()
versions = [Gates({s.name: torch.full((s.channels,), v) for s in sites}) for v in (0.25, 0.75)]
save_gates(versions[0], path)
seen = set()
random.seed(0)
for attempt in range(300):
    if attempt >= 15 and len(seen) == 2:
        break
    pid = os.fork()
    if pid == 0:
        while True:
            for gates in versions[:: 1 if attempt % 2 else -1]:
                save_gates(gates, path)
    time.sleep(random.uniform(0.005, 0.1))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    values = {v for score in load_gates(path).scores.values() for v in score.tolist()}
    assert len(values) == 1, values
    seen |= values
print(sorted(seen))
"""


@posix
def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    result = subprocess.run(
        [sys.executable, "-c", SAVE_FOREVER, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[0.25, 0.75]"  # both versions were met
    leftovers = [p.name for p in tmp_path.iterdir() if p != path]
    assert not any(name.endswith(".safetensors") for name in leftovers)  # no dropdown shows them


SAVE_NEW = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from ldcp_core import SD15, Gates, load_gates, save_gates

torch.set_num_threads(1)
folder = Path(sys.argv[1])
gates = Gates({s.name: torch.full((s.channels,), 0.25) for s in SD15.all_sites()})
random.seed(0)
for attempt in range(15):
    pid = os.fork()
    if pid == 0:
        sync = os.fsync
        os.fsync = lambda file: (sync(file), time.sleep(0.02))  # a slow disk
        for number in range(10**6):
            save_gates(gates, folder / f"{attempt}_{number}.safetensors", overwrite=False)
    while not (folder / f"{attempt}_0.safetensors").exists():
        time.sleep(0.001)
    time.sleep(random.uniform(0, 0.08))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
names = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
for path in names:
    load_gates(path)
print(len(names))
"""


@posix
def test_a_name_holds_a_whole_file_from_the_start_and_what_the_killed_left_goes_at_the_next(
    tmp_path: Path,
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SAVE_NEW, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) >= 15
    left = [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]
    assert left  # some were killed while they wrote
    for path in left:
        os.utime(path, (0, time.time() - 2 * YOUNG))
    save_gates(small_gates(), tmp_path / "next.safetensors")
    assert all(path.suffix == ".safetensors" for path in tmp_path.iterdir())


def test_a_new_name_is_never_that_of_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "taken"
    for case in ("links", "no links"):
        path.write_bytes(b"old")
        with pytest.raises(FileExistsError):
            write_atomically(path, b"new", overwrite=False)
        assert path.read_bytes() == b"old"
        write_atomically(tmp_path / case, b"new", overwrite=False)
        assert (tmp_path / case).read_bytes() == b"new"

        def fail(*_: object) -> None:  # as exFAT answers
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", fail, raising=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["links", "no links", "taken"]


HOLD = """
import sys, time
from pathlib import Path
from ldcp_core import files

files.os.fsync = lambda _: (print("writing", flush=True), time.sleep(600))
files.write_atomically(Path(sys.argv[1]) / "held", b"content")
"""


def test_only_what_nobody_writes_any_more_is_removed(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline().strip() == b"writing"
        (held,) = tmp_path.iterdir()
        kept = {held.name, ".gates.0123abcd.ldcp", "gates.0123abcd.ldcp", ".gates.0123abcd", ".l"}
        for name in (*kept - {held.name}, ".gates.89abcdef.ldcp", ".f.00000000.ldcp"):
            (tmp_path / name).write_bytes(b"a part")
        (tmp_path / ".folder.01234567.ldcp").mkdir()
        for path in tmp_path.iterdir():
            os.utime(path, (0, time.time() - 2 * YOUNG))
        os.utime(tmp_path / ".gates.0123abcd.ldcp")  # just written: perhaps not locked yet
        remove_abandoned(tmp_path)
        assert {p.name for p in tmp_path.iterdir()} == {*kept, ".folder.01234567.ldcp"}
    finally:
        writer.kill()
        writer.communicate()
    remove_abandoned.cache_clear()
    remove_abandoned(tmp_path)
    assert held not in tmp_path.iterdir()


@posix
def test_a_pipe_that_is_named_like_a_temporary_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".gates.01234567.ldcp")
    os.utime(tmp_path / ".gates.01234567.ldcp", (0, 0))
    write_atomically(tmp_path / "x", b"content")
    assert (tmp_path / ".gates.01234567.ldcp").exists()


def test_the_longest_name_that_a_folder_takes_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / ("門" * 81 + ".safetensors")  # 255 bytes, which is what Linux takes
    write_atomically(path, b"content")
    assert path.read_bytes() == b"content"


@pytest.mark.parametrize("failing", ["replace", "fsync", "utime"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_disk_leaves_the_old_file_and_no_litter(
    failing: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gates.safetensors"
    save_gates(small_gates(), path)

    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        save_gates(small_gates(1), path)
    monkeypatch.undo()
    assert same(load_gates(path), small_gates())
    assert list(tmp_path.iterdir()) == [path]


def test_the_data_is_on_the_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def spy(*args: Any, name: str = name, real: Callable[..., Any] = real) -> Any:
            calls.append(name)
            return real(*args)

        monkeypatch.setattr(os, name, spy)
    write_atomically(tmp_path / "x", b"content")
    assert calls == ["fsync", "replace"]


def test_a_missing_folder_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_gates(small_gates(), tmp_path / "nowhere" / "gates.safetensors")


def test_the_umask_of_the_process_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not for a moment: another thread may create a file in it."""
    monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the umask was changed"))
    save_gates(small_gates(), tmp_path / "gates.safetensors")


@posix
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    before = os.umask(umask)
    try:
        save_gates(small_gates(), path)
        assert os.umask(umask) == umask  # and it is left as it was
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode


# --- refusals -------------------------------------------------------------------------------------

DESCRIPTION = {
    "topology": TINY.to_json(),
    "padding": "zero",
    "floor": 0,
    "stages": [],
    "info": {},
}


def crafted(
    scores: dict[str, Tensor] | None = None,
    description: Any = None,
    **metadata: str | None,
) -> bytes:
    """A gate file by hand; the defaults are a good one but for its checksum."""
    tensors = {f"{SITE}.score": torch.linspace(0, 1, 16)} if scores is None else scores
    if description is None:
        description = DESCRIPTION
    text = description if isinstance(description, str) else json.dumps(description)
    found = {"format": FORMAT, "version": "4", "gates": text, "checksum": "0" * 64, **metadata}
    return save(tensors, {k: v for k, v in found.items() if v is not None})


def described(**changes: Any) -> bytes:
    description = {**DESCRIPTION, **changes}
    return crafted(description={k: v for k, v in description.items() if v is not None})


def described_scores(scores: dict[str, Tensor]) -> bytes:
    """Scores of a U-Net that says how many heads its attention has."""
    topology = replace(TINY, heads=(4, 4, 4, 4)).to_json()
    tensors = {f"{site}.score": score for site, score in scores.items()}
    return crafted(tensors, {**DESCRIPTION, "topology": topology})


def saved() -> bytes:
    return GOLDEN.read_bytes()


def swapped_bit(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


S, ORPHAN = f"{SITE}.score", f"{OTHER}.constant"
NESTED = "[" * 100_000 + "]" * 100_000
REFUSALS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    # name: content, what was found, what to do or what was expected
    "text": (lambda: b"these are my gates", "not a readable .safetensors", "download or copy"),
    "html": (
        lambda: b"<!DOCTYPE html><html><body>Not found</body></html>",
        "not a readable .safetensors",
        "web page saved under this name",
    ),
    "empty": (lambda: b"", "not a readable .safetensors", "download or copy"),
    "truncated header": (lambda: saved()[:100], "not a readable .safetensors", "truncated"),
    "truncated tensors": (lambda: saved()[:-1], "not a readable .safetensors", "truncated"),
    "appended": (lambda: saved() + b"\0", "not a readable .safetensors", "copy it again"),
    "pickle": (lambda: pickle.dumps({SITE: [1.0]}), "not a readable .safetensors", "copy it again"),
    "no metadata": (lambda: save({S: torch.rand(16)}), "format None", repr(FORMAT)),
    "a model": (lambda: crafted(format="pt"), "format 'pt'", "made by training.fit"),
    "another version": (lambda: crafted(version="5"), "version '5'", "update the node pack"),
    "no version": (lambda: crafted(version=None), "version None", "reads versions 1, 2, 3, 4"),
    "heads in version 2": (lambda: crafted(version="2"), "'heads': []", "train the gates again"),
    "a part of a head": (
        lambda: described_scores({HEADS_SITE: torch.arange(16) / 15}),
        "several scores for one attention head",
        "train the gates again",
    ),
    "no description": (lambda: crafted(gates=None), "not valid JSON", "train the gates again"),
    "bad JSON": (lambda: crafted(description="{"), "not valid JSON", "train the gates again"),
    "nested JSON": (lambda: crafted(description=NESTED), "not valid JSON", "copy the file again"),
    "huge number": (lambda: crafted(description="9" * 5000), "not valid JSON", "copy the file"),
    "a list": (lambda: crafted(description=[]), "list, not an object", "copy the file again"),
    "no topology": (lambda: described(topology=None), "None", "train the gates again"),
    "bad topology": (
        lambda: described(topology={**TINY.to_json(), "widths": [8, 8]}),
        "widths (8, 8)",
        "four levels",
    ),
    "no input width": (
        lambda: described(topology={**TINY.to_json(), "in_channels": "4"}),
        "'4'",
        "positive integers",
    ),
    "padding": (lambda: described(padding="wrap"), "padding rule 'wrap'", "one of zero, extend"),
    "padding list": (lambda: described(padding=["zero"]), "['zero']", "one of zero, extend"),
    "no padding": (lambda: described(padding=None), "padding rule None", "one of zero, extend"),
    "floor": (lambda: described(floor=1), "floor 1", "a number from 0 up to 1"),
    "no floor": (lambda: described(floor=None), "floor None", "a number from 0 up to 1"),
    "floor text": (lambda: described(floor="x"), "floor 'x'", "a number from 0 up to 1"),
    "no stages": (lambda: described(stages=None), "stages None", "at most 16 pairs"),
    "a late first stage": (lambda: described(stages=[[0.5, 0.1]]), "[[0.5, 0.1]]", "the first 0"),
    "stages out of order": (
        lambda: described(stages=[[0, 0.1], [0.6, 0.2], [0.5, 0.3]]),
        "[0.5, 0.3]]",
        "in rising order",
    ),
    "a stage of too much": (lambda: described(stages=[[0, 1.5]]), "[[0, 1.5]]", "from 0 to 1"),
    "a stage past the end": (
        lambda: described(stages=[[0, 0.1], [1, 0.2]]),
        "[1, 0.2]]",
        "from 0 up to 1",
    ),
    "17 stages": (
        lambda: described(stages=[[n / 20, 0.1] for n in range(17)]),
        "stages [[0.0, 0.1]",
        "at most 16",
    ),
    "family": (
        lambda: described(topology={**TINY.to_json(), "family": "SDXL"}),
        "of Stable Diffusion 1.5 says that it is one of SDXL",
        "copy the file again",
    ),
    "no info": (lambda: described(info=None), "'info' object is missing", "copy the file again"),
    "unknown site": (
        lambda: crafted({"mid_block.resnets.2.conv1.score": torch.rand(16)}),
        "'mid_block.resnets.2.conv1.score'",
        "such as 'mid_block.resnets.0.conv1.score'",
    ),
    "unknown part": (
        lambda: crafted({f"{SITE}.weight": torch.rand(16)}),
        f"'{SITE}.weight'",
        "update the node pack",
    ),
    "no dot": (lambda: crafted({"score": torch.rand(16)}), "'score'", "update the node pack"),
    "width": (lambda: crafted({S: torch.rand(1280)}), "is F32 [1280]", "expected F32 [16]"),
    "two axes": (lambda: crafted({S: torch.rand(1, 16)}), "is F32 [1, 16]", "expected F32 [16]"),
    "dtype": (lambda: crafted({S: torch.rand(16).half()}), "is F16 [16]", "expected F32 [16]"),
    "NaN": (lambda: crafted({S: torch.full((16,), torch.nan)}), f"{S!r} holds NaN", "train"),
    "infinite": (
        lambda: crafted({S: torch.rand(16), f"{OTHER}.score": torch.full((16,), torch.inf)}),
        "NaN or infinite",
        "train",
    ),
    "too large": (lambda: crafted({S: torch.full((16,), 1.25)}), "1.25", "scores in [0, 1]"),
    "negative": (lambda: crafted({S: torch.full((16,), -0.5)}), "-0.5", "scores in [0, 1]"),
    "orphan": (
        lambda: crafted({S: torch.rand(16), ORPHAN: torch.rand(16)}),
        f"constants without scores for {OTHER}",
        "copy the file again",
    ),
    "no scores": (lambda: crafted({}), "holds no scores", "train the gates again"),
    "checksum": (crafted, "checksum does not match", "copy the file again"),
    "no checksum": (lambda: crafted(checksum=None), "checksum does not match", "copy the file"),
    "a changed score": (lambda: swapped_bit(saved(), -66), "checksum", "copy the file again"),
    "a changed note": (
        lambda: saved().replace(b"golden", b"golfer"),
        "checksum does not match",
        "copy the file again",
    ),
}


#: a line break, an escape sequence, a control of 8 bits, a turned direction, Markdown
HOSTILE = "x\n| forged | 0 |\x1b[2J\x9b1m\u202e\u2028**bold**" + "y" * 5000
HOSTILE_FILES: dict[str, Callable[[], bytes]] = {
    "format": lambda: crafted(format=HOSTILE),
    "version": lambda: crafted(version=HOSTILE),
    "description": lambda: crafted(description=HOSTILE),
    "name": lambda: crafted({HOSTILE: torch.rand(16)}),
    "site": lambda: crafted({f"{HOSTILE}.score": torch.rand(16)}),
    "padding": lambda: described(padding=HOSTILE),
    "padding list": lambda: described(padding=[HOSTILE] * 10),
    "topology": lambda: described(topology=HOSTILE),
    "widths": lambda: described(topology={**TINY.to_json(), "widths": [HOSTILE] * 4}),
    "many widths": lambda: described(topology={**TINY.to_json(), "widths": [8] * 9000}),
    "down": lambda: described(topology={**TINY.to_json(), "down": [HOSTILE] * 4}),
    "family": lambda: described(topology={**TINY.to_json(), "family": HOSTILE}),
    "not a safetensors": lambda: HOSTILE.encode(),
    "a key": lambda: save({HOSTILE: torch.rand(3)}).replace(b"F32", b"F33"),
    "axes": lambda: crafted({S: torch.rand((1,) * 40)}),
}


@pytest.mark.parametrize("case", HOSTILE_FILES)
def test_no_field_and_no_file_name_reaches_a_message_as_it_is(case: str, tmp_path: Path) -> None:
    odd = "a\x1b[31m\n\u202e" + "b" * 200 if os.name == "posix" else "a"
    path = tmp_path / odd / "gates.safetensors"
    path.parent.mkdir()
    path.write_bytes(HOSTILE_FILES[case]())
    with pytest.raises(GateFileError) as error:
        load_gates(path)
    message = str(error.value)
    assert message.isprintable() and len(message) <= 500, message
    assert message.endswith(("again", "update the node pack", "models/ldcp_gates"))


@pytest.mark.parametrize("key", ['"padding": "extend", ', '"info": {}, '])
def test_a_key_that_is_there_twice_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    topology = json.dumps(TINY.to_json())
    path.write_bytes(
        crafted(description=f'{{{key}"topology": {topology}, "padding": "zero", "info": {{}}}}')
    )
    with pytest.raises(GateFileError, match="not valid JSON .a key is there twice"):
        load_gates(path)
    name = json.dumps(S)
    header = crafted().replace(name.encode(), b'"__metadata__":null,' + name.encode())
    length = struct.unpack("<Q", header[:8])[0] + len('"__metadata__":null,')
    path.write_bytes(struct.pack("<Q", length) + header[8:])
    with pytest.raises(GateFileError, match="not a readable .safetensors"):
        load_gates(path)


OVERWRITE = """
import sys, threading, time
from pathlib import Path
import torch
from ldcp_core import SD15, GateFileError, Gates, load_gates, save_gates

torch.set_num_threads(1)
path = Path(sys.argv[1])
save_gates(Gates({s.name: torch.rand(s.channels) for s in SD15.sites("all+ff")}), path)
data, end = path.read_bytes(), time.monotonic() + 1.5

def download() -> None:
    while time.monotonic() < end:
        with path.open("wb") as file:  # in place: first the file is empty
            file.write(data)

writer = threading.Thread(target=download)
writer.start()
while writer.is_alive():
    try:
        load_gates(path)
    except GateFileError:
        pass
"""


def test_a_file_that_is_overwritten_in_place_while_it_is_read_ends_no_process(
    tmp_path: Path,
) -> None:
    run = subprocess.run(
        [sys.executable, "-c", OVERWRITE, str(tmp_path / "gates.safetensors")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, (run.returncode, run.stderr)


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_names_the_file_what_was_found_and_what_to_do(case: str, tmp_path: Path) -> None:
    content, found, remedy = REFUSALS[case]
    path = tmp_path / "gates.safetensors"
    path.write_bytes(content())
    with pytest.raises(GateFileError) as error:
        load_gates(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert found in message and remedy in message
    assert len(message) <= 500 and message.isprintable()


def test_the_hand_made_file_is_good_but_for_its_checksum(tmp_path: Path) -> None:
    """So that each refusal above is for its own reason."""
    path = tmp_path / "gates.safetensors"
    path.write_bytes(crafted())
    with pytest.raises(GateFileError, match="checksum"):
        load_gates(path)


def test_a_file_of_a_models_size_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    os.truncate(path, 2**31)
    with pytest.raises(GateFileError, match="2,147,483,648 bytes is too large.*choose a file made"):
        load_gates(path)


def test_gates_too_large_to_be_read_back_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ldcp_core.gatefile.MAX_BYTES", 100)
    with pytest.raises(GateFileError, match="too large for a gate file .* of a lower rank"):
        save_gates(small_gates(), tmp_path / "gates.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_the_size_that_counts_is_that_of_what_was_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "grows.safetensors"
    path.write_bytes(b"")
    before = path.stat()
    os.truncate(path, MAX_BYTES + 1)
    monkeypatch.setattr(os, "fstat", lambda _: before)  # a size of 0, as long as nobody reads
    monkeypatch.setattr(Path, "stat", lambda *_, **__: before)
    with pytest.raises(GateFileError, match="50,331,649 bytes is too large"):
        load_gates(path)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(GateFileError, match="this is a folder; choose a gate file") as error:
        load_gates(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_file_is_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.safetensors"):
        load_gates(tmp_path / "nowhere.safetensors")


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "boom").touch, ())

    path = tmp_path / "gates.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(GateFileError):
        load_gates(path)
    torch.save({"scores": torch.rand(16)}, path)
    with pytest.raises(GateFileError):
        load_gates(path)
    assert not (tmp_path / "boom").exists()


# --- fuzz -----------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    header = 8 + struct.unpack("<Q", data[:8])[0]
    kind = rng.choice(["bit", "bit", "header", "header", "cut", "insert", "word", "length"])
    out = bytearray(data)
    if kind == "bit":
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == "header":  # another printable character, so that the JSON often stays JSON
        out[rng.randrange(8, header)] = rng.choice(b'0123456789"{}[],:.-aeFI_ ')
    elif kind == "cut":
        del out[rng.randrange(len(out)) :]
    elif kind == "insert":
        at = rng.randrange(len(out))
        out[at:at] = rng.randbytes(rng.randrange(1, 5))
    elif kind == "word":
        words = [b"F32", b"score", b"constant", b"zero", b"conv1", b"resnets", b"16", b"true", b"8"]
        new = [
            b"F64",
            b"I32",
            b"BF16",
            b"F16",
            b"null",
            b"extend",
            b"conv2",
            b"false",
            b"1e400",
            b"",
        ]
        body = bytes(out[8:header]).replace(rng.choice(words), rng.choice(new), rng.randint(1, 3))
        out = bytearray(struct.pack("<Q", len(body)) + body + out[header:])
    else:
        out[:8] = struct.pack("<Q", rng.choice([0, 1, header, 2**40, 2**63, rng.randrange(2**12)]))
    return bytes(out)


def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path) -> None:
    data, original = GOLDEN.read_bytes(), load_gates(GOLDEN)
    path, rng, refused = tmp_path / "gates.safetensors", random.Random(0), 0
    for _ in range(2000):
        path.write_bytes(mutated(data, rng))
        try:
            loaded = load_gates(path)
        except GateFileError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert same(loaded, original)
    assert refused > 1500


# --- the fingerprint ------------------------------------------------------------------------------


def weights(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: torch.randn(24, 24, 3, 3, generator=g) for name in (SITE, OTHER)}


def test_a_model_and_its_half_precision_copy_have_one_fingerprint() -> None:
    model = weights()
    half = {name: w.half() for name, w in model.items()}
    again = {name: w.half().float() for name, w in model.items()}
    backwards = dict(reversed(model.items()))
    last = {name: w.to(memory_format=torch.channels_last) for name, w in model.items()}
    assert len({fingerprint(m) for m in (model, half, again, backwards, last)}) == 1


def test_another_model_has_another_fingerprint() -> None:
    model = weights()
    tuned = {name: w * 1.01 for name, w in model.items()}
    swapped = {SITE: model[OTHER], OTHER: model[SITE]}
    fewer = {SITE: model[SITE]}
    found = {fingerprint(m) for m in (model, weights(1), tuned, swapped, fewer, {})}
    assert len(found) == 6
    assert all(len(f) == 32 and int(f, 16) >= 0 for f in found)


def test_large_weights_are_sampled_over_their_whole_length() -> None:
    one = torch.zeros(10 * FINGERPRINT_SAMPLES)
    other = one.clone()
    other[-10] = 1.0  # the last sample
    assert fingerprint({SITE: one}) != fingerprint({SITE: other})


def test_the_topology_of_a_full_model_fits_the_size_limit(tmp_path: Path) -> None:
    full = {site.name: site.shared(torch.rand(site.channels)) for site in SD15.all_sites()}
    path = tmp_path / "gates.safetensors"
    save_gates(Gates(full, {name: t - 0.5 for name, t in full.items()}), path)
    assert path.stat().st_size * 10 < MAX_BYTES
    assert same(load_gates(path), Gates(full, {name: t - 0.5 for name, t in full.items()}))
