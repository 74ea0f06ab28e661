"""Malformed gate files by the thousand, read by a process with little memory and little time.

An independent reader (struct, json and numpy, none of the code under test) says of every file
whether it is valid and what it holds. What `load_gates` accepts must be valid and equal to that,
bit for bit; everything else must be refused with GateFileError, quickly and in few words. Many
mutations carry a fresh, correct checksum, as somebody who means harm would write it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import gatefile_mutations as mutations
import pytest

from ldcp_core import GateFileError, load_gates

ROOT = Path(__file__).parents[2]
#: LDCP_TEST_FUZZ=20000 reads more
FILES = int(os.environ.get("LDCP_TEST_FUZZ", 1200))


# elsewhere a process does not tell its memory in this way; what is read is the same code there
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_no_malformed_file_crashes_hangs_floods_memory_or_is_taken_for_another(
    tmp_path: Path,
) -> None:
    command = [sys.executable, mutations.__file__, str(FILES), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300 + FILES, env=environment
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    counts = Counter(json.loads(run.stdout.splitlines()[-1]))
    assert counts.total() == FILES and set(counts) == {"refused", "same", "another valid file"}
    # enough of each that the mutations are neither all noise nor all harmless
    assert counts["refused"] > 0.7 * FILES
    assert min(counts["same"], counts["another valid file"]) > FILES / 120


@pytest.mark.parametrize("kind", mutations.KINDS)
def test_every_kind_of_mutation_is_told_by_the_independent_reader(
    kind: str, tmp_path: Path
) -> None:
    """Few files of each kind here, with the reader's verdict beside that of `load_gates`."""
    path = tmp_path / "gates.safetensors"
    accepted = refused = 0
    for data in mutations.files(40, kinds=(kind,)):
        path.write_bytes(data)
        try:
            found = mutations.contents(load_gates(path))
        except GateFileError:
            refused += 1
        else:
            assert found == mutations.independently_read(data)
            accepted += 1
    assert refused + accepted == 40
    assert accepted > 0 or kind not in mutations.HARMLESS
    assert refused > 0 or kind in mutations.HARMLESS


def test_the_independent_reader_reads_what_is_saved() -> None:
    for data in mutations.originals():
        assert mutations.independently_read(data) is not None


# Windows has no pipes among its files that could be named as a gate file
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "gates.safetensors"
    os.mkfifo(pipe)
    refused: list[str] = []

    def load() -> None:
        with pytest.raises(GateFileError) as error:
            load_gates(pipe)
        refused.append(str(error.value))

    reader = threading.Thread(target=load, daemon=True)  # which may wait for ever
    reader.start()
    reader.join(60)
    assert refused and "not a regular file" in refused[0]


def test_a_million_tensors_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "gates.safetensors"
    path.write_bytes(mutations.many_tensors(300_000))
    with pytest.raises(GateFileError) as error:
        load_gates(path)
    assert len(str(error.value)) <= 500


LOAD = """
import resource, sys
from pathlib import Path
from ldcp_core import GateFileError, load_gates

def grown() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = grown()
for path in sys.argv[1:]:
    try:
        kept = load_gates(path)
    except GateFileError as error:
        print(len(str(error)), (grown() - before) // 1024)
"""


# ru_maxrss is in kilobytes on Linux alone; what is read is the same code elsewhere
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tells memory as Linux does")
def test_megabytes_of_nested_lists_in_a_file_of_good_size_are_refused_at_little_cost(
    tmp_path: Path,
) -> None:
    many = "[[],[]]," * (15 * 2**17) + "0"
    parts = mutations.Parts(mutations.GOLDEN.read_bytes())
    described = {**parts.description, "info": {"x": "x"}, "more": 0}
    text = json.dumps(described)
    data = parts.pack(text)
    data = data.replace(b'{"__metadata__":', f'{{"x":[{many}],"__metadata__":'.encode(), 1)
    data = (int.from_bytes(data[:8], "little") + len(many) + 7).to_bytes(8, "little") + data[8:]
    contents = {
        "info": parts.pack(text.replace('"x": "x"', f'"x": [{many}]')),
        "widths": parts.pack(text.replace('"widths": [', f'"widths": [{many}, ')),
        "header": data,
        "header longer than the file": (10**9).to_bytes(8, "little") + b'"' * 2**24,
    }
    paths = [tmp_path / name for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    run = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, paths)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = [tuple(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(found) == len(paths), run.stderr  # all refused
    assert all(message <= 500 and grown < 200 for message, grown in found), run.stdout
