"""Pruned attention heads beside what other nodes do to attention, inside ComfyUI.

Each evaluation is compared with the masked reference, or with the unpruned model where the block
has to run as it is.
"""

from __future__ import annotations

import importlib

import pytest
import torch

pytestmark = pytest.mark.comfyui
TOLERANCE = 2e-6
MIDDLE = "mid_block.attentions.0.transformer_blocks.0"
SELF, CROSS = f"{MIDDLE}.attn1.to_v", f"{MIDDLE}.attn2.to_v"
LAST = "up_blocks.3.attentions.2.transformer_blocks.0"


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture
def gates(comfy, model, make_gates):
    sites = comfy.model.model_topology(model.model).sites("heads")
    return make_gates([site.name for site in sites], constants=5, seed=3)


@pytest.fixture
def pruned(comfy):
    """A pruned clone of a ModelPatcher, and what its latest run noted."""

    def attach(model, gates):
        patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
        return patched, lambda: comfy.patch.attached(patched).record.notes

    return attach


@pytest.fixture
def check(pruned, sample, unpatched, masked):
    """Each evaluation equals the masked reference of these sites; the notes of the run."""

    def run(model, gates, sites=None):
        patched, notes = pruned(model, gates)
        evaluated = []
        sample(patched, 1, (16, 24), evaluated=evaluated)
        keep_sets = {s: k for s, k in gates.keep_sets().items() if sites is None or s in sites}
        for *call, output, _ in evaluated:
            with masked(model, gates, keep_sets):
                reference = unpatched(model, *call)
            whole = unpatched(model, *call)
            error = rms(output - reference)
            assert error <= TOLERANCE * rms(reference)
            assert rms(whole - reference) >= 100 * error  # few layers move the output little
        return notes()

    return run


def doubled(q, k, v, options):
    """What a guidance node may put in the place of attention: it counts on all heads."""
    attention = importlib.import_module("comfy.ldm.modules.attention")
    return 2 * attention.optimized_attention(q, k, v, options["n_heads"])


@pytest.mark.parametrize("depth", [(), (0,)], ids=["its blocks", "this block"])
@pytest.mark.parametrize("name", ["attn1", "attn2"])
@pytest.mark.parametrize(("block", "place"), [(MIDDLE, ("middle", 0)), (LAST, ("output", 11))])
def test_attention_that_another_node_replaces_runs_as_it_is_and_the_run_says_so(
    model, gates, check, block, place, name, depth
):
    replaced = model.clone()
    replaced.set_model_patch_replace(doubled, name, *place, *depth)
    (note,) = check(replaced, gates, set(gates.scores) - {f"{block}.{name}.to_v"})
    assert f"{block}.{name} runs unpruned" in note and f"replaced the attention {name}" in note


def test_tokens_that_another_node_merges_are_merged(model, gates, check):
    """As ToMe and HyperTile do, before and behind the attention."""
    merged = model.clone()
    merged.set_model_attn1_patch(lambda q, k, v, options: (q[:, ::2], k[:, ::2], 3 * v[:, ::2]))
    merged.set_model_attn1_output_patch(lambda n, options: n.repeat_interleave(2, dim=1))
    merged.set_model_attn2_patch(lambda q, k, v, options: (q, k[:, :40], -v[:, :40]))
    assert check(merged, gates) == []


def test_the_hosts_own_attention_runs_on_the_heads_that_are_left(
    comfy, model, gates, pruned, sample, monkeypatch
):
    attention = importlib.import_module("comfy.ldm.modules.attention")
    seen, own = [], attention.optimized_attention

    def watched(q, k, v, heads, *args, **options):
        seen.append((heads, q.shape[-1], options["transformer_options"]["block"]))
        return own(q, k, v, heads, *args, **options)

    monkeypatch.setattr(attention, "optimized_attention", watched)  # as SageAttention's node does
    sample(pruned(model, gates)[0], 1)
    kept = {s: int(k.sum()) for s, k in gates.keep_sets().items()}
    middle = [call for call in seen if call[2] == ("middle", 0)]
    assert middle == [(kept[s] // 16, kept[s], ("middle", 0)) for s in (SELF, CROSS)]
    assert len({heads for heads, *_ in seen}) > 1


def test_a_mask_reaches_the_attention(comfy, model, gates, masked):
    unet = model.model.diffusion_model
    module = unet.get_submodule(comfy.model.module_path(f"{MIDDLE}.attn2"))
    x, context = torch.randn(2, 6, 128), torch.randn(2, 9, 64)
    mask = torch.zeros(2, 6, 9).masked_fill(torch.rand(2, 6, 9) < 0.5, -1e9)
    block = comfy.model.find_blocks(model.model, gates)[f"{MIDDLE}.attn2"]
    gate = comfy.core.block_gates(gates.pruned())[f"{MIDDLE}.attn2"]
    compact = block.compact(gate, torch.device("cpu"), torch.float32)
    found = compact.forward(x, context=context, mask=mask)
    with masked(model, gates):
        reference = module(x, context=context, mask=mask)
        without = module(x, context=context)
    assert rms(found - reference) <= TOLERANCE * rms(reference)
    assert rms(without - reference) >= 100 * TOLERANCE * rms(reference)


@pytest.mark.parametrize("what", ["a layer", "the class"])
def test_attention_changed_by_another_extension_runs_unpruned_and_says_so(
    comfy, small_model, gates, pruned, sample, monkeypatch, what
):
    model = small_model()
    module = model.model.diffusion_model.get_submodule(comfy.model.module_path(f"{MIDDLE}.attn1"))
    if what == "a layer":
        module.to_q.forward = lambda x, forward=module.to_q.forward: 2 * forward(x)
    else:
        own = type(module).forward
        monkeypatch.setattr(
            type(module), "forward", lambda self, *args, **options: 2 * own(self, *args, **options)
        )
    alone = comfy.core.Gates({SELF: gates.scores[SELF]}, gates.constants, "zero", gates.topology)
    plain = sample(model, 1)
    patched, notes = pruned(model, alone)
    assert torch.equal(sample(patched, 1), plain)
    assert f"{MIDDLE}.attn1 runs unpruned" in notes()[0]


def test_gates_of_other_heads_are_refused(comfy, model, gates):
    other = comfy.core.Topology((32, 64, 128, 128), context_width=64, heads=(4, 4, 4, 4))
    wrong = comfy.core.Gates(gates.scores, {}, "zero", other)
    with pytest.raises(comfy.model.ModelError, match="must be of the same architecture"):
        comfy.patch.attach(model, comfy.patch.Layer(wrong, wrong.keep_sets()))
