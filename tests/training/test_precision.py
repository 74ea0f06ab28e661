"""The U-Net in other precisions: what it computes, what it weighs, and that nothing is left."""

from __future__ import annotations

import builtins
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldcp_core import Gates, PrunedSite
from ldcp_core.diffusers import compact_blocks, topology_of
from training.benchmarking.variants import Inputs, unet_bytes
from training.errors import UserError
from training.model.gating import compacted
from training.model.load import DiffusionModel, load_model
from training.model.precision import PRECISIONS, STORING, PackedBlock, in_precision, storage_of
from training.sample import Candidate


@pytest.fixture(scope="module")
def inputs(model: DiffusionModel) -> Inputs:
    return Inputs.random(model.unet, 2, 8, seed=0)


@pytest.fixture(scope="module")
def gates(model: DiffusionModel) -> Gates:
    """Random gates on every layer; one site keeps nothing, one everything."""
    topology = topology_of(model.unet)
    generator = torch.Generator().manual_seed(0)
    scores = {s.name: torch.rand(s.channels, generator=generator) for s in topology.sites("all+ff")}
    first, second = list(scores)[:2]
    scores[first], scores[second] = torch.zeros_like(scores[first]), torch.ones_like(scores[second])
    constants = {name: torch.rand(s.numel(), generator=generator) for name, s in scores.items()}
    return Gates(scores, constants, topology=topology)


def test_fp32_of_a_model_in_bf16_takes_no_second_copy(pipeline: Path, inputs: Inputs) -> None:
    unet = load_model(str(pipeline), dtype=torch.bfloat16).unet
    half = unet_bytes(unet)
    with in_precision(unet, "fp32", {}) as size:
        assert size < 1.1 * half  # norms alone are cast
        found = inputs.run(unet)
    assert torch.equal(found, inputs.run(unet.float()))


def missing_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def find(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchao"):
            raise ImportError("No module named 'torchao'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", find)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("pruned", [False, True])
def test_afterwards_the_unet_holds_the_same_objects(
    model: DiffusionModel, inputs: Inputs, gates: Gates, precision: str, pruned: bool
) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    unet = model.unet
    before, dense = list(unet.named_parameters()), inputs.run(unet)
    candidate = Candidate(gates if pruned else None, precision)
    with pytest.raises(ZeroDivisionError), candidate.running(unet):
        output = inputs.run(unet)
        raise ZeroDivisionError
    after = list(unet.named_parameters())
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))
    assert not any("forward" in module.__dict__ for module in unet.modules())
    assert torch.equal(inputs.run(unet), dense)
    assert output.dtype == dense.dtype and bool(output.isfinite().all())


def test_full_precision_is_the_model_itself(
    model: DiffusionModel, inputs: Inputs, gates: Gates
) -> None:
    dense = inputs.run(model.unet)
    with Candidate().running(model.unet) as size:
        assert torch.equal(inputs.run(model.unet), dense) and size == unet_bytes(model.unet)
    with compacted(model.unet, gates.pruned()):
        wanted = inputs.run(model.unet)
    with Candidate(gates).running(model.unet):
        assert torch.equal(inputs.run(model.unet), wanted)
    assert relative(wanted, dense) > 0.01


@pytest.mark.parametrize("precision", [p for p in PRECISIONS if p != "fp32"])
def test_pruned_and_quantized_stays_near_pruned(
    model: DiffusionModel, inputs: Inputs, gates: Gates, precision: str
) -> None:
    if precision == "int8":
        pytest.importorskip("torchao")
    with Candidate(gates).running(model.unet):
        wanted = inputs.run(model.unet)
    with Candidate(gates, precision).running(model.unet):
        found = inputs.run(model.unet)
    # 3 mantissa bits of fp8 are off by up to 1/16, 8 bits by 1/254 of a row's largest weight
    assert 0 < relative(found, wanted) < {"fp8": 0.1, "int8": 0.03}.get(precision, 0.02)


def test_fp8_is_the_layerwise_casting_of_diffusers(model: DiffusionModel, inputs: Inputs) -> None:
    other = deepcopy(model.unet)
    other.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with Candidate(None, "fp8").running(model.unet):
        assert torch.equal(inputs.run(model.unet), inputs.run(other))


def test_int8_is_torchaos_weight_only_quantization(model: DiffusionModel, inputs: Inputs) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    other = deepcopy(model.unet)
    torchao.quantize_(other, torchao.Int8WeightOnlyConfig())  # linear layers only
    for module in other.modules():
        if isinstance(module, torch.nn.Conv2d):
            rows = torch.nn.Linear(module.weight[0].numel(), len(module.weight), bias=False)
            rows.weight.data = module.weight.data.flatten(1)
            torchao.quantize_(rows, torchao.Int8WeightOnlyConfig())
            module.weight.data = rows.weight.dequantize().view_as(module.weight)
    dense = inputs.run(model.unet)
    with Candidate(None, "int8").running(model.unet):
        found = inputs.run(model.unet)
    assert relative(found, inputs.run(other)) < 1e-5 < relative(found, dense)


def test_bytes_are_those_of_the_stored_tensors(model: DiffusionModel, gates: Gates) -> None:
    pytest.importorskip("torchao")
    unet = model.unet
    layers = [m for m in unet.modules() if isinstance(m, STORING)]
    weights = sum(m.weight.numel() for m in layers)
    rows = sum(len(m.weight) for m in layers)
    biases = sum(m.bias.numel() for m in layers if m.bias is not None)
    norms = sum(p.numel() for p in unet.parameters()) - weights - biases
    wanted = {
        "fp32": 4 * (weights + biases + norms),
        "bf16": 2 * (weights + biases + norms),
        "fp8": weights + biases + 4 * norms,
        # a byte per weight; a scale of 4 bytes and a zero point of 1 per row
        "int8": weights + 5 * rows + 4 * (biases + norms),
    }
    for precision, size in wanted.items():
        with Candidate(None, precision).running(unet) as found:
            assert found == size
        with Candidate(gates, precision).running(unet) as pruned:
            assert pruned < found
    # what was pruned is gone: the gated layers' full weights are in no parameter
    with Candidate(gates, "fp32").running(unet):
        assert sum(p.numel() for p in unet.parameters()) < 0.7 * (weights + biases + norms)


def test_pruning_comes_before_quantizing(model: DiffusionModel) -> None:
    """A large weight that is pruned does not coarsen the scale of those that stay."""
    pytest.importorskip("torchao")
    site = next(s for s in topology_of(model.unet).sites("mid") if s.kind.name == "inner")
    keep = torch.ones(site.channels, dtype=torch.bool)
    keep[:8] = False
    conv2 = model.unet.get_submodule(site.name.replace("conv1", "conv2"))
    original = conv2.weight.data.clone()
    try:
        conv2.weight.data[:, 0] *= 1000
        blocks = compact_blocks(model.unet, {site.name: PrunedSite(keep)})
    finally:
        conv2.weight.data.copy_(original)
    (block,) = blocks.values()
    stored = PackedBlock(block, storage_of("int8", torch.device("cpu"))).tensors()
    kept = original[:, 8:]
    (found,) = [t.dequantize() for t in stored if t.shape == kept.shape]
    assert bool(((found - kept).abs() <= kept.abs().amax((1, 2, 3), True) / 250).all())


def test_without_torchao_the_message_says_what_to_install(
    model: DiffusionModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing_torchao(monkeypatch)
    before = list(model.unet.parameters())
    with pytest.raises(UserError, match=r'pip install ".\[int8\]"'):
        with in_precision(model.unet, "int8", {}):
            pass
    assert all(a is b for a, b in zip(model.unet.parameters(), before, strict=True))
