"""The exactness contract inside ComfyUI: dense where off, the masked reference where on.

Every evaluation that a sampler makes is compared with the same call on the unpatched model and
with the masked reference. Tolerances are the RMS of the difference in the map that leaves the mid
block, whose own RMS is about 8; each pruned map must differ from dense by 100 times as much.
"""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.comfyui
INNER = tuple(f"mid_block.resnets.{r}.conv1" for r in (0, 1))
RESIDUAL = tuple(f"mid_block.resnets.{r}.conv2" for r in (0, 1))
SITES = {"inner": INNER, "residual": RESIDUAL, "both": INNER + RESIDUAL}
FLOAT32, BFLOAT16 = 2e-6, 0.04


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture
def check(comfy, sample, unpatched, masked):
    """Prune step 1 of 3 and compare every evaluation and the map that leaves the mid block."""

    def run(model, gates, tolerance, size=(32, 32)):
        middle = []
        hook = model.model.diffusion_model.middle_block[2].register_forward_hook(
            lambda module, inputs, output: middle.append(output)
        )
        layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.steps("1"))
        evaluated = []
        sample(comfy.patch.attach(model, layer), 3, size, evaluated=evaluated)
        assert [step for *_, step in evaluated] == [0, 1, 2]
        for (*call, output, step), pruned in zip(evaluated, list(middle), strict=True):
            middle.clear()
            whole = unpatched(model, *call)
            if step != 1:
                assert torch.equal(output, whole)
                continue
            with masked(model, gates):
                reference = unpatched(model, *call)
            dense, expected = middle
            assert rms(pruned - expected) <= tolerance
            assert rms(dense - expected) >= 100 * tolerance
            if tolerance == FLOAT32:  # in bfloat16 the whole output hides the mid block in rounding
                assert rms(output - reference) <= tolerance
                assert rms(whole - reference) >= 100 * tolerance
        hook.remove()

    return run


@pytest.mark.parametrize("padding", ["zero", "extend"])
@pytest.mark.parametrize("sites", SITES)
def test_float32_on_a_map_that_is_not_square(check, model, make_gates, sites, padding):
    check(model, make_gates(SITES[sites], padding), FLOAT32, (32, 40))


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_float32_on_the_smallest_square_map(check, model, make_gates, padding):
    check(model, make_gates(padding=padding), FLOAT32)


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_bfloat16(check, small_model, make_gates, padding):
    check(small_model(dtype=torch.bfloat16), make_gates(padding=padding, constants=4), BFLOAT16)


def test_bfloat16_weights_cast_to_float32_by_the_host(check, small_model, make_gates):
    check(small_model(dtype=torch.bfloat16, manual_cast=torch.float32), make_gates(), FLOAT32)


def test_circular_padding_set_by_another_extension(check, small_model, make_gates):
    model = small_model()
    for module in model.model.diffusion_model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            module.padding_mode = "circular"
            module._reversed_padding_repeated_twice = [1, 1, 1, 1]
    check(model, make_gates(), FLOAT32)


def modules_and_parameters(model):
    found = dict(model.model.named_modules())
    return found | dict(model.model.named_parameters())


def test_the_model_keeps_its_own_objects_and_no_trace(comfy, model, make_gates, sample):
    gates = make_gates()
    before = modules_and_parameters(model)
    plain = sample(model, 2)
    attributes = {name: set(vars(m)) for name, m in model.model.named_modules()}
    pruned = sample(comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets())), 2)
    assert not torch.equal(plain, pruned)
    after = modules_and_parameters(model)
    assert after.keys() == before.keys() and all(after[k] is before[k] for k in before)
    for name, module in model.model.named_modules():
        assert set(vars(module)) == attributes[name]
        assert "forward" not in vars(module) and "_conv_forward" not in vars(module)
    assert torch.equal(sample(model, 2), plain)  # the node is deleted or bypassed


def test_a_failing_evaluation_leaves_no_trace(comfy, model, make_gates, sample):
    gates = make_gates()
    plain = sample(model, 2)
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))

    def fail(module, inputs):
        raise RuntimeError("interrupted")

    handle = model.model.diffusion_model.middle_block[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        sample(patched)
    handle.remove()
    assert not any("forward" in vars(module) for module in model.model.modules())
    assert torch.equal(sample(model, 2), plain)


def test_pruning_in_no_step_gives_the_unpatched_image(comfy, model, make_gates, sample):
    gates = make_gates()
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.NEVER)
    assert torch.equal(sample(comfy.patch.attach(model, layer), 2), sample(model, 2))


def test_gates_that_keep_everything_give_the_unpatched_image(comfy, model, make_gates, sample):
    gates = make_gates()
    layer = comfy.patch.Layer(gates, gates.keep_sets_at(0.0))
    assert torch.equal(sample(comfy.patch.attach(model, layer), 2), sample(model, 2))


def test_compact_weights_are_freed_when_the_run_ends(comfy, model, make_gates, sample):
    from comfy.patcher_extension import WrappersMP

    gates = make_gates()
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    sample(patched)
    (pruning,) = patched.get_wrappers(WrappersMP.APPLY_MODEL, comfy.patch.KEY)
    assert len(pruning._runs) == 0
