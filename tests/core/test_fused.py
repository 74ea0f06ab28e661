"""When the Triton kernels are used; and, where Triton is installed, that they are right.

Where it is missing the second part is skipped, and says so (`pip install triton` on Linux).
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldcp_core import fused

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU taken for a GPU of which nothing is known yet."""
    remembered = fused._kernels, fused._works
    monkeypatch.setattr(fused, "DEVICES", ("cpu",))
    yield
    for function in remembered:
        function.cache_clear()


def kernels_that(run: Callable[..., None]) -> Any:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return run

    return lambda: SimpleNamespace(norm_silu=Kernel(), join=Kernel())


def fails(*args: object, **constants: int) -> None:
    raise RuntimeError("no C compiler")


def is_wrong(out: Tensor, *args: object, **constants: int) -> None:
    out.zero_()


@torch.no_grad()
@pytest.mark.parametrize(("run", "reason"), [(fails, "no C compiler"), (is_wrong, "off")])
def test_kernels_that_fail_or_are_wrong_are_not_used_and_that_is_said_once(
    run: Callable[..., None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fused, "_kernels", kernels_that(run))
    with caplog.at_level(logging.WARNING, "ldcp"):
        assert not fused.usable(torch.ones(1, 2, 3, 3))
        assert not fused.usable(torch.ones(1, 2, 4, 4))
    assert len(caplog.records) == 1 and reason in caplog.text and "LDCP_TRITON=0" in caplog.text


@torch.no_grad()
def test_they_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LDCP_TRITON", "0")
    monkeypatch.setitem(sys.modules, "ldcp_core.kernels", SimpleNamespace(AVAILABLE=True))
    assert fused._kernels() is None and not fused.usable(torch.ones(1, 2, 3, 3))


@torch.no_grad()
def test_only_maps_that_they_take_go_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_works", lambda device: True)
    maps = torch.ones(1, 2, 3, 3)
    assert fused.usable(maps, maps)
    assert not fused.usable(maps, maps.half())
    assert not fused.usable(maps, maps.to(memory_format=torch.channels_last))
    assert not fused.usable(maps.double()) and not fused.usable(maps[:, :0])
    with torch.enable_grad():
        assert not fused.usable(maps)
    monkeypatch.setattr(fused, "DEVICES", ("cuda",))
    assert not fused.usable(maps)


def test_the_kernels_keep_the_contract_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed, so its kernels are not tested")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted_kernels.py"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
