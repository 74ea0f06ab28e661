"""Corrections that Calibrate Gates makes, in a real ComfyUI.

The reference computes what a reader would be fed and would lack from activations that hooks of its
own keep, without the code under test.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import demo_model
import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.comfyui
INNER = "mid_block.resnets.1.conv1"
HIDDEN = "mid_block.attentions.0.transformer_blocks.0.ff.net.0"
HEADS = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
#: below the middle block: the readers of these sites
READERS = {
    INNER: "2.out_layers.3",
    HIDDEN: "1.transformer_blocks.0.ff.net.2",
    HEADS: "1.transformer_blocks.0.attn2.to_out.0",
}
HIDDEN_ROWS = "1.transformer_blocks.0.ff.net.0.proj"
RESIDUAL = "mid_block.resnets.1.conv2"


@pytest.fixture
def correct(comfy):
    """The module that makes corrections."""
    return importlib.import_module(comfy.files.__name__.replace("files", "correct"))


@pytest.fixture(scope="module")
def redundant(small_model):
    """A model in whose middle every odd channel, and every odd head, does what the even one does.

    What its reader lacks can be told from the kept ones, by few evaluations.
    """

    def make(**options):
        model = small_model(**options)
        for path in ("2.in_layers.2", "2.emb_layers.1", "2.out_layers.0", HIDDEN_ROWS):
            for values in middle(model, path).parameters():
                values.data[1::2] = values.data[::2]
        for layer in ("to_q", "to_k", "to_v"):
            weight = middle(model, f"1.transformer_blocks.0.attn2.{layer}").weight.data
            heads = weight.view(8, 16, -1)
            heads[1::2] = heads[::2]
        for path in READERS.values():
            middle(model, path).weight.data.mul_(5)
        return model

    return make


@pytest.fixture(scope="module")
def model(redundant):
    """One for every test that leaves it as it was."""
    return redundant()


@pytest.fixture
def given(comfy, model):
    """Gates that prune the copies, and a quarter of what the corrected convolution adds."""

    def make(padding="zero", sites=(INNER, RESIDUAL, HIDDEN, HEADS)):
        topology = comfy.model.model_topology(model.model)
        known = {site.name: site for site in topology.all_sites()}
        scores = {
            name: (torch.arange(known[name].channels) // known[name].group % 2 == 0).float()
            for name in sites
        }
        if RESIDUAL in scores:
            scores[RESIDUAL] = (torch.arange(128) % 4 > 0).float()
        return comfy.core.Gates(scores, {}, padding, topology)

    return make


@pytest.fixture
def node(comfy, sampling):
    """Execute Calibrate Gates with corrections: what it returns."""

    def run(model, gates, corrections=True, calibration=None, settings=None, **choice):
        chosen = {"criterion": "flap", "sparsity": 0.5, "ranking": "per layer", "padding": "zero"}
        chosen |= {"scope": "mid", **choice}
        settings = settings or sampling()
        more = {"gates": gates, "calibration": calibration, "corrections": corrections}
        made = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
        return made.execute(model, **settings, **chosen, **more).args

    return run


@pytest.fixture
def made(node, given):
    """The gates alone; those that prune the copies, unless others are given."""

    def run(model, gates="copies", **options):
        return node(model, given() if gates == "copies" else gates, **options)[0]

    return run


@pytest.fixture
def apply(comfy):
    made = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"]
    return lambda *given: made.execute(*given[:2], -1.0, *given[2:]).args[0]


@pytest.fixture
def ksampler(comfy):
    return lambda model, settings: comfy.nodes.KSampler().sample(model, **settings)[0]["samples"]


@pytest.fixture
def shown(comfy, monkeypatch):
    """What the node shows while it runs in a server."""
    lines = []
    server = SimpleNamespace(client_id="browser", send_progress_text=lambda *m: lines.append(m[0]))
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", fake)
    made = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    monkeypatch.setattr(made, "hidden", SimpleNamespace(unique_id="7"))
    return lines


def middle(model, path):
    return model.model.diffusion_model.middle_block.get_submodule(path)


def state(model):
    """Everything that hangs on the modules of the U-Net, and its weights."""
    unet = model.model.diffusion_model
    hung = {
        name: (
            {k: id(v) for k, v in vars(module).items()},
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
        )
        for name, module in unet.named_modules()
    }
    return hung, {name: (id(p), p.double().sum().item()) for name, p in unet.named_parameters()}


def updates(gates):
    """Site -> what its correction adds to the weights, and to the bias."""
    return {s: (c.left.float() @ c.right.float(), c.bias) for s, c in gates.corrections.items()}


def close(one, two, tolerance):
    """Whether two gates' corrections say the same, each measured against its own size."""
    found, expected = updates(one), updates(two)
    return set(found) == set(expected) and all(
        (a - b).norm() <= tolerance * b.norm()
        for site in expected
        for a, b in zip(found[site], expected[site], strict=True)
    )


def fed_and_missing(model, gates, site, output):
    """What the reader of a site would be fed if it were pruned, and what its output would lack.

    ``output`` gets the dense model's inputs and outputs by path in the middle block.
    """
    keep, constant = gates.keep_sets()[site], gates.constant(site)
    (x,), y = output[READERS[site]]
    if site != INNER:
        fed = torch.where(keep, x, constant)
        return fed, y - F.linear(
            fed, *(p for _, p in middle(model, READERS[site]).named_parameters())
        )
    h, (before,) = output["2.in_layers.2"][1], output["2.out_layers.0"][0]
    pruned = torch.where(keep[:, None, None], h, constant[:, None, None]) + before - h
    norm, reader = middle(model, "2.out_layers.0"), middle(model, READERS[site])
    fed = F.silu(F.group_norm(pruned, norm.num_groups, norm.weight, norm.bias, norm.eps))
    missing = y - F.conv2d(fed, reader.weight, reader.bias, padding=1)
    residual = gates.keep_sets()[INNER.replace("conv1", "conv2")]
    return fed, missing * residual[:, None, None]


def test_they_are_the_least_squares_of_what_the_readers_lack(
    comfy, model, made, ksampler, sampling
):
    settings = sampling(steps=5)
    gates = made(model, settings=settings)
    keep_sets = gates.keep_sets()
    expected = {site: comfy.core.Regression(keep_sets[site]) for site in READERS}
    paths = [*READERS.values(), "2.in_layers.2", "2.out_layers.0"]
    for held_out in (False, True):
        run = {**settings, **({"seed": settings["seed"] + 1, "steps": 4} if held_out else {})}
        kept = {path: [] for path in paths}
        handles = [
            middle(model, path).register_forward_hook(
                lambda m, i, o, k=kept[path]: k.append((i, o))
            )
            for path in paths
        ]
        ksampler(model, run)
        for handle in handles:
            handle.remove()
        for evaluation in zip(*kept.values(), strict=True):
            output = dict(zip(kept, evaluation, strict=True))
            for site, regression in expected.items():
                regression.add(*fed_and_missing(model, gates, site, output), held_out)
    found = {site: regression.correction() for site, regression in expected.items()}
    assert close(gates, replace(gates, corrections=found), 0.01)


@pytest.mark.parametrize("padding", ["zero", "extend"])
def test_a_model_pruned_by_them_is_the_masked_reference(
    model, made, given, apply, ksampler, check_exact, sampling, padding
):
    settings = sampling()
    gates = made(model, given(padding))
    assert set(gates.corrections) == set(READERS) and gates.padding == padding
    check_exact(model, gates)
    plain = replace(gates, corrections={})
    images = [ksampler(apply(model, g), settings) for g in (gates, plain)]
    assert not torch.allclose(*images, rtol=1e-3)


@pytest.mark.parametrize("share", [0.3, 0.4])
def test_on_the_demo_model_other_noise_comes_nearer_to_dense(
    comfy, made, apply, ksampler, capsys, share
):
    model = demo_model.load()
    settings = {"steps": 20, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
    settings |= {"seed": 1, "denoise": 1.0, "latent_image": {"samples": torch.zeros(1, 4, 32, 32)}}
    prompt = "a young woman with long blond hair, smiling, red background"
    settings["positive"] = demo_model.conditioning(prompt)
    settings["negative"] = demo_model.conditioning("")
    choice = {"sparsity": share, "ranking": "global", "scope": "all+ff"}
    gates = made(model, None, settings=settings, **choice)
    other = {**settings, "seed": 20, "latent_image": {"samples": torch.zeros(4, 4, 32, 32)}}
    dense = ksampler(model, other)
    far = {}
    for steps in ("0-", "8"):
        schedule = comfy.core.Schedule.steps(steps)
        far[steps] = [
            rms(ksampler(apply(model, chosen, schedule), other) - dense)
            for chosen in (gates, replace(gates, corrections={}))
        ]
    with capsys.disabled():
        print(f"\n{share:.0%}, far from dense, corrected and not: {far}")
    # where every step prunes, another picture comes out, and how far it lies says little
    assert far["8"][0] < 0.95 * far["8"][1]


def rms(x):
    return float(x.float().square().mean().sqrt())


def test_a_lora_before_the_node_counts_in_them(redundant, made):
    base, merged = redundant(), redundant()
    patched, weights = with_lora(base)
    merged.model.load_state_dict(weights, strict=False)
    found, expected, without = (made(model) for model in (patched, merged, base))
    assert close(found, expected, 0.01)
    assert not close(found, without, 0.1)


def test_a_lora_after_the_apply_node_is_pruned_with_them(
    comfy, redundant, made, masked, sample, unpatched
):
    """They add to the weights that there are, which the masked reference has merged by hand."""
    base, merged = redundant(), redundant()
    gates = made(base)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    patched, weights = with_lora(comfy.patch.attach(base, layer))
    merged.model.load_state_dict(weights, strict=False)
    evaluated = []
    sample(patched, 1, evaluated=evaluated)
    ((*call, output, _),) = evaluated
    with masked(merged, gates):
        reference = unpatched(merged, *call)
    dense = unpatched(merged, *call)
    assert rms(output - reference) <= 1e-5 * rms(reference)
    assert rms(dense - reference) >= 1e-3 * rms(reference)


def with_lora(model):
    """A clone with a LoRA on all readers; its weights merged by hand."""
    generator = torch.Generator().manual_seed(4)
    patches, weights = {}, model.model.state_dict()
    for path in READERS.values():
        key = f"diffusion_model.middle_block.{path}.weight"
        size = weights[key].std()
        patches[key] = ("diff", (torch.randn(weights[key].shape, generator=generator) * size,))
    patched = model.clone()
    assert set(patched.add_patches(patches, 0.5)) == set(patches)
    return patched, {key: weights[key] + 0.5 * diff for key, (_, (diff,)) in patches.items()}


@pytest.mark.parametrize("precision", ["bfloat16", "cast", "low VRAM"])
def test_they_are_the_same_however_the_model_is_loaded(
    comfy, redundant, made, monkeypatch, precision
):
    half = {} if precision == "low VRAM" else {"dtype": torch.bfloat16}
    cast = {"manual_cast": torch.float32} if precision == "cast" else {}
    model, exact = redundant(**half, **cast), redundant()
    exact.model.load_state_dict({k: v.float() for k, v in model.model.state_dict().items()})
    expected = made(exact)
    if precision == "low VRAM":
        patcher = type(model)
        load = patcher.load
        monkeypatch.setattr(
            patcher,
            "load",
            lambda self, device=None, *_, **__: load(self, device, lowvram_model_memory=1),
        )
    assert close(made(model), expected, 0.2 if precision == "bfloat16" else 0.01)


@pytest.mark.parametrize("moment", ["a layer", "the second run", "the solving"])
def test_an_interrupt_leaves_nothing_on_the_model(
    comfy, redundant, made, ksampler, sampling, monkeypatch, moment
):
    import comfy.model_management as management

    model, settings = redundant(), sampling()
    plain, before = ksampler(model, settings), state(model)
    target, name = {
        "a layer": (comfy.core.Regression, "add"),
        "the second run": (comfy.nodes, "common_ksampler"),
        "the solving": (torch.linalg, "cholesky_ex"),
    }[moment]
    original = getattr(target, name)
    calls = []

    def stop(*given, **options):
        calls.append(1)
        if len(calls) == 2:  # the user presses the button meanwhile
            management.interrupt_current_processing()
        return original(*given, **options)

    monkeypatch.setattr(target, name, stop)
    with pytest.raises(management.InterruptProcessingException):
        made(model)
    monkeypatch.undo()
    assert len(calls) == 2
    assert state(model) == before
    assert torch.equal(ksampler(model, settings), plain)


def test_nothing_is_left_on_the_model(redundant, made, ksampler, sampling):
    model, settings = redundant(), sampling()
    plain, before = ksampler(model, settings), state(model)
    wrappers = {kind: dict(found) for kind, found in model.wrappers.items()}
    made(model)
    assert state(model) == before
    assert {kind: dict(found) for kind, found in model.wrappers.items()} == wrappers
    assert torch.equal(ksampler(model, settings), plain)


def test_the_latent_and_the_channels_are_those_without_them(model, node):
    with_them, without = node(model, None), node(model, None, corrections=False)
    assert torch.equal(with_them[1]["samples"], without[1]["samples"])
    for part in ("scores", "constants"):
        found, expected = (getattr(made[0], part) for made in (with_them, without))
        assert list(found) == list(expected)
        assert all(torch.equal(found[site], expected[site]) for site in expected)
    assert without[0].corrections == {} and "correction_rank" not in without[0].info
    assert with_them[0].info["correction_rank"] == 16


def test_a_prompt_saved_before_they_were_there_makes_none(comfy, model, sampling):
    made = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPCalibrateGates"]
    choice = {"criterion": "flap", "sparsity": 0.5, "ranking": "per layer", "padding": "zero"}
    gates = made.execute(model, **sampling(), **choice, scope="mid").args[0]
    assert gates.corrections == {}


def test_where_memory_is_short_several_runs_find_the_same(
    comfy, correct, model, made, sampling, monkeypatch
):
    once = made(model)
    monkeypatch.setattr(correct, "_room", lambda: 1)
    runs, real = [], comfy.nodes.common_ksampler
    monkeypatch.setattr(
        comfy.nodes, "common_ksampler", lambda *a, **k: runs.append(1) or real(*a, **k)
    )
    again = made(model)
    # one that watches, and for each layer one that gathers and one that checks
    assert len(runs) == 1 + 2 * len(comfy.core.correctable(again))
    assert close(again, once, 1e-6)


def test_what_another_node_has_seen_is_sampled_once_more(
    comfy, model, node, given, sampling, conditioning, monkeypatch
):
    first = sampling(3, seed=7, positive=conditioning(8))
    _, _, seen = node(model, given(), corrections=False, settings=first)
    runs, real = [], comfy.nodes.common_ksampler

    def record(patcher, **given):
        runs.append((given["seed"], given["steps"], given["positive"] is first["positive"]))
        return real(patcher, **given)

    monkeypatch.setattr(comfy.nodes, "common_ksampler", record)
    gates, _, both = node(model, given(), calibration=seen, settings=sampling(25, seed=2**64 - 1))
    own, other = 2**64 - 1, 7
    assert runs == [
        (own, 25, False),
        (other, 3, True),
        (other + 1, 3, True),
        (own, 25, False),
        (0, 5, False),
    ]
    assert gates.corrections and len(both.runs) == 2 and len(seen.runs) == 1


def test_a_single_step_is_enough(model, made, sampling):
    gates = made(model, settings=sampling(steps=1, batch=2))
    assert set(gates.corrections) == set(READERS)


def test_the_node_says_how_many_layers_were_corrected_or_why_none(
    comfy, model, made, given, shown, monkeypatch
):
    def last():
        return shown[-1].split("  \n")[-1]

    gates = made(model)
    assert last() == "3 of 3 layers corrected"
    assert not made(model, gates, corrections=False).corrections
    assert last() == "corrections of the given gates left out"
    made(model, given(sites=[RESIDUAL]))
    assert last() == "no layer to correct: none reads a site of which a part is pruned"
    monkeypatch.setattr(comfy.core.Regression, "correction", lambda *_: None)
    assert not made(model, given(sites=[INNER])).corrections
    assert last() == "0 of 1 layer corrected: none found that helps under other noise"


def test_they_are_saved_loaded_reported_and_go_with_the_channels(
    comfy, model, made, apply, ksampler, sampling, tmp_path, monkeypatch
):
    folders = comfy.folder_paths.folder_names_and_paths
    monkeypatch.setitem(folders, "ldcp_gates", ([str(tmp_path)], {".safetensors"}))
    gates, classes = made(model), comfy.nodes.NODE_CLASS_MAPPINGS
    classes["LDCPSaveGates"].execute(gates, "mine")
    (loaded,) = classes["LDCPLoadGates"].execute("mine_00001.safetensors").args
    assert close(loaded, gates, 1e-6) and loaded.info["correction_rank"] == 16
    pruned, settings = apply(model, loaded), sampling()
    assert torch.equal(ksampler(pruned, settings), ksampler(apply(model, gates), settings))
    text = classes["LDCPPruningReport"].execute(pruned).args[0]
    count = len(gates.corrections)
    assert f"corrections in use: {count} of {count}" in text


def test_a_block_that_runs_unpruned_is_not_corrected(redundant, made, shown):
    model = redundant()
    reader = middle(model, READERS[HIDDEN])
    forward = reader.forward
    reader.forward = lambda x: forward(x)  # another extension's
    assert set(made(model).corrections) == {INNER, HEADS}
    assert shown[-1].endswith("2 of 3 layers corrected")
