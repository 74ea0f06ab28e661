"""Beyond the mid block, inside ComfyUI: every ResBlock, feed-forward and attention.

Each evaluation of a sampler is compared with the same call on the unpatched model where the
schedule is off and with the masked reference where it is on. Tolerances are the RMS of the
difference over that of the reference; pruning must move the output by 100 times as much.
"""

from __future__ import annotations

import pytest
import quantised
import torch

pytestmark = pytest.mark.comfyui
FLOAT32 = 2e-6
FF = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture
def gates_of(comfy, model, make_gates):
    def make(scope, padding="zero", constants=0.3, seed=1, info=()):
        sites = [site.name for site in comfy.model.model_topology(model.model).sites(scope)]
        return make_gates(sites, padding, seed, constants, info=info)

    return make


@pytest.mark.parametrize("padding", ["zero", "extend"])
@pytest.mark.parametrize("scope", ["up", "down", "ff", "heads", "mid+ff", "all+ff+heads"])
def test_every_scope_in_float32(check_exact, model, gates_of, scope, padding):
    check_exact(model, gates_of(scope, padding))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_weights_that_the_host_casts(check_exact, small_model, gates_of, dtype):
    check_exact(
        small_model(dtype=dtype, manual_cast=torch.float32), gates_of("all+ff+heads", constants=2)
    )


def test_a_feed_forward_in_bfloat16(comfy, small_model, make_gates, sample, masked):
    """Looked at where it is: in the model's output rounding hides what a single layer does."""
    model, gates = small_model(dtype=torch.bfloat16), make_gates([FF], constants=8)
    module = model.model.diffusion_model.get_submodule(
        comfy.model.module_path(FF[: -len(".net.0")])
    )
    seen = []
    hook = module.register_forward_hook(lambda m, inputs, output: seen.append((*inputs, output)))
    sample(comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets())), 1)
    hook.remove()
    ((x, output),) = seen
    assert output.dtype == torch.bfloat16
    whole = module(x)
    with masked(model, gates):
        reference = module(x)
    assert rms(output - reference) <= 6e-3 * rms(reference)
    assert rms(whole - reference) >= 0.6 * rms(reference)


def lora(comfy, model, sites):
    """Differences on the weights of ``sites`` and of the layers after them, as a patched clone."""
    generator = torch.Generator().manual_seed(4)
    state, patches = model.model.state_dict(), {}
    for site in sites:
        path = comfy.model.layer_path(site)
        paths = [path, path.replace("net.0.proj", "net.2")] if "net.0" in path else [path]
        if path.endswith("to_v"):
            paths = [path.replace("to_v", layer) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
        for path in paths:
            key = f"diffusion_model.{path}.weight"
            noise = torch.randn(state[key].shape, generator=generator)
            patches[key] = ("diff", (0.5 * state[key][0].numel() ** -0.5 * noise,))
    patched = model.clone()
    assert set(patched.add_patches(patches, 1.0)) == set(patches)
    return patched


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("loading", ["full", "low_vram"])
def test_lora_on_the_pruned_layers(
    comfy, small_model, gates_of, sample, unpatched, masked, order, loading, monkeypatch
):
    base, gates = small_model(), gates_of("all+ff+heads")
    if loading == "low_vram":
        load = type(base).load
        monkeypatch.setattr(
            type(base),
            "load",
            lambda self, device=None, *_, **__: load(self, device, lowvram_model_memory=1),
        )
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    without = sample(comfy.patch.attach(base, layer), 2)
    if order == "before":
        patched = comfy.patch.attach(lora(comfy, base, gates.scores), layer)
    else:
        patched = lora(comfy, comfy.patch.attach(base, layer), gates.scores)
    evaluated = []
    assert rms(sample(patched, 2, evaluated=evaluated) - without) > 1e-2
    for *call, output, _ in evaluated:
        with masked(base, gates):
            reference = unpatched(patched, *call)
        assert rms(output - reference) <= FLOAT32 * rms(reference)
    assert torch.equal(sample(comfy.patch.attach(base, layer), 2), without)  # LoRA gone again


def test_parts_of_one_file_have_schedules_of_their_own(
    comfy, model, gates_of, sample, unpatched, masked
):
    """Mid always, up only in late steps: two Apply nodes in a row on the same gates."""
    gates, node = gates_of("mid+up+ff"), comfy.apply_node.LDCPApplyDynamicPruning
    late = comfy.core.Schedule.steps("2-")
    mid = node.execute(model, gates, -1.0, sites="mid").args[0]
    both = node.execute(mid, gates, -1.0, late, sites="up + ff").args[0]
    evaluated = []
    sample(both, 4, (16, 16), evaluated=evaluated)
    topology = comfy.model.model_topology(model.model)
    for *call, output, step in evaluated:
        names = [site.name for site in topology.sites("mid")]
        if step >= 2:
            names += [site.name for site in topology.sites("up+ff")]
        keep_sets = {site: keep for site, keep in gates.keep_sets().items() if site in names}
        with masked(model, gates, keep_sets):
            reference = unpatched(model, *call)
        assert rms(output - reference) <= FLOAT32 * rms(reference)


def test_the_share_of_an_override_is_of_the_chosen_sites(comfy, gates_of):
    gates = gates_of("all+ff")
    ((_, found),) = comfy.apply_node.chosen_keep_sets(gates, 0.5, "ff")
    assert {site.rsplit(".", 3)[-3] for site in found} == {"ff"}
    kept = sum(int(keep.sum()) for keep in found.values())
    assert kept / sum(keep.numel() for keep in found.values()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ("sides", "unknown scope or site 'sides'; a scope is mid, up"),
        ("up", "these gates have no site in 'up', only in mid_block; leave 'sites' empty"),
    ],
)
def test_sites_that_cannot_be_meant_are_refused(comfy, gates_of, sites, message):
    with pytest.raises(ValueError, match=message):
        comfy.apply_node.chosen_keep_sets(gates_of("mid"), None, sites)


def test_a_feed_forward_changed_by_another_extension_runs_unpruned_and_says_so(
    comfy, small_model, make_gates, sample, caplog
):
    model, gates = small_model(), make_gates([FF])
    plain = sample(model, 2)
    proj = model.model.diffusion_model.get_submodule(comfy.model.layer_path(FF))
    proj.forward = lambda x, forward=proj.forward: forward(x)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    assert torch.equal(sample(comfy.patch.attach(model, layer), 2), plain)
    assert f"{FF.removesuffix('.net.0')} runs unpruned" in caplog.text


def test_a_linear_layer_with_an_own_computation_runs_unpruned_and_says_so(
    comfy, small_model, make_gates, sample, caplog
):
    model, gates = small_model(), make_gates([FF])
    proj = model.model.diffusion_model.get_submodule(comfy.model.layer_path(FF))

    class Quantized(type(proj)):
        def forward(self, x):
            return (x[..., None, :] * self.weight).sum(-1) + self.bias

    proj.__class__ = Quantized
    plain = sample(model, 2)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    assert torch.equal(sample(comfy.patch.attach(model, layer), 2), plain)
    assert "not computed as a linear layer" in caplog.text


def test_gates_for_everything_keep_the_model_as_it_was(comfy, model, gates_of, sample):
    gates = gates_of("all+ff+heads")
    plain = sample(model, 2)
    attributes = {name: set(vars(m)) for name, m in model.model.named_modules()}
    pruned = sample(comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets())), 2)
    assert not torch.equal(plain, pruned)
    assert {name: set(vars(m)) for name, m in model.model.named_modules()} == attributes
    assert torch.equal(sample(model, 2), plain)


@pytest.mark.parametrize("ranking", ["per layer", "global"])
def test_gates_are_estimated_for_every_scope(comfy, model, sample, ranking):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPEstimateGates"]
    gates = node.execute(model, "l1", 0.5, ranking, "zero", "all+ff+heads").args[0]
    assert len(gates.scores) == 92 and gates.sparsity == pytest.approx(0.5, abs=0.01)
    floor = comfy.core.DEFAULT_FLOOR
    assert all(keep.float().mean() >= floor for keep in gates.keep_sets().values())
    apply = comfy.apply_node.LDCPApplyDynamicPruning
    pruned = sample(apply.execute(model, gates, -1.0).args[0], 2)
    zeros = comfy.core.Gates(gates.scores, {}, "zero", gates.topology)
    worse = sample(apply.execute(model, zeros, -1.0).args[0], 2)
    dense = sample(model, 2)
    assert 0 < rms(pruned - dense) < rms(worse - dense)


@pytest.fixture(scope="module", params=quantised.FORMATS)
def compressed(comfy, request):
    """A model of a checkpoint with quantised linear layers, and their format."""
    model = quantised.quantised_model(comfy.root, request.param)
    if model is None:
        pytest.skip("this ComfyUI does not know the format")
    return model, request.param


@pytest.mark.parametrize("scope", ["all+ff", "all+ff+heads"])
def test_quantised_layers_run_unpruned_and_the_res_blocks_beside_them_pruned(
    comfy, compressed, gates_of, sample, scope
):
    (model, kind), gates = compressed, gates_of(scope)
    apply = comfy.apply_node.LDCPApplyDynamicPruning
    pruned = apply.execute(model, gates, -1.0).args[0]
    latent = sample(pruned, 2)
    assert torch.equal(latent, sample(apply.execute(model, gates, -1.0, sites="all").args[0], 2))
    assert not torch.equal(latent, sample(model, 2))
    record = comfy.patch.attached(pruned).record
    assert record.pruned_evaluations == record.evaluations == 2
    (note,) = record.notes
    left = {block for block in comfy.core.blocks_of(gates.scores) if ".attentions." in block}
    assert note.endswith(
        f" and {len(left) - 3} more run unpruned, because of quantised weights ({kind})"
    )


def test_the_res_blocks_of_a_quantised_checkpoint_are_pruned_as_any(
    comfy, compressed, gates_of, sample, unpatched, masked
):
    """Rows alone: int8 layers round the last bits of what they read to another step."""
    (model, _), gates = compressed, gates_of("*.conv2", constants=2)
    pruned = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    evaluated = []
    sample(pruned, 1, evaluated=evaluated)
    ((*call, output, _),) = evaluated
    with masked(model, gates):
        reference = unpatched(model, *call)
    assert rms(output - reference) <= FLOAT32 * rms(reference)
    assert rms(unpatched(model, *call) - reference) >= 100 * FLOAT32 * rms(reference)


def test_linear_layers_that_a_quantised_checkpoint_leaves_as_they_are_are_pruned(
    comfy, check_exact, make_gates
):
    if not quantised.newer_host():
        pytest.skip("this ComfyUI quantises all linear layers of a model, or none")
    sites = [FF, FF.replace("ff.net.0", "attn1.to_v")]
    paths = [comfy.model.layer_path(site) for site in sites]
    plain = [paths[0], paths[0].replace("0.proj", "2")]
    plain += [paths[1].replace("to_v", layer) for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    model = quantised.quantised_model(comfy.root, "float8_e4m3fn", plain)
    check_exact(model, make_gates(sites, constants=5))


@pytest.mark.parametrize("scope", ["all+ff", "heads"])
@pytest.mark.parametrize("node", ["LDCPEstimateGates", "LDCPCalibrateGates"])
def test_gates_of_quantised_layers_are_refused_before_anything_is_loaded(
    comfy, compressed, sampling, monkeypatch, node, scope
):
    (model, kind), made = compressed, comfy.nodes.NODE_CLASS_MAPPINGS[node]
    settings = sampling() if node == "LDCPCalibrateGates" else {}
    load = comfy.root.model_management
    monkeypatch.setattr(load, "load_models_gpu", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(comfy.model.ModelError) as error:
        made.execute(model, **settings, **by_magnitude(scope))
    assert f"have quantised weights ({kind}), and gates are made of others" in str(error.value)
    assert "choose a scope without ff and heads" in str(error.value)


def test_calibrating_gates_of_quantised_layers_is_refused(comfy, compressed, gates_of, sampling):
    calibrate = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    with pytest.raises(comfy.model.ModelError, match="or gates without these"):
        calibrate.execute(
            compressed[0], **sampling(), **by_magnitude("mid"), gates=gates_of("mid+ff")
        )


def test_gates_of_the_res_blocks_of_a_quantised_checkpoint_are_those_of_the_original(
    comfy, compressed, model, sampling
):
    choice = by_magnitude("all")
    estimate = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPEstimateGates"]
    ours, original = (estimate.execute(m, **choice).args[0] for m in (compressed[0], model))
    assert ours.info["fingerprint"] == original.info["fingerprint"]
    for site, score in original.scores.items():
        assert torch.equal(ours.scores[site], score)
        assert torch.equal(ours.constant(site), original.constant(site))
    calibrate = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    gates = calibrate.execute(compressed[0], **sampling(), **choice).args[0]
    assert all(torch.equal(gates.scores[site], score) for site, score in original.scores.items())


def test_a_layer_counts_as_quantised_where_it_multiplies_in_fp8(comfy):
    ops, quantised_format = comfy.root.ops, comfy.weights.quantised
    fast, cast, fp8 = ops.fp8_ops.Linear, ops.manual_cast.Linear, torch.float8_e4m3fn
    assert quantised_format(fast(16, 16, dtype=fp8)) == "float8_e4m3fn"
    assert not quantised_format(fast(16, 16, dtype=torch.float8_e5m2))
    assert not quantised_format(fast(16, 16)) and not quantised_format(cast(16, 16, dtype=fp8))


def test_whether_quantised_weights_are_those_of_the_training_is_not_known(
    comfy, compressed, model, gates_of
):
    gates = gates_of("all+ff")
    info = {"fingerprint": comfy.identity.own_fingerprint(model, gates)}
    gates = gates_of("all+ff", info=info)
    assert not comfy.identity.differs_from_training(compressed[0], gates)


def by_magnitude(scope):
    return {
        "criterion": "l1",
        "sparsity": 0.5,
        "ranking": "per layer",
        "padding": "zero",
        "scope": scope,
    }
