"""Under ComfyUI's dynamic VRAM the full weights of pruned layers are never brought in.

ComfyUI's own ModelPatcherDynamic runs on the pretend device, and what it asks of comfy-aimdo is
counted.
"""

from __future__ import annotations

import gc
from functools import partial

import features
import full_checkpoint
import pretend_aimdo
import pytest
import torch
from gated import GATED, WIDTH, convs, unload, weights_left_out

pytestmark = pytest.mark.comfyui
PAGE = 8192
#: bytes of the weight and bias of one gated convolution in float32
FULL = 4 * (9 * WIDTH * WIDTH + WIDTH)
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture
def aimdo(comfy, device, monkeypatch, report_note):
    """The stand-in for comfy-aimdo, with small pages."""
    if not hasattr(comfy.root.model_patcher, "ModelPatcherDynamic"):
        message = "DYNAMIC VRAM TESTS SKIPPED: this ComfyUI manages VRAM in the classic way only"
        report_note.append(message)
        pytest.skip(message)
    aimdo = pretend_aimdo.install(monkeypatch, comfy.root.model_management, device, PAGE)
    monkeypatch.setattr(comfy.dynamic_vram, "PAGE", PAGE)
    return aimdo


@pytest.fixture
def dynamic(comfy, small_model, device, aimdo):
    """Make a small model whose layers ComfyUI brings to the pretend device as they run."""

    def make(**options):
        model = small_model(**options).model
        return comfy.root.model_patcher.ModelPatcherDynamic(model, device, torch.device("cpu"))

    yield make
    unload(comfy, device)


@pytest.fixture
def classic(comfy, small_model, device):
    """The same model, loaded in full in the classic way."""
    model = small_model()
    model.load_device = device
    yield model
    unload(comfy, device)


@pytest.fixture
def run(run):
    return partial(run, side=16)


@pytest.fixture
def add_lora(comfy, tmp_path):
    """A clone of a model with a LoRA on the gated convolutions and on attention."""
    from comfy.sd import load_lora_for_models
    from comfy.utils import load_torch_file

    features.save_lora(tmp_path / "lora.safetensors")
    lora = load_torch_file(str(tmp_path / "lora.safetensors"))
    return lambda model: load_lora_for_models(model, None, lora, 1.0, 0.0)[0]


@pytest.fixture
def as_if_run(comfy, monkeypatch):
    """Context: weights are seen by running their layers, which brings them in."""

    def patch():
        monkeypatch.setattr(comfy.dynamic_vram, "readable", lambda layer, device: False)

    return patch


def set_page(comfy, aimdo, monkeypatch, size):
    aimdo.page = size
    monkeypatch.setattr(comfy.dynamic_vram, "PAGE", size)


def space(model):
    (found,) = model.model.dynamic_vbars.values()
    return found


def brought_in(model, aimdo):
    """The gated convolutions whose full weights have ever been in VRAM."""
    return [path for path, conv in zip(GATED, convs(model), strict=True) if _was(conv, aimdo)]


def _was(conv, aimdo):
    return conv._v[1] in aimdo.faulted | aimdo.refused or "_pins" in vars(conv)


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_the_full_weights_of_pruned_layers_are_never_brought_in_nor_pinned(
    comfy, dynamic, aimdo, memory, layer, run, padding
):
    whole, pruned, one = dynamic(), dynamic(), layer(padding=padding)
    patched = comfy.patch.attach(pruned, one)
    tensors = {}
    for name, model in {"once": whole, "too": patched, "dense": whole, "pruned": patched}.items():
        tensors[name] = []
        run(model, lambda *_, seen=tensors[name]: seen.append(memory.allocated()))
    assert brought_in(whole, aimdo) == GATED
    assert brought_in(pruned, aimdo) == []

    pages = space(whole).loaded_size() - space(pruned).loaded_size()
    by_hand = len(GATED) * FULL
    assert pages >= 0.95 * by_hand
    assert whole.pinned_memory_size() - pruned.pinned_memory_size() >= 0.95 * by_hand
    # all told, with the compact copies
    for dense, with_copies in zip(tensors["dense"], tensors["pruned"], strict=True):
        assert pages - (with_copies - dense) >= 0.95 * weights_left_out(one)


def test_nor_are_those_of_an_attention_whose_heads_are_pruned(
    comfy, dynamic, classic, aimdo, make_gates, run
):
    transformer = "mid_block.attentions.0.transformer_blocks.0"
    sites = [f"{transformer}.attn1.to_v", f"{transformer}.attn2.to_v", f"{transformer}.ff.net.0"]
    gates = make_gates(sites, constants=5.0)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    model = dynamic()
    found = run(comfy.patch.attach(model, layer))
    block = model.model.diffusion_model.get_submodule("middle_block.1.transformer_blocks.0")
    linear = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linear) == 10 and not any(_was(m, aimdo) for m in linear)
    assert torch.equal(found, run(comfy.patch.attach(classic, layer)))
    assert not torch.equal(found, run(model))
    assert all(_was(m, aimdo) for m in linear)


def test_one_block_is_selected_at_a_time(comfy, dynamic, aimdo, memory, layer, run):
    patched = comfy.patch.attach(dynamic(), layer())
    run(patched, steps=1, side=8)
    memory.reset_peak()
    before = memory.allocated()
    run(patched, steps=1, side=8)
    copies = comfy.patch.attached(patched).record.resident_bytes
    # the two convolutions of one block, the kept rows of one of them, and maps
    assert memory.peak() - before - copies <= 3 * FULL


def test_a_pruned_model_gives_the_same_as_in_the_classic_way_and_as_the_masked_one(
    comfy, dynamic, classic, layer, run, masked
):
    model, one = dynamic(), layer()
    dense = run(model)
    pruned = run(comfy.patch.attach(model, one))
    assert torch.equal(dense, run(classic))
    assert torch.equal(pruned, run(comfy.patch.attach(classic, one)))
    with masked(model, one.gates):
        expected = run(model)
    error = (pruned - expected).norm()
    assert error <= 2e-6 * expected.norm() and (dense - expected).norm() >= 100 * error


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_lora_counts_and_is_gone_again(
    comfy, dynamic, classic, aimdo, layer, run, add_lora, masked, order
):
    model, one = dynamic(), layer()

    def patched(base):
        if order == "before":
            return comfy.patch.attach(add_lora(base), one)
        return add_lora(comfy.patch.attach(base, one))

    without = run(comfy.patch.attach(model, one))
    with_lora = run(patched(model))
    assert brought_in(model, aimdo) == []
    assert torch.equal(with_lora, run(patched(classic)))
    assert torch.equal(run(comfy.patch.attach(model, one)), without)
    assert brought_in(model, aimdo) == []
    with masked(model, one.gates):
        expected = run(add_lora(model))
    error = (with_lora - expected).norm()
    assert error <= 2e-6 * expected.norm() and (without - expected).norm() >= 100 * error


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float32 loaded as bfloat16", "fp8", "bfloat16"])
def test_weights_read_from_host_memory_are_bit_for_bit_what_running_the_layer_shows(
    comfy, dynamic, aimdo, layer, run, add_lora, as_if_run, monkeypatch, kind, lora
):
    # what the host keeps in fp8 is rounded at random, which the pretend device can't
    monkeypatch.setattr(comfy.root.float, "stochastic_rounding", lambda w, dtype, seed: w.to(dtype))

    def make():
        dtypes = {"float32": torch.float32, "fp8": FLOAT8}
        cast = torch.float32 if kind != "bfloat16" else None
        model = dynamic(dtype=dtypes.get(kind, torch.bfloat16), manual_cast=cast)
        if "loaded as" in kind:
            comfy.root.model_management.archive_model_dtypes(model.model)
            for weight in model.model.parameters():
                weight.data = weight.float() * 1.001  # not to be had in bfloat16
        return add_lora(model) if lora else model

    read = run(comfy.patch.attach(model := make(), layer()))
    assert brought_in(model, aimdo) == []
    as_if_run()
    assert torch.equal(run(comfy.patch.attach(model := make(), layer())), read)
    assert brought_in(model, aimdo) == GATED


@pytest.mark.parametrize("full_weights", ["auto", "offload", "keep"])
def test_steps_that_do_not_prune_are_the_hosts_own(
    comfy, dynamic, classic, aimdo, memory, layer, run, full_weights
):
    model, seen = dynamic(), {}

    def watch(name):
        seen[name] = []
        return lambda step, denoised, x, total: seen[name].append(
            (denoised.cpu(), memory.allocated())
        )

    run(model, watch("dense"))
    unload(comfy, space(model).aimdo.device)
    patched = comfy.patch.attach(model, layer("1", full_weights))
    last = run(patched, watch("mixed"))
    assert torch.equal(seen["mixed"][0][0], seen["dense"][0][0])
    assert torch.equal(last, run(comfy.patch.attach(classic, layer("1", full_weights))))
    (_, before), (_, during), (_, after) = seen["mixed"]
    assert during - before > FULL
    assert (after - before < FULL / 10) == (full_weights != "keep")
    late = run(comfy.patch.attach(model, layer("2", full_weights)), watch("late"))
    assert torch.equal(seen["late"][1][0], seen["dense"][1][0]) and not torch.equal(last, late)


def test_the_report_says_what_was_resident(comfy, dynamic, aimdo, device, layer, run, monkeypatch):
    set_page(comfy, aimdo, monkeypatch, 512)  # a size that no two places share
    model, one = dynamic(), layer()

    def record(layer):
        patched = comfy.patch.attach(model, layer)
        run(patched)
        return comfy.patch.attached(patched).record

    always = record(one)
    assert always.full_bytes == len(GATED) * FULL and always.kept_full == ""
    assert always.saved_bytes >= 0.95 * weights_left_out(one)
    compact = always.resident_bytes

    mixed = record(layer("1-2"))
    assert mixed.resident_bytes == len(GATED) * FULL + compact
    assert "steps that are not pruned" in mixed.kept_full
    # pages stay until somebody needs the room
    assert record(one).resident_bytes == mixed.resident_bytes
    unload(comfy, device)
    again = record(one)
    assert (again.resident_bytes, again.kept_full) == (compact, "")


def test_an_evaluation_asks_once_which_pages_are_in_vram(
    comfy, dynamic, aimdo, layer, run, monkeypatch
):
    asked, counted = [], []
    residency, resident_bytes = pretend_aimdo.Space.get_residency, comfy.run.resident_bytes

    def ask(space):
        asked.append(space)
        return residency(space)

    def count(*layer):
        counted.append(layer)
        return resident_bytes(*layer)

    monkeypatch.setattr(pretend_aimdo.Space, "get_residency", ask)
    monkeypatch.setattr(comfy.run, "resident_bytes", count)
    run(comfy.patch.attach(dynamic(), layer()), steps=5)
    # when the weights are selected and after each evaluation
    assert len(asked) == 1 + 5
    # when they are selected and after the first evaluation, which has brought the other layers in
    assert len(counted) == 2 * len(GATED)


def test_a_page_that_comes_in_later_in_the_run_counts_too(comfy, dynamic, aimdo, layer, run):
    model = dynamic()
    patched, (conv, *_) = comfy.patch.attach(model, layer()), convs(model)

    def bring_in(step, *_):
        if step == 1:
            conv._v[0].fault(*conv._v[1:])
            conv._v[0].unpin(*conv._v[1:])

    run(patched)
    before = comfy.patch.attached(patched).record
    run(patched, bring_in)
    record = comfy.patch.attached(patched).record
    assert FULL - 2 * PAGE <= record.resident_bytes - before.resident_bytes <= FULL
    assert "until it needs the room" in record.kept_full


def test_an_early_comfy_aimdo_does_not_say_what_is_resident(
    comfy, dynamic, aimdo, layer, run, monkeypatch
):
    monkeypatch.delattr(pretend_aimdo.Space, "get_residency")
    model, patched = dynamic(), []
    for one in (layer(), layer("1-2"), layer()):
        patched.append(comfy.patch.attach(model, one))
        run(patched[-1])
    first, mixed, last = (comfy.patch.attached(p).record for p in patched)
    assert first.kept_full == "" and mixed.kept_full == last.kept_full != ""
    assert mixed.resident_bytes == first.resident_bytes + len(GATED) * FULL == last.resident_bytes


def test_a_page_shared_with_a_layer_that_runs_counts_as_resident(
    comfy, dynamic, aimdo, layer, run, monkeypatch
):
    set_page(comfy, aimdo, monkeypatch, 2**20)
    model = dynamic()
    patched = comfy.patch.attach(model, layer())
    run(patched)
    assert brought_in(model, aimdo) == []
    flags, resident = space(model).get_residency(), 0
    for conv in convs(model):
        start = conv._v[1] - space(model).base_addr
        for byte in range(start, start + FULL, 512):  # places begin and end at multiples of it
            resident += 512 if flags[byte // 2**20] else 0
    record = comfy.patch.attached(patched).record
    assert 0 < resident < len(GATED) * FULL
    assert "page with other weights" in record.kept_full
    compact = record.resident_bytes - resident
    assert 0.95 * weights_left_out(layer()) <= len(GATED) * FULL - compact


def test_a_layer_of_another_extension_is_brought_in_and_the_record_says_so(
    comfy, dynamic, aimdo, layer, run
):
    model = dynamic()
    usual = run(comfy.patch.attach(model, layer()))
    conv = convs(model)[1]

    class Other(type(conv)):
        def forward_comfy_cast_weights(self, x):
            return super().forward_comfy_cast_weights(x)

    conv.__class__ = Other
    patched = comfy.patch.attach(model, layer())
    assert torch.equal(run(patched), usual)
    assert brought_in(model, aimdo) == GATED[1:2]
    assert "another extension" in comfy.patch.attached(patched).record.kept_full


def test_the_copies_give_way_when_the_model_is_unloaded_in_the_middle(
    comfy, dynamic, aimdo, memory, device, layer, run
):
    model = dynamic()
    patched = comfy.patch.attach(model, layer())
    usual, copies = run(patched), []

    def unload_after_the_second(step, *_):
        if step == 1:
            before = memory.allocated()
            unload(comfy, device)
            gc.collect()
            copies.append(before - memory.allocated())

    assert torch.equal(run(patched, unload_after_the_second), usual)
    assert copies[0] >= comfy.patch.attached(patched).record.resident_bytes
    assert brought_in(model, aimdo) == []


def test_with_weights_scheduled_by_hooks_comfyui_loads_the_model_in_the_classic_way(
    comfy, dynamic, classic, aimdo, layer, run, conditioning
):
    hooks = comfy.root.hooks.create_hook_lora(None, 1.0, 0.0)
    (hook,) = hooks.hooks
    hook.need_weight_init = False
    key = f"diffusion_model.{GATED[3]}.weight"
    hook.weights = {key: ("diff", (torch.full((WIDTH, WIDTH, 3, 3), 0.05),))}
    positive = [[conditioning()[0][0], {"hooks": hooks}]]
    model = dynamic()
    model.cached_patcher_init = lambda disable_dynamic: classic, ()
    patched = comfy.patch.attach(model, layer())
    hooked = run(patched, positive=positive)
    assert torch.equal(hooked, run(comfy.patch.attach(classic, layer()), positive=positive))
    assert not torch.equal(hooked, run(patched))
    assert brought_in(model, aimdo) == []


@pytest.mark.parametrize("room", [0.5, 0.1])
def test_with_too_little_room_all_is_right_only_slower(
    comfy, dynamic, aimdo, layer, run, add_lora, room
):
    model, other = dynamic(), dynamic(seed=3)
    variants = [
        comfy.patch.attach(model, layer()),
        comfy.patch.attach(other, layer(seed=2)),
        comfy.patch.attach(add_lora(model), layer("1-")),
        other,
        model,
    ]
    usual = [run(variant) for variant in variants]
    aimdo.room = room * space(model).loaded_size()
    assert all(map(torch.equal, map(run, variants), usual))
    assert aimdo.evictions and (room > 0.1 or aimdo.refused)


def test_a_hundred_alternating_runs_leave_nothing_behind(
    comfy, dynamic, aimdo, memory, layer, run, add_lora
):
    model = dynamic()
    variants = [
        comfy.patch.attach(model, layer(seed=1)),
        model,
        comfy.patch.attach(add_lora(model), layer(padding="extend", seed=2)),
        add_lora(comfy.patch.attach(model, layer("0", seed=3))),
        comfy.patch.attach(model, layer("1", seed=4)),
    ]

    def short(variant):
        latent = run(variant, steps=1, side=8)
        comfy.root.model_management.reset_cast_buffers()  # as ComfyUI does after each prompt
        return latent

    def state():
        gc.collect()
        names = {name: sorted(vars(m)) for name, m in model.model.named_modules()}
        tensors = sum(1 for o in gc.get_objects() if isinstance(o, torch.Tensor))
        host = [sum(aimdo.pinned.values()), comfy.root.model_management.TOTAL_PINNED_MEMORY]
        return names, tensors, host, memory.allocated(), aimdo.resident(), space(model).offset

    usual = [short(variant) for variant in variants]
    # in a run of one step, steps "1" is dense
    assert len({tuple(latent.flatten().tolist()) for latent in usual}) == len(variants) - 1
    before = state()
    for number in range(100):
        assert torch.equal(short(variants[number % 5]), usual[number % 5])
    assert state() == before
    assert aimdo.in_use() == 0


@pytest.mark.parametrize(
    "scope, megabytes, share", [("mid", 112.6, 0.57), ("all", 932, 0.72), ("all+ff", 1217, 0.79)]
)
def test_at_full_size_most_of_what_is_left_out_lies_on_pages_of_its_own(
    comfy, device, aimdo, scope, megabytes, share
):
    """Half precision and comfy-aimdo's pages: neighbours on a page bring some of the rest in."""
    config = comfy.root.supported_models.SD15(dict(full_checkpoint.UNET))
    config.set_inference_dtype(torch.float16, None)
    model = comfy.root.model_base.BaseModel(config, device=torch.device("meta"))
    patcher = comfy.root.model_patcher.ModelPatcherDynamic(model, device, torch.device("cpu"))
    sites = comfy.model.model_topology(model).sites(scope)
    gated = {comfy.model.layer_path(site.name) for site in sites}
    gated |= {path.replace("net.0.proj", "net.2") for path in gated}  # loses columns

    page, places, end = 32 * 2**20, {}, 0
    for *_, size, name, _, weights in sorted(patcher._load_list(for_dynamic=True)):
        if size > 16 * 1024:  # the host loads smaller layers for good
            size = sum(-(-2 * w.numel() // 1024) * 1024 for w in weights.values())
            places[name.removeprefix("diffusion_model.")] = range(end, end + size)
            end += size
    left_out = sum(len(places[name]) for name in gated)
    brought_in = {
        number
        for name, place in places.items()
        if name not in gated
        for number in range(place.start // page, (place.stop - 1) // page + 1)
    }
    alone = sum(
        len(range(max(place.start, number * page), min(place.stop, (number + 1) * page)))
        for place in map(places.get, gated)
        for number in range(end // page + 1)
        if number not in brought_in
    )
    print(f"\n{scope}: {left_out / 2**20:.0f} MiB, {alone / left_out:.0%} on pages of their own")
    assert left_out / 2**20 == pytest.approx(megabytes, rel=2e-3)
    assert alone / left_out == pytest.approx(share, abs=0.01)


def test_corrections_are_those_of_a_model_loaded_in_full(comfy, dynamic, classic, aimdo, sampling):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    choice = {"criterion": "flap", "sparsity": 0.5, "ranking": "per layer", "padding": "zero"}
    model = dynamic()
    found, expected = (
        node.execute(model, **sampling(), **choice, scope="mid", corrections=True).args[0]
        for model in (model, classic)
    )
    assert expected.corrections and list(found.corrections) == list(expected.corrections)
    for site, correction in expected.corrections.items():
        for part, value in vars(correction).items():
            other = getattr(found.corrections[site], part)
            assert torch.allclose(value, other, rtol=1e-3, atol=1e-4)
    assert not any(module._forward_hooks for module in model.model.modules())
