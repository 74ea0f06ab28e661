"""Several Apply nodes, schedules, samplers, LoRA and low-VRAM loading."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

pytestmark = pytest.mark.comfyui
A, B = "mid_block.resnets.0.conv1", "mid_block.resnets.1.conv2"


@pytest.fixture
def layer(comfy, make_gates):
    def make(steps=None, sites=(A, B), seed=1, padding="zero"):
        gates = make_gates(sites, padding, seed)
        schedule = comfy.core.ALWAYS if steps is None else comfy.core.Schedule.steps(steps)
        return comfy.patch.Layer(gates, gates.keep_sets(), schedule)

    return make


@pytest.fixture
def pruned_steps(comfy, sample, unpatched):
    """(steps reported, differs from the unpatched call?) of every evaluation of a run."""

    def run(base, patched, steps, **options):
        evaluated = []
        sample(patched, steps, (16, 16), evaluated=evaluated, **options)
        return [
            (step, not torch.equal(output, unpatched(base, *call)))
            for *call, output, step in evaluated
        ]

    return run


def first_of_each_step(evaluations):
    """Samplers report a step right after its first evaluation: the last one before each report."""
    return dict(evaluations)


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpm_2", "uni_pc", "lcm"])
def test_the_first_evaluation_of_every_step_knows_its_step(
    comfy, model, layer, pruned_steps, sampler, steps
):
    patched = comfy.patch.attach(model, layer("0, 2-3"))
    found = pruned_steps(model, patched, steps, sampler=sampler)
    expected = {0: True, 1: False, 2: True, 3: True, 4: False}
    assert first_of_each_step(found) == {step: expected[step] for step in range(steps)}


def test_steps_count_from_the_start_step_of_ksampler_advanced(comfy, model, layer, pruned_steps):
    patched = comfy.patch.attach(model, layer("0"))
    found = pruned_steps(model, patched, 6, start_step=2, last_step=5)
    assert found == [(0, True), (1, False), (2, False)]


def test_steps_count_from_the_first_one_with_denoise_below_one(comfy, model, layer, pruned_steps):
    patched = comfy.patch.attach(model, layer("1-"))
    assert pruned_steps(model, patched, 3, denoise=0.5) == [(0, False), (1, True), (2, True)]


def test_percent_is_of_the_full_schedule(comfy, model, make_gates, pruned_steps):
    gates = make_gates()
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.percent(0.0, 0.5))
    patched = comfy.patch.attach(model, layer)
    # four equal steps from t = 999: 0%, 25%, 50%, 75% of the timesteps, sigma(50%) included
    found = pruned_steps(model, patched, 4, scheduler="sgm_uniform")
    assert [pruned for _, pruned in found] == [True, True, True, False]
    # the lower half alone: every step of it lies behind 50%
    found = pruned_steps(model, patched, 2, scheduler="sgm_uniform", denoise=0.4)
    assert [pruned for _, pruned in found] == [False, False]


def test_chained_schedules_are_a_union(comfy, model, make_gates, pruned_steps):
    gates, schedule_node = make_gates(), comfy.schedule_node.LDCPStepSchedule
    (first,) = schedule_node.execute("steps", "0", 0.0, 1.0).args
    (both,) = schedule_node.execute("steps", "2", 0.0, 1.0, first).args
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets(), both))
    assert pruned_steps(model, patched, 4) == [(0, True), (1, False), (2, True), (3, False)]


def test_a_range_past_the_last_step_prunes_nothing_and_says_so_once(
    comfy, model, layer, pruned_steps, caplog
):
    patched = comfy.patch.attach(model, layer("0, 7-9"))
    with caplog.at_level(logging.WARNING, "ldcp"):
        assert pruned_steps(model, patched, 3) == [(0, True), (1, False), (2, False)]
    (message,) = [r.getMessage() for r in caplog.records if r.name == "ldcp"]
    assert "3 steps (0 to 2); the range 7-9" in message


def test_a_sampler_may_overwrite_its_schedule_during_the_run(
    comfy, model, layer, sample, unpatched
):
    patched, pruned = comfy.patch.attach(model, layer("2")), []

    def overwrite(apply_model, call):
        call["c"]["transformer_options"]["sample_sigmas"][: len(pruned)] = 0  # steps gone by
        arguments = call["input"], call["timestep"], call["c"]
        output = apply_model(arguments[0], arguments[1], **arguments[2])
        pruned.append(not torch.equal(output, unpatched(model, *arguments)))
        return output

    patched.set_model_unet_function_wrapper(overwrite)
    sample(patched, 4)
    assert pruned == [False, False, True, False]


def test_two_apply_nodes_on_clones_do_not_disturb_each_other(comfy, model, layer, sample):
    plain = sample(model, 2)
    one = comfy.patch.attach(model, layer(sites=(A,)))
    first = sample(one, 2)
    two = comfy.patch.attach(model, layer(sites=(B,)))
    second = sample(two, 2)
    assert not torch.equal(first, second)
    assert torch.equal(sample(one, 2), first)
    assert torch.equal(sample(two, 2), second)
    assert torch.equal(sample(model, 2), plain)


def test_two_in_series_add_up_each_with_its_own_schedule(
    comfy, model, layer, sample, unpatched, masked
):
    one, two = layer("0-1", (A,)), layer("1-2", (B,), padding="extend")
    patched = comfy.patch.attach(comfy.patch.attach(model, one), two)
    evaluated = []
    sample(patched, 4, evaluated=evaluated)
    for *call, output, step in evaluated:
        active = [n for n, steps in ((one, (0, 1)), (two, (1, 2))) if step in steps]
        same_as(output, call, model, active, unpatched, masked)


def test_gates_in_stages_prune_their_share_in_each(
    comfy, model, make_gates, sample, unpatched, masked
):
    stages = (comfy.core.Stage(0.0, 0.125), comfy.core.Stage(0.5, None))
    gates = replace(make_gates((A, B)), stages=stages)
    node = comfy.apply_node.LDCPApplyDynamicPruning
    patched, evaluated = node.execute(model, gates, 0.9, channels="as learned").args[0], []
    sample(patched, 4, evaluated=evaluated)
    layers = comfy.patch.attached(patched).layers
    assert [str(layer.schedule) for layer in layers] == ["0%-50%", "50%-100%"]
    for *call, output, step in evaluated:
        same_as(output, call, model, [layers[step >= 2]], unpatched, masked)
    assert comfy.patch.attached(patched).record.pruned_evaluations == len(evaluated)

    some = comfy.core.Schedule.steps("1-2")
    patched, evaluated = node.execute(model, gates, 0.9, some, channels="as learned").args[0], []
    sample(patched, 4, evaluated=evaluated)
    for *call, output, step in evaluated:
        active = [layers[step >= 2]] if step in (1, 2) else []
        same_as(output, call, model, active, unpatched, masked)


def test_two_in_series_on_one_site_the_later_one_wins(
    comfy, model, layer, sample, unpatched, masked
):
    one, two = layer("0-1", (A, B), seed=1), layer("1-", (A,), seed=2)
    patched = comfy.patch.attach(comfy.patch.attach(model, one), two)
    only_b = comfy.patch.Layer(one.gates, {B: one.keep_sets[B]})
    expected = {0: [one], 1: [only_b, two], 2: [two]}
    evaluated = []
    sample(patched, 3, evaluated=evaluated)
    for *call, output, step in evaluated:
        same_as(output, call, model, expected[step], unpatched, masked)


def same_as(output, call, model, layers, unpatched, masked):
    """The output equals the masked reference to 1e-5, and is 100 times as far from dense."""
    dense = unpatched(model, *call)
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(masked(model, layer.gates, layer.keep_sets))
        reference = unpatched(model, *call)
    if not layers:
        assert torch.equal(output, dense)
        return
    error, effect = (float((y - reference).square().mean().sqrt()) for y in (output, dense))
    assert error <= 1e-5
    assert effect >= 100 * error and effect > 1e-5


def test_applying_the_same_gates_twice_equals_once(comfy, model, layer, sample):
    once = comfy.patch.attach(model, layer())
    twice = comfy.patch.attach(once, layer())
    assert torch.equal(sample(once), sample(twice))


def lora(comfy, model, strength=1.0):
    """A LoRA of rank 4 on the four gated convolutions and on norm2, as a patched clone."""
    generator = torch.Generator().manual_seed(4)
    patches = {}
    for block in (0, 2):
        for path in (f"{block}.in_layers.2", f"{block}.out_layers.3", f"{block}.out_layers.0"):
            key = f"diffusion_model.middle_block.{path}.weight"
            weight = model.model.state_dict()[key]
            patches[key] = ("diff", (0.2 * torch.randn(weight.shape, generator=generator),))
    patched = model.clone()
    assert set(patched.add_patches(patches, strength)) == set(patches)
    return patched


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("loading", ["full", "low_vram"])
def test_lora(comfy, small_model, layer, sample, unpatched, masked, order, loading, monkeypatch):
    base, gates = small_model(), layer()
    if loading == "low_vram":
        load = type(base).load
        monkeypatch.setattr(
            type(base),
            "load",
            lambda self, device=None, *_, **__: load(self, device, lowvram_model_memory=1),
        )
    without = sample(comfy.patch.attach(base, gates), 2)
    if order == "before":
        patched = comfy.patch.attach(lora(comfy, base), gates)
    else:
        patched = lora(comfy, comfy.patch.attach(base, gates))
    evaluated = []
    result = sample(patched, 2, evaluated=evaluated)
    assert (result - without).abs().max() > 1e-3
    if loading == "low_vram":
        assert base.model.diffusion_model.middle_block[0].in_layers[2].weight_function
    for *call, output, _ in evaluated:
        same_as(output, call, patched, [gates], unpatched, masked)
    assert torch.equal(sample(comfy.patch.attach(base, gates), 2), without)  # LoRA gone again


def test_lora_hooked_to_one_of_two_conditions(
    comfy, model, layer, sample, unpatched, masked, conditioning
):
    """ComfyUI writes hooked weights in place between the evaluations of a run."""
    gates, compared = layer(), []
    hooks = comfy.root.hooks.create_hook_lora(None, 1.0, 0.0)
    (hook,) = hooks.hooks
    hook.need_weight_init = False
    key = "diffusion_model.middle_block.2.out_layers.3.weight"
    hook.weights = {key: ("diff", (torch.full((128, 128, 3, 3), 0.05),))}
    patched = comfy.patch.attach(model, gates)

    def compare(apply_model, call):
        arguments = call["input"], call["timestep"], call["c"]
        output = apply_model(arguments[0], arguments[1], **arguments[2])
        same_as(output, arguments, model, [gates], unpatched, masked)
        compared.append(model.model.state_dict()[key].sum())
        return output

    patched.set_model_unet_function_wrapper(compare)
    sample(patched, 2, cfg=3.0, positive=[[conditioning()[0][0], {"hooks": hooks}]])
    # two conditions, two steps, and weights that came and went
    assert len(compared) == 4 and len({float(total) for total in compared}) == 2


def test_a_block_changed_by_another_extension_runs_unpruned_and_says_so(
    comfy, small_model, layer, sample, caplog
):
    model = small_model()
    conv = model.model.diffusion_model.middle_block[0].in_layers[2]
    original = conv.forward
    conv.forward = lambda x: 2 * original(x)
    only_other = comfy.patch.attach(model, layer(sites=(B,)))
    with caplog.at_level(logging.WARNING, "ldcp"):
        pruned = sample(comfy.patch.attach(model, layer()))
    messages = {r.getMessage() for r in caplog.records if r.name == "ldcp"}
    assert len(messages) == 1 and "mid_block.resnets.0 runs unpruned" in messages.pop()
    assert pruned.shape == sample(only_other).shape


def with_negative(model, negative, unpatched):
    """As DualModelGuider: another model is evaluated with the options of the first."""
    model = model.clone()

    def evaluate(apply_model, call):
        arguments = call["input"], call["timestep"], call["c"]
        found = negative.model.apply_model(*arguments[:2], **arguments[2])
        assert torch.equal(found, unpatched(negative, *arguments))
        return 2 * apply_model(*arguments[:2], **arguments[2]) - found

    model.set_model_unet_function_wrapper(evaluate)
    return model


def test_another_model_evaluated_in_a_run_is_not_pruned_and_leaves_no_trace(
    comfy, model, small_model, layer, sample, unpatched
):
    patched = comfy.patch.attach(model, layer())
    both, pruning = with_negative(patched, small_model(3), unpatched), comfy.patch.attached(patched)
    for _ in range(2):
        sample(both, 2)
        record = pruning.record
        assert (record.sampled, record.evaluations, record.pruned_evaluations) == (True, 2, 2)
        assert record.pruned_steps == {0, 1} and not record.notes
        assert not pruning._runs


def test_outside_a_sampler_every_evaluation_selects_the_weights_of_the_moment(
    comfy, small_model, layer, sample, masked
):
    model, one = small_model(), layer()
    patched = comfy.patch.attach(model, one)
    pruning, x = comfy.patch.attached(patched), torch.ones(1, 4, 16, 16)
    call = x, torch.ones(1), None, torch.ones(1, 77, 64)
    sample(patched, 2)
    sampled = pruning.record
    for _ in range(2):
        found = model.model.apply_model(*call, transformer_options={"wrappers": patched.wrappers})
        with masked(model, one.gates):
            assert torch.allclose(found, model.model.apply_model(*call), atol=1e-5)
        assert not torch.allclose(found, model.model.apply_model(*call), atol=1e-3)
        assert not any(run._compacts or run._forwards for run in pruning._runs.values())
        model.model.diffusion_model.middle_block[0].in_layers[2].weight.mul_(-3)  # as LoRA would
    assert pruning.record is sampled
