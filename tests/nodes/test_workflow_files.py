"""What can be checked in the shipped workflow files without a ComfyUI."""

from __future__ import annotations

import json
import re

import pytest
import ui_workflow
import workflow_png

from ldcp_core import Schedule

CHINESE = re.compile("[\u4e00-\u9fff]")
each_file = pytest.mark.parametrize("path", ui_workflow.FILES, ids=lambda path: path.stem)


def find(workflow, node_type):
    return [node for node in workflow["nodes"] if node["type"] == node_type]


def test_the_workflows_are_there():
    names = {"ldcp_basic", "ldcp_step_schedule", "ldcp_report", "ldcp_lora_controlnet"}
    names |= {"ldcp_estimate_and_save", "ldcp_compare_sparsities", "ldcp_calibrate"}
    assert {path.stem for path in ui_workflow.FILES} >= names


@each_file
def test_every_link_joins_two_sockets_that_know_it(path):
    workflow = ui_workflow.read(path)
    nodes = {node["id"]: node for node in workflow["nodes"]}
    assert len(nodes) == len(workflow["nodes"]) and max(nodes) <= workflow["last_node_id"]
    known = set()
    for link, source, output, target, slot, kind in workflow["links"]:
        sockets = nodes[source]["outputs"][output], nodes[target]["inputs"][slot]
        # an input may take several types
        assert sockets[0]["type"] == kind and kind in sockets[1]["type"].split(",")
        assert link in sockets[0]["links"] and link == sockets[1]["link"]
        assert link not in known and link <= workflow["last_link_id"]
        known.add(link)
    for node in nodes.values():
        named = [link for socket in node["outputs"] for link in socket["links"] or []]
        named += [s["link"] for s in node["inputs"] if s["link"] is not None]
        assert set(named) <= known


@each_file
def test_nodes_have_their_default_names_and_are_all_active(path):
    for node in ui_workflow.read(path)["nodes"]:
        assert "title" not in node and node["mode"] == 0


@each_file
def test_nodes_do_not_lie_on_top_of_each_other(path):
    # a node's title bar is 30 high and lies above its position
    boxes = [
        (x, y - 30, x + width, y + height)
        for (x, y), (width, height) in (
            (node["pos"], node["size"]) for node in ui_workflow.read(path)["nodes"]
        )
    ]
    for i, (left, top, right, bottom) in enumerate(boxes):
        for x0, y0, x1, y1 in boxes[:i]:
            assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


@each_file
def test_nothing_of_the_machine_it_was_made_on_is_left(path):
    workflow = ui_workflow.read(path)
    assert set(workflow["extra"]) - {"linearData"} == {"ds", "frontendVersion"}
    assert not re.search(r"[A-Za-z]:\\|/home/|/root/|/Users/|/tmp/|127\.0\.0", json.dumps(workflow))


@each_file
def test_it_starts_as_a_user_would_and_says_what_to_do(path):
    workflow = ui_workflow.read(path)
    (checkpoint,) = find(workflow, "CheckpointLoaderSimple")
    (latent,) = find(workflow, "EmptyLatentImage")
    notes = [note["widgets_values"][0] for note in find(workflow, "MarkdownNote")]
    assert checkpoint["widgets_values"] == ["v1-5-pruned-emaonly.safetensors"]
    assert not find(workflow, "LDCPLoadGates")  # a fresh installation has no gate file
    for apply in find(workflow, "LDCPApplyDynamicPruning"):
        gates, _ = origin(workflow, apply, "gates")
        assert gates["type"] in ("LDCPEstimateGates", "LDCPCalibrateGates")
        # of the model that is pruned
        assert origin(workflow, gates, "model") == origin(workflow, apply, "model")
    assert latent["widgets_values"] == [512, 512, 1]
    for sampler in find(workflow, "KSampler"):
        assert sampler["widgets_values"][1:3] == ["fixed", 20]
    for note in notes:
        for word in ("training.fit", "models/ldcp_gates", "7%", "1%"):
            assert word in note


@each_file
def test_its_note_says_the_same_in_english_and_in_chinese(path):
    notes = find(ui_workflow.read(path), "MarkdownNote")
    english, chinese = (note["widgets_values"][0] for note in notes)
    assert not CHINESE.search(english)
    assert english.count("\n\n") == chinese.count("\n\n")
    assert all(CHINESE.search(paragraph) for paragraph in chinese.split("\n\n"))
    # what is typed or read on the screen is the same in both
    assert set(re.findall(r"`(.+?)`", english)) == set(re.findall(r"`(.+?)`", chinese))


@each_file
def test_its_picture_holds_the_same_graph(path):
    picture = path.with_suffix(".png")
    found = workflow_png.embedded(picture)
    assert found == ui_workflow.read(path), "run python tests/nodes/workflow_png.py"
    assert picture.stat().st_size < 400_000


@each_file
def test_it_has_the_thumbnail_that_the_templates_menu_asks_for(path):
    thumbnail = path.with_suffix(".jpg")
    with workflow_png.Image.open(thumbnail) as image:
        assert image.format == "JPEG" and image.size == workflow_png.THUMBNAIL
    assert thumbnail.stat().st_size < 40_000


@pytest.mark.parametrize("path", ui_workflow.BLUEPRINTS, ids=lambda path: path.stem)
def test_a_blueprint_is_one_node_whose_sockets_lead_into_its_subgraph(path):
    blueprint = ui_workflow.read(path)
    (outer,), (inner,) = blueprint["nodes"], blueprint["definitions"]["subgraphs"]
    assert outer["type"] == inner["id"] and outer["title"] == inner["name"] == path.stem
    assert path.stem.startswith("Prune")  # the search looks at the start of a name
    nodes = {node["id"]: node for node in inner["nodes"]}
    nodes[-10] = {"outputs": inner["inputs"]}
    nodes[-20] = {"inputs": inner["outputs"]}
    known = set()
    for link in inner["links"]:
        source = nodes[link["origin_id"]]["outputs"][link["origin_slot"]]
        target = nodes[link["target_id"]]["inputs"][link["target_slot"]]
        assert source["type"] == link["type"] == target["type"]
        assert link["id"] in (source.get("links") or source["linkIds"])
        assert link["id"] in target.get("linkIds", [target.get("link")])
        known.add(link["id"])
    sockets = [*inner["inputs"], *inner["outputs"]]
    assert {link for socket in sockets for link in socket["linkIds"]} <= known
    assert all(socket["linkIds"] for socket in sockets)
    for sides in ("inputs", "outputs"):
        names = [(socket["name"], socket["type"]) for socket in inner[sides]]
        assert names == [(socket["name"], socket["type"]) for socket in outer[sides]]


def test_the_blueprints_are_there():
    assert len(ui_workflow.BLUEPRINTS) == 2


@pytest.mark.parametrize("page", sorted(workflow_png.HELP.glob("*.md")), ids=lambda p: p.stem)
def test_every_help_page_shows_its_node(page):
    """A picture beside the page, small, named like the node."""
    text = page.read_text(encoding="utf-8")
    assert f"![the node {text.splitlines()[0][2:]}]({page.stem}.png)" in text
    picture = page.with_suffix(".png")
    assert picture.stat().st_size < 60_000
    with workflow_png.Image.open(picture) as image:
        assert image.width > 300


def test_a_picture_without_a_graph_gets_one(tmp_path):
    plain, workflow = tmp_path / "plain.png", tmp_path / "small.json"
    workflow.write_text('{"nodes": [], "links": [], "extra": "\u00e9\u2713"}', encoding="utf-8")
    workflow_png.Image.new("RGB", (8, 6), (200, 20, 20)).save(plain)
    assert workflow_png.embedded(plain) is None
    written = workflow_png.embed(plain, workflow)
    assert workflow_png.embedded(written) == ui_workflow.read(workflow)
    with workflow_png.Image.open(written) as image:
        assert image.convert("RGB").getpixel((3, 3)) == (200, 20, 20)


@pytest.mark.parametrize("name", ["ldcp_basic", "ldcp_step_schedule"])
def test_the_two_samplers_side_by_side_differ_in_the_model_alone(name):
    workflow = ui_workflow.read(ui_workflow.FOLDER / f"{name}.json")
    origins = {link[0]: link[1:3] for link in workflow["links"]}
    first, second = find(workflow, "KSampler")
    assert first["widgets_values"] == second["widgets_values"]
    for a, b in zip(first["inputs"], second["inputs"], strict=True):
        same = origins[a["link"]] == origins[b["link"]]
        assert same == (a["name"] != "model")


def test_the_schedule_leaves_the_first_steps_to_the_full_model():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_step_schedule.json")
    (schedule,) = find(workflow, "LDCPStepSchedule")
    assert schedule["widgets_values"][:2] == ["steps", "5-"]


def origin(workflow, node, name):
    """(class, output) that an input of a node is connected to."""
    (link,) = (socket["link"] for socket in node["inputs"] if socket["name"] == name)
    source, output = next(entry[1:3] for entry in workflow["links"] if entry[0] == link)
    return next(n for n in workflow["nodes"] if n["id"] == source), output


def test_lora_and_controlnet_both_reach_the_pruned_sampler():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_lora_controlnet.json")
    (sampler,) = find(workflow, "KSampler")
    apply, _ = origin(workflow, sampler, "model")
    lora, output = origin(workflow, apply, "model")
    assert (apply["type"], lora["type"], output) == ("LDCPApplyDynamicPruning", "LoraLoader", 0)
    for output, prompt in enumerate(("positive", "negative")):
        control, found = origin(workflow, sampler, prompt)
        assert (control["type"], found) == ("ControlNetApplyAdvanced", output)
        text, _ = origin(workflow, control, prompt)
        assert origin(workflow, text, "clip") == (lora, 1)
    edges, _ = origin(workflow, control, "image")
    assert edges["type"] == "Canny" and origin(workflow, edges, "image")[0]["type"] == "LoadImage"


def test_the_estimated_gates_are_those_that_are_saved_and_applied():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_estimate_and_save.json")
    (save,), (apply,) = find(workflow, "LDCPSaveGates"), find(workflow, "LDCPApplyDynamicPruning")
    (sampler,) = find(workflow, "KSampler")
    estimated = origin(workflow, save, "gates")
    assert estimated[0]["type"] == "LDCPEstimateGates"
    assert origin(workflow, apply, "gates") == estimated
    assert origin(workflow, sampler, "model")[0] == apply


def test_the_calibration_and_the_pruned_run_sample_the_same():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_calibrate.json")
    (calibrate,), (sampler,) = find(workflow, "LDCPCalibrateGates"), find(workflow, "KSampler")
    for name in ("positive", "negative", "latent_image"):
        assert origin(workflow, calibrate, name) == origin(workflow, sampler, name)
    # seed, steps, cfg, sampler, scheduler, denoise; the canvas adds "fixed" below KSampler's seed
    seed, fixed, *settings = sampler["widgets_values"]
    assert calibrate["widgets_values"][:6] == [seed, *settings] and fixed == "fixed"
    apply, _ = origin(workflow, sampler, "model")
    assert origin(workflow, apply, "gates") == (calibrate, 0)
    watched, calibrated = find(workflow, "SaveImage")
    assert origin(workflow, origin(workflow, watched, "images")[0], "samples") == (calibrate, 1)
    assert origin(workflow, origin(workflow, calibrated, "images")[0], "samples")[0] == sampler


def test_the_compared_shares_are_of_the_model_that_the_gates_are_made_of():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_compare_sparsities.json")
    (compare,), (save,) = find(workflow, "LDCPCompareShares"), find(workflow, "SaveImage")
    gates, _ = origin(workflow, compare, "gates")
    assert gates["type"] == "LDCPEstimateGates"
    assert origin(workflow, gates, "model") == origin(workflow, compare, "model")
    # shares, schedules, seed, steps, as in the other workflows
    assert compare["widgets_values"][:4] == ["0.1, 0.3, 0.5", "", 20150, 20]
    assert origin(workflow, save, "images") == (compare, 1)


def test_the_report_is_on_the_model_that_was_sampled_and_comes_after_it():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_report.json")
    origins = {link[0]: link[1:3] for link in workflow["links"]}
    (report,), (sampler,) = find(workflow, "LDCPPruningReport"), find(workflow, "KSampler")
    (apply,) = find(workflow, "LDCPApplyDynamicPruning")
    inputs = {socket["name"]: socket["link"] for socket in report["inputs"]}
    sampled = {socket["name"]: socket["link"] for socket in sampler["inputs"]}
    assert origins[inputs["model"]] == origins[sampled["model"]] == [apply["id"], 0]
    assert origins[inputs["after"]] == [sampler["id"], 0]
    assert inputs["gates"] is None  # with gates it would report on these, and measure nothing


def test_the_basic_workflow_is_an_app_as_well():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_basic.json")
    app, nodes = workflow["extra"]["linearData"], {str(n["id"]): n for n in workflow["nodes"]}
    shown = [(nodes[number]["type"], name) for number, name in app["inputs"]]
    assert shown[0] == ("CheckpointLoaderSimple", "ckpt_name")  # what a user must choose
    assert {("LDCPEstimateGates", "sparsity"), ("LDCPEstimateGates", "scope")} <= {*shown}
    assert [nodes[number]["type"] for number in app["outputs"]] == ["SaveImage", "SaveImage"]
    assert "linearMode" not in workflow["extra"]  # it opens as a graph


def test_every_range_that_the_note_suggests_can_be_read():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_step_schedule.json")
    note, _ = find(workflow, "MarkdownNote")
    ranges = re.findall(r"`(\d[\d,\- ]*)`", note["widgets_values"][0])
    assert len(ranges) == 4
    for text in ranges:
        Schedule.steps(text)
