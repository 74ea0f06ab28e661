"""The nodes as ComfyUI sees them: what they offer, accept, refuse and show."""

from __future__ import annotations

import asyncio
import html
import importlib
import logging
import os
import re
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
    "LDCPCompareShares",
]
APPLY = "LDCPApplyDynamicPruning"


@pytest.fixture
def folder(comfy, tmp_path, monkeypatch):
    entry = ([str(tmp_path)], comfy.files.EXTENSIONS)
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
    title = text.splitlines()[0].removeprefix("# ")
    assert title == info["display_name"] or info["display_name"].endswith(f" ({title})")
    assert all(f"**{name}**" in text for name in inputs)
    locale = os.path.join(web, "..", "..", "locales", "en", "nodeDefs.json")
    with open(locale, encoding="utf-8") as file:
        texts = json.load(file)[node_id]
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
        display_name: str = ""

    @dataclasses.dataclass
    class Newer(Older):
        search_aliases: list = dataclasses.field(default_factory=list)

    schema, apply = comfy.shared.schema, "LDCPApplyDynamicPruning"
    monkeypatch.setattr(io, "Schema", Older)
    assert schema("LDCPLoadGates", display_name="a") == Older("LDCPLoadGates", "a")
    name = schema(apply, display_name="Apply Dynamic Pruning").display_name
    assert "Apply Dynamic Pruning" in name
    # that host's search looks for a word in the first 30 letters
    assert all(word in name[:30].lower() for word in ("prune", "channel", "speed"))
    monkeypatch.setattr(io, "Schema", Newer)
    assert "load gates" in schema("LDCPLoadGates").search_aliases
    assert schema(apply, display_name="a").display_name == "a"
    assert set(comfy.shared.SEARCH_ALIASES) == set(NODE_IDS)


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
    comfy.files.register_folder()
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
    entry = ([str(gone), str(there)], comfy.files.EXTENSIONS)
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
    comfy.files.register_folder()
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
    entry = ([str(inside)], comfy.files.EXTENSIONS)
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


class Sink:
    """An output node of the old kind that takes anything."""

    FUNCTION, RETURN_TYPES, OUTPUT_NODE = "run", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"anything": ("*",)}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True


@pytest.fixture
def queue(comfy, monkeypatch):
    """What ComfyUI answers before a run to a node with these widgets: its errors' details."""
    import execution

    monkeypatch.setitem(comfy.nodes.NODE_CLASS_MAPPINGS, "TestSink", Sink)

    def send(node_id, **widgets):
        graph = {
            "1": {"class_type": node_id, "inputs": widgets},
            "2": {"class_type": "TestSink", "inputs": {"anything": ["1", 0]}},
        }
        comfy.queued.remember({"prompt": graph})  # as the server does
        valid, _, _, errors = asyncio.run(execution.validate_prompt("id", graph, None))
        found = [e["details"] for node in errors.values() for e in node["errors"]]
        assert valid == (not found)
        return found

    yield send
    comfy.queued.remember({})


def queue_schedule(queue, mode="steps", steps="0-", start_percent=0.0, end_percent=1.0):
    widgets = {"mode": mode, "steps": steps}
    widgets |= {"start_percent": start_percent, "end_percent": end_percent}
    return queue("LDCPStepSchedule", **widgets)


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        (("steps", "", 0.0, 1.0), "the step ranges are empty"),
        (("steps", "9-4", 0.0, 1.0), "step range '9-4' is reversed: write '4-9'"),
        (("steps", "0-4, 1;2", 0.0, 1.0), "cannot read the step range '1;2'"),
        (("percent", "0-", 0.5, 0.5), "percent range 0.5 to 0.5 is empty"),
        (("percent", "0-", 0.8, 0.2), "percent range 0.8 to 0.2 is reversed"),
        (("percent", "0-", float("nan"), 0.2), "start_percent nan is outside 0.0 to 1.0"),
        (("steps", "x" * 10**6, 0.0, 1.0), "step ranges of 1,000,000 characters"),
    ],
)
def test_a_range_that_cannot_be_meant_is_refused_before_the_run_once(queue, widgets, message):
    (found,) = queue_schedule(queue, *widgets)
    assert message in found and len(found) < 300


def test_good_ranges_pass_and_the_unused_mode_is_not_judged(queue):
    assert queue_schedule(queue, "steps", "0-4, 10-19, 25-", 0.9, 0.1) == []
    assert queue_schedule(queue, "percent", "", 0.0, 0.6) == []
    assert queue_schedule(queue, "percent", "typo", 0.0, 0.6) == []


def test_a_prompt_that_another_extension_has_put_there_is_the_one_that_is_checked(comfy, queue):
    sent = comfy.queued.remember({"prompt": {"1": {"inputs": {"steps": "0-"}}}})
    sent["prompt"] = {"1": {"inputs": {"steps": "5-"}}}
    assert comfy.queued.inputs_of("1")["steps"] == "5-"


def test_prompts_that_are_checked_at_once_do_not_mix(comfy, queue):
    async def send(steps):
        comfy.queued.remember({"prompt": {"1": {"inputs": {"steps": steps}}}})
        await asyncio.sleep(0.01)
        return comfy.queued.inputs_of("1")["steps"]

    async def both():
        return await asyncio.gather(send("a"), send("b"))

    assert asyncio.run(both()) == ["a", "b"]


def test_a_linked_value_is_judged_when_it_is_known(comfy):
    node = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPStepSchedule"]
    assert node.validate_inputs(None) is True  # what is not known yet
    for widgets, message in (
        (("steps", "9-4", 0.0, 1.0), "is reversed"),
        (("steps", None, 0.0, 1.0), "steps is None"),
        (("steps", 7, 0.0, 1.0), "steps is 7"),
        (("sometimes", "0-", 0.0, 1.0), "mode is 'sometimes'; choose one of steps, percent"),
        (("percent", "0-", "a", 1.0), "start_percent 'a' is outside"),
    ):
        with pytest.raises(ValueError, match=message):
            node.execute(*widgets)


@pytest.mark.parametrize("sparsity", [-0.5, -0.01, -1.5, 1.1, float("nan")])
def test_a_sparsity_without_meaning_is_refused_once(
    comfy, model, make_gates, apply, queue, sparsity
):
    # its model and gates are missing as well, which ComfyUI says by itself
    found = [text for text in queue(APPLY, sparsity=sparsity) if "sparsity" in text]
    assert len(found) == 1 and f"sparsity {sparsity:g} is outside 0.0 to 1.0" in found[0]
    with pytest.raises(ValueError, match="is outside 0.0 to 1.0"):
        apply(model, make_gates(), sparsity)


def test_a_sparsity_that_is_not_used_is_not_judged(comfy, model, make_gates, queue):
    widgets = {"sparsity": 7.0, "channels": "as learned"}
    assert not [text for text in queue(APPLY, **widgets) if "sparsity" in text]
    comfy.nodes.NODE_CLASS_MAPPINGS[APPLY].execute(model, make_gates(), **widgets)


@pytest.mark.parametrize("sites", ["mdi", "mid, upp", "mid_block.resnets.7.conv1", "'"])
def test_a_typo_in_sites_is_refused_before_the_run_once(queue, sites):
    found = [text for text in queue(APPLY, sparsity=0.3, sites=sites) if "sites" in text]
    assert len(found) == 1 and f"sites: unknown scope or site {sites.split()[-1]!r}" in found[0]


@pytest.mark.parametrize(
    "sites",
    ["", " ", "mid", "mid, up", "mid up", "MID", '"mid"', "'mid'", "\u201cMid\u201d+FF", "*"],
)
def test_what_people_type_for_sites_is_accepted_before_the_run(queue, sites):
    assert not [text for text in queue(APPLY, sparsity=0.3, sites=sites) if "sites" in text]


@pytest.mark.parametrize(
    ("widgets", "message"),
    [
        ({"full_weights": "nothing"}, "full_weights is 'nothing'; choose one of auto, offload"),
        ({"full_weights": None}, "full_weights is None"),
        ({"full_weights": ["auto"]}, "full_weights is .'auto'."),
        ({"channels": "all"}, "channels is 'all'; choose one of as learned, a share"),
        ({"channels": "a share", "sparsity": "0.3"}, "sparsity '0.3' is outside"),
        ({"channels": "a share", "sparsity": None}, "sparsity None is outside"),
        ({"sites": 7}, "sites is 7; connect or write a text"),
        ({"sites": "mid_block.resnets.1" + "x" * 10**6}, "a scope of 1,000,019 characters is none"),
        ({"sites": "x" * 9_000}, "unknown scope or site"),
    ],
)
def test_a_value_that_no_widget_offers_is_refused_and_not_echoed(
    comfy, model, make_gates, widgets, message
):
    node = comfy.nodes.NODE_CLASS_MAPPINGS[APPLY]
    with pytest.raises(ValueError, match=message) as error:
        node.execute(model, make_gates(), **{"sparsity": 0.3, **widgets})
    assert len(str(error.value)) < 400


def test_as_learned_or_a_share_is_chosen_by_name_and_old_prompts_mean_what_they_meant(
    comfy, model, make_gates
):
    def counts(**widgets):
        node = comfy.nodes.NODE_CLASS_MAPPINGS[APPLY]
        (patched,) = node.execute(model, gates, **widgets).args
        (layer,) = comfy.patch.attached(patched).layers
        return {site: int(keep.sum()) for site, keep in layer.keep_sets.items()}

    gates = make_gates()
    learned = {site: int(keep.sum()) for site, keep in gates.keep_sets().items()}
    share = {site: int(keep.sum()) for site, keep in gates.keep_sets_at(0.25).items()}
    assert learned != share
    assert counts(sparsity=0.25, channels="as learned") == learned
    assert counts(sparsity=0.25, channels="a share") == share
    assert counts(sparsity=-1.0) == learned and counts(sparsity=0.25) == share  # an old prompt
    assert counts(sparsity=-1.0, channels="a share") == learned  # its sparsity came over a link


def test_the_default_prunes_as_learned_and_zero_nothing(model, make_gates, apply, sample):
    gates, plain = make_gates(), sample(model, 2)
    assert torch.equal(sample(apply(model, gates, 0.0), 2), plain)
    learned, half = sample(apply(model, gates), 2), sample(apply(model, gates, 0.25), 2)
    assert not torch.equal(learned, plain) and not torch.equal(learned, half)


@pytest.fixture
def screen(comfy, monkeypatch):
    """What nodes show on a server: (lines, node, client), the latest last; Apply has the id 7.

    ``events`` are those that it sends to the browser: (name, content, client).
    """
    shown, events = [], []

    def send(text, *where):
        shown.append((html.unescape(text).split("  \n"), *where))

    def send_event(*event):
        events.append(event)

    server = SimpleNamespace(client_id="browser", last_prompt_id="a", send_progress_text=send)
    server.send_sync = send_event
    fake = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", fake)
    node = comfy.nodes.NODE_CLASS_MAPPINGS[APPLY]
    monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7"))
    return SimpleNamespace(shown=shown, server=server, events=events)


def test_the_status_counts_what_is_saved(comfy, model, make_gates, screen):
    node = comfy.nodes.NODE_CLASS_MAPPINGS[APPLY]
    schedule = comfy.core.Schedule.steps("0-4")
    node.execute(model, make_gates(["mid_block.resnets.0.conv2"]), 0.3, schedule)
    ((lines, node_id, client),) = screen.shown
    assert (node_id, client) == ("7", "browser")
    # 128 channels at 30%: keep round(89.6) = 90, aligned to 88, so 40 = 31.25% pruned. Each row is
    # 9 * 128 weights and a bias, of which a constant stays: 40 * 1152 * 4 bytes = 0.18 MiB
    assert lines == [
        "1 site, 31.2% pruned (30.0% requested)",
        "0.2 MiB of weights left out (counted)",
        "steps 0-4",
    ]


def test_a_range_past_the_end_is_said_on_the_node_after_the_run(
    comfy, model, make_gates, apply, sample, screen
):
    patched = apply(model, make_gates(), -1.0, comfy.core.Schedule.steps("0, 9-"))
    before = screen.shown[-1][0]
    sample(patched, 2)
    note = "this run has 2 steps (0 to 1); the range 9- lies past the last one and prunes nothing"
    lines, *where = screen.shown[-1]
    assert where == ["7", "browser"]
    assert lines[: len(before)] == before and lines[-1] == note
    # another sampler of the same prompt: both are told
    sample(patched, 3)
    assert len(screen.shown[-1][0]) == len(lines) + 1
    sample(patched, 3)
    # the next prompt starts anew
    screen.server.last_prompt_id = "b"
    sample(patched, 12)
    assert len(screen.shown[-1][0]) == len(lines) - 1
    # for a node that is not on the screen: each note once a prompt
    assert screen.events == [
        ("ldcp.notes", {"node": "7", "notes": [note.replace("2 steps (0 to 1)", steps)]}, "browser")
        for steps in ("2 steps (0 to 1)", "3 steps (0 to 2)")
    ]


def test_what_runs_unpruned_is_said_on_the_node_and_in_the_report(
    comfy, small_model, make_gates, apply, sample, screen
):
    model = small_model()
    patched = apply(apply(model, make_gates()), make_gates(seed=2), -1.0)
    for block in (model.model.diffusion_model.middle_block[0],):
        conv = block.in_layers[2]
        conv.forward = lambda x, conv=conv: type(conv).forward(conv, x) + 1
    sample(patched, 1)
    notes = comfy.patch.attached(patched).record.notes
    assert len(notes) == 1 and notes[0].startswith("mid_block.resnets.0 runs unpruned, because")
    assert [lines[-1] for lines, *_ in screen.shown[-2:]] == notes * 2  # on both nodes
    report = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"]
    text, _ = report.execute(patched).args
    assert f"note      {notes[0]}" in text


def test_of_many_notes_the_node_shows_the_first(comfy, screen):
    status = comfy.apply_node.Status(["a"], "7")
    record = importlib.import_module(f"{comfy.patch.__package__}.record").RunRecord()
    record.notes = [f"block {number} runs unpruned" for number in range(22)]
    status.ended(record)
    lines, *_ = screen.shown[-1]
    assert len(lines) == 6 and lines[-1] == "and 19 more: see Pruning Report, or the log"


def test_the_node_shows_what_the_run_does_while_it_goes_and_what_it_did(
    comfy, model, make_gates, apply, sample, screen, monkeypatch
):
    monkeypatch.setattr(comfy.apply_node, "EVERY", 0.0)
    patched = apply(model, make_gates(), -1.0, comfy.core.Schedule.steps("1-2"))
    before, first = screen.shown[-1][0], len(screen.shown)
    sample(patched, 4)
    *going, (after, *_) = [(lines[len(before) :], *rest) for lines, *rest in screen.shown[first:]]
    words = [re.sub(r"[\d.]+ s$", "T s", lines[0]) for lines, *_ in going]
    assert words == [
        "now in full; 0 of 1 evaluations pruned so far, T s",
        "now pruned; 1 of 2 evaluations pruned so far, T s",
        "now pruned; 2 of 3 evaluations pruned so far, T s",
        "now in full; 2 of 4 evaluations pruned so far, T s",
    ]
    assert [len(lines) for lines, *_ in going] == [1, 3, 3, 3]  # bytes since the first pruned one
    assert after[0].startswith("steps 1-2 of 4 ran pruned (2 of 4 evaluations), ")
    assert after[1].startswith("gated layers on cpu: ")


def test_what_an_earlier_prompt_noticed_is_gone_once_the_next_one_samples(
    comfy, model, make_gates, apply, sample, screen, monkeypatch
):
    monkeypatch.setattr(comfy.apply_node, "EVERY", 0.0)
    patched = apply(model, make_gates(), -1.0, comfy.core.Schedule.steps("0, 9-"))
    sample(patched, 2)
    assert "lies past the last one" in screen.shown[-1][0][-1]
    screen.server.last_prompt_id, first = "b", len(screen.shown)
    sample(patched, 12)
    assert not any("lies past" in line for lines, *_ in screen.shown[first:] for line in lines)


def test_the_node_is_not_told_more_often_than_one_can_read(
    comfy, model, make_gates, apply, sample, screen, monkeypatch
):
    monkeypatch.setattr(comfy.apply_node, "EVERY", 60.0)
    patched = apply(model, make_gates())
    first = len(screen.shown)
    sample(patched, 3)
    assert len(screen.shown) - first == 1  # at the end


def test_text_is_shown_as_it_is_and_never_read_as_markup(comfy, screen):
    text = "<img src=x onerror=alert(1)> & *a* _b_ __c__ `d` [[e|f]] # g"
    comfy.shared.show_on_node(f"{text}\n{text}", "7")
    assert screen.shown[-1][0] == [text, text]
    sent = comfy.shared.as_markup(text)
    assert not set(sent) & set("<>*_`[]|") and sent.count("&") == sent.count("&#")
    assert comfy.shared.as_markup("mid_block.resnets.0") == "mid_block.resnets.0"


def test_without_a_server_the_node_runs(model, make_gates, apply, monkeypatch):
    monkeypatch.delitem(sys.modules, "server", raising=False)
    apply(model, make_gates())


def test_other_base_weights_are_a_warning_on_the_node_and_in_the_report(
    comfy, model, make_gates, apply, caplog, screen
):
    plain = make_gates()
    own = comfy.core.fingerprint(comfy.identity.base_weights(model, plain))
    with caplog.at_level(logging.WARNING, "ldcp"):
        apply(model, plain)
        apply(model, make_gates(info={"fingerprint": own}))
        assert not caplog.records
        patched = apply(model, make_gates(info={"fingerprint": "0" * 32}))
    assert "trained on other base weights" in caplog.text
    (lines, *_) = screen.shown[-1]
    assert lines[-1].startswith("these gates were trained on other base weights")
    assert screen.events == [("ldcp.notes", {"node": "7", "notes": [lines[-1]]}, "browser")]
    text, _ = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"].execute(patched).args
    assert f"note      {lines[-1]}" in text


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
