"""The shipped workflows through a real server, as a user's browser would send them.

Sizes and steps are made small; everything else is as shipped. The checkpoint has random weights,
so the images mean nothing; what counts is which of them are equal.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import comfy_server
import full_addons
import numpy
import pytest
import safetensors.torch
import torch
import ui_workflow
from PIL import Image

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = {"width": 64, "height": 64}  # the mid block sees 1x1: enough for the plumbing
MEDIUM = {"width": 128, "height": 128}  # 2x2
LARGE = {"width": 256, "height": 256}  # 4x4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="module")
def server(comfy, comfyui_path, base, sd15_checkpoint, make_gates):
    comfy_server.prepare_folder(base, REPOSITORY, sd15_checkpoint)
    full_addons.add_to(base, comfyui_path)
    folder = base / "models" / "ldcp_gates"
    # large constants: in a random U-Net the mid block alone hardly reaches the 8 bits of an image
    gates = make_gates(topology=comfy.core.SD15, constants=20.0)
    comfy.core.save_gates(gates, folder / "gates.safetensors")
    comfy.core.save_gates(make_gates(), folder / "narrow.safetensors")
    (folder / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


@pytest.fixture(scope="module")
def shipped(server):
    """Make a fresh prompt of a shipped workflow, with some widgets changed.

    Its gates come from a file with large constants, but where saving them is what is shown.
    """
    schemas = server.schemas()

    def make(name, **changes):
        workflow = ui_workflow.read(ui_workflow.FOLDER / f"{name}.json")
        prompt = ui_workflow.to_prompt(workflow, schemas)
        if name != "ldcp_estimate_and_save":
            ui_workflow.load_gates(prompt)
        ui_workflow.set_widgets(prompt, **changes)
        return prompt

    return make


def pixels(file):
    """uint8 [height, width, channel], without the workflow that the file also holds."""
    return numpy.array(Image.open(io.BytesIO(file)))


def save_latents(prompt):
    """Let both samplers of a prompt save float32 latents: an image would hide what it rounds."""
    for number, node in list(prompt.items()):
        if node["class_type"] == "KSampler":
            source = prompt[node["inputs"]["model"][0]]["class_type"]
            name = "pruned" if source == "LDCPApplyDynamicPruning" else "unpruned"
            inputs = {"samples": [number, 0], "filename_prefix": f"latent_{name}"}
            prompt[f"latent {number}"] = {"class_type": "SaveLatent", "inputs": inputs}


def test_the_workflows_are_offered_as_templates_and_the_nodes_have_help(server):
    assert b'"ldcp_step_schedule"' in server.get("/workflow_templates")
    for path in ui_workflow.FILES:
        picture = server.get(f"/api/workflow_templates/LDCP/{path.stem}.jpg")
        assert picture == path.with_suffix(".jpg").read_bytes()
    pages = ("LoadGates", "ApplyDynamicPruning", "StepSchedule", "PruningReport")
    for page in (*pages, "EstimateGates", "CalibrateGates", "SaveGates", "CompareShares"):
        assert server.get(f"/extensions/LDCP/docs/LDCP{page}.md")


def test_the_basic_workflow_makes_an_image_and_shows_what_it_prunes(server, shipped):
    prompt = shipped("ldcp_basic", EmptyLatentImage=SMALL, KSampler={"steps": 1})
    result = server.run(prompt)
    assert {"LDCP_pruned", "LDCP_full"} == set(result.files)
    assert pixels(result.files["LDCP_pruned"]).shape == (64, 64, 3)
    ((node, shown),) = result.status.items()
    assert prompt[node]["class_type"] == "LDCPApplyDynamicPruning"
    lines = shown.splitlines()
    assert re.fullmatch(r"4 sites, \d\d\.\d% pruned", lines[0]) and lines[2] == "all steps"
    assert re.fullmatch(r"step 0 of 1 ran pruned \((\d) of \1 evaluations?\), [\d.]+ s", lines[3])


def test_the_report_workflow_reports_on_its_own_run(server, shipped):
    prompt = shipped("ldcp_report", EmptyLatentImage=SMALL, KSampler={"steps": 2})
    result = server.run(prompt)
    assert pixels(result.files["LDCP_report"]).shape == (64, 64, 3)
    (report,) = (n for n, node in prompt.items() if node["class_type"] == "LDCPPruningReport")
    lines = result.status[report].splitlines()
    assert re.fullmatch(r"4 sites, \d\d\.\d% of 5,120 channels pruned, .*, all steps", lines[0])
    assert lines[1] == "corrections in use: 2 of 2"
    # the sampler evaluates both conditionings in one batch or one after the other
    assert re.fullmatch(r"steps 0-1 of 2 ran pruned \((\d) of \1 evaluations\)", lines[4])
    (image,) = set(result.files) - {"LDCP_report"}
    assert pixels(result.files[image]).shape[1] == 768


def test_steps_in_the_schedule_change_the_image_and_steps_past_the_end_do_not(server, shipped):
    def run(steps):
        changes = {"EmptyLatentImage": LARGE, "KSampler": {"steps": 2}}
        prompt = shipped("ldcp_step_schedule", LDCPStepSchedule={"steps": steps}, **changes)
        save_latents(prompt)
        result = server.run(prompt)
        (shown,) = result.status.values()
        past = (
            "this run has 2 steps (0 to 1); the range 999 lies past the last one and prunes nothing"
        )
        lines = shown.splitlines()
        assert lines[2] == f"steps {steps}" and (lines[-1] == past) == (steps == "999")
        latents, images = [], []
        for name in ("pruned", "unpruned"):
            saved = safetensors.torch.load(result.files[f"latent_{name}"])
            latents.append(saved["latent_tensor"])
            images.append(pixels(result.files[f"LDCP_{name}"]).astype(int))
        return *latents, *images

    pruned, plain, pruned_image, plain_image = run("0")
    assert plain_image.shape == (256, 256, 3) and plain_image.std() > 10  # not of one colour
    assert (pruned - plain).abs().max() > 0.1 * plain.std()
    assert numpy.abs(pruned_image - plain_image).max() > 10
    pruned, plain, pruned_image, plain_image = run("999")
    assert plain.dtype == torch.float32 and torch.equal(pruned, plain)
    assert numpy.array_equal(pruned_image, plain_image)


def test_lora_and_controlnet_each_change_what_the_pruned_model_makes(server, shipped):
    def run(**changes):
        small = {"EmptyLatentImage": MEDIUM, "KSampler": {"steps": 1}}
        result = server.run(shipped("ldcp_lora_controlnet", **small, **changes))
        ((_, shown),) = result.status.items()
        lines = r"4 sites, \d+\.\d% pruned.*\n.*\nall steps\n(step 0|no step) of 1 ran pruned"
        assert re.match(lines, shown)
        return pixels(result.files["LDCP_lora_controlnet"]).astype(int)

    both = run()
    assert both.shape == (128, 128, 3) and both.std() > 10
    without_lora = run(LoraLoader={"strength_model": 0.0})
    without_control = run(ControlNetApplyAdvanced={"strength": 0.0})
    unpruned = run(LDCPApplyDynamicPruning={"sparsity": 0.0, "channels": "a share"})
    for other in (without_lora, without_control, unpruned):
        assert numpy.abs(both - other).max() > 10


def test_estimated_gates_are_saved_and_prune(server, shipped, base):
    prompt = shipped("ldcp_estimate_and_save", EmptyLatentImage=SMALL, KSampler={"steps": 1})
    result = server.run(prompt)
    assert pixels(result.files["LDCP_estimated"]).shape == (64, 64, 3)
    shown = {prompt[node]["class_type"]: text for node, text in result.status.items()}
    # 1280 · 0.7 = 896 kept of each, a multiple of 8
    assert shown["LDCPEstimateGates"].startswith("4 sites, 30.0% pruned (30.0% requested)\nl1, per")
    assert shown["LDCPApplyDynamicPruning"].startswith("4 sites, 30.0% pruned\n")
    assert shown["LDCPSaveGates"] == "saved as estimated_00001.safetensors"
    assert (base / "models" / "ldcp_gates" / "estimated_00001.safetensors").is_file()


def test_the_calibrate_workflow_shows_the_full_model_and_the_pruned_one(server, shipped):
    one = {"KSampler": {"steps": 1}, "LDCPCalibrateGates": {"steps": 1}}
    prompt = shipped("ldcp_calibrate", EmptyLatentImage=MEDIUM, **one)
    (pruned,) = (n for n, node in prompt.items() if node["class_type"] == "KSampler")
    (watched,) = (n for n, node in prompt.items() if node["class_type"] == "LDCPCalibrateGates")
    (source,) = (n for n, node in prompt.items() if node["class_type"] == "CheckpointLoaderSimple")
    plain = dict(prompt[pruned]["inputs"], model=[source, 0])
    prompt["plain"] = {"class_type": "KSampler", "inputs": plain}
    for name, latent in (("plain", ["plain", 0]), ("w", [watched, 1]), ("p", [pruned, 0])):
        inputs = {"samples": latent, "filename_prefix": f"calibrate_{name}"}
        prompt[f"latent {name}"] = {"class_type": "SaveLatent", "inputs": inputs}
    result = server.run(prompt)
    assert result.status[watched].startswith(
        "4 sites, 30.0% pruned (30.0% requested)\nflap, global"
    )
    assert {"LDCP_watched", "LDCP_calibrated"} <= set(result.files)
    plain, watched, pruned = (
        safetensors.torch.load(result.files[f"calibrate_{name}"])["latent_tensor"]
        for name in ("plain", "w", "p")
    )
    assert torch.equal(plain, watched) and not torch.equal(plain, pruned)


def test_of_the_compared_shares_the_first_is_the_model_itself_and_more_changes_more(
    server, shipped
):
    one = {"LDCPCompareShares": {"steps": 1}}
    prompt = shipped("ldcp_compare_sparsities", EmptyLatentImage=MEDIUM, **one)
    (compare,) = (n for n, node in prompt.items() if node["class_type"] == "LDCPCompareShares")
    sampling = dict(prompt[compare]["inputs"])
    decode = {"samples": ["plain", 0], "vae": sampling["vae"]}
    plain = {k: v for k, v in sampling.items() if k not in ("gates", "vae", "shares", "schedules")}
    prompt["plain"] = {"class_type": "KSampler", "inputs": plain}
    prompt["decode"] = {"class_type": "VAEDecode", "inputs": decode}
    sources = {"plain": ["decode", 0]}
    for place in range(4):
        inputs = {"image": [compare, 1], "batch_index": place, "length": 1}
        prompt[f"at {place}"] = {"class_type": "ImageFromBatch", "inputs": inputs}
        sources[f"at_{place}"] = [f"at {place}", 0]
    for name, image in sources.items():
        inputs = {"images": image, "filename_prefix": name}
        prompt[f"save {name}"] = {"class_type": "SaveImage", "inputs": inputs}
    result = server.run(prompt)
    plain, *compared = (pixels(result.files[name]).astype(float) for name in sources)
    rmse = [float(numpy.sqrt(((image - plain) ** 2).mean())) for image in compared]
    assert rmse[0] == 0 < rmse[1] < rmse[2] < rmse[3]
    shown = result.status[compare].splitlines()
    assert shown[0].startswith("full model, ")
    for line, share, moved in zip(shown[1:4], ("0.1", "0.3", "0.5"), rmse[1:], strict=True):
        assert line.startswith(f"share {share}, ") and line.endswith(" of 255")
        # the files are rounded to 8 bits, the node's images are not
        assert float(line.split()[-3]) == pytest.approx(moved, abs=0.5)
    assert "LDCP_shares" in result.files


@pytest.mark.parametrize(
    ("error", "changes", "found", "advice"),
    [
        (
            comfy_server.Refused,
            {"LDCPLoadGates": {"gates_name": "gone.safetensors"}},
            "no gate file 'gone.safetensors'",
            "make gates without training: put Estimate Gates from Model or Calibrate Gates",
        ),
        (
            comfy_server.Refused,
            {"LDCPStepSchedule": {"steps": "9-4"}},
            "is reversed",
            "write '4-9'",
        ),
        (
            comfy_server.Refused,
            {"LDCPApplyDynamicPruning": {"sparsity": -0.5, "channels": "a share"}},
            "sparsity -0.5",
            "outside 0.0 to 1.0",
        ),
        (
            comfy_server.Failed,
            {"LDCPLoadGates": {"gates_name": "page.safetensors"}},
            "page.safetensors",
            "not a readable",
        ),
        (
            comfy_server.Failed,
            {"LDCPLoadGates": {"gates_name": "narrow.safetensors"}},
            "the gates have 128 channels at mid_block.resnets.0.conv1, the model has 1280",
            "Choose gates that were trained for this model",
        ),
    ],
    ids=["missing file", "reversed range", "sparsity", "not a gate file", "another width"],
)
def test_a_mistake_is_answered_with_what_to_do(server, shipped, error, changes, found, advice):
    small = {"EmptyLatentImage": SMALL, "KSampler": {"steps": 1}}
    with pytest.raises(error) as caught:
        server.run(shipped("ldcp_step_schedule", **small, **changes))
    assert found in str(caught.value) and advice in str(caught.value)
