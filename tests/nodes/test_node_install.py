"""Installed as a user does it, and removed again.

ComfyUI-Manager clones the repository, or unpacks the registry's archive, into ``custom_nodes``; it
then installs what ``requirements.txt`` lists and runs ``install.py``. This pack has neither.
"""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import comfy_server
import pytest
from test_node_import import SCRIPT

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]
#: what is imported -> what brings it
PACKAGES = {"PIL": "pillow"}
#: imported only where it is there, and where an exported model is loaded outside ComfyUI
OPTIONAL = {"triton", "diffusers"}
OF_COMFYUI = {"comfy", "comfy_api", "folder_paths", "nodes"}


def tracked():
    """The files of a clone, as paths below the repository."""
    found = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if found.returncode:
        pytest.skip("this is no clone, so what a clone holds is not known")
    return [name for name in found.stdout.split("\0") if name]


def archived():
    """The files of the registry's archive: those of a clone that .comfyignore leaves."""
    lines = (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = [line for line in lines if line and not line.startswith("#")]
    patterns = [line + "*" if line.endswith("/") else line for line in left_out]
    return [name for name in tracked() if not any(fnmatch.fnmatch(name, each) for each in patterns)]


def install(files, folder):
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, folder / name)


def below(folder):
    """All files below a folder, without what Python compiles."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("files", [tracked, archived], ids=["clone", "archive"])
def test_all_nodes_load_from_what_is_installed(comfy, tmp_path, files):
    pack = tmp_path / "custom_nodes" / "ldcp"
    install(files(), pack)
    comfyui = os.path.dirname(os.path.abspath(comfy.nodes.__file__))
    command = [sys.executable, "-c", SCRIPT, str(pack)]
    run = subprocess.run(command, cwd=comfyui, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    here = {name for name in comfy.nodes.NODE_CLASS_MAPPINGS if name.startswith("LDCP")}
    # the schemas of the test's own pack, from the same files
    assert set(re.findall(r'"(LDCP\w+)"', run.stdout)) == here and len(here) >= 8


def test_nothing_is_installed_or_run_when_it_is_installed():
    for name in ("requirements.txt", "install.py", "uninstall.py", "prestartup_script.py"):
        assert not (REPOSITORY / name).exists(), f"{name} is for what ComfyUI does not have"


def test_every_package_it_imports_is_a_requirement_of_comfyui(comfyui_path):
    lines = (comfyui_path / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = {re.split(r"[^\w.-]", line, maxsplit=1)[0].lower() for line in lines}
    used = set()
    for path in (*REPOSITORY.glob("nodes/**/*.py"), *REPOSITORY.glob("ldcp_core/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                used |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                used.add(node.module.split(".")[0])
    packages = used - sys.stdlib_module_names - OF_COMFYUI - OPTIONAL - {"ldcp_core"}
    assert packages >= {"torch", "numpy", "PIL", "safetensors"}
    assert {PACKAGES.get(name, name) for name in packages} <= required


PROMPT = {
    "model": ("LDCPTestSmallModel", {}),
    "latent": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
    "sampler": (
        "KSampler",
        {
            "model": ["model", 0],
            "positive": ["model", 1],
            "negative": ["model", 1],
            "latent_image": ["latent", 0],
            **{"seed": 3, "steps": 1, "cfg": 1.0, "denoise": 1.0},
            **{"sampler_name": "euler", "scheduler": "normal"},
        },
    ),
    "latents": ("SaveLatent", {"samples": ["sampler", 0], "filename_prefix": "latent"}),
}
CHOICE = {"criterion": "l1", "sparsity": 0.5, "ranking": "per layer", "padding": "zero"}
OURS = {
    "gates": ("LDCPEstimateGates", {"model": ["model", 0], "scope": "mid", **CHOICE}),
    "save": ("LDCPSaveGates", {"gates": ["gates", 0], "filename_prefix": "mine"}),
    "apply": (
        "LDCPApplyDynamicPruning",
        {"model": ["model", 0], "gates": ["gates", 0], "sparsity": 0.5, "channels": "a share"},
    ),
    "report": ("LDCPPruningReport", {"model": ["apply", 0], "after": ["sampler", 0]}),
}


def queue(server, prompt):
    return server.run({k: {"class_type": c, "inputs": i} for k, (c, i) in prompt.items()})


def user_folder(home):
    """A fresh user's folder with the model of these tests, in a home of its own."""
    base = home / "ComfyUI"
    (base / "custom_nodes").mkdir(parents=True)
    small = Path(__file__).with_name("small_model_node.py")
    (base / "custom_nodes" / small.name).symlink_to(small)
    return base


def test_removing_it_leaves_the_users_gate_files_and_nothing_else(
    comfyui_path, tmp_path, monkeypatch
):
    def at_home(name):
        """Everything that a server writes goes below this folder."""
        for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME"):
            folder = tmp_path / name / variable.lower()
            folder.mkdir(parents=True)
            monkeypatch.setenv(variable, str(folder))
        return user_folder(tmp_path / name)

    base = at_home("without")
    with comfy_server.Server(comfyui_path, base) as server:
        queue(server, PROMPT)
    written_by_comfyui = below(tmp_path / "without")

    base = at_home("with")
    pack = base / "custom_nodes" / "ldcp"
    install(archived(), pack)
    pruned = {**PROMPT, **OURS}
    pruned["sampler"] = (PROMPT["sampler"][0], {**PROMPT["sampler"][1], "model": ["apply", 0]})
    with comfy_server.Server(comfyui_path, base) as server:
        result = queue(server, pruned)
    assert result.status["save"] == "saved as mine_00001.safetensors"
    assert below(pack) == set(archived())  # it writes nothing into its own folder
    shutil.rmtree(pack)
    with comfy_server.Server(comfyui_path, base) as server:
        left = below(tmp_path / "with")  # now that ComfyUI has emptied its folder of previews
        assert left - written_by_comfyui == {"ComfyUI/models/ldcp_gates/mine_00001.safetensors"}
        assert not {node_id for node_id, _ in OURS.values()} & set(server.schemas())
        queue(server, PROMPT)
