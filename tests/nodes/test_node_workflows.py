"""The shipped workflow files against ComfyUI's own nodes: nothing missing, nothing out of range."""

from __future__ import annotations

import asyncio

import pytest
import ui_workflow

pytestmark = pytest.mark.comfyui
each_file = pytest.mark.parametrize("path", ui_workflow.FILES, ids=lambda path: path.stem)


@pytest.fixture
def schemas(comfy, comfyui_path, monkeypatch, tmp_path):
    """The inputs of every node, with the files that the workflows name in their folders."""
    for folder, name in (
        ("checkpoints", "v1-5-pruned-emaonly.safetensors"),
        ("ldcp_gates", "gates.safetensors"),
        ("loras", "lora.safetensors"),
        ("controlnet", "control_v11p_sd15_canny_fp16.safetensors"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
        known = comfy.folder_paths.folder_names_and_paths
        monkeypatch.setitem(known, folder, ([str(tmp_path / folder)], {".safetensors"}))
    classes = comfy.nodes.NODE_CLASS_MAPPINGS
    if "Canny" not in classes:  # one of the nodes that only a whole ComfyUI loads
        extra = comfyui_path / "comfy_extras" / "nodes_canny.py"
        assert asyncio.run(comfy.nodes.load_custom_node(str(extra), module_parent="comfy_extras"))
    types = {node["type"] for path in ui_workflow.FILES for node in ui_workflow.read(path)["nodes"]}
    return {name: classes[name].INPUT_TYPES() for name in types - ui_workflow.CANVAS_ONLY}


@each_file
def test_every_node_exists_with_these_sockets(comfy, schemas, path):
    for node in ui_workflow.read(path)["nodes"]:
        if node["type"] in ui_workflow.CANVAS_ONLY:
            continue
        declared = ui_workflow.declared(schemas[node["type"]])
        for socket in node["inputs"]:
            assert declared[socket["name"]][0] == socket["type"]
        # newer hosts may offer more: an output added at the end breaks no link
        offered = comfy.nodes.NODE_CLASS_MAPPINGS[node["type"]].RETURN_TYPES
        saved = [socket["type"] for socket in node["outputs"]]
        assert saved == list(offered)[: len(saved)]


@each_file
def test_every_required_input_is_connected_and_every_widget_within_its_range(schemas, path):
    for node in ui_workflow.to_prompt(ui_workflow.read(path), schemas).values():
        schema = schemas[node["class_type"]]
        assert set(schema["required"]) <= set(node["inputs"])
        for name, (kind, options) in ui_workflow.declared(schema).items():
            if not ui_workflow.is_widget(kind):
                continue
            value = node["inputs"][name]
            if isinstance(kind, list) or kind == "COMBO":
                assert value in (kind if isinstance(kind, list) else options["options"])
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"]


@each_file
def test_comfyui_accepts_it(comfy, schemas, path):
    import execution

    prompt = ui_workflow.to_prompt(ui_workflow.read(path), schemas)
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and not error and not node_errors
    shown = {"SaveImage", "LDCPPruningReport", "LDCPSaveGates", "LDCPCompareShares"}
    expected = {number for number, node in prompt.items() if node["class_type"] in shown}
    assert set(outputs) == expected


def test_widgets_get_the_values_that_the_canvas_saved_for_them(schemas):
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_report.json")
    prompt = ui_workflow.to_prompt(workflow, schemas)
    (sampler,) = (node["inputs"] for node in prompt.values() if node["class_type"] == "KSampler")
    plain = {name: value for name, value in sampler.items() if not isinstance(value, list)}
    assert plain == {
        "seed": 20150,
        "steps": 20,
        "cfg": 7,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1,
    }
    assert prompt[sampler["model"][0]]["class_type"] == "LDCPApplyDynamicPruning"


def test_a_file_saved_with_other_widgets_is_noticed(schemas):
    workflow = ui_workflow.read(ui_workflow.FOLDER / "ldcp_basic.json")
    (apply,) = (n for n in workflow["nodes"] if n["type"] == "LDCPApplyDynamicPruning")
    apply["widgets_values"].append("one too many")
    with pytest.raises(ValueError, match="its widgets are"):
        ui_workflow.to_prompt(workflow, schemas)
