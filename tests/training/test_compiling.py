"""Compiled parts: the answers of those that are not, and refusals in words."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ldcp_core import SoftGate
from training import compiling, fit
from training.compiling import compile_
from training.data import Batch
from training.denoising import Denoising
from training.errors import UserError
from training.gating import deviation, topology_of
from training.models import DiffusionModel


def answers(model: DiffusionModel, steps: int) -> Iterator[list[Tensor]]:
    """Dense and gated outputs and the gradients of the masks; two steps for each problem."""
    generator = torch.Generator().manual_seed(0)
    sites = topology_of(model.unet).sites("mid")
    denoising = Denoising(model, 0)
    for step in range(steps):
        if step % 2 == 0:
            pixels = torch.rand(2, 3, 16, 16, generator=generator)
            problem = denoising.problem(Batch(pixels, [str(step), ""], [f"{step}", f"{step}b"]))
            answered = denoising.answered(problem, [site.name for site in sites])
        masks = {
            site.name: (torch.rand(site.channels, generator=generator) > 0.5).float()
            for site in sites
        }
        gates = {
            site: SoftGate(mask.requires_grad_(), torch.zeros(mask.numel()))
            for site, mask in masks.items()
        }
        with denoising.pruned(answered, gates, "zero") as output:
            loss = deviation(output, answered.dense) * 1e6
            yield [answered.dense, output.detach(), *torch.autograd.grad(loss, masks.values())]


def test_compiled_parts_answer_as_those_that_are_not(model: DiffusionModel) -> None:
    expected = list(answers(model, 4))
    compiled = replace(model, unet=deepcopy(model.unet))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_(compiled.unet, [s.name for s in topology_of(model.unet).sites("mid")], "eager")
    for found, wanted in zip(answers(compiled, 4), expected, strict=True):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 8  # four parts, with and without gradient
    assert not counters["graph_break"]
    apart = (expected[0][1] - expected[1][1]).abs().max()
    assert apart > 1e-5  # other masks: what one step did is not what the next one got


def test_which_parts_are_compiled(model: DiffusionModel) -> None:
    def parts(scope: str) -> list[str]:
        sites = [site.name for site in topology_of(model.unet).sites(scope)]
        return compiling._parts(model.unet, compiling.blocks_of(sites))

    up = [f"up_blocks.{i}" for i in range(4)]
    assert parts("mid") == up
    assert parts("up_blocks.1.*") == up[2:]
    assert parts("down") == ["mid_block", *up]
    with pytest.raises(UserError, match="every part of the U-Net after the first gate holds gates"):
        compile_(model.unet, [site.name for site in topology_of(model.unet).sites("all")])


def test_without_a_compiler_it_is_refused(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"no C\+\+ compiler here"):
        compile_(model.unet, [site.name for site in topology_of(model.unet).sites("mid")])


def test_the_option_compiles_and_is_refused_with_checkpointing(
    pipeline: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    class Reached(Exception):
        pass

    def reached(*_: object) -> None:
        raise Reached

    monkeypatch.setattr(fit, "compile_", reached)
    arguments = ["--model", str(pipeline), "--data", str(images), "--compile"]
    arguments += ["--output", str(tmp_path / "a.safetensors")]
    with pytest.raises(Reached):
        fit.main(arguments)
    assert fit.main([*arguments, "--gradient-checkpointing"]) == 1
    assert "--gradient-checkpointing and --compile" in capsys.readouterr().err
