"""SD2, SDXL, its refiner and its derivatives in ComfyUI, narrow and with random weights.

As for SD1.5: dense where off, the masked reference where on, LoRA included.
"""

from __future__ import annotations

import importlib

import model_families
import pytest
import torch
from model_families import FAMILIES

pytestmark = pytest.mark.comfyui
TOLERANCE = 2e-6
LAYERS = ("in_layers.2", "out_layers.3", "ff.net.0.proj", "ff.net.2")
LAYERS += ("to_q", "to_k", "to_v", "to_out.0")


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture(scope="module")
def small(comfy):
    """Make a narrow ModelPatcher of a family."""
    return lambda family: model_families.make(comfy.root, family)


@pytest.fixture
def gates_of(comfy, make_gates):
    """Random gates of every site of a model."""

    def make(model, padding="zero", scope="all+ff+heads"):
        topology = comfy.model.model_topology(model.model)
        sites = [site.name for site in topology.sites(scope)]
        # three quarters kept, so that what is left of the deep ones is not only their constants
        return make_gates(sites, padding, topology=topology, constants=0.3, power=0.5)

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_where_off_and_the_masked_reference_where_on(small, gates_of, check_exact, family):
    model = small(family)
    check_exact(model, gates_of(model, "extend" if family == "SDXL refiner" else "zero"))


def test_sdxl_is_described_by_its_widths_and_depths(comfy, small):
    topology = comfy.model.model_topology(small("SDXL").model)
    assert topology == comfy.core.Topology(
        widths=(32, 64, 128),
        down=((0, 0), (1, 1), (3, 3)),
        mid=(3, 0),
        up=((3, 3, 3), (1, 1, 1), (0, 0, 0)),
        context_width=64,
        pooled_width=2816,
        linear_projections=True,
        heads=(0, 1, 2),
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_a_layer_of_the_model(comfy, small, family):
    model = small(family)
    topology = comfy.model.model_topology(model.model)
    unet = comfy.model.unet(model.model)
    for site in topology.all_sites():
        layer = unet.get_submodule(comfy.model.layer_path(site.name, topology.layers_per_block))
        assert layer.weight.shape[0] == site.channels * site.kind.rows
    named = {name for name, m in unet.named_modules() if type(m).__name__ == "ResBlock"}
    transformer = ("FeedForward", "CrossAttention")
    named |= {name for name, m in unet.named_modules() if type(m).__name__ in transformer}
    paths = {comfy.model.module_path(b.name, topology.layers_per_block) for b in topology.blocks()}
    assert paths == named


def test_gates_of_another_family_are_refused_with_both_named(comfy, small, gates_of, make_gates):
    model = small("SDXL")
    gates = make_gates()
    with pytest.raises(comfy.model.ModelError, match="made for Stable Diffusion 1.5, .* is SDXL;"):
        comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    other = gates_of(small("SD2"))
    with pytest.raises(comfy.model.ModelError, match="made for Stable Diffusion 2, .* is SDXL;"):
        comfy.patch.attach(model, comfy.patch.Layer(other, other.keep_sets()))


def lora(unet, seed=0):
    """A LoRA of every layer that is pruned, in the layout of kohya's trainer."""
    g, found = torch.Generator().manual_seed(seed), {}
    for name, module in unet.named_modules():
        if name.endswith(LAYERS):
            key, weight = f"lora_unet_{name.replace('.', '_')}", module.weight
            down = torch.randn(4, *weight.shape[1:], generator=g) * weight[0].numel() ** -0.5
            up = torch.randn(weight.shape[0], 4, *[1] * (weight.dim() - 2), generator=g)
            found |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": 0.3 * up}
    return found


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_lora_of_sdxl_is_pruned_with_the_weights(
    comfy, small, gates_of, sample, unpatched, masked, after
):

    model = small("SDXL")
    gates = gates_of(model)
    layer = comfy.patch.Layer(gates, gates.keep_sets())
    weights = lora(comfy.model.unet(model.model))

    def with_lora(patcher):
        return importlib.import_module("comfy.sd").load_lora_for_models(
            patcher, None, weights, 1.0, 0.0
        )[0]

    if after:
        patched = with_lora(comfy.patch.attach(model, layer))
    else:
        patched = comfy.patch.attach(with_lora(model), layer)
    evaluated = []
    pruned = sample(patched, 1, evaluated=evaluated)
    alone = sample(comfy.patch.attach(small("SDXL"), layer), 1)
    assert not torch.allclose(pruned, alone, atol=1e-2)  # the LoRA matters
    ((*call, output, _),) = evaluated
    bare = with_lora(model)
    comfy.root.model_management.load_models_gpu([bare])
    with masked(bare, gates):
        reference = unpatched(bare, *call)
    assert rms(output - reference) <= TOLERANCE * rms(reference)


@pytest.mark.parametrize("family", ["SD2", "SDXL", "SDXL refiner"])
def test_gates_are_estimated_and_calibrated_from_the_model(
    comfy, small, conditioning, check_exact, family
):
    model = small(family)
    nodes = comfy.nodes.NODE_CLASS_MAPPINGS
    how = {"sparsity": 0.3, "ranking": "per layer", "padding": "zero", "scope": "all+ff+heads"}
    (estimated,) = nodes["LDCPEstimateGates"].execute(model, criterion="l1", **how).args
    assert estimated.topology.family in (family, f"Stable Diffusion {family[-1]}")
    assert abs(estimated.sparsity - 0.3) < 0.05
    sampling = {
        "seed": 1,
        "steps": 1,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": conditioning(5),
        "negative": conditioning(6),
        "latent_image": {"samples": torch.zeros(1, 4, 32, 32)},
        "denoise": 1.0,
    }
    made, _, _ = (
        nodes["LDCPCalibrateGates"].execute(model, criterion="flap", **sampling, **how).args
    )
    assert set(made.scores) == set(estimated.scores) and made.topology == estimated.topology
    (report,) = (
        nodes["LDCPPruningReport"]
        .execute(comfy.patch.attach(model, comfy.patch.Layer(made, made.keep_sets())))
        .args[:1]
    )
    check_exact(model, estimated)


def test_sites_of_every_family_can_be_named_before_the_model_is_known(comfy, small):
    for family in FAMILIES:
        sites = comfy.model.model_topology(small(family).model).all_sites()
        assert comfy.apply_node.problem(0.3, sites=", ".join(site.name for site in sites)) is None
    assert "unknown scope or site" in comfy.apply_node.problem(0.3, sites="mid_block.resnets.2")
