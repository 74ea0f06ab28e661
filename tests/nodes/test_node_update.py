"""Workflows and a gate file of version 0.1.0 in the pack as it is now.

`golden` holds them as that version shipped and wrote them. They were made before *channels* and
*corrections* were there, and must stay as they are.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import comfy_server
import full_addons
import numpy
import pytest
import ui_workflow
from PIL import Image

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).with_name("golden")
OLD = sorted(GOLDEN.glob("*.json"))
APPLY = "LDCPApplyDynamicPruning"
#: by version 0.1.0, of the gate file
KEPT = {
    "mid_block.resnets.0.conv1": 638,
    "mid_block.resnets.0.conv2": 630,
    "mid_block.resnets.1.conv1": 599,
    "mid_block.resnets.1.conv2": 664,
}
SIZE = {"width": 128, "height": 128}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("update") / "base"


@pytest.fixture(scope="module")
def server(comfy, comfyui_path, base, sd15_checkpoint):
    """A user's folder with the old gate file, and today's pack in it."""
    comfy_server.prepare_folder(base, REPOSITORY, sd15_checkpoint)
    full_addons.add_to(base, comfyui_path)
    gates = base / "models" / "ldcp_gates" / "gates.safetensors"
    gates.write_bytes((GOLDEN / "gates.safetensors").read_bytes())
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


@pytest.fixture(scope="module")
def old_prompt(server):
    """The prompt that version 0.1.0 queued for one of its workflows, made small."""
    schemas = server.schemas()
    del schemas[APPLY]["optional"]["channels"]
    del schemas["LDCPCalibrateGates"]["optional"]["corrections"]

    def make(path):
        prompt = ui_workflow.to_prompt(ui_workflow.read(path), schemas)
        for node in prompt.values():
            if node["class_type"] in ("KSampler", "LDCPCalibrateGates"):
                node["inputs"]["steps"] = 6 if path.stem == "ldcp_step_schedule" else 1
        ui_workflow.set_widgets(prompt, EmptyLatentImage=SIZE)
        return prompt

    return make


def pixels(file):
    return numpy.array(Image.open(io.BytesIO(file)))


def test_the_old_files_are_there():
    names = ("basic", "calibrate", "compare_sparsities", "estimate_and_save")
    names += ("lora_controlnet", "report", "step_schedule")
    assert [path.stem for path in OLD] == [f"ldcp_{name}" for name in names]


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_an_old_workflow_runs_to_its_images(server, old_prompt, path):
    prompt = old_prompt(path)
    result = server.run(prompt)
    prefixes = {
        node["inputs"]["filename_prefix"]
        for node in prompt.values()
        if node["class_type"] == "SaveImage"
    }
    assert prefixes and prefixes <= set(result.files)
    assert all(pixels(result.files[prefix]).shape == (128, 128, 3) for prefix in prefixes)
    for number, node in prompt.items():
        if node["class_type"] == APPLY:
            sparsity = node["inputs"]["sparsity"]
            lines = result.status[number].splitlines()
            assert re.match(r"4 sites, \d+\.\d% pruned", lines[0])
            # a sparsity of -1 meant: as learned
            assert ("requested" in lines[0]) == (sparsity >= 0)
            ran = any(re.match(r"steps? [\d-]+ of \d ran pruned", line) for line in lines)
            assert ran == (sparsity != 0)


def test_the_old_gate_file_prunes_what_it_did(comfy):
    gates = comfy.core.load_gates(GOLDEN / "gates.safetensors")
    assert {site: int(keep.sum()) for site, keep in gates.keep_sets().items()} == KEPT
    assert comfy.core.SD15.fits(gates.topology) and gates.padding == "zero"


def test_an_old_prompt_gives_the_image_of_todays_with_the_channels_as_learned(server, old_prompt):
    old = old_prompt(GOLDEN / "ldcp_basic.json")
    new, full = old_prompt(GOLDEN / "ldcp_basic.json"), old_prompt(GOLDEN / "ldcp_basic.json")
    for prompt, changes in (
        (new, {"channels": "as learned", "sparsity": 0.3}),
        (full, {"channels": "a share", "sparsity": 0.0}),
    ):
        (apply,) = (node for node in prompt.values() if node["class_type"] == APPLY)
        apply["inputs"] |= changes
    images = []
    for prompt in (old, new, full):
        (save,) = (node for node in prompt.values() if node["class_type"] == "SaveImage")
        images.append(pixels(server.run(prompt).files[save["inputs"]["filename_prefix"]]))
    assert (images[0] == images[1]).all() and (images[0] != images[2]).any()
