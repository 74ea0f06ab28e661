"""What can be checked in the shipped workflow files without a ComfyUI."""

from __future__ import annotations

import json
import re

import pytest
import ui_workflow
import workflow_png

from ldcp_core import Schedule

each_file = pytest.mark.parametrize("path", ui_workflow.FILES, ids=lambda path: path.stem)


def find(workflow, node_type):
    return [node for node in workflow["nodes"] if node["type"] == node_type]


def test_the_workflows_are_there():
    names = {"ldcp_basic", "ldcp_step_schedule", "ldcp_report"}
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
    assert set(workflow["extra"]) == {"ds", "frontendVersion"}
    assert not re.search(r"[A-Za-z]:\\|/home/|/root/|/Users/|/tmp/|127\.0\.0", json.dumps(workflow))


@each_file
def test_it_starts_as_a_user_would_and_says_what_to_do(path):
    workflow = ui_workflow.read(path)
    (checkpoint,) = find(workflow, "CheckpointLoaderSimple")
    (gates,) = find(workflow, "LDCPLoadGates")
    (latent,) = find(workflow, "EmptyLatentImage")
    (note,) = find(workflow, "MarkdownNote")
    assert checkpoint["widgets_values"] == ["v1-5-pruned-emaonly.safetensors"]
    assert gates["widgets_values"] == ["gates.safetensors"]
    assert latent["widgets_values"] == [512, 512, 1]
    for sampler in find(workflow, "KSampler"):
        assert sampler["widgets_values"][1:3] == ["fixed", 20]
    for word in ("training.fit", "models/ldcp_gates", "11%", "1.5%"):
        assert word in note["widgets_values"][0]


@each_file
def test_its_picture_holds_the_same_graph(path):
    picture = path.with_suffix(".png")
    found = workflow_png.embedded(picture)
    assert found == ui_workflow.read(path), "run python tests/nodes/workflow_png.py"
    assert picture.stat().st_size < 400_000


def test_a_picture_without_a_graph_gets_one(tmp_path):
    plain, workflow = tmp_path / "plain.png", tmp_path / "small.json"
    workflow.write_text('{"nodes": [], "links": [], "extra": "\u00e9\u2713"}', encoding="utf-8")
    workflow_png.Image.new("RGB", (8, 6), (200, 20, 20)).save(plain)
    assert workflow_png.embedded(plain) is None
    written = workflow_png.embed(plain, workflow)
    assert workflow_png.embedded(written) == ui_workflow.read(workflow)
    with workflow_png.Image.open(written) as image:
        assert image.convert("RGB").getpixel((3, 3)) == (200, 20, 20)


def test_the_two_samplers_side_by_side_differ_in_the_model_alone():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_step_schedule.json")
    origins = {link[0]: link[1:3] for link in workflow["links"]}
    first, second = find(workflow, "KSampler")
    assert first["widgets_values"] == second["widgets_values"]
    for a, b in zip(first["inputs"], second["inputs"], strict=True):
        same = origins[a["link"]] == origins[b["link"]]
        assert same == (a["name"] != "model")
    (schedule,) = find(workflow, "LDCPStepSchedule")
    assert schedule["widgets_values"][:2] == ["steps", "5-"]


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


def test_every_range_that_the_note_suggests_can_be_read():
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_step_schedule.json")
    (note,) = find(workflow, "MarkdownNote")
    ranges = re.findall(r"`(\d[\d,\- ]*)`", note["widgets_values"][0])
    assert len(ranges) == 4
    for text in ranges:
        Schedule.steps(text)
