"""Gates calibrated while ComfyUI samples, in a real ComfyUI.

The reference watches the same run by hooks of its own and keeps every activation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy_server
import pytest
import torch

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
SITES = [f"mid_block.resnets.{r}.{c}" for r in (0, 1) for c in ("conv1", "conv2")]
PATHS = ["0.in_layers.2", "0.out_layers.3", "2.in_layers.2", "2.out_layers.3"]


@pytest.fixture
def run(comfy, sampling):
    """Execute the node: (gates, latent, calibration)."""

    def calibrate(model, gates=None, calibration=None, settings=None, **choice):
        chosen = {
            "criterion": "flap",
            "sparsity": 0.5,
            "ranking": "per layer",
            "padding": "zero",
            "scope": "mid",
            **choice,
        }
        node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
        settings = settings or sampling()
        return node.execute(model, gates=gates, calibration=calibration, **settings, **chosen).args

    return calibrate


@pytest.fixture
def ksampler(comfy):
    def run(model, settings):
        return comfy.nodes.KSampler().sample(model, **settings)[0]["samples"]

    return run


@pytest.fixture
def apply(comfy):
    def run(model, gates):
        return comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"].execute(
            model, gates, -1.0
        )

    return lambda model, gates: run(model, gates).args[0]


@pytest.fixture
def activations(ksampler):
    """Path -> (all inputs, all outputs) [C, values] of the gated convolutions in one run."""

    def run(model, settings):
        kept = {path: ([], []) for path in PATHS}

        def keep(path):
            def hook(conv, inputs, output):
                for store, x in zip(kept[path], (inputs[0], output), strict=True):
                    store.append(x.double().movedim(1, 0).flatten(1))

            return hook

        handles = [middle(model, path).register_forward_hook(keep(path)) for path in PATHS]
        ksampler(model, settings)
        for handle in handles:
            handle.remove()
        return {path: tuple(torch.cat(part, 1) for part in parts) for path, parts in kept.items()}

    return run


@pytest.fixture
def shown(monkeypatch):
    """What nodes show while they run in a server."""
    lines = []
    server = SimpleNamespace(client_id="browser", send_progress_text=lambda *m: lines.append(m))
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", fake)
    return lines


def middle(model, path):
    return model.model.diffusion_model.middle_block.get_submodule(path)


def same(one, two):
    return list(one) == list(two) and all(torch.equal(one[s], two[s]) for s in one)


def close(one, two, tolerance=1e-5):
    return all(torch.allclose(one[s], two[s], rtol=tolerance, atol=tolerance) for s in one)


def state(model):
    """Everything that hangs on the modules of the U-Net beside their weights."""
    return {
        name: (
            {k: id(v) for k, v in vars(module).items()},
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for name, module in model.model.diffusion_model.named_modules()
    }


def variances(found):
    """Site -> (variance of what is watched for the importance, norm of the readers' columns)."""
    return {
        SITES[0]: found[PATHS[1]][0].var(1, correction=0),
        SITES[1]: found[PATHS[1]][1].var(1, correction=0),
        SITES[2]: found[PATHS[3]][0].var(1, correction=0),
        SITES[3]: found[PATHS[3]][1].var(1, correction=0),
    }


def test_constants_are_the_means_of_all_that_was_sampled(model, run, activations, sampling):
    found = activations(model, sampling())
    gates, _, seen = run(model)
    assert list(gates.scores) == SITES and list(gates.constants) == SITES
    for site, path in zip(SITES, PATHS, strict=True):
        # 2 steps, both conditions, 2x2 maps
        assert found[path][1].shape == (128, 16) and seen.outputs[site].count == 16
        mean = found[path][1].mean(1)
        assert (gates.constant(site) - mean).abs().max() < 1e-5 < 0.01 * mean.std()


def test_the_channels_that_stray_least_from_their_mean_are_pruned(
    model, run, activations, sampling
):
    found = activations(model, sampling())
    gates, _, seen = run(model, sparsity=0.25)
    for site, variance in variances(found).items():
        importance = variance
        if site.endswith("conv1"):
            reader = middle(model, PATHS[SITES.index(site) + 1])
            importance = variance * reader.weight.double().square().sum((0, 2, 3))
        assert torch.allclose(seen.importances()[site].double(), importance, rtol=1e-4)
        # a quarter of 128 channels: the 32 that stray least, and scores rise with the importance
        assert set(importance.argsort()[:32].tolist()) == set(
            (gates.scores[site] <= 0.5).nonzero()[:, 0].tolist()
        )
        assert gates.scores[site][importance.argsort()].diff().min() >= 0


def test_hidden_channels_of_a_feed_forward_are_watched_where_they_are_read(
    model, run, ksampler, sampling
):
    site = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
    path = "1.transformer_blocks.0.ff.net.2"
    read = []
    handle = middle(model, path).register_forward_hook(
        lambda linear, inputs, output: read.append(inputs[0].double().flatten(0, 1))
    )
    ksampler(model, sampling())
    handle.remove()
    values, weight = torch.cat(read), middle(model, path).weight.double()
    gates, _, seen = run(model, scope="mid+ff")
    assert set(SITES) < set(gates.scores) and site in gates.scores
    assert (gates.constant(site) - values.mean(0)).abs().max() < 1e-5
    importance = values.var(0, correction=0) * weight.square().sum(0)
    assert torch.allclose(seen.importances()[site].double(), importance, rtol=1e-4)
    assert gates.scores[site][importance.argsort()].diff().min() >= 0
    assert not any(module._forward_hooks for module in model.model.diffusion_model.modules())


def test_the_latent_is_what_ksampler_gives(model, run, ksampler, sampling):
    settings = sampling(batch=2, sampler_name="dpmpp_2m", denoise=0.6)
    plain = ksampler(model, settings)
    _, latent, _ = run(model, settings=settings)
    assert torch.equal(latent["samples"], plain)
    # a mask and a batch index go the same way
    settings["latent_image"] = {
        "samples": torch.ones(2, 4, 16, 16),
        "noise_mask": torch.ones(1, 1, 128, 128).tril(),
        "batch_index": [4, 7],
    }
    plain = ksampler(model, settings)
    _, latent, _ = run(model, settings=settings)
    assert torch.equal(latent["samples"], plain)
    assert latent["batch_index"] == [4, 7]


def test_both_conditions_in_one_batch_or_one_after_the_other_see_the_same(
    model, run, sampling, monkeypatch
):
    together, _, seen = run(model, settings=sampling(batch=2))
    assert seen.evaluations == 2
    monkeypatch.setattr(model.model, "memory_required", lambda *_, **__: 1e30)
    apart, _, separate = run(model, settings=sampling(batch=2))
    assert separate.evaluations == 4
    assert [m.count for m in seen.outputs.values()] == [m.count for m in separate.outputs.values()]
    assert close(together.constants, apart.constants)
    assert close(seen.importances(), separate.importances(), 1e-4)


def test_without_guidance_the_negative_prompt_is_not_watched(model, run, sampling):
    _, _, seen = run(model, settings=sampling(cfg=1.0))
    assert seen.evaluations == 2 and seen.outputs[SITES[0]].count == 8


@pytest.mark.parametrize("loading", ["full", "low_vram", "half", "cast"])
def test_a_lora_counts_however_the_model_is_loaded(
    small_model, run, sampling, ksampler, monkeypatch, loading
):
    options = {
        "half": {"dtype": torch.bfloat16},
        "cast": {"dtype": torch.bfloat16, "manual_cast": torch.float32},
    }.get(loading, {})
    if loading == "low_vram":
        patcher = type(small_model())
        load = patcher.load
        monkeypatch.setattr(
            patcher,
            "load",
            lambda self, device=None, *_, **__: load(self, device, lowvram_model_memory=1),
        )
    base, merged = small_model(**options), small_model(**options)
    before = ksampler(base, sampling())
    patched, weights = with_lora(base)
    merged.model.load_state_dict(weights, strict=False)
    expected, _, by_hand = run(merged)
    found, _, seen = run(patched)
    if loading == "low_vram":
        assert middle(base, PATHS[0]).weight_function
    # in bfloat16 the LoRA is rounded into the weights by another way
    tolerance = 2e-2 if options else 1e-5
    assert close(found.constants, expected.constants, tolerance)
    assert close(seen.importances(), by_hand.importances(), 5 * tolerance)
    without, _, _ = run(base)
    assert not close(found.constants, without.constants, 5 * tolerance)
    # LoRA and hooks are gone from the base
    assert torch.equal(ksampler(base, sampling()), before)


def with_lora(model):
    """A clone with a LoRA on the gated convolutions; its weights merged by hand."""
    generator = torch.Generator().manual_seed(4)
    patches, weights = {}, model.model.state_dict()
    for path in PATHS:
        key = f"diffusion_model.middle_block.{path}.weight"
        patches[key] = ("diff", (torch.randn(weights[key].shape, generator=generator) * 0.2,))
    patched = model.clone()
    assert set(patched.add_patches(patches, 0.5)) == set(patches)
    return patched, {
        key: (weights[key].float() + 0.5 * diff).to(weights[key])
        for key, (_, (diff,)) in patches.items()
    }


def test_a_lora_hooked_to_one_prompt_counts_in_its_evaluations_alone(
    comfy, model, run, sampling, conditioning
):
    hooks = comfy.root.hooks.create_hook_lora(None, 1.0, 0.0)
    (hook,) = hooks.hooks
    hook.need_weight_init = False
    key = "diffusion_model.middle_block.0.out_layers.3.weight"
    hook.weights = {key: ("diff", (torch.full((128, 128, 3, 3), 0.05),))}
    hooked = [[conditioning(5)[0][0], {"hooks": hooks}]]
    weight = middle(model, PATHS[1]).weight.detach().clone()
    _, _, seen = run(model, settings=sampling(positive=hooked))
    norms = [w.double().square().sum((0, 2, 3)) for w in (weight, weight + 0.05)]
    assert seen.evaluations == 4  # two steps, each prompt with its own weights
    assert torch.allclose(seen.columns[SITES[0]].mean, sum(norms) / 2, rtol=1e-5)
    assert not torch.allclose(norms[0], norms[1], rtol=1e-2)
    assert torch.equal(middle(model, PATHS[1]).weight, weight)


def test_nothing_is_left_on_the_model(comfy, small_model, run, sampling, ksampler, make_gates):
    model = small_model()
    plain, before = ksampler(model, sampling()), state(model)
    wrappers = {kind: dict(found) for kind, found in model.wrappers.items()}
    run(model)
    assert state(model) == before
    assert {kind: dict(found) for kind, found in model.wrappers.items()} == wrappers
    assert not model.callbacks or not any(
        "ldcp" in str(key) for found in model.callbacks.values() for key in found
    )
    blocks = comfy.model.find_blocks(model.model, make_gates())
    assert not any(block.judge().bypassed for block in blocks.values())
    assert torch.equal(ksampler(model, sampling()), plain)


@pytest.mark.parametrize("moment", ["between evaluations", "inside one"])
def test_an_interrupt_leaves_nothing_on_the_model(
    small_model, run, sampling, ksampler, apply, make_gates, monkeypatch, moment
):
    import comfy.model_management as management

    model = small_model()
    plain, before = ksampler(model, sampling()), state(model)
    interrupted = management.InterruptProcessingException
    if moment == "inside one":

        def interrupt(*_):
            raise interrupted

        handle = middle(model, PATHS[2]).register_forward_hook(interrupt)
    else:
        steps = []

        def stop(*_):
            steps.append(1)
            if len(steps) == 2:
                raise interrupted

        monkeypatch.setattr("latent_preview.prepare_callback", lambda *_: stop)
    with pytest.raises(interrupted):
        run(model)
    if moment == "inside one":
        handle.remove()
    monkeypatch.undo()
    assert state(model) == before
    assert torch.equal(ksampler(model, sampling()), plain)
    gates = make_gates()
    assert not torch.equal(ksampler(apply(model, gates), sampling()), plain)  # still prunes


def test_pruning_before_it_is_left_out(model, run, apply, make_gates, sampling, ksampler):
    expected, latent, _ = run(model)
    pruned = apply(model, make_gates())
    found, sampled, _ = run(pruned)
    assert same(found.scores, expected.scores) and same(found.constants, expected.constants)
    assert torch.equal(sampled["samples"], latent["samples"])
    # and the pruned model still prunes
    assert not torch.equal(ksampler(pruned, sampling()), latent["samples"])


def test_what_was_calibrated_is_pruned_and_comes_closer_to_dense_than_zeros(
    comfy, small_model, run, apply, sampling, sample, unpatched, masked
):
    for seed in range(2):
        model = small_model(seed)
        gates, _, _ = run(model)
        zeros = comfy.core.Gates(gates.scores, {}, gates.padding, gates.topology)
        deviation = {}
        for name, chosen in (("means", gates), ("zeros", zeros)):
            found, evaluated = [], []
            handle = middle(model, "2").register_forward_hook(lambda *c, f=found: f.append(c[2]))
            sample(apply(model, chosen), 2, evaluated=evaluated)
            pruned = list(found)
            for *call, _, _ in evaluated:
                unpatched(model, *call)
            dense = found[len(pruned) :]
            with masked(model, chosen):
                for *call, _, _ in evaluated:
                    unpatched(model, *call)
            handle.remove()
            reference = found[len(pruned) + len(dense) :]
            differences = zip(pruned, reference, dense, strict=True)
            for y, by_mask, whole in differences:
                assert rms(y - by_mask) <= 2e-6 and rms(y - whole) >= 100 * 2e-6
                deviation.setdefault(name, []).append(rms(y - whole))
        pairs = zip(deviation["means"], deviation["zeros"], strict=True)
        assert all(means < zeros for means, zeros in pairs)


def rms(x):
    return float(x.float().square().mean().sqrt())


def test_given_gates_keep_their_channels_and_get_new_constants(
    model, run, make_gates, activations, sampling
):
    given = make_gates(SITES[2:], padding="extend", info={"criterion": "learned", "lambda": 0.01})
    kept = dict(given.constants)
    gates, _, _ = run(model, gates=given, sparsity=0.9, padding="zero", criterion="l1")
    found = activations(model, sampling())
    assert same(gates.scores, given.scores) and gates.padding == "extend"
    assert gates.topology == given.topology
    assert dict(gates.info) == {
        "criterion": "learned",
        "lambda": 0.01,
        "calibrated": "activations",
        "calibration_evaluations": 2,
    }
    for site, path in zip(SITES[2:], PATHS[2:], strict=True):
        assert (gates.constant(site) - found[path][1].mean(1)).abs().max() < 1e-5
        assert torch.equal(given.constant(site), kept[site])  # the given ones are untouched


def test_a_second_prompt_adds_to_what_the_first_has_shown(model, run, activations, sampling):
    one, two = sampling(), sampling(seed=8, steps=3)
    first, _, calibration = run(model, settings=one)
    evaluations = calibration.evaluations
    both, _, seen = run(model, settings=two, calibration=calibration)
    assert (evaluations, seen.evaluations) == (2, 5)
    assert calibration.evaluations == 2  # the host caches it: it must not change
    found = [activations(model, settings) for settings in (one, two)]
    for site, path in zip(SITES, PATHS, strict=True):
        mean = torch.cat([f[path][1] for f in found], 1).mean(1)
        assert (both.constant(site) - mean).abs().max() < 1e-5
    assert not close(both.constants, first.constants)
    assert both.info["calibration_evaluations"] == 5


def test_a_calibration_of_other_layers_is_refused(model, run, make_gates):
    _, _, narrow = run(model, gates=make_gates(SITES[:1]))
    with pytest.raises(ValueError, match=r"of 1 site \(128 channels\) and of 4 sites"):
        run(model, calibration=narrow)


@pytest.mark.parametrize("criterion", ["l1", "l2"])
def test_by_magnitude_the_channels_are_those_of_estimate_and_the_constants_measured(
    comfy, model, run, criterion
):
    estimate = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPEstimateGates"]
    (estimated,) = estimate.execute(model, criterion, 0.5, "global", "extend", "mid").args
    gates, _, _ = run(model, criterion=criterion, ranking="global", padding="extend")
    by_flap, _, _ = run(model)
    assert same(gates.scores, estimated.scores) and gates.padding == "extend"
    assert same(gates.constants, by_flap.constants)
    assert gates.info["criterion"] == criterion and gates.info["calibrated"] == "activations"


def test_the_gates_say_how_they_came_about(comfy, model, run):
    gates, _, _ = run(model, sparsity=0.3, ranking="global", padding="extend")
    assert gates.padding == "extend"
    assert dict(gates.info) == {
        "criterion": "flap",
        "ranking": "global",
        "scope": "mid",
        "target_sparsity": 0.3,
        "achieved_sparsity": gates.sparsity,
        "calibrated": "activations",
        "calibration_evaluations": 2,
        "fingerprint": comfy.core.fingerprint(comfy.identity.base_weights(model, gates)),
    }
    assert abs(gates.sparsity - 0.3) < 0.02


def test_the_node_shows_what_came_out(comfy, model, run, sampling, make_gates, shown, monkeypatch):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))
    run(model, sparsity=0.3)
    # 90 of 128 aligned to 88 at each site
    text = (
        "4 sites, 31.2% pruned (30.0% requested)  \nflap, per layer, rule 'zero'  \n"
        "2 evaluations watched"
    )
    assert shown == [(text, "7", "browser")]
    shown.clear()
    gates = make_gates(SITES[:1])
    run(model, gates=gates)
    text = (
        f"1 site, {gates.sparsity:.1%} pruned  \nscores as given, rule 'zero'  \n"
        "2 evaluations watched  \ncorrections of the given gates left out"
    )
    assert shown == [(text, "7", "browser")]
    shown.clear()
    run(model, settings=sampling(steps=1))
    ((text, *_),) = shown
    assert text.endswith("\n1 evaluation watched")


def test_a_layer_that_is_never_evaluated_is_named(small_model, run, sampling):
    model = small_model()
    block = model.model.diffusion_model.middle_block[2]
    block.forward = lambda x, emb: x
    with pytest.raises(ValueError, match=r"mid_block.resnets.1.conv1 was not evaluated once"):
        run(model)
    with pytest.raises(ValueError, match="sample at least one step"):
        run(small_model(), settings=sampling(denoise=0.0))


def test_what_is_no_number_is_refused(small_model, run, sampling):
    model = small_model()
    middle(model, PATHS[1]).weight.data[3, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"mid_block.resnets.0.conv2 gave values that are not"):
        run(model, settings=sampling(steps=1))  # the second step starts from NaN


def test_a_model_of_another_family_or_width_is_refused_before_sampling(
    comfy, model, run, make_gates, monkeypatch
):
    monkeypatch.setattr("nodes.common_ksampler", lambda *_, **__: pytest.fail("sampled"))
    wide = make_gates(topology=comfy.core.SD15)
    with pytest.raises(comfy.model.ModelError, match="the gates have 1280 channels"):
        run(model, gates=wide)
    with pytest.raises(ValueError, match="sparsity 1.5 is outside"):
        run(model, sparsity=1.5)
    fake = type("Flux", (), {})()
    fake.unet_config = {"image_model": "flux"}
    monkeypatch.setattr(model.model, "model_config", fake)
    with pytest.raises(comfy.model.ModelError, match=r"this model is Flux \(not a conv"):
        run(model)


def test_a_compiled_model_is_watched_as_it_is_before_compiling(comfy, model, run):
    from comfy.patcher_extension import WrappersMP

    plain, _, _ = run(model)
    compiled = model.clone()

    def compiled_wrapper(executor, *args, **kwargs):
        pytest.fail("ran compiled")

    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", compiled_wrapper)
    gates, _, _ = run(compiled)
    assert same(gates.constants, plain.constants)
    assert compiled.get_wrappers(WrappersMP.APPLY_MODEL, "torch.compile") == [compiled_wrapper]


def test_in_the_server_calibrated_gates_are_made_saved_and_applied(comfyui_path, tmp_path):
    base = tmp_path / "base"
    comfy_server.prepare_folder(base, REPOSITORY, tmp_path / "none.safetensors")
    custom = base / "custom_nodes" / "small_model_node.py"
    custom.symlink_to(Path(__file__).with_name("small_model_node.py"))
    sampler = {
        "seed": 1,
        "steps": 2,
        "cfg": 2.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": ["model", 1],
        "negative": ["model", 1],
        "latent_image": ["latent", 0],
        "denoise": 1.0,
    }
    choice = {"criterion": "flap", "sparsity": 0.5, "ranking": "per layer", "padding": "zero"}
    calibrate = {"model": ["model", 0], "scope": "mid", **sampler, **choice}

    def latent(name, source):
        return ("SaveLatent", {"samples": source, "filename_prefix": name})

    graph = {
        "model": ("LDCPTestSmallModel", {}),
        "latent": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 1}),
        "first": ("LDCPCalibrateGates", calibrate),
        "second": (
            "LDCPCalibrateGates",
            {**calibrate, "seed": 2, "calibration": ["first", 2], "corrections": True},
        ),
        "apply": (
            "LDCPApplyDynamicPruning",
            {"model": ["model", 0], "gates": ["second", 0], "sparsity": -1.0},
        ),
        "pruned": ("KSampler", {"model": ["apply", 0], **sampler}),
        "dense": ("KSampler", {"model": ["model", 0], **sampler}),
        "save": ("LDCPSaveGates", {"gates": ["second", 0], "filename_prefix": "calibrated"}),
        "l1": latent("watched", ["first", 1]),
        "l2": latent("dense", ["dense", 0]),
        "l3": latent("pruned", ["pruned", 0]),
    }
    with comfy_server.Server(comfyui_path, base) as server:
        prompt = {k: {"class_type": c, "inputs": i} for k, (c, i) in graph.items()}
        result = server.run(prompt)
        prompt["first"]["inputs"]["sparsity"] = 1.5
        with pytest.raises(comfy_server.Refused, match="bigger than max"):
            server.run(prompt)
        languages = json.loads(server.get("/i18n"))
        assert server.get("/extensions/LDCP/docs/LDCPCalibrateGates.md")
    assert result.status["first"].endswith("\n2 evaluations watched")
    assert result.status["second"] == (
        "4 sites, 50.0% pruned (50.0% requested)\nflap, per layer, rule 'zero'\n"
        "4 evaluations watched\n2 of 2 layers corrected"
    )
    assert result.status["save"] == "saved as calibrated_00001.safetensors"
    import safetensors.torch

    latents = {
        name: safetensors.torch.load(result.files[name])["latent_tensor"]
        for name in ("watched", "dense", "pruned")
    }
    # the dense run comes after two calibrations of the same model, in whatever order
    assert torch.equal(latents["watched"], latents["dense"])
    assert not torch.equal(latents["pruned"], latents["dense"])
    for language in ("en", "zh"):
        assert languages[language]["nodeDefs"]["LDCPCalibrateGates"]["description"]
