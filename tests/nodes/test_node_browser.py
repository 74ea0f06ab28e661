"""The shipped workflows and the nodes' help in a real browser on a real server.

What a user does between two runs must not show in the images: queued again, bypassed, brought
back, another sparsity, other steps. Each image is compared with the one that a server gave which
had never run anything else. ``LDCP_TEST_PICTURES`` names a folder to keep the screenshots in.
"""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import browser
import comfy_server
import full_addons
import numpy
import pytest
import ui_workflow
from PIL import Image

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "nodes" / "web" / "docs"
PIXELS = 128  # the mid block sees 2x2
APPLY, COMPARE = "LDCPApplyDynamicPruning", "LDCPCompareShares"
CALIBRATE = "LDCPCalibrateGates"
RESIDENT = r"gated layers on cpu: [\d.]+ MiB resident, [\d.]+ MiB in full"


@pytest.fixture(scope="module")
def start(needs_browser, comfy, comfyui_path, tmp_path_factory, sd15_checkpoint, make_gates):
    """Make a server with the models and gates that the workflows name."""
    # large constants: in a random U-Net the mid block alone hardly reaches the 8 bits of an image
    gates = make_gates(topology=comfy.core.SD15, constants=20.0)

    def make(name):
        base = tmp_path_factory.mktemp(name) / "base"
        comfy_server.prepare_folder(base, REPOSITORY, sd15_checkpoint)
        full_addons.add_to(base, comfyui_path)
        stages = (comfy.core.Stage(0.0, 0.25), comfy.core.Stage(0.5, None))
        for name, found in (("gates", gates), ("staged", replace(gates, stages=stages))):
            file = base / "models" / "ldcp_gates" / f"{name}.safetensors"
            comfy.core.save_gates(found, file)
        return comfy_server.Server(comfyui_path, base)

    return make


@pytest.fixture(scope="module")
def expected(start):
    """Name -> pixels of the basic workflow on a fresh server, asked without a browser."""
    changes = {
        "pruned": {},
        "nothing pruned": {APPLY: {"sparsity": 0.0, "channels": "a share"}},
        "80%": {APPLY: {"sparsity": 0.8, "channels": "a share"}},
        "two steps": {"KSampler": {"steps": 2}},
    }
    found = {}
    with start("fresh") as server:
        schemas = server.schemas()
        workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_basic.json")
        for name, widgets in changes.items():
            prompt = ui_workflow.to_prompt(workflow, schemas)
            ui_workflow.load_gates(prompt)
            size = {"width": PIXELS, "height": PIXELS}
            ui_workflow.set_widgets(prompt, EmptyLatentImage=size, KSampler={"steps": 1})
            ui_workflow.set_widgets(prompt, **widgets)
            found[name] = pixels(server.run(prompt).files["LDCP_pruned"])
            server.post("/free", {"unload_models": True, "free_memory": True})
    names = list(found)
    for i, one in enumerate(names):
        for other in names[:i]:
            assert difference(found[one], found[other]) > 0, (one, other)
    return found


@pytest.fixture(scope="module")
def server(start):
    """The server that the browser uses."""
    with start("browser") as running:
        yield running


@pytest.fixture
def page(server):
    with browser.Browser(server) as opened:
        opened.use_nodes_2(False)
        yield opened


@pytest.fixture
def loading(tmp_path):
    """Where a shipped workflow lies that loads its gates from a file.

    The basic one also without what the full model draws.
    """

    def write(name, full_model=True):
        path = tmp_path / f"{name}.json"
        workflow = ui_workflow.with_gate_file(ui_workflow.read(ui_workflow.FOLDER / path.name))
        if not full_model:
            ui_workflow.remove(workflow, *range(11, 14))
        path.write_text(json.dumps(workflow), encoding="utf-8")
        return path

    return write


@pytest.fixture
def pictures(tmp_path):
    """Where screenshots are kept."""
    folder = Path(os.environ.get("LDCP_TEST_PICTURES") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def keep(pictures):
    """Keep a screenshot; where."""
    return lambda page, name, *node_type: page.picture(pictures / f"{name}.png", *node_type)


def pixels(file):
    return numpy.array(Image.open(io.BytesIO(file))).astype(int)


def difference(one, other):
    return int(numpy.abs(one - other).max())


def make_small(page, steps=1):
    page.set_all("EmptyLatentImage", width=PIXELS, height=PIXELS)
    page.set_all("KSampler", steps=steps)
    page.set_all("LDCPCalibrateGates", steps=steps)
    page.set_all(COMPARE, steps=steps)


def apart(page):
    """No node lies on another one."""
    boxes = page.room()
    for i, (one, left, top, right, bottom) in enumerate(boxes):
        for other, x0, y0, x1, y1 in boxes[:i]:
            separate = right <= x0 or x1 <= left or bottom <= y0 or y1 <= top
            assert separate, f"nodes {one} and {other} overlap: {boxes}"


def in_order(state):
    """No node is unknown or marked red, every link joins two sockets, no dialog is open."""
    assert all(node["known"] and not node["red"] for node in state["nodes"]), state["nodes"]
    assert all(link["whole"] for link in state["links"])
    assert state["dialogs"] == []


def test_what_happens_between_two_runs_does_not_show_in_the_images(expected, page, loading):
    # first in this file: the server that gives what is expected has ended before this one starts
    page.drop(loading("ldcp_basic"))
    make_small(page)

    def queued():
        return pixels(page.images(page.queue())["LDCP_pruned"])

    def forget():
        """Another run in between, so that the next one is computed and not remembered."""
        page.set_widgets("KSampler", seed=1)
        other = queued()
        page.set_widgets("KSampler", seed=20150)
        return other

    def mode():
        (node,) = (n for n in page.state()["nodes"] if n["type"] == APPLY)
        return node["mode"]

    assert difference(queued(), expected["pruned"]) == 0
    assert difference(queued(), expected["pruned"]) == 0  # queued again, nothing changed
    assert difference(forget(), expected["pruned"]) > 10
    assert difference(queued(), expected["pruned"]) == 0  # the same patched model once more

    page.press("Control+b", APPLY)
    assert mode() == 4  # bypassed
    assert difference(queued(), expected["nothing pruned"]) == 0
    page.press("Control+b", APPLY)
    assert mode() == 0
    assert difference(queued(), expected["pruned"]) == 0

    page.set_widgets(APPLY, sparsity=0.8, channels="a share")
    assert difference(queued(), expected["80%"]) == 0
    page.set_widgets(APPLY, sparsity=0.0)
    assert difference(queued(), expected["nothing pruned"]) == 0
    page.set_widgets(APPLY, channels="as learned")
    assert difference(queued(), expected["pruned"]) == 0

    page.set_widgets("KSampler", steps=2)
    assert difference(queued(), expected["two steps"]) == 0
    page.set_widgets("KSampler", steps=1)
    assert difference(queued(), expected["pruned"]) == 0


def test_muted_and_deleted_nodes_leave_nothing_behind(expected, page, loading):
    page.drop(loading("ldcp_basic", full_model=False))  # so that nothing can run without Apply
    make_small(page)

    def queued():
        return pixels(page.images(page.queue())["LDCP_pruned"])

    assert difference(queued(), expected["pruned"]) == 0

    page.press("Control+m", APPLY)  # a muted node gives no model, and ComfyUI says so
    with pytest.raises(RuntimeError, match="refused"):
        page.queue()
    page.close_dialogs()
    page.press("Control+m", APPLY)
    assert difference(queued(), expected["pruned"]) == 0

    page.press("Delete", APPLY)  # the canvas joins what was before and behind it
    assert APPLY not in [node["type"] for node in page.state()["nodes"]]
    assert difference(queued(), expected["nothing pruned"]) == 0
    page.keys("Control+z")
    assert APPLY in [node["type"] for node in page.state()["nodes"]]
    assert difference(queued(), expected["pruned"]) == 0


@pytest.mark.parametrize("path", ui_workflow.FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("suffix", [".json", ".png"])
def test_a_dropped_workflow_opens_as_it_was_saved_and_runs_to_the_end(
    page, keep, pictures, path, suffix
):
    page.drop(path.with_suffix(suffix))
    workflow, state = ui_workflow.read(path), page.state()
    in_order(state)
    assert len(state["links"]) == len(workflow["links"])
    opened = {int(node["id"]): node for node in state["nodes"]}  # newer frontends: a string
    for node in workflow["nodes"]:
        assert opened[node["id"]]["type"] == node["type"]
        if node["type"] not in ui_workflow.CANVAS_ONLY:
            widgets = opened[node["id"]]["widgets"].values()
            saved = node.get("widgets_values", [])
            assert list(widgets)[: len(saved)] == saved
    if suffix == ".png":  # the same graph: one run is enough
        return
    make_small(page, steps=6 if path.stem == "ldcp_step_schedule" else 1)  # which prunes from 5
    run = page.queue()
    in_order(page.state())
    apart(page)
    saved = [n for n in workflow["nodes"] if n["type"] == "SaveImage"]
    images = page.images(run)
    for node in saved:
        assert pixels(images[node["widgets_values"][0]]).shape == (PIXELS, PIXELS, 3)
    assert page.picture_of_graph(pictures / f"{path.stem}.png").stat().st_size > 50_000
    if "LDCP_TEST_PICTURES" in os.environ:
        for own in {n["type"] for n in state["nodes"] if n["type"].startswith("LDCP")}:
            keep(page, own, own)
    if page.use_nodes_2(True):
        apart(page)
        page.picture_of_graph(pictures / f"{path.stem}_nodes_2.png")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_every_line_on_a_node_is_seen_also_what_the_run_noticed(page, keep, loading, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    page.drop(loading("ldcp_step_schedule"))
    make_small(page, steps=8)
    page.set_widgets("LDCPStepSchedule", steps="0-3, 99")
    page.set_all("KSampler", seed=int(nodes_2))  # Apply may be cached; a run is not
    page.room()  # brings all nodes in sight
    live = []

    def look():
        lines = page.lines("4 sites")
        if not any(line.startswith("now ") for line in lines):
            return
        if not live:
            keep(page, f"live_{'nodes_2' if nodes_2 else 'classic'}")
        live.extend(lines)

    page.queue(look)
    steps = [line for line in live if line.startswith("now ")]
    assert {line.split(";")[0] for line in steps} == {"now pruned", "now in full"}, live
    assert all(re.search(r" evaluations pruned so far, [\d.]+ s$", line) for line in steps), live
    assert any(re.fullmatch(RESIDENT, line) for line in live), live
    assert not any("this run has" in line for line in live), live  # nor what an earlier run noticed
    text = page.text("4 sites")
    assert [line.split(" ", 2)[:2] for line in text["lines"][:2]] == [
        ["4", "sites,"],
        ["113.8", "MiB"],
    ]
    schedule, run, resident, stayed, note = text["lines"][2:]
    assert schedule == "steps 0-3, 99"
    assert run.startswith("steps 0-3 of 8 ran pruned (4 of 8 evaluations), ")
    assert re.fullmatch(RESIDENT, resident) and "share one memory" in stayed
    assert note == (
        "this run has 8 steps (0 to 7); the range 99 lies past the last one and prunes nothing"
    )
    assert text["cut"] <= 1
    apart(page)
    keep(page, f"notes_{'nodes_2' if nodes_2 else 'classic'}")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_gates_in_stages_say_what_each_stage_prunes(page, keep, loading, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    page.drop(loading("ldcp_basic", full_model=False))
    make_small(page, steps=4)
    page.set_widgets("LDCPLoadGates", gates_name="staged.safetensors")
    page.set_all("KSampler", seed=int(nodes_2))
    page.queue()
    text = page.text("4 sites")
    pruned, left_out, stages, run = text["lines"][:4]
    assert re.fullmatch(r"4 sites, 25\.\d%, then \d\d\.\d% pruned", pruned)
    assert re.fullmatch(r"[\d.]+, then [\d.]+ MiB of weights left out \(counted\)", left_out)
    assert stages == "0%-50%, then 50%-100%"
    assert run.startswith("steps 0-3 of 4 ran pruned (4 of 4 evaluations), ")
    assert text["cut"] <= 1
    apart(page)
    keep(page, f"stages_{'nodes_2' if nodes_2 else 'classic'}")


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_a_workflow_without_channels_opens_as_it_was_meant(page, tmp_path, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_basic.json")
    (apply,) = (node for node in workflow["nodes"] if node["type"] == APPLY)
    for saved, sparsity, channels in (
        ([-1, "auto", ""], 0.3, "as learned"),
        ([0.5, "keep", "mid"], 0.5, "a share"),
        # ComfyUI 0.3.64 saves what the node shows as if it were a widget
        ([-1, "auto", "", "4 sites, 50.0% pruned"], 0.3, "as learned"),
        ([0, "auto", "", "4 sites, 0.0% pruned"], 0, "a share"),
        ([0.5, "auto", "", "as learned"], 0.5, "as learned"),
    ):
        apply["widgets_values"] = saved
        path = tmp_path / "old.json"
        path.write_text(json.dumps(workflow), encoding="utf-8")
        page.drop(path)
        (opened,) = (n["widgets"] for n in page.state()["nodes"] if n["type"] == APPLY)
        rest = dict(zip(("full_weights", "sites"), saved[1:3], strict=True))
        assert opened == {"sparsity": sparsity, **rest, "channels": channels}


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_a_workflow_without_corrections_makes_none(page, tmp_path, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_calibrate.json")
    (node,) = (n for n in workflow["nodes"] if n["type"] == CALIBRATE)
    *before, _ = node["widgets_values"]
    # ComfyUI 0.3.64 saves what the node shows as if it were a widget
    for saved, opened in (([], False), (["4 sites"], False), ([False], False), ([True], True)):
        node["widgets_values"] = [*before, *saved]
        path = tmp_path / "old.json"
        path.write_text(json.dumps(workflow), encoding="utf-8")
        page.drop(path)
        (found,) = (n["widgets"] for n in page.state()["nodes"] if n["type"] == CALIBRATE)
        assert list(found.values())[: len(before) + 1] == [*before, opened]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_the_workflows_of_version_0_1_0_open_as_they_were_meant(page, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    for path in sorted((Path(__file__).parent / "golden").glob("*.json")):
        page.drop(path)
        workflow, state = ui_workflow.read(path), page.state()
        in_order(state)
        assert len(state["links"]) == len(workflow["links"])
        saved, opened = ([n for n in w["nodes"] if n["type"] == APPLY] for w in (workflow, state))
        assert saved
        for before, now in zip(saved, opened, strict=True):
            sparsity, *rest = before["widgets_values"]
            learned = sparsity == -1
            assert list(now["widgets"].values()) == [
                0.3 if learned else sparsity,
                *rest,
                "as learned" if learned else "a share",
            ]


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_a_dropped_prompt_without_channels_opens_as_it_was_meant(page, tmp_path, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    plain = {"full_weights": "auto", "sites": ""}
    for inputs, sparsity, channels in (
        ({"sparsity": -1, **plain}, 0.3, "as learned"),
        ({"sparsity": 0.5, **plain}, 0.5, "a share"),
        ({"sparsity": 0, **plain}, 0, "a share"),
        ({"sparsity": 0.5, **plain, "channels": "as learned"}, 0.5, "as learned"),
        ({"sparsity": 0.5, **plain, "channels": "a share"}, 0.5, "a share"),
        ({"channels": "as learned", "sparsity": 0.5, **plain}, 0.5, "as learned"),
    ):
        path = tmp_path / "prompt.json"
        path.write_text(json.dumps({"4": {"class_type": APPLY, "inputs": inputs}}))
        page.drop(path)
        (opened,) = (n["widgets"] for n in page.state()["nodes"] if n["type"] == APPLY)
        assert opened == {"sparsity": sparsity, **plain, "channels": channels}


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_what_a_node_in_a_closed_subgraph_has_to_say_is_said_in_a_toast(page, keep, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    page.drop(ui_workflow.FOLDER / "ldcp_step_schedule.json")
    make_small(page)
    page.set_widgets("LDCPStepSchedule", steps="0, 99")
    page.set_all("KSampler", seed=70 + nodes_2)
    told = []

    def look():  # a toast goes after a while, on a slow machine before the run ends
        told.append(page.toasts())
        if told[-1] and not any(told[:-1]):
            keep(page, f"toast_{'nodes_2' if nodes_2 else 'classic'}")

    page.queue(look)
    look()
    assert not any(told)  # it is on the node
    page.set_all("KSampler", seed=80 + nodes_2)
    page.enclose("LDCPEstimateGates", "LDCPStepSchedule", APPLY)
    page.queue(look)
    look()
    note = "this run has 1 step (0 to 0); the range 99 lies past the last one and prunes nothing"
    said = [f"Apply Dynamic Pruning {note}"]
    assert said in told and all(texts in ([], said) for texts in told)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_shares_and_schedules_are_compared_in_one_labelled_grid(page, keep, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    page.drop(ui_workflow.FOLDER / "ldcp_compare_sparsities.json")
    make_small(page, steps=2)
    page.set_widgets(COMPARE, shares="0.3, 0.5", schedules="0-\n0", seed=90 + nodes_2)
    run = page.queue()
    full, *rest = page.text("full model")["lines"]
    assert re.fullmatch(r"full model, [\d.]+ s", full)
    figures = r".*, [\d.]+ s, [\d.]+ of full, weights: .*, RMSE [\d.]+ of 255"
    named = ["share 0.3", "share 0.5", "share 0.3 in steps? 0", "share 0.5 in steps? 0"]
    for line, name in zip(rest[:4], named, strict=True):
        assert re.fullmatch(name + figures, line), rest
    (compare,) = (str(n["id"]) for n in page.state()["nodes"] if n["type"] == COMPARE)
    assert len(run["outputs"][compare]["images"]) == 1  # the grid
    keep(page, f"grid_{'nodes_2' if nodes_2 else 'classic'}")


def test_a_refusal_reaches_the_user(page):
    page.drop(ui_workflow.FOLDER / "ldcp_report.json")  # where nothing can run without Apply
    page.set_widgets(APPLY, sites="nowhere")
    with pytest.raises(RuntimeError, match="unknown scope or site 'nowhere'"):
        page.queue()


@pytest.mark.parametrize("page_of", sorted(DOCS.glob("*.md")), ids=lambda path: path.stem)
def test_the_help_page_opens_with_its_picture(page, keep, page_of):
    page.add(page_of.stem)
    page.open_help(page_of.stem)
    title, pictures = page.help()
    assert title == page_of.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    assert pictures and all(width > 100 for width in pictures)
    keep(page, f"help_{page_of.stem}")
