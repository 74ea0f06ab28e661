"""The nodes as ComfyUI sees them: what they offer, accept, refuse and show."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.comfyui
NODE_IDS = [
    "LDCPLoadGates",
    "LDCPApplyDynamicPruning",
    "LDCPStepSchedule",
    "LDCPPruningReport",
    "LDCPEstimateGates",
    "LDCPCalibrateGates",
    "LDCPSaveGates",
]


@pytest.fixture
def folder(comfy, tmp_path, monkeypatch):
    entry = ([str(tmp_path)], comfy.load_node.EXTENSIONS)
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "ldcp_gates", entry)
    return tmp_path


@pytest.fixture
def apply(comfy):
    def run(model, gates, sparsity=-1.0, schedule=None):
        node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"]
        return node.execute(model, gates, sparsity, schedule).args[0]

    return run


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_node_is_offered_and_explains_itself(comfy, node_id):
    info = comfy.nodes.NODE_CLASS_MAPPINGS[node_id].GET_NODE_INFO_V1()
    assert info["name"] == node_id and info["display_name"] and info["description"]
    assert info["category"] == "model_patches/LDCP"
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert inputs and all(options["tooltip"] for _, options in inputs.values())
    assert all(info["output_tooltips"])


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_node_has_a_help_page_and_its_texts_are_in_the_locale(comfy, node_id):
    import json

    (web,) = [d for d in comfy.nodes.EXTENSION_WEB_DIRS.values() if "nodes" in d and "web" in d]
    page = os.path.join(web, "docs", f"{node_id}.md")
    with open(page, encoding="utf-8") as file:
        text = file.read()
    info = comfy.nodes.NODE_CLASS_MAPPINGS[node_id].GET_NODE_INFO_V1()
    inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
    assert text.startswith(f"# {info['display_name']}\n")
    assert all(f"**{name}**" in text for name in inputs)
    locale = os.path.join(web, "..", "..", "locales", "en", "nodeDefs.json")
    with open(locale, encoding="utf-8") as file:
        texts = json.load(file)[node_id]
    assert texts["display_name"] == info["display_name"]
    assert texts["description"] == info["description"]
    for name, (_, options) in inputs.items():
        assert texts["inputs"][name]["tooltip"] == options["tooltip"]


@pytest.mark.parametrize("node_id", NODE_IDS)
def test_the_node_is_found_by_other_words_where_the_host_has_them(comfy, node_id):
    import dataclasses

    from comfy_api.latest import io

    known = any(field.name == "search_aliases" for field in dataclasses.fields(io.Schema))
    schema = comfy.nodes.NODE_CLASS_MAPPINGS[node_id].define_schema()
    found = getattr(schema, "search_aliases", [])
    assert bool(found) is known and ("ldcp" in found) is known


def test_an_older_host_gets_no_aliases_and_a_newer_one_those_of_the_node(comfy, monkeypatch):
    import dataclasses

    from comfy_api.latest import io

    @dataclasses.dataclass
    class Older:
        node_id: str
        category: str = ""

    @dataclasses.dataclass
    class Newer(Older):
        search_aliases: list = dataclasses.field(default_factory=list)

    monkeypatch.setattr(io, "Schema", Older)
    assert comfy.schema.schema("LDCPLoadGates", category="a") == Older("LDCPLoadGates", "a")
    monkeypatch.setattr(io, "Schema", Newer)
    assert "load gates" in comfy.schema.schema("LDCPLoadGates").search_aliases
    assert set(comfy.schema.SEARCH_ALIASES) == set(NODE_IDS)


def test_gates_written_by_the_core_are_loaded(comfy, make_gates, folder):
    gates = make_gates()
    comfy.core.save_gates(gates, folder / "a.safetensors")
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    assert node.validate_inputs("a.safetensors") is True
    (loaded,) = node.execute("a.safetensors").args
    assert all(torch.equal(loaded.scores[s], gates.scores[s]) for s in gates.scores)


def test_a_new_file_appears_without_a_restart_and_others_do_not(comfy, make_gates, folder):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]

    def offered():
        return node.INPUT_TYPES()["required"]["gates_name"][1]["options"]

    assert offered() == []
    comfy.core.save_gates(make_gates(), folder / "new.safetensors")
    (folder / "notes.txt").write_text("not gates")
    os.utime(folder, ns=(1, 1))  # file systems with coarse times see the change as well
    assert offered() == ["new.safetensors"]


def test_the_folder_takes_gate_files_alone_and_keeps_the_users_other_folders(
    comfy, monkeypatch, tmp_path
):
    folders = comfy.folder_paths.folder_names_and_paths
    assert folders["ldcp_gates"][1] == {".safetensors"}
    # as extra_model_paths.yaml leaves it: another folder, and every extension
    monkeypatch.setitem(folders, "ldcp_gates", ([str(tmp_path)], set()))
    monkeypatch.setattr(comfy.folder_paths, "models_dir", str(tmp_path / "models"))
    comfy.load_node.register_folder()
    default = tmp_path / "models" / "ldcp_gates"
    assert folders["ldcp_gates"] == ([str(tmp_path), str(default)], {".safetensors"})
    assert default.is_dir()


def test_a_file_trained_again_is_read_again(comfy, make_gates, folder):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    path = folder / "a.safetensors"
    comfy.core.save_gates(make_gates(), path)
    before = node.fingerprint_inputs("a.safetensors")
    assert node.fingerprint_inputs("a.safetensors") == before
    os.utime(path, ns=(1, 1))
    assert node.fingerprint_inputs("a.safetensors") != before


def test_another_file_of_equal_size_and_time_is_read_again(comfy, make_gates, folder):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    found = set()
    for seed in (1, 2):
        comfy.core.save_gates(make_gates(seed=seed), folder / "a.safetensors")
        os.utime(folder / "a.safetensors", ns=(1, 1))
        found.add(node.fingerprint_inputs("a.safetensors"))
    assert len(found) == 2 and len({p.stat().st_size for p in folder.iterdir()}) == 1


def test_a_folder_that_is_gone_is_a_missing_file_and_not_an_exception(
    comfy, make_gates, folder, monkeypatch
):
    import execution

    gone, there = folder / "gone", folder / "there"
    entry = ([str(gone), str(there)], comfy.load_node.EXTENSIONS)
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "ldcp_gates", entry)
    for path in (gone, there):
        path.mkdir()
        comfy.core.save_gates(make_gates(), path / f"{path.name}.safetensors")
    load = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]

    def offered():
        return load.INPUT_TYPES()["required"]["gates_name"][1]["options"]

    assert offered() == ["gone.safetensors", "there.safetensors"]
    shutil.rmtree(gone)
    graph = {
        "1": {"class_type": "LDCPLoadGates", "inputs": {"gates_name": "gone.safetensors"}},
        "2": {
            "class_type": "LDCPSaveGates",
            "inputs": {"gates": ["1", 0], "filename_prefix": "gates"},
        },
    }
    valid, _, _, errors = asyncio.run(execution.validate_prompt("id", graph, None))
    assert not valid and "no gate file 'gone.safetensors'" in str(errors)
    assert "Exception" not in str(errors)
    assert offered() == ["there.safetensors"]
    comfy.nodes.NODE_CLASS_MAPPINGS["LDCPSaveGates"].execute(make_gates(), "gates")
    assert offered() == ["gates_00001.safetensors", "there.safetensors"]


def test_what_killed_savers_left_goes_when_the_pack_is_loaded(comfy, make_gates, folder):
    left = folder / "portraits" / ".gates_00001.safetensors.0123abcd.ldcp"
    left.parent.mkdir()
    left.write_bytes(b"a part")
    os.utime(left, (0, 0))
    load = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    assert load.INPUT_TYPES()["required"]["gates_name"][1]["options"] == []
    comfy.load_node.register_folder()
    assert not left.exists()


def test_a_message_shows_names_as_a_line_and_not_all_of_them(comfy, folder):
    odd = "a\x1b[31m\n\u202e" if os.name == "posix" else "a"
    for number in range(50):
        (folder / f"{odd}{number}{'b' * 150}.safetensors").touch()
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    message = node.validate_inputs(odd + "x" * 20_000_000)
    assert message.isprintable() and len(message) < 3000
    assert "and 40 more" in message


def test_a_missing_file_is_named_before_the_run(comfy, folder):
    message = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"].validate_inputs("gone.safetensors")
    assert "no gate file 'gone.safetensors'" in message and str(folder) in message
    assert "put a gate file made by training.fit into this folder" in message


@pytest.fixture
def outside(comfy, folder, make_gates, monkeypatch):
    """A folder for gate files, and a good gate file right beside it that must not be reached."""
    inside = folder / "models"
    inside.mkdir()
    entry = ([str(inside)], comfy.load_node.EXTENSIONS)
    monkeypatch.setitem(comfy.folder_paths.folder_names_and_paths, "ldcp_gates", entry)
    path = folder / "outside.safetensors"
    comfy.core.save_gates(make_gates(), path)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "x/../../outside.safetensors",
        "./../outside.safetensors",
        "..\\outside.safetensors",
        "../models/../outside.safetensors",
        "{path}",  # absolute
        "/{path}",
        "file://{path}",
        "{path}\0",
        "../outside.safetensors\0.safetensors",
        "",
        ".",
        "..",
        "~/outside.safetensors",
    ],
)
def test_the_loader_reads_nothing_outside_its_folder(comfy, outside, monkeypatch, name):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    name = name.format(path=outside)
    opened = []
    monkeypatch.setattr(comfy.load_node, "load_gates", opened.append)
    assert "no gate file" in node.validate_inputs(name)
    assert node.fingerprint_inputs(name) == ""
    with pytest.raises(FileNotFoundError, match="no gate file"):
        node.execute(name)
    assert opened == []


def test_folders_inside_and_links_that_the_user_made_are_followed(comfy, outside):
    """Who can put a link into the models folder can put the file there as well."""
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"]
    inside = outside.parent / "models"
    (inside / "faces").mkdir()
    os.symlink(outside, inside / "link.safetensors")
    os.rename(outside, inside / "faces" / "own.safetensors")
    os.symlink(inside / "faces" / "own.safetensors", outside)
    for name in ("link.safetensors", "faces/own.safetensors"):
        assert node.validate_inputs(name) is True
        (loaded,) = node.execute(name).args
        assert loaded.channels == 512


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html></html>", b"\x08" + b"\0" * 40])
def test_a_file_that_is_not_gates_is_refused(comfy, folder, content):
    (folder / "bad.safetensors").write_bytes(content)
    with pytest.raises(comfy.core.GateFileError) as error:
        comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"].execute("bad.safetensors")
    assert "bad.safetensors" in str(error.value) and "not a readable" in str(error.value)


def test_a_truncated_file_is_refused(comfy, make_gates, folder):
    comfy.core.save_gates(make_gates(), folder / "a.safetensors")
    whole = (folder / "a.safetensors").read_bytes()
    (folder / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(comfy.core.GateFileError, match="truncated"):
        comfy.nodes.NODE_CLASS_MAPPINGS["LDCPLoadGates"].execute("a.safetensors")


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        (("steps", "", 0.0, 1.0), "the step ranges are empty"),
        (("steps", "9-4", 0.0, 1.0), "is reversed: write '4-9'"),
        (("steps", "1;2", 0.0, 1.0), "cannot read the step range"),
        (("percent", "0-", 0.5, 0.5), "is empty"),
        (("percent", "0-", 0.8, 0.2), "is reversed"),
        (("sometimes", "0-", 0.0, 1.0), "choose one of steps, percent"),
    ],
)
def test_a_range_that_cannot_be_meant_is_shown_before_the_run(comfy, widgets, message):
    assert message in comfy.nodes.NODE_CLASS_MAPPINGS["LDCPStepSchedule"].validate_inputs(*widgets)


def test_comfyui_shows_the_message_when_the_graph_is_queued(comfy, monkeypatch):
    import execution

    class Sink:
        FUNCTION, RETURN_TYPES, OUTPUT_NODE = "run", (), True

        @classmethod
        def INPUT_TYPES(cls):
            return {"required": {"schedule": ("LDCP_SCHEDULE",)}}

    def queue(steps):
        widgets = {"mode": "steps", "steps": steps, "start_percent": 0.0, "end_percent": 1.0}
        graph = {
            "1": {"class_type": "LDCPStepSchedule", "inputs": widgets},
            "2": {"class_type": "TestSink", "inputs": {"schedule": ["1", 0]}},
        }
        valid, _, _, errors = asyncio.run(execution.validate_prompt("id", graph, None))
        return valid, str(errors)

    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "TestSink", Sink)
    assert queue("0-4, 7-") == (True, "{}")
    valid, errors = queue("9-4")
    assert not valid and "is reversed: write '4-9'" in errors


def test_good_ranges_pass_and_the_unused_mode_is_not_judged(comfy):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPStepSchedule"]
    assert node.validate_inputs("steps", "0-4, 10-19, 25-", 0.9, 0.1) is True
    assert node.validate_inputs("percent", "", 0.0, 0.6) is True
    assert node.validate_inputs("steps", None, 0.0, 1.0) is True  # connected, not known yet


@pytest.mark.parametrize("sparsity", [-0.5, -0.01, -1.5, 1.1])
def test_a_sparsity_without_meaning_is_refused(comfy, model, make_gates, apply, sparsity):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"]
    assert "-1 prunes as learned" in node.validate_inputs(sparsity)
    with pytest.raises(ValueError, match="-1 prunes as learned"):
        apply(model, make_gates(), sparsity)


def test_the_default_prunes_as_learned_and_zero_nothing(model, make_gates, apply, sample):
    gates, plain = make_gates(), sample(model, 2)
    assert torch.equal(sample(apply(model, gates, 0.0), 2), plain)
    learned, half = sample(apply(model, gates), 2), sample(apply(model, gates, 0.25), 2)
    assert not torch.equal(learned, plain) and not torch.equal(learned, half)


def test_the_status_counts_what_is_saved(comfy, model, make_gates, apply, monkeypatch):
    shown = []
    server = SimpleNamespace(
        client_id="browser", send_progress_text=lambda *message: shown.append(message)
    )
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", fake)
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPApplyDynamicPruning"]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))
    schedule = comfy.core.Schedule.steps("0-4")
    node.execute(model, make_gates(["mid_block.resnets.0.conv2"]), 0.3, schedule)
    ((text, node_id, client),) = shown
    assert (node_id, client) == ("7", "browser")
    # 128 channels at 30%: keep round(89.6) = 90, aligned to 88, so 40 = 31.25% pruned. Each row is
    # 9 * 128 weights and a bias, of which a constant stays: 40 * 1152 * 4 bytes = 0.18 MiB
    assert text == (
        "1 site, 31.2% pruned (30.0% requested)\n0.2 MiB of weights left out (counted)\nsteps 0-4"
    )


def test_without_a_server_the_node_runs(model, make_gates, apply, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    apply(model, make_gates())


def test_other_base_weights_are_a_warning(comfy, model, make_gates, apply, caplog):
    plain = make_gates()
    own = comfy.core.fingerprint(comfy.identity.base_weights(model, plain))
    with caplog.at_level(logging.WARNING, "ldcp"):
        apply(model, plain)
        apply(model, make_gates(info={"fingerprint": own}))
        assert not caplog.records
        apply(model, make_gates(info={"fingerprint": "0" * 32}))
    assert "trained on other base weights" in caplog.text


def test_a_lora_merged_into_the_weights_does_not_change_the_fingerprint(
    comfy, small_model, make_gates
):
    model = small_model()
    gates = make_gates()
    own = comfy.core.fingerprint(comfy.identity.base_weights(model, gates))
    key = "diffusion_model.middle_block.0.in_layers.2.weight"
    patched = model.clone()
    patched.add_patches({key: ("diff", (torch.ones(128, 128, 3, 3),))}, 1.0)
    patched.patch_model(torch.device("cpu"))
    assert comfy.core.fingerprint(comfy.identity.base_weights(patched, gates)) == own
    patched.unpatch_model()


def test_weights_in_bfloat16_are_not_compared(comfy, small_model, make_gates):
    gates = make_gates(info={"fingerprint": "0" * 32})
    assert not comfy.identity.differs_from_training(small_model(dtype=torch.bfloat16), gates)
