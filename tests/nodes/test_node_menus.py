"""What a user finds in ComfyUI's own menus, in a real browser on a real server.

The templates menu, the box that adds nodes, and the blueprints of the node library.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from urllib.error import HTTPError

import browser
import comfy_server
import full_addons
import numpy
import pytest
import ui_workflow
from PIL import Image

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
PIXELS = 128
APPLY = "LDCPApplyDynamicPruning"
ESTIMATE, COMPARE = "Prune - Estimate, Save, Apply", "Prune - Compare with Full Model"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="module")
def server(needs_browser, comfy, comfyui_path, base, sd15_checkpoint):
    comfy_server.prepare_folder(base, REPOSITORY, sd15_checkpoint)
    full_addons.add_to(base, comfyui_path)
    with comfy_server.Server(comfyui_path, base) as running:
        yield running


@pytest.fixture
def page(server):
    with browser.Browser(server) as opened:
        opened.use_nodes_2(False)
        yield opened


def difference(one, other):
    """The largest difference of two image files, in steps of their 8 bits."""
    one, other = (numpy.array(Image.open(io.BytesIO(file))).astype(int) for file in (one, other))
    return int(numpy.abs(one - other).max())


def in_order(state, workflow):
    """The nodes of the workflow are there, known, and joined by whole links; nothing is red."""
    opened = sorted(node["type"] for node in state["nodes"])
    assert opened == sorted(node["type"] for node in workflow["nodes"])
    assert all(node["known"] and not node["red"] for node in state["nodes"]), state["nodes"]
    assert all(link["whole"] for link in state["links"])
    assert len(state["links"]) == len(workflow["links"]) and state["dialogs"] == []


def test_the_tiles_of_the_templates_menu_have_pictures_and_open_their_workflows(page, keep):
    page.open_templates("LDCP")
    widths = page.tiles()
    keep(page, "templates")
    assert set(widths) == {file.stem for file in ui_workflow.FILES}
    assert all(width > 100 for width in widths.values()), widths
    for file in ui_workflow.FILES:
        page.open_template(file.stem)
        in_order(page.state(), ui_workflow.read(file))
        page.open_templates("LDCP")


def test_the_search_finds_the_node_that_prunes(page, keep):
    for word in ("prune", "speed", "channel"):
        found = page.search(word)
        keep(page, f"search_{word}")
        assert any("Apply Dynamic Pruning" in name for name in found), (word, found)
        page.keys("Escape")


@pytest.fixture(params=["classic", "nodes_2"])
def drawn(request, page):
    """How nodes are drawn, for the names of pictures."""
    if not page.use_nodes_2(request.param == "nodes_2"):
        pytest.skip("this frontend has no Nodes 2.0")
    return request.param


@pytest.fixture
def blueprint(page, server):
    """Put a blueprint between the checkpoint and the images of the basic workflow."""
    try:
        server.get("/global_subgraphs")
    except HTTPError:
        pytest.skip("this ComfyUI does not offer the blueprints of node packs")

    def place(name):
        page.drop(ui_workflow.FOLDER / "ldcp_basic.json")
        page.remove("LDCPEstimateGates", APPLY, "MarkdownNote")
        assert name in page.search("prune")
        page.choose(name)
        page.connect(("CheckpointLoaderSimple", 0), "MODEL", (name, 0), "model")
        page.set_all("EmptyLatentImage", width=PIXELS, height=PIXELS)

    return place


def test_the_blueprint_that_estimates_saves_and_applies_runs(page, keep, drawn, blueprint, base):
    blueprint(ESTIMATE)
    page.connect((ESTIMATE, 0), "MODEL", ("KSampler", 0), "model")
    page.set_all("KSampler", steps=1)
    page.set_widgets(ESTIMATE, sparsity=0.9, scope="all", filename_prefix=f"{drawn}/gates")
    images = page.images(page.queue())
    keep(page, f"blueprint_estimate_{drawn}")
    assert difference(images["LDCP_pruned"], images["LDCP_full"]) > 0
    assert (base / "models/ldcp_gates" / drawn / "gates_00001.safetensors").is_file()


def test_the_blueprint_that_compares_samples_the_same_but_for_the_pruning(
    page, keep, drawn, blueprint
):
    blueprint(COMPARE)
    page.remove("KSampler", "VAEDecode")
    page.connect(("CheckpointLoaderSimple", 0), "VAE", (COMPARE, 0), "vae")
    page.connect(("EmptyLatentImage", 0), "LATENT", (COMPARE, 0), "latent_image")
    for number, name in enumerate(("positive", "negative")):
        page.connect(("CLIPTextEncode", number), "CONDITIONING", (COMPARE, 0), name)
    for number, name in enumerate(("pruned", "full")):
        page.connect((COMPARE, 0), name, ("SaveImage", number), "images")
    page.set_widgets(COMPARE, steps=1, scope="all", sparsity=0.0, seed=5)
    images = page.images(page.queue())
    assert difference(images["LDCP_pruned"], images["LDCP_full"]) == 0
    page.set_widgets(COMPARE, sparsity=0.9)
    images = page.images(page.queue())
    keep(page, f"blueprint_compare_{drawn}")
    assert difference(images["LDCP_pruned"], images["LDCP_full"]) > 0


def test_the_basic_workflow_runs_in_app_mode(page, keep):
    if not page.has_command("Comfy.ToggleLinear"):
        pytest.skip("this frontend has no app mode")
    page.drop(ui_workflow.FOLDER / "ldcp_basic.json")
    page.set_all("EmptyLatentImage", width=PIXELS, height=PIXELS)
    page.set_all("KSampler", steps=1)
    page.open_app()
    names = ["ckpt_name", "prompt", "negative prompt", "sparsity", "scope", "width", "height"]
    assert [line for line in page.app_inputs() if line in names] == names
    images = page.images(page.queue(start=page.run_app))
    keep(page, "app")
    assert {"LDCP_pruned", "LDCP_full"} == {*images}
    assert page.app_outputs() >= 2


@pytest.fixture
def chinese(page):
    page.use_language("zh")
    yield page
    page.use_language("en")


def test_names_tooltips_and_help_are_chinese_in_a_chinese_comfyui(chinese, keep, drawn):
    assert "应用动态剪枝" in chinese.search("剪枝")
    keep(chinese, f"search_zh_{drawn}")
    chinese.keys("Escape")
    chinese.add(APPLY)
    texts = json.loads((REPOSITORY / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))
    told = texts[APPLY]["inputs"]["full_weights"]["tooltip"]
    assert chinese.tooltip(APPLY, "full_weights") == told
    keep(chinese, f"tooltip_zh_{drawn}")
    chinese.open_help(APPLY)
    title, pictures = chinese.help()
    keep(chinese, f"help_zh_{drawn}")
    assert title == "应用动态剪枝" and pictures and all(width > 100 for width in pictures)


def test_a_shipped_workflow_is_chinese_in_a_chinese_comfyui(chinese, keep, drawn):
    chinese.drop(ui_workflow.FOLDER / "ldcp_basic.json")
    keep(chinese, f"dropped_zh_{drawn}")
    titles = {node["type"]: node["title"] for node in chinese.state()["nodes"]}
    assert titles[APPLY] == "应用动态剪枝" and titles["LDCPEstimateGates"] == "从模型估算门控"
    assert chinese.lines("采样时对 Stable Diffusion 剪枝")
