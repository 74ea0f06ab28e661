"""The first minute of a new user, in a real browser: this pack, one checkpoint, no gate file.

The checkpoint has another name than the one that the workflows were saved with.
"""

from __future__ import annotations

import json
import time

import browser
import comfy_server
import full_addons
import pytest
import ui_workflow
from test_node_browser import PIXELS, REPOSITORY, in_order, make_small, pixels

pytestmark = pytest.mark.comfyui
CHECKPOINT = "my_own_model.safetensors"
SECONDS = 10  # from the drop to the queue


@pytest.fixture(scope="module")
def server(needs_browser, comfy, comfyui_path, tmp_path_factory, sd15_checkpoint):
    base = tmp_path_factory.mktemp("fresh") / "base"
    comfy_server.prepare_folder(base, REPOSITORY, sd15_checkpoint)
    (saved,) = (base / "models" / "checkpoints").iterdir()
    saved.rename(saved.with_name(CHECKPOINT))
    full_addons.add_to(base, comfyui_path)
    assert not list((base / "models" / "ldcp_gates").iterdir())
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


@pytest.fixture(scope="module")
def opened(server):
    with browser.Browser(server) as page:
        yield page


@pytest.fixture
def page(opened):
    opened.use_nodes_2(False)
    return opened


def choose_checkpoint(page):
    page.set_all("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    page.forgive()  # newer frontends mark a missing file, until it is chosen with the mouse


def stop(server):
    """End what is queued; a run that has just begun takes no notice of the first call."""
    while any(json.loads(server.get("/queue")).values()):
        server.post("/interrupt", {})
        time.sleep(0.2)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_the_basic_workflow_is_queued_ten_seconds_after_the_drop(page, server, keep, nodes_2):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    begun = time.monotonic()
    page.drop(ui_workflow.FOLDER / "ldcp_basic.json")
    keep(page, f"dropped_{'nodes_2' if nodes_2 else 'classic'}")
    choose_checkpoint(page)
    answer = page.send()
    seconds = time.monotonic() - begun
    keep(page, f"queued_{'nodes_2' if nodes_2 else 'classic'}")
    stop(server)
    print(f"{seconds:.1f} s from the drop to the queue")
    assert answer.status == 200 and answer.json()["node_errors"] == {}
    in_order(page.state())
    assert seconds < SECONDS


@pytest.mark.parametrize("path", ui_workflow.FILES, ids=lambda path: path.stem)
def test_a_shipped_workflow_runs_to_its_images_with_nothing_chosen_but_the_checkpoint(page, path):
    page.drop(path)
    choose_checkpoint(page)
    make_small(page)
    images = page.images(page.queue())
    in_order(page.state())
    saved = [n for n in ui_workflow.read(path)["nodes"] if n["type"] == "SaveImage"]
    assert saved
    for node in saved:
        assert pixels(images[node["widgets_values"][0]]).shape == (PIXELS, PIXELS, 3)


@pytest.mark.parametrize("nodes_2", [False, True], ids=["classic", "Nodes 2.0"])
def test_the_message_of_a_missing_gate_file_says_first_how_to_do_without_training(
    page, keep, tmp_path, nodes_2
):
    if not page.use_nodes_2(nodes_2):
        pytest.skip("this frontend has no Nodes 2.0")
    workflow = ui_workflow.with_gate_file(
        ui_workflow.read(ui_workflow.FOLDER / "ldcp_report.json")  # no image without gates
    )
    path = tmp_path / "missing.json"
    path.write_text(json.dumps(workflow), encoding="utf-8")
    page.drop(path)
    choose_checkpoint(page)
    with pytest.raises(RuntimeError, match="no gate file 'gates.safetensors'") as refused:
        page.queue()
    page.show("no gate file 'gates.safetensors'")
    keep(page, f"missing_gate_file_{'nodes_2' if nodes_2 else 'classic'}")
    message = str(refused.value)
    without = message.index("make gates without training: put Estimate Gates from Model")
    assert without < message.index("put a gate file made by training.fit")
