"""Other packs themselves, where they are at hand; `test_node_changes.py` has stand-ins for them.

``LDCP_TEST_PACKS`` names the folder that holds ``ComfyUI-AnimateDiff-Evolved`` (with a motion model
of random weights in the layout of v1), ``ComfyUI-deepcache``, and two packs of Spectrum
(arXiv:2603.01623): ``ComfyUI-Spectrum-sdxl`` and ``ComfyUI-Spectrum-SDXL-Proper``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path

import full_checkpoint
import model_families
import pytest
import torch
from features import Kit

PACKS = os.environ.get("LDCP_TEST_PACKS")
pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.skipif(not PACKS, reason="LDCP_TEST_PACKS names no folder of other packs"),
]
SITES = tuple(f"mid_block.resnets.{r}.conv{c}" for r in (0, 1) for c in (1, 2))
FRAMES, TOLERANCE = 4, 1e-6
#: the mid block has the last width: as narrow as in the other tests, and SD1.5's own
WIDTHS = {"narrow": (32, 64, 128, 128), "full width": (32, 64, 128, 1280)}


@pytest.fixture(scope="module")
def kit(comfy, small_model, conditioning, tmp_path_factory):
    return Kit(comfy, small_model, conditioning, tmp_path_factory.mktemp("loras"))


@pytest.fixture(scope="module")
def load_pack(comfy, tmp_path_factory):
    """Load a pack as ComfyUI does, with a models folder of its own to make its folders in."""
    earlier = comfy.folder_paths.models_dir
    comfy.folder_paths.models_dir = str(tmp_path_factory.mktemp("models"))

    def load(name):
        path = Path(PACKS) / name
        assert asyncio.run(comfy.nodes.load_custom_node(str(path))), f"{path} does not load"
        return str(path).replace(".", "_x_")  # the name of its module

    yield load
    comfy.folder_paths.models_dir = earlier


@pytest.fixture(scope="module")
def animate(comfy, kit, load_pack, tmp_path_factory):
    """The pack's loader on a model, with motion modules of as many channels as the model has."""
    from safetensors.torch import save_file

    pack = load_pack("ComfyUI-AnimateDiff-Evolved")
    motion = sys.modules[f"{pack}.animatediff.motion_module_ad"]
    folder = tmp_path_factory.mktemp("motion")
    comfy.folder_paths.add_model_folder_path("animatediff_models", str(folder))
    module = motion.MotionModule

    @contextlib.contextmanager
    def fitting(widths):
        """The pack builds full-size modules only."""

        def make(channels, block_type, block_idx, **rest):
            level = block_idx if block_type == motion.BlockType.DOWN else 3 - block_idx
            return module(widths[level], block_type=block_type, block_idx=block_idx, **rest)

        motion.MotionModule = make
        try:
            yield
        finally:
            motion.MotionModule = module

    def run(model, widths):
        name = f"v1_{widths[-1]}.safetensors"
        with fitting(widths):
            if not (folder / name).exists():
                place = ".motion_modules.0.temporal_transformer.transformer_blocks.0"
                encoder = f"_blocks.3{place}.attention_blocks.1.pos_encoder.pe"
                layout = dict.fromkeys(["down" + encoder, "up" + encoder], torch.zeros(1, 24, 1))
                info = motion.AnimateDiffInfo("SD1.5", "AnimateDiff", "v1", name)
                modules = motion.AnimateDiffModel(layout, info)
                full_checkpoint.randomise_(modules, seed=3)
                save_file(modules.state_dict(), folder / name)
                comfy.folder_paths.filename_list_cache.clear()
            return kit.model_node("ADE_AnimateDiffLoaderGen1", model, model_name=name)

    return run


def frames(kit, model, steps=2, cfg=2.0):
    graph = kit.graph(model)
    graph.settings.update(steps=steps, cfg=cfg)
    graph.latent = {"samples": torch.zeros(FRAMES, 4, 16, 16)}
    return kit.sample(graph)


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_frames_that_animatediff_norms_together_are_pruned_so_and_the_run_says_what_it_costs(
    comfy, kit, small_model, make_gates, masked, animate, widths
):
    multiples = [width // widths[0] for width in widths]
    base = small_model(model_channels=widths[0], channel_mult=multiples)
    gates = make_gates(SITES, topology=comfy.core.Topology(widths, context_width=64))
    pruned = comfy.patch.attach(base, comfy.patch.Layer(gates, gates.keep_sets()))
    dense = frames(kit, animate(base, widths))
    with masked(base, gates):
        expected = frames(kit, animate(base, widths))
    found = frames(kit, animate(pruned, widths))
    print(f"from masked: pruned {apart(found, expected):.1e}, dense {apart(dense, expected):.1e}")
    assert apart(dense, expected) > 100 * TOLERANCE
    assert apart(found, expected) <= TOLERANCE
    record = comfy.patch.attached(pruned).record
    assert record.pruned_evaluations == record.evaluations > 0
    (note,) = record.notes
    print(note)
    assert note.startswith(
        "mid_block.resnets.0 and mid_block.resnets.1 run with a part of the savings, because "
        "another node or extension has replaced "
    )
    assert "GroupNorm.forward" in note


def test_deepcache_prunes_nothing_and_the_run_says_so(
    comfy, kit, model, make_gates, load_pack, caplog
):
    load_pack("ComfyUI-deepcache")
    gates = make_gates(SITES)
    pruned = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    (cached,) = kit.node("DeepCache", model=pruned)
    (plain,) = kit.node("DeepCache", model=model)
    with caplog.at_level(logging.WARNING, "ldcp"):
        found = frames(kit, cached)
    assert torch.equal(found, frames(kit, plain))
    text, _ = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"].execute(cached).args
    print(text)
    assert "without a sampler" not in text
    assert "measured  sampled, but the model was never asked: nothing was pruned" in text
    (note,) = comfy.patch.attached(cached).record.notes
    assert note.startswith("this run never asked the model, so nothing was pruned")
    assert [record.getMessage() for record in caplog.records] == ["LDCP: " + note]


STEPS = 14
SPECTRUM = {
    "ComfyUI-Spectrum-sdxl": (
        "SpectrumSDXL",
        {
            "w": 0.6,
            "m": 4,
            "lam": 0.1,
            "window_size": 3,
            "flex_window": 0.75,
            "warmup_steps": 5,
            "stop_caching_step": -1,
        },
    ),
    "ComfyUI-Spectrum-SDXL-Proper": (
        "SpectrumApplySDXL",
        {
            "enabled": True,
            "blend_weight": 0.5,
            "degree": 4,
            "ridge_lambda": 0.1,
            "window_size": 2.0,
            "flex_window": 0.75,
            "warmup_steps": 5,
            "tail_actual_steps": 3,
            "min_fit_points": 4,
            "debug": False,
        },
    ),
}


@pytest.mark.parametrize("pack", SPECTRUM)
@pytest.mark.parametrize("steps", ["0-", "6-"], ids=["every step", "the later steps"])
def test_what_spectrum_forecasts_from_pruned_steps_is_what_it_forecasts_from_masked_ones(
    comfy, kit, make_gates, masked, load_pack, monkeypatch, pack, steps
):
    load_pack(pack)
    done = []  # the steps that the sampler has reported
    preview = __import__("latent_preview")  # beside ComfyUI's main.py
    monkeypatch.setattr(
        preview, "prepare_callback", lambda *_, **__: lambda step, *_: done.append(step)
    )
    node, settings = SPECTRUM[pack]
    base = model_families.make(comfy.root, "SDXL")
    topology = comfy.model.model_topology(base.model)
    sites = [site.name for site in topology.sites("mid+ff+heads")]
    gates = make_gates(sites, topology=topology, constants=0.3, power=0.5)
    schedule = comfy.core.Schedule.steps(steps)
    pruned = comfy.patch.attach(base, comfy.patch.Layer(gates, gates.keep_sets(), schedule))

    def sampled(model, forecast=True):
        graph = kit.graph(kit.model_node(node, model, **settings) if forecast else model)
        graph.settings.update(steps=STEPS, cfg=1.0)
        done.clear()
        return kit.sample(graph)

    found, dense = sampled(pruned), sampled(base)
    record = comfy.patch.attached(pruned).record
    assert apart(dense, sampled(base, forecast=False)) > 1e-3  # it forecasts something
    assert 0 < record.pruned_evaluations < STEPS
    assert record.evaluations < STEPS or "did not reach the pruned layers" in record.notes[0]
    first = int(steps.removesuffix("-"))
    with masked(base, gates, when=lambda: len(done) >= first):
        expected = sampled(base)
    assert apart(found, expected) <= 10 * TOLERANCE  # a forecast makes a difference larger
    assert apart(dense, expected) > 100 * apart(found, expected)
    assert torch.equal(sampled(base), dense)  # no trace of pruning
