"""Pruning inside graphs of ComfyUI's own nodes, against the same graph with a masked model.

Every feature of `features.py` is sampled three times: pruned from the second step on; with full
layers whose output is masked from the second step on, by the step that the sampler reports;
and dense. The first step must be bit for bit the dense one, the others the masked ones to the
feature's tolerance, and at least a hundred times as far from dense.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import compatibility
import pytest
import torch
from features import FEATURES, FULL, NONE, PART, Kit

pytestmark = pytest.mark.comfyui
SITES = tuple(f"mid_block.resnets.{r}.conv{c}" for r in (0, 1) for c in (1, 2))
#: before the mid block, where guidance nodes replace attention
HEADS = tuple(f"down_blocks.2.attentions.1.transformer_blocks.0.attn{n}.to_v" for n in (1, 2))
ROWS_ALONE = tuple(f"mid_block.resnets.{r}.conv2" for r in (0, 1))
FIRST_PRUNED = 1
GATED = tuple(f"middle_block.{b}.{c}" for b in (0, 2) for c in ("in_layers.2", "out_layers.3"))


@pytest.fixture(scope="module")
def record(comfyui_path):
    """Adds a row to the file that ``LDCP_COMPATIBILITY`` names."""

    def add(feature, loading, errors):
        if "LDCP_COMPATIBILITY" in os.environ:
            path, host = Path(os.environ["LDCP_COMPATIBILITY"]), compatibility.host(comfyui_path)
            compatibility.add_row(path, host, feature.name, loading, errors)

    return add


@pytest.fixture(scope="module")
def kit(comfy, small_model, conditioning, tmp_path_factory):
    return Kit(comfy, small_model, conditioning, tmp_path_factory.mktemp("loras"))


@dataclass
class Found:
    """What a run of a graph gave: the denoised latent of every step, and every mid-block map."""

    steps: list[torch.Tensor] = field(default_factory=list)
    #: (steps reported before, the map)
    maps: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    latent: torch.Tensor | None = None

    def pruned_latents(self):
        return [*self.steps[FIRST_PRUNED:], self.latent]

    def pruned_maps(self, feature):
        maps = [found for step, found in self.maps if step >= FIRST_PRUNED]
        return maps[:1] if feature.coarse else maps


@pytest.fixture
def outcome(comfy, kit, masked, monkeypatch):
    """Build the graph of a feature with something in our node's place, and sample it."""
    preview = __import__("latent_preview")  # beside ComfyUI's main.py

    def run(feature, base, ours, mask=None):
        found = Found()

        def report(step, denoised, *_):
            assert step == len(found.steps)
            found.steps.append(denoised.clone())

        monkeypatch.setattr(preview, "prepare_callback", lambda *_, **__: report)
        graph = kit.graph(ours(base))
        if feature.finish:
            feature.finish(kit, graph)
        torch.manual_seed(0)  # some features draw as they go
        pruning = nullcontext()
        if mask is not None:
            pruning = masked(base, mask, when=lambda: len(found.steps) >= FIRST_PRUNED)
        middle = base.model.diffusion_model.middle_block[2]
        hook = middle.register_forward_hook(
            lambda module, inputs, output: found.maps.append((len(found.steps), output.clone()))
        )
        with pruning:
            found.latent = kit.sample(graph)
        hook.remove()
        return found

    return run


@pytest.fixture
def load(monkeypatch):
    """Let ComfyUI load models in one of its ways; ``model`` is one as the graph will have it."""

    def use(model, loading):
        if loading == FULL:
            return
        real = type(model).load
        budget = 1 if loading == NONE else part_of(model)

        def low(self, device=None, *_, **__):
            return real(self, device, lowvram_model_memory=budget)

        monkeypatch.setattr(type(model), "load", low)

    return use


def part_of(model):
    """A budget with which ComfyUI, in whatever order it loads, loads some of the gated layers."""
    for hundredth in range(5, 100):
        budget = model.model_size() * hundredth // 100
        model.load(model.load_device, lowvram_model_memory=budget)
        loaded = len(loaded_convs(model))
        model.detach()
        if 0 < loaded < len(GATED):
            return budget
    raise AssertionError("no budget loads a part of the gated layers")


def loaded_convs(model):
    convs = [model.model.get_submodule(f"diffusion_model.{path}") for path in GATED]
    return [conv for conv in convs if vars(conv).get("comfy_patched_weights")]


def relative(one, other):
    return float((one.float() - other.float()).norm() / other.float().norm())


def differences(one, other, strict=True):
    return [relative(*pair) for pair in zip(one, other, strict=strict)]


CASES = [(feature, loading) for feature in FEATURES for loading in feature.loading]


@pytest.mark.parametrize(
    ("feature", "loading"), CASES, ids=[f"{feature.name}-{loading}" for feature, loading in CASES]
)
def test_it_equals_the_same_graph_with_full_convolutions_and_masked_output(
    comfy, kit, make_gates, outcome, load, record, feature, loading
):
    base = feature.model(kit) if feature.model else kit.small_model()
    patch = feature.patch or (lambda kit, model: model.clone())
    load(patch(kit, base), loading)
    schedule = comfy.core.Schedule.steps(f"{FIRST_PRUNED}-")

    def placements(patch, ours):
        """Our node after the feature's, and before it, where it is a node on the model."""
        orders = [lambda model: ours(patch(kit, model))]
        return [*orders, lambda model: patch(kit, ours(model))] if feature.patch else orders

    def pruned(gates):
        layer = comfy.patch.Layer(gates, gates.keep_sets(), schedule)
        return lambda model: comfy.patch.attach(model, layer)

    dense = outcome(feature, base, lambda model: patch(kit, model))
    check_loading(base, loading)
    without = outcome(replace(feature, **WITHOUT[feature.patch is None]), base, as_it_is)
    if feature.changes and not (feature.patch or feature.finish):
        without = outcome(feature, kit.small_model(), as_it_is)
    assert different(dense.latent, without.latent) or not feature.changes
    more = len(dense.maps) - len(without.maps)
    assert (more > 0) - (more < 0) == feature.evaluations

    errors = {}
    for rows, sites in (("rows", ROWS_ALONE), ("all", SITES + HEADS)):
        # large constants: in a random U-Net the mid block alone hardly reaches the image
        topology = comfy.model.model_topology(base.model)
        gates = make_gates(sites, constants=20.0, topology=topology)
        expected = outcome(feature, base, lambda model: patch(kit, model), mask=gates)
        # what leaves evaluations out may leave out others when dense
        same = feature.evaluations >= 0
        far = differences(dense.pruned_maps(feature), expected.pruned_maps(feature), same)
        assert min(far) >= 100 * feature.tolerance
        effect = differences(dense.pruned_latents(), expected.pruned_latents())
        errors[rows] = 0.0
        for model in placements(patch, pruned(gates)):
            found = outcome(feature, base, model)
            for step in range(FIRST_PRUNED):
                assert torch.equal(found.steps[step], dense.steps[step])
            near = differences(found.pruned_maps(feature), expected.pruned_maps(feature))
            assert max(near) <= feature.tolerance
            if not feature.coarse:
                near = differences(found.pruned_latents(), expected.pruned_latents())
                assert max(near) <= feature.tolerance
                assert all(a >= 100 * b for a, b in zip(effect, near, strict=True))
            errors[rows] = max(errors[rows], *near)
    again = outcome(feature, base, lambda model: patch(kit, model))
    assert torch.equal(again.latent, dense.latent)  # no trace of pruning
    record(feature, loading, errors)


def as_it_is(model):
    return model.clone()


#: the part of a feature that is left out to see whether it does anything
WITHOUT = {False: {"patch": None}, True: {"finish": None}}


def different(one, other):
    return one.shape != other.shape or relative(one, other) > 1e-3


def check_loading(base, loading):
    """Whether the gated convolutions, or some, are loaded, as this way of loading means."""
    loaded = len(loaded_convs(base))
    assert loaded in {FULL: {4}, PART: {1, 2, 3}, NONE: {0}}[loading]


def test_merging_takes_no_pruning_from_the_second_model(comfy, kit, make_gates):
    gates = make_gates(constants=20.0)
    first, second = kit.small_model(), kit.other_model
    pruned = comfy.patch.attach(second, comfy.patch.Layer(gates, gates.keep_sets()))

    def merge(other):
        (model,) = kit.node("ModelMergeSimple", model1=first, model2=other, ratio=0.5)
        return kit.sample(kit.graph(model))

    dense = merge(second)
    assert torch.equal(merge(pruned), dense)
    assert not torch.equal(kit.sample(kit.graph(pruned)), kit.sample(kit.graph(second)))
