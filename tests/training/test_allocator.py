"""Freed memory stays with the process, where glibc can be asked for it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from training import allocator

#: page faults while a buffer of 64 MiB is filled, ten times over, once the heap has settled
FAULTS = """
import resource, sys
import torch
from training.allocator import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(30):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's malloc")


def faults(what: str, **environment: str) -> tuple[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", FAULTS, what]
    done = subprocess.run(command, env={**clean, **environment}, stdout=subprocess.PIPE, text=True)
    kept, count = done.stdout.split()
    return kept, int(count)


@glibc
def test_what_was_freed_is_there_for_what_comes_next() -> None:
    kept, few = faults("keep")
    assert kept == "True"
    assert few < faults("leave")[1] / 10


@glibc
@pytest.mark.parametrize(
    "setting", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=65536"}]
)
def test_an_environment_that_says_otherwise_is_heard(setting: dict[str, str]) -> None:
    assert faults("keep", **setting)[0] == "False"


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())
    assert not allocator.keep_freed_memory()
    allocator.give_back_memory()
