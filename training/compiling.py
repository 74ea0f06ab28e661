"""`torch.compile` for the parts of the U-Net that run in every step and hold no gate.

A gated part gets another forward in every evaluation, and what lies before the first gate runs once
for several steps: neither is worth minutes of compiling. The same parts, compiled, give the same
answers up to rounding, but no longer the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch._dynamo
from diffusers import UNet2DConditionModel

from ldcp_core import blocks_of
from training.errors import UserError
from training.thrift import stages_before

COMPILERS = ("g++", "clang++", "cl")
#: how often a class of parts may be compiled: its parts, times full and last batches, times two
RECOMPILES = 32


def compile_(unet: UNet2DConditionModel, sites: Iterable[str], backend: str = "inductor") -> None:
    """Compile, in place, the top-level parts after the first of the gated blocks that hold no gate.

    Raises UserError where there is none, or nothing to compile with.
    """
    parts = _parts(unet, blocks_of(sites))
    if not parts:
        raise UserError(
            "--compile was given, and every part of the U-Net after the first gate holds gates.",
            "a scope such as mid, whose gates leave the up path alone",
            "leave out --compile, or change --scope",
        )
    if backend == "inductor" and unet.device.type == "cpu" and _compiler() is None:
        raise UserError(
            "--compile was given, and there is no C++ compiler here.",
            f"one of {', '.join(COMPILERS)} on the path, or named by $CXX",
            "install one, or leave out --compile",
        )
    # parts of one class share one limit, each with a shape, with and without gradient
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILES)
    for name in parts:
        unet.get_submodule(name).compile(backend=backend, dynamic=False)


@contextmanager
def uncompiled(unet: UNet2DConditionModel) -> Iterator[None]:
    """Context in which nothing of the U-Net runs compiled: another precision would compile anew."""
    compiled = {m: m._compiled_call_impl for m in unet.modules() if m._compiled_call_impl}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _parts(unet: UNet2DConditionModel, blocks: Iterable[str]) -> list[str]:
    gated = list(blocks)
    skipped = len(stages_before(unet, gated))
    return [
        name
        for name in stages_before(unet, [])[skipped:]
        if not any(block.startswith(name + ".") for block in gated)
    ]


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [named] if named else COMPILERS)), None)
