"""Full weights of pruned layers off the compute device, and everything back afterwards."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch
from gated import GATED, WIDTH, convs, unload, weights_left_out

pytestmark = pytest.mark.comfyui


@pytest.fixture
def model(comfy, small_model, device):
    """A small model that computes on the pretend device and is offloaded to the CPU."""
    model = small_model()
    model.load_device = device
    yield model
    unload(comfy, device)


def loaded_bytes(model, device):
    return sum(t.nbytes for t in model.model.state_dict().values() if t.device == device)


def state(model):
    """Where every weight is, and every mark that ComfyUI keeps on its module."""
    found = {}
    for name, module in model.model.named_modules():
        marks = {k: v for k, v in vars(module).items() if "comfy" in k}
        found[name] = (marks, [str(p.device) for p in module.parameters(recurse=False)])
    return found


class Watch:
    """What lies on the device at the end of every step, in the host's books and in truth."""

    def __init__(self, model, memory, device):
        self.model, self.memory, self.device = model, memory, device
        self.allocated, self.booked, self.loaded = [], [], []

    def __call__(self, *_):
        gc.collect()
        self.allocated.append(self.memory.allocated())
        self.booked.append(self.model.model.model_loaded_weight_memory)
        self.loaded.append(loaded_bytes(self.model, self.device))


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_the_weights_left_out_really_leave_the_device(
    comfy, model, layer, run, memory, device, padding
):
    dense, pruned = (Watch(model, memory, device) for _ in range(2))
    run(model, dense)
    before = state(model)
    one = layer(padding=padding)
    patched = comfy.patch.attach(model, one)
    run(patched, pruned)

    expected = weights_left_out(one)
    assert expected > 4 * 9 * WIDTH * WIDTH  # more than one of the four convolutions
    for with_all, without in zip(dense.allocated, pruned.allocated, strict=True):
        assert with_all - without >= 0.95 * expected
    assert pruned.booked == pruned.loaded  # ComfyUI's own count stays true
    assert dense.loaded[0] - pruned.loaded[0] == sum(4 * (9 * WIDTH * WIDTH + WIDTH) for _ in GATED)
    assert state(model) == before
    assert model.model.model_loaded_weight_memory == dense.booked[0]

    record = comfy.patch.attached(patched).record
    assert record.kept_full == "" and record.device == str(device)
    assert record.full_bytes == 4 * 4 * (9 * WIDTH * WIDTH + WIDTH)
    assert record.saved_bytes >= 0.95 * expected


@pytest.mark.parametrize("circular", [False, True])
def test_where_conv1_alone_is_gated_conv2_is_counted_as_well(
    comfy, model, make_gates, run, circular
):
    """Half of its columns are folded, or where another extension pads, it stays as it is."""
    gates = make_gates([f"mid_block.resnets.{block}.conv1" for block in (0, 1)])
    one = comfy.patch.Layer(replace(gates, corrections={}), gates.keep_sets())
    for conv in convs(model):
        conv.padding_mode = "circular" if circular else "zeros"
    patched = comfy.patch.attach(model, one)
    run(patched)
    record = comfy.patch.attached(patched).record
    full = 4 * 2 * (9 * WIDTH * WIDTH + WIDTH)
    rows = sum(4 * (9 * WIDTH + 1) * int((~keep).sum()) for keep in one.keep_sets.values())
    assert (record.full_bytes, record.kept_full) == (2 * full, "")
    assert record.saved_bytes == pytest.approx(rows if circular else weights_left_out(one), rel=0.1)


def test_the_peak_falls_too_with_selection_and_restoring_included(comfy, model, layer, run, memory):
    one = layer()
    patched = comfy.patch.attach(model, one)
    peaks = []
    run(model, side=40, steps=1)
    for variant in (model, patched):
        memory.reset_peak()
        run(variant, side=40, steps=1)
        peaks.append(memory.peak())
    assert peaks[0] - peaks[1] >= 0.9 * weights_left_out(one)


def test_the_numbers_do_not_depend_on_where_the_weights_are(comfy, model, small_model, layer, run):
    at_home = small_model()
    expected = run(comfy.patch.attach(at_home, layer()))
    assert not torch.equal(expected, run(at_home))
    found = [run(comfy.patch.attach(model, layer(full_weights=f))) for f in ("auto", "keep")]
    assert torch.equal(found[0], found[1])
    assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "full_weights, leaves", [("auto", False), ("keep", False), ("offload", True)]
)
def test_with_steps_that_do_not_prune_the_user_chooses(
    comfy, model, layer, run, memory, device, full_weights, leaves
):
    run(model)
    whole = loaded_bytes(model, device)
    watch = Watch(model, memory, device)
    patched = comfy.patch.attach(model, layer("0, 2", full_weights))
    result = run(patched, watch)
    assert [loaded < whole for loaded in watch.loaded] == [leaves] * 3
    assert watch.booked == watch.loaded
    assert (comfy.patch.attached(patched).record.kept_full == "") == leaves
    assert torch.equal(result, run(comfy.patch.attach(model, layer("0, 2", "keep"))))


def test_where_the_host_keeps_models_on_the_gpu_the_record_says_so(
    comfy, model, small_model, layer, run, device
):
    """As --highvram and --gpu-only tell it to: a model is offloaded to where it computes."""
    model.offload_device = device
    for each, reason in (
        (model, "ComfyUI was told to keep models on the GPU (--highvram, --gpu-only)"),
        (small_model(), "weights and compute share one memory"),  # on a CPU
    ):
        patched = comfy.patch.attach(each, layer())
        run(patched)
        record = comfy.patch.attached(patched).record
        assert record.kept_full == reason and record.saved_bytes < 0


def test_a_schedule_that_covers_every_step_of_the_run_is_as_good_as_none(
    comfy, model, layer, run, memory, device
):
    run(model)
    whole = loaded_bytes(model, device)
    watch = Watch(model, memory, device)
    run(comfy.patch.attach(model, layer("0-2")), watch)
    assert all(loaded < whole for loaded in watch.loaded)


@pytest.mark.parametrize("full_weights, kept", [("auto", 1), ("keep", 2)])
def test_a_stage_that_has_ended_leaves_its_copies_behind(
    comfy, model, make_gates, run, memory, device, full_weights, kept
):
    gates = replace(make_gates(), stages=(comfy.core.Stage(0.0, 0.25), comfy.core.Stage(0.5, None)))
    layers = [
        comfy.patch.Layer(gates, keep_sets, comfy.core.ALWAYS.during(stage), full_weights)
        for stage, keep_sets in gates.by_stage()
    ]
    run(model)
    whole, watch = loaded_bytes(model, device), Watch(model, memory, device)
    patched = comfy.patch.attach(model, *layers)
    copies = []

    def look(*step):
        watch(*step)
        run_now = comfy.patch.attached(patched)._runs[model.model]
        copies.append(len({key[1] for key in run_now._compacts}))

    run(patched, look, steps=4)
    assert copies == [1, 1, kept, kept]
    assert [loaded < whole for loaded in watch.loaded] == [full_weights == "auto"] * 4


@pytest.mark.parametrize(
    "schedules, auto, keep",
    [
        (["0", "1-"], [1, 1, 1, 1], [1, 2, 2, 2]),  # shares in stages, by hand
        (["0-", "1-"], [1, 1, 1, 1], [1, 2, 2, 2]),  # the later one wins
        (["0, 2-", "1"], [1, 2, 1, 1], [1, 2, 2, 2]),  # the first is needed again
        (["0, 2"], [1, 1, 1, 0], [1, 1, 1, 1]),
        (["0%-25%, 1", "2-"], [1, 1, 1, 1], [1, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("full_weights", ["auto", "keep"])
def test_copies_stay_for_as_long_as_a_later_step_needs_them(
    comfy, model, layer, run, monkeypatch, schedules, auto, keep, full_weights
):
    percent = comfy.core.Schedule.percent(0.0, 0.25) | comfy.core.Schedule.steps("1")
    layers = [
        replace(layer(None, full_weights, seed=seed), schedule=schedule)
        for seed, schedule in enumerate(
            percent if "%" in text else comfy.core.Schedule.steps(text) for text in schedules
        )
    ]
    patched, copies, selected = comfy.patch.attach(model, *layers), [], []
    select = comfy.run.Run._select

    def count(self, *call):
        selected.append(call[2:])
        select(self, *call)

    monkeypatch.setattr(comfy.run.Run, "_select", count)

    def look(*_):
        known = comfy.patch.attached(patched)._runs[model.model]
        assert known._compacts.keys() >= known._forwards.keys()
        copies.append(len({key[1] for key in known._compacts}))

    run(patched, look, steps=4, side=8)
    assert copies == (keep if full_weights == "keep" else auto)
    assert len(selected) == len(set(selected)) == 2 * len(schedules)  # each block once


def test_what_was_pruned_in_earlier_steps_stays_in_the_record(comfy, model, make_gates, run):
    schedules, layers = map(comfy.core.Schedule.steps, ("0", "1-")), []
    for block, schedule in enumerate(schedules):
        gates = make_gates([f"mid_block.resnets.{block}.{conv}" for conv in ("conv1", "conv2")])
        layers.append(comfy.patch.Layer(gates, gates.keep_sets(), schedule, "offload"))
    patched = comfy.patch.attach(model, *layers)
    run(patched, side=8)
    record = comfy.patch.attached(patched).record
    assert record.full_bytes == 4 * 4 * (9 * WIDTH * WIDTH + WIDTH)
    # the copies of one block at a time
    assert 0 < record.resident_bytes < record.full_bytes / 3


def test_the_bytes_of_a_layer_are_counted_once_for_all_that_is_selected_together(
    comfy, model, layer, run, monkeypatch
):
    counted, resident_bytes = [], comfy.run.resident_bytes

    def count(*layer):
        counted.append(layer)
        return resident_bytes(*layer)

    monkeypatch.setattr(comfy.run, "resident_bytes", count)
    run(comfy.patch.attach(model, layer()), side=8)
    assert len(counted) == len(GATED)


def test_off_steps_with_offloaded_weights_equal_the_unpatched_model(comfy, model, layer, run):
    patched = comfy.patch.attach(model, layer("99", "offload"))
    assert torch.equal(run(patched), run(model))
    only_last = run(comfy.patch.attach(model, layer("2", "offload")), steps=3)
    assert torch.equal(only_last, run(comfy.patch.attach(model, layer("2", "keep")), steps=3))


@pytest.mark.parametrize("when", [1, 2])
@pytest.mark.parametrize("kind", ["interrupt", "error"])
def test_an_interrupt_or_error_brings_everything_back(comfy, model, layer, run, kind, when):
    plain, before = run(model), state(model)
    booked = model.model.model_loaded_weight_memory
    done = []

    def stop(*_):
        done.append(1)
        if len(done) == when:
            if kind == "interrupt":
                raise comfy.root.model_management.InterruptProcessingException
            raise RuntimeError("another node failed")

    with pytest.raises((comfy.root.model_management.InterruptProcessingException, RuntimeError)):
        run(comfy.patch.attach(model, layer()), stop)
    assert state(model) == before
    assert model.model.model_loaded_weight_memory == booked
    assert torch.equal(run(model), plain)


def test_a_cleanup_that_was_skipped_is_made_up_for(comfy, model, layer, run, device):
    """An ON_CLEANUP callback of somebody else, before ours, raises."""
    from comfy.patcher_extension import CallbacksMP

    plain, before = run(model), state(model)
    broken = model.clone()

    def fail(patcher):
        raise RuntimeError("not ours")

    broken.add_callback(CallbacksMP.ON_CLEANUP, fail)
    patched = comfy.patch.attach(broken, layer())
    with pytest.raises(RuntimeError, match="not ours"):
        run(patched)
    assert all(conv.weight.device.type == "cpu" for conv in convs(model))
    assert model.model.model_loaded_weight_memory == loaded_bytes(model, device)
    assert torch.equal(run(model), plain)  # right meanwhile, only slower

    patched.remove_callbacks_with_key(CallbacksMP.ON_CLEANUP, None)
    run(patched)
    assert state(model) == before


def test_when_comfyui_unloads_the_model_in_the_middle_it_stays_unloaded(
    comfy, model, layer, run, device
):
    plain = run(model)
    patched = comfy.patch.attach(model, layer())
    done = []

    def unload_after_the_last(*_):
        done.append(1)
        if len(done) == 3:
            unload(comfy, device)

    run(patched, unload_after_the_last)
    assert loaded_bytes(model, device) == model.model.model_loaded_weight_memory == 0
    assert not any("prev_comfy_cast_weights" in vars(conv) for conv in convs(model))
    assert torch.equal(run(model), plain)


def test_when_comfyui_offloads_a_parked_layer_itself_its_books_stay_true(
    comfy, model, layer, run, device
):
    plain = run(model)
    done = []

    def offload(*_):
        done.append(1)
        if len(done) == 2:
            model.partially_unload(model.offload_device, loaded_bytes(model, device))

    pruned = run(comfy.patch.attach(model, layer()))
    assert torch.equal(run(comfy.patch.attach(model, layer()), offload), pruned)
    assert model.model.model_loaded_weight_memory == loaded_bytes(model, device)
    for conv in convs(model):
        assert conv.comfy_cast_weights and conv.prev_comfy_cast_weights is False
    assert torch.equal(run(model), plain)


def test_without_room_to_come_back_the_weights_stay_offloaded_and_right(
    comfy, model, layer, run, device, monkeypatch, caplog
):
    plain = run(model)
    conv = convs(model)[1]
    move = type(conv).to

    def full(self, target, *rest):
        if self is conv and torch.device(target) == device:
            raise torch.OutOfMemoryError("no room")
        return move(self, target, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(conv), "to", full)
        run(comfy.patch.attach(model, layer()))
    assert "full weights can't come back to pretend:0 (no room)" in caplog.text
    assert conv.weight.device.type == "cpu" and conv.comfy_cast_weights
    assert model.model.model_loaded_weight_memory == loaded_bytes(model, device)
    assert torch.equal(run(model), plain)
    unload(comfy, device)
    assert torch.equal(run(model), plain)
    assert loaded_bytes(model, device) == model.model.model_loaded_weight_memory
    assert not conv.comfy_cast_weights


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_weights_are_parked_merged_and_taken_out_again(
    comfy, model, layer, run, device, order
):
    generator = torch.Generator().manual_seed(4)
    patches = {
        f"diffusion_model.{path}.weight": (
            "diff",
            (0.2 * torch.randn(WIDTH, WIDTH, 3, 3, generator=generator),),
        )
        for path in GATED
    }
    plain, original = run(model), [conv.weight.cpu().clone() for conv in convs(model)]
    patched = comfy.patch.attach(model, layer()) if order == "after" else model.clone()
    assert set(patched.add_patches(patches, 1.0)) == set(patches)
    if order == "before":
        patched = comfy.patch.attach(patched, layer())
    kept = comfy.patch.attach(patched, layer(full_weights="keep"))
    parked = run(patched)
    assert comfy.patch.attached(patched).record.kept_full == ""
    assert torch.equal(parked, run(kept))
    assert not torch.equal(parked, run(comfy.patch.attach(model, layer())))
    assert torch.equal(run(model), plain)
    for conv, weight in zip(convs(model), original, strict=True):
        assert torch.equal(conv.weight.cpu(), weight)
    assert model.model.model_loaded_weight_memory == loaded_bytes(model, device)


def test_low_vram_loading_needs_no_parking_and_keeps_its_marks(
    comfy, model, layer, run, device, monkeypatch
):
    load = type(model).load
    monkeypatch.setattr(
        type(model), "load", lambda self, to=None, *_, **__: load(self, to, lowvram_model_memory=1)
    )
    plain, before = run(model), state(model)
    pruned = run(comfy.patch.attach(model, layer()))
    assert not torch.equal(pruned, plain)
    assert state(model) == before
    assert torch.equal(run(model), plain)


@pytest.mark.parametrize("which", [0, 1])
def test_a_layer_that_cannot_leave_is_in_the_record_although_another_of_its_block_does(
    comfy, model, make_gates, run, device, which
):
    gates = make_gates(["mid_block.resnets.0.conv1"])  # of conv2 columns are copied
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    run(model, side=8)
    held, where = convs(model)[which], []
    held.comfy_patched_weights = False  # as if the host had not loaded it
    run(patched, lambda *_: where.append([c.weight.device for c in convs(model)[:2]]), side=8)
    held.comfy_patched_weights = True
    assert [place == device for place in where[0]] == [which == 0, which == 1]
    assert "another extension holds" in comfy.patch.attached(patched).record.kept_full


def test_modules_that_comfyui_casts_although_they_are_loaded_keep_their_marks(
    comfy, model, layer, run
):
    model.force_cast_weights = True
    run(model)
    before = state(model)
    assert all(vars(conv)["comfy_cast_weights"] for conv in convs(model))
    patched = comfy.patch.attach(model, layer())
    run(patched)
    assert comfy.patch.attached(patched).record.kept_full == ""
    assert state(model) == before


def test_weights_that_hooks_change_are_not_parked(comfy, model, layer, run, conditioning, device):
    hooks = comfy.root.hooks.create_hook_lora(None, 1.0, 0.0)
    (hook,) = hooks.hooks
    hook.need_weight_init = False
    key = "diffusion_model.middle_block.2.out_layers.3.weight"
    hook.weights = {key: ("diff", (torch.full((WIDTH, WIDTH, 3, 3), 0.05),))}
    patched = comfy.patch.attach(model, layer())
    watch = []
    run(
        patched,
        lambda *_: watch.append(convs(model)[0].weight.device),
        positive=[[conditioning()[0][0], {"hooks": hooks}]],
    )
    assert watch == [device] * 3
    assert "hooks" in comfy.patch.attached(patched).record.kept_full


def test_a_hundred_runs_with_alternating_gates_leave_everything_where_it_was(
    comfy, model, layer, run, memory
):
    plain = run(model)
    patched = [
        comfy.patch.attach(model, layer(seed=1)),
        comfy.patch.attach(model, layer(padding="extend", seed=2)),
        comfy.patch.attach(model, layer("0", seed=3)),
    ]
    for one in patched:
        run(one, steps=1, side=8)
    gc.collect()
    before, allocated = state(model), memory.allocated()
    tensors = sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))
    for number in range(100):
        run(patched[number % 3], steps=1, side=8)
    gc.collect()
    assert memory.allocated() == allocated
    assert sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor)) <= tensors
    assert state(model) == before
    assert torch.equal(run(model), plain)


def test_memory_reserved_for_others_changes_no_number(
    comfy, small_model, make_gates, run, memory, device, monkeypatch
):
    """As with --reserve-vram: ComfyUI then loads a part of the model."""
    management = comfy.root.model_management
    model = small_model(model_channels=96)  # 0.3 GB
    model.load_device = device
    gates = make_gates(topology=comfy.model.model_topology(model.model))
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))

    def outcomes():
        found = [run(variant, steps=1, side=16) for variant in (patched, model)]
        return found, loaded_bytes(model, device)

    usual, whole = outcomes()
    assert whole == loaded_bytes(model, device) > 2**28
    unload(comfy, device)
    with monkeypatch.context() as patch:
        for_inference = management.minimum_inference_memory() - management.EXTRA_RESERVED_VRAM
        patch.setattr(management, "EXTRA_RESERVED_VRAM", 2**34 - for_inference - 150e6)
        patch.setattr(management, "vram_state", management.VRAMState.NORMAL_VRAM)  # as with a GPU
        reserved, part = outcomes()
        assert 0 < part < whole
    unload(comfy, device)
    again, all_of_it = outcomes()
    assert all_of_it == whole
    for found in (reserved, again):
        assert all(map(torch.equal, found, usual))
    unload(comfy, device)
    assert loaded_bytes(model, device) == 0
