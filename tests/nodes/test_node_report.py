"""The Pruning Report: its figures, what it shows, and that it is never served from the cache."""

from __future__ import annotations

import asyncio
import importlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import comfy_server
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
CONV1, CONV2 = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"


@pytest.fixture
def node(comfy, tmp_path, monkeypatch):
    """The node, whose previews go into a folder of this test."""
    monkeypatch.setattr(comfy.folder_paths, "temp_directory", str(tmp_path))
    return comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"]


@pytest.fixture
def record(comfy):
    return importlib.import_module(f"{comfy.patch.__package__}.record").RunRecord


@pytest.fixture
def gated(comfy):
    """Gates of the small model that keep the first ``kept`` channels of a site."""

    def make(kept, site=CONV2, padding="zero"):
        scores = torch.where(torch.arange(128) < kept, 0.9, 0.1)
        topology = comfy.core.Topology((32, 64, 128, 128), context_width=64, heads=(8, 8, 8, 8))
        return comfy.core.Gates({site: scores}, {}, padding, topology)

    return make


@pytest.fixture
def attach(comfy):
    def run(model, gates, steps="0-", keep_sets=None):
        schedule = comfy.core.Schedule.steps(steps)
        keep_sets = keep_sets or gates.keep_sets()
        return comfy.patch.attach(model, comfy.patch.Layer(gates, keep_sets, schedule))

    return run


def test_the_figures_are_those_counted_by_hand(node, model, attach, gated):
    text, image = node.execute(attach(model, gated(88), "1-")).args
    # 40 rows of 9 * 128 weights (a constant stays for each bias) in float32: 184,320 bytes; at the
    # 8x8 positions of two images 2 * 40 * 1152 * 128 = 11,796,480 FLOPs
    assert text.splitlines()[0] == "1 site, 31.2% of 128 channels pruned, rule 'zero', steps 1-"
    assert f"{CONV2}           88/128     31.2%      -46,080       -11.8" in text
    assert "weights: 0.2 MiB of" in text and "compute: 11.8 MFLOP of" in text
    assert "4 bytes per parameter, 64x64 latent, batch 2" in text
    assert image.dtype == torch.float32 and image.shape[0] == 1 and image.shape[2:] == (768, 3)
    assert 0.0 <= image.min() < 0.2 and 0.8 < image.max() <= 1.0


def test_the_image_is_shown_on_the_node(node, model, attach, gated, tmp_path):
    output = node.execute(attach(model, gated(88)))
    (shown,) = output.ui.as_dict()["images"]
    assert shown["type"] == "temp"
    with Image.open(tmp_path / shown["filename"]) as file:
        assert file.size == (768, output.args[1].shape[1])


def test_the_node_shows_the_facts_in_lines(node, model, attach, gated, monkeypatch):
    shown = []
    server = SimpleNamespace(
        client_id="browser", send_progress_text=lambda *message: shown.append(message)
    )
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", fake)
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7", prompt=0, extra_pnginfo=0))
    node.execute(attach(model, gated(88)))
    ((text, node_id, client),) = shown
    assert (node_id, client) == ("7", "browser")
    lines = text.split("  \n")
    assert lines[0] == "1 site, 31.2% of 128 channels pruned, rule 'zero', all steps"
    assert lines[1].startswith("weights: 0.2 MiB of") and lines[2].startswith("compute: 11.8 MFLOP")
    assert lines[3].startswith("not measured: no run of this model yet; connect 'after'")


def test_before_a_run_the_report_says_how_to_measure(node, model, attach, gated):
    text, _ = node.execute(attach(model, gated(88))).args
    assert "connect 'after' to the sampler's LATENT" in text and "measured  " not in text


def test_after_a_run_the_report_says_what_it_did(node, model, attach, gated, sample):
    patched = attach(model, gated(88), "1-")
    _, before = node.execute(patched).args
    sample(patched, steps=3)
    text, image = node.execute(patched).args
    assert "measured  steps 1-2 of 3 ran pruned (2 of 3 evaluations)" in text
    # a convolution of 128 * 128 * 9 weights and 128 biases in float32: 590,336 bytes
    assert re.search("measured  gated layers on cpu: .* resident, 0.6 MiB in full\n", text)
    assert "not measured" not in text
    assert image.shape[1] > before.shape[1]
    sample(attach(patched, gated(88), "0"), steps=3)  # a run of another model is not this one's
    assert node.execute(patched).args[0] == text


def test_the_record_is_shown_as_it_is(comfy, node, model, attach, gated, record):
    patched = attach(model, gated(88))
    comfy.patch.attached(patched).record = record(
        steps=20,
        pruned_steps=set(range(5, 20)),
        evaluations=20,
        pruned_evaluations=15,
        device="cuda:0",
        full_bytes=100 * 2**20,
        resident_bytes=130 * 2**20,
        kept_full="steps that do not prune need them",
    )
    lines = node.execute(patched).args[0].splitlines()
    assert lines[-3:] == [
        "measured  steps 5-19 of 20 ran pruned (15 of 20 evaluations)",
        "measured  gated layers on cuda:0: 130.0 MiB resident, 100.0 MiB in full",
        "measured  full weights stayed: steps that do not prune need them",
    ]


def test_of_several_apply_nodes_every_one_is_reported(node, model, attach, gated):
    patched = attach(attach(model, gated(88), "0-4"), gated(64, CONV1, "extend"), "5-")
    patched = attach(patched, gated(32), "7-")  # the first site again: this one wins
    text, _ = node.execute(patched).args
    assert text.splitlines()[:4] == [
        "gates 1: 1 site, 31.2% of 128 channels pruned, rule 'zero', steps 0-4",
        "gates 2: 1 site, 50.0% of 128 channels pruned, rule 'extend', steps 5-",
        "gates 3: 1 site, 75.0% of 128 channels pruned, rule 'zero', steps 7-",
        "where several gate the same site, the later ones are shown",
    ]
    # conv1: 64 rows of 1152 in it, and of conv2's 64 columns of 1152 all but a tap sum per row,
    # of which the residual gate then takes 96 rows: 64 kept columns of 9 taps and 64 tap sums
    assert f"{CONV1}           64/128     50.0%     -139,264" in text
    assert f"{CONV2}           32/128     75.0%      -61,440" in text


def test_gates_alone_are_reported_whatever_the_model_is_pruned_by(
    node, model, attach, gated, sample
):
    gates = gated(64, CONV1)
    text, _ = node.execute(model, gates).args
    assert text.splitlines()[0] == "1 site, 50.0% of 128 channels pruned, rule 'zero'"
    assert CONV1 in text and "measured" not in text
    patched = attach(model, gated(88))
    sample(patched, steps=2)
    assert node.execute(patched, gates).args[0] == text


def test_an_override_of_the_sparsity_is_what_is_reported(node, model, attach, gated):
    gates = gated(88)
    text, _ = node.execute(attach(model, gates, keep_sets=gates.keep_sets_at(0.5))).args
    assert f"{CONV2}           64/128     50.0%" in text


def test_a_model_without_pruning_is_refused(comfy, node, model):
    with pytest.raises(comfy.model.ModelError) as error:
        node.execute(model)
    assert "this model is not pruned" in str(error.value)
    assert "comes out of Apply Dynamic Pruning, or gates from Load" in str(error.value)


def test_gates_of_another_width_are_refused(comfy, node, model):
    gates = comfy.core.Gates({CONV1: torch.ones(1280)})
    with pytest.raises(comfy.model.ModelError, match="the gates have 1280 channels at mid_block"):
        node.execute(model, gates)


def test_no_two_runs_have_the_same_fingerprint(node):
    assert node.fingerprint_inputs() != node.fingerprint_inputs()
    assert node.fingerprint_inputs(after=None) is not node.fingerprint_inputs(after=None)


@pytest.mark.parametrize(("source", "fits"), [("LATENT", True), ("IMAGE", True), ("MASK", False)])
def test_the_report_can_stand_after_a_latent_or_an_image(comfy, node, monkeypatch, source, fits):
    import execution

    class Source:
        FUNCTION, RETURN_TYPES = "run", ("MODEL", source)

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {}}

    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "TestSource", Source)
    graph = {
        "1": {"class_type": "TestSource", "inputs": {}},
        "2": {"class_type": node.__name__, "inputs": {"model": ["1", 0], "after": ["1", 1]}},
    }
    valid, _, outputs, _ = asyncio.run(execution.validate_prompt("id", graph, None))
    assert valid is fits
    assert outputs == (["2"] if fits else [])


@pytest.fixture
def server(comfy, comfyui_path, tmp_path, gated):
    """A server that knows the small model, gates for it, and this pack."""
    base = tmp_path / "base"
    comfy_server.prepare_folder(base, REPOSITORY, tmp_path / "none.safetensors")
    custom = base / "custom_nodes" / "small_model_node.py"
    custom.symlink_to(Path(__file__).with_name("small_model_node.py"))
    comfy.core.save_gates(gated(88), base / "models" / "ldcp_gates" / "gates.safetensors")
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


def test_in_the_server_the_report_waits_for_the_sampler_and_is_made_at_every_run(server):
    widgets = {"seed": 1, "steps": 3, "cfg": 1.0, "denoise": 1.0}
    widgets |= {"sampler_name": "euler", "scheduler": "normal"}
    schedule = {"mode": "steps", "steps": "1-", "start_percent": 0.0, "end_percent": 1.0}
    size = {"width": 128, "height": 128, "batch_size": 1}
    prompt = {
        # the report comes first in the file: only its inputs can make it wait
        "report": ("LDCPPruningReport", {"model": ["apply", 0], "after": ["sampler", 0]}),
        "model": ("LDCPTestSmallModel", {}),
        "gates": ("LDCPLoadGates", {"gates_name": "gates.safetensors"}),
        "schedule": ("LDCPStepSchedule", schedule),
        "apply": (
            "LDCPApplyDynamicPruning",
            {
                "model": ["model", 0],
                "gates": ["gates", 0],
                "sparsity": -1.0,
                "schedule": ["schedule", 0],
            },
        ),
        "latent": ("EmptyLatentImage", size),
        "sampler": (
            "KSampler",
            {
                **widgets,
                "model": ["apply", 0],
                "positive": ["model", 1],
                "negative": ["model", 1],
                "latent_image": ["latent", 0],
            },
        ),
    }
    prompt = {
        name: {"class_type": class_type, "inputs": inputs}
        for name, (class_type, inputs) in prompt.items()
    }
    first, second = server.run(prompt), server.run(prompt)
    assert "steps 1-2 of 3 ran pruned (2 of 3 evaluations)" in first.status["report"].splitlines()
    # the second time all others are served from the cache, and show nothing
    assert set(first.status) == {"apply", "report"} and set(second.status) == {"report"}
    assert second.status["report"] == first.status["report"]
    for result in (first, second):
        ((name, content),) = result.files.items()
        assert name.startswith("ComfyUI_temp_")
        with Image.open(io.BytesIO(content)) as image:
            assert image.size[0] == 768 and image.size[1] > 800
    assert first.files.keys() != second.files.keys()
