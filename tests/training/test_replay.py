"""What saves work changes nothing: the same outputs and gradients, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from ldcp_core import PADDINGS, SoftGate, blocks_of
from ldcp_core.diffusers import topology_of
from training.data.encoding import Batch
from training.model.encode import embed_prompts
from training.model.gating import deviation, masked
from training.model.load import DiffusionModel
from training.step.denoising import Denoising, Problem
from training.step.frozen import frozen_layers
from training.step.replay import stages_before

SCOPES = ["mid", "up", "down", "all", "ff", "up_blocks.3.*", "up_blocks.1.resnets.2.conv1"]


@pytest.fixture
def problem(model: DiffusionModel) -> Problem:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 16, 16, generator=generator)
    context, _ = embed_prompts(model, [""] * 3)
    return Denoising(model, 0).problem(Batch(latents, context, ["a", "b", "c"], 3, slice(3)))


def logits_and_gates(model: DiffusionModel, scope: str) -> tuple[list[Tensor], dict[str, SoftGate]]:
    """Leaf tensors, and gates that depend on them; half of the channels are closed."""
    generator = torch.Generator().manual_seed(1)
    leaves, gates = [], {}
    for site in topology_of(model.unet).sites(scope):
        mask = (torch.rand(site.channels, generator=generator) > 0.5).float().requires_grad_()
        leaves.append(mask)
        gates[site.name] = SoftGate(mask, torch.randn(site.channels, generator=generator))
    return leaves, gates


def plain(model: DiffusionModel, problem: Problem, scope: str, padding: str) -> list[Tensor]:
    """Loss and gradients by two whole evaluations and PyTorch's own backward."""
    leaves, gates = logits_and_gates(model, scope)
    denoising = Denoising(model, 0)
    target = denoising.dense(problem)
    with masked(model.unet, gates, padding):
        output = denoising.predict(problem)
        loss = deviation(output, target)
        return [loss.detach(), output.detach(), target, *torch.autograd.grad(loss, leaves)]


def saving(model: DiffusionModel, problem: Problem, scope: str, padding: str) -> list[Tensor]:
    leaves, gates = logits_and_gates(model, scope)
    denoising = Denoising(model, 0)
    answered = denoising.answered(problem, gates)
    with denoising.pruned(answered, gates, padding) as output:
        loss = deviation(output, answered.dense)
        gradients = torch.autograd.grad(loss, leaves)
    return [loss.detach(), output.detach(), answered.dense, *gradients]


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("scope", SCOPES)
def test_loss_and_gradients_are_those_of_the_plain_path_to_the_bit(
    model: DiffusionModel, problem: Problem, scope: str, padding: str
) -> None:
    expected = plain(model, problem, scope, padding)
    found = saving(model, problem, scope, padding)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert expected[0] > 0 and all(bool(gradient.any()) for gradient in expected[3:])


@pytest.mark.parametrize("scope", ["mid", "all", "ff"])
def test_gradient_checkpointing_changes_no_gradient(
    model: DiffusionModel, problem: Problem, scope: str
) -> None:
    expected = plain(model, problem, scope, "zero")
    model.unet.enable_gradient_checkpointing()
    try:
        with evaluations(model) as counted:
            found = saving(model, problem, scope, "zero")
    finally:
        model.unet.disable_gradient_checkpointing()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # dense, gated, and once more for the gradient
    assert counted["up_blocks.3.resnets.2.norm1"] == 3


@contextmanager
def evaluations(model: DiffusionModel) -> Iterator[Counter[str]]:
    """How often each module is evaluated within the context."""
    counted: Counter[str] = Counter()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: counted.update([name]))
        for name, module in model.unet.named_modules()
    ]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def test_what_comes_before_the_first_gate_is_computed_once(
    model: DiffusionModel, problem: Problem
) -> None:
    with evaluations(model) as counted:
        saving(model, problem, "mid", "zero")
    assert counted["down_blocks.3.resnets.1.conv1"] == 1
    assert counted["up_blocks.0.resnets.0.norm2"] == 2
    with evaluations(model) as counted:
        saving(model, problem, "up", "zero")
    assert counted["mid_block.attentions.0"] == 1
    with evaluations(model) as counted:
        saving(model, problem, "down", "zero")
    assert counted["down_blocks.0.attentions.0"] == 2


def test_the_stages_before_a_block(model: DiffusionModel) -> None:
    down = ["conv_in", *(f"down_blocks.{i}" for i in range(4))]
    assert stages_before(model.unet, ["mid_block.resnets.1"]) == down
    assert stages_before(model.unet, ["up_blocks.1.resnets.0", "up_blocks.3.resnets.0"]) == [
        *down, "mid_block", "up_blocks.0",
    ]  # fmt: skip
    assert stages_before(model.unet, ["up_blocks.1.resnets.0", "down_blocks.1.resnets.0"]) == [
        "conv_in", "down_blocks.0",
    ]  # fmt: skip


def test_no_graph_before_the_first_gate(model: DiffusionModel, problem: Problem) -> None:
    _, gates = logits_and_gates(model, "mid")
    recorded: dict[str, bool] = {}

    def watch(name: str) -> None:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            recorded[name] = output.requires_grad

        hooks.append(model.unet.get_submodule(name).register_forward_hook(hook))

    hooks: list[torch.utils.hooks.RemovableHandle] = []
    names = ["time_embedding", "mid_block.resnets.0.norm1", "mid_block.resnets.0.norm2"]
    try:
        for name in names:
            watch(name)
        with masked(model.unet, gates, "zero"):
            Denoising(model, 0).predict(problem)
    finally:
        for handle in hooks:
            handle.remove()
    assert recorded == dict(zip(names, [False, False, True], strict=True))


def saved_bytes(model: DiffusionModel, problem: Problem, context: object) -> int:
    """Bytes of activations that autograd keeps for the backward of one evaluation."""
    _, gates = logits_and_gates(model, "mid")
    weights = {parameter.data_ptr() for parameter in model.unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with context, masked(model.unet, gates, "zero"):  # type: ignore[attr-defined]
            output = Denoising(model, 0).predict(problem)
    assert output.requires_grad
    return sum(kept.values())


def test_frozen_layers_keep_no_inputs(model: DiffusionModel, problem: Problem) -> None:
    from contextlib import nullcontext

    usual = saved_bytes(model, problem, nullcontext())
    found = saved_bytes(model, problem, frozen_layers(model.unet.modules()))
    print(f"kept for backward: {usual:,} bytes, {found:,} without the inputs of convolutions")
    assert found < 0.9 * usual  # 0.85 here


def test_afterwards_the_modules_are_what_they_were(model: DiffusionModel, problem: Problem) -> None:
    saving(model, problem, "all", "zero")
    for module in model.unet.modules():
        assert not {"forward", "_conv_forward"} & set(module.__dict__)


def test_the_first_gate_of_a_scope_is_where_blocks_of_says(model: DiffusionModel) -> None:
    sites = [site.name for site in topology_of(model.unet).sites("up")]
    assert stages_before(model.unet, blocks_of(sites))[-1] == "mid_block"
