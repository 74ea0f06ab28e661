"""torch.compile of the whole U-Net, with our node before and after it, and of single blocks.

Compiling the U-Net takes minutes on a CPU, so it runs only when asked:
``LDCP_TEST_COMPILE=inductor`` (needs a C++ compiler) goes through ComfyUI's own node,
``LDCP_TEST_COMPILE=eager`` through the function behind it, without generating code. What pruning
itself must not do in a compiled region is always tested, in tests/core/test_resblock.py, and how
often a block is compiled, here.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import replace

import pytest
import torch
from features import Kit

pytestmark = pytest.mark.comfyui
whole = pytest.mark.skipif(
    "LDCP_TEST_COMPILE" not in os.environ, reason="set LDCP_TEST_COMPILE=eager"
)
BACKEND = os.environ.get("LDCP_TEST_COMPILE", "")


@pytest.fixture
def kit(comfy, small_model, conditioning, tmp_path):
    return Kit(comfy, small_model, conditioning, tmp_path)


def compiled(kit, model):
    torch._dynamo.reset()
    if BACKEND == "inductor":
        return kit.model_node("TorchCompileModel", model, backend=BACKEND)
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    model = model.clone()
    set_torch_compile_wrapper(model=model, backend=BACKEND)
    return model


@whole
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_is_pruned_as_an_uncompiled_one(comfy, kit, make_gates, masked, order):
    base, gates = kit.small_model(), make_gates(constants=20.0)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    if order == "before":
        model = compiled(kit, comfy.patch.attach(base, layer))
    else:
        model = comfy.patch.attach(compiled(kit, base), layer)
    latent = kit.sample(kit.graph(model))
    record = comfy.patch.attached(model).record
    assert record.evaluations == record.pruned_evaluations == 2
    dense = kit.sample(kit.graph(base))
    with masked(base, gates):
        expected = kit.sample(kit.graph(base))
    # generated code rounds differently, with pruning or without
    rounding = apart(kit.sample(kit.graph(compiled(kit, base))), dense)
    error, effect = apart(latent, expected), apart(dense, expected)
    print(
        f"\n{BACKEND}, {order}: {error:.1e} from masked, dense {effect:.1e}, "
        f"compiling alone {rounding:.1e}"
    )
    assert error <= max(2e-6, 2 * rounding) and rounding <= 1e-5 and effect >= 2e-4


@whole
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_whose_evaluations_easycache_leaves_out_is_pruned_in_the_others(
    comfy, kit, make_gates, masked, order
):
    base, gates = kit.small_model(), make_gates(constants=20.0)
    layer = comfy.patch.Layer(gates, gates.keep_sets())

    def cached(model):
        options = {"reuse_threshold": 0.5, "start_percent": 0.0, "end_percent": 1.0}
        return kit.model_node("EasyCache", model, **options)

    def sampled(model):
        graph = kit.graph(model)
        graph.settings.update(steps=8)
        return kit.sample(graph)

    if order == "before":
        model = compiled(kit, cached(comfy.patch.attach(base, layer)))
    else:
        model = comfy.patch.attach(cached(compiled(kit, base)), layer)
    found = sampled(model)
    record = comfy.patch.attached(model).record
    assert 0 < record.pruned_evaluations < 8
    dense = sampled(cached(base))
    with masked(base, gates):
        expected = sampled(cached(base))
        whole = sampled(base)
    assert apart(expected, whole) > 1e-3  # EasyCache leaves something out
    rounding = apart(sampled(cached(compiled(kit, base))), dense)
    assert apart(found, expected) <= max(2e-6, 2 * rounding) and rounding <= 1e-5
    assert apart(dense, expected) >= 100 * apart(found, expected)


@whole
def test_of_a_whole_model_too_a_second_run_and_another_schedule_compile_nothing_anew(
    comfy, kit, make_gates
):
    base, gates = compiled(kit, kit.small_model()), make_gates(constants=20.0)

    def graphs_after_run(schedule=comfy.core.ALWAYS):
        layer = comfy.patch.Layer(gates, gates.keep_sets(), schedule)
        kit.sample(kit.graph(comfy.patch.attach(base, layer)))
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    first = graphs_after_run()
    assert first > 0
    assert graphs_after_run() == graphs_after_run(comfy.core.Schedule.steps("0-1")) == first


CONVOLUTIONS = tuple(f"mid_block.resnets.0.conv{number}" for number in (1, 2))
TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0"


@pytest.mark.parametrize(
    "sites, path, shapes",
    [
        (CONVOLUTIONS, "middle_block.0", [(2, 128, 4, 4), (2, 128)]),
        ((f"{TRANSFORMER}.ff.net.0",), "middle_block.1.transformer_blocks.0.ff", [(2, 16, 128)]),
        (
            (f"{TRANSFORMER}.attn2.to_v",),
            "middle_block.1.transformer_blocks.0.attn2",
            [(2, 16, 128), (2, 77, 64)],
        ),
    ],
    ids=["ResBlock", "feed-forward", "attention"],
)
@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_another_run_schedule_or_choice_of_as_many_channels_compiles_nothing_anew(
    comfy, model, make_gates, sites, path, shapes, padding, monkeypatch
):
    graphs = []
    # what ComfyUI uses on a GPU; on a CPU its own breaks graphs, asking for free memory
    attention = importlib.import_module("comfy.ldm.modules.attention")
    monkeypatch.setattr(attention, "optimized_attention", attention.attention_pytorch)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    block = model.model.diffusion_model.get_submodule(path)
    compiled = torch.compile(lambda *inputs: block(*inputs), backend=count)
    inputs = [torch.randn(shape, generator=torch.Generator().manual_seed(2)) for shape in shapes]
    dense = block(*inputs)
    gates = make_gates(sites, padding, constants=20.0)
    as_many = replace(gates, scores={site: s.flip(0) for site, s in gates.scores.items()})
    fewer = make_gates(sites, padding, constants=20.0, power=3)

    def evaluate(gates, schedule=comfy.core.ALWAYS):
        run = comfy.patch.Run((comfy.patch.Layer(gates, gates.keep_sets(), schedule),))
        forwards = run.forwards(model.model, torch.device("cpu"), {}, [True])
        with comfy.patch._installed(forwards):
            found = compiled(*inputs)
            assert torch.equal(found, block(*inputs)) and not torch.equal(found, dense)
        return found

    first = evaluate(gates)
    assert len(graphs) == 1
    assert torch.equal(evaluate(gates), first)
    assert torch.equal(evaluate(gates, comfy.core.Schedule.steps("0")), first)
    assert not torch.equal(evaluate(as_many), first)
    assert len(graphs) == 1
    evaluate(fewer)
    assert len(graphs) == 2
    assert torch.equal(compiled(*inputs), dense) and len(graphs) == 3
    evaluate(gates)
    assert len(graphs) == 3


def apart(found, expected):
    return float((found - expected).norm() / expected.norm())
