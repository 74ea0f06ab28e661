"""What the Comfy Registry and the forge read: metadata, icon, workflows."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ldcp_release", ROOT / ".ci" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(pyproject: dict[str, Any]) -> dict[str, Any]:
    """The metadata as somebody who publishes would complete them."""
    return {
        "project": {**pyproject["project"], "urls": {"Repository": "https://forge.test/me/ldcp"}},
        "tool": {
            "comfy": {
                **pyproject["tool"]["comfy"],
                "PublisherId": "me",
                "Icon": "https://forge.test/me/ldcp/icon.svg",
            }
        },
    }


def test_only_what_cannot_be_known_yet_is_missing(
    pyproject: dict[str, Any], release: ModuleType
) -> None:
    found = release.problems(pyproject)
    unknown = ("PublisherId", "Repository", "Icon")
    assert all(any(name in problem for name in unknown) for problem in found), found
    assert release.problems(filled(pyproject)) == []


def test_the_registry_learns_name_licence_icon_and_the_comfyui_it_needs(
    pyproject: dict[str, Any],
) -> None:
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert "comfyui" not in project["name"] and project["description"]
    assert [name for name in project["license-files"] if not (ROOT / name).is_file()] == []
    assert "Operating System :: OS Independent" in project["classifiers"]
    assert comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.3.64"
    assert project["dependencies"] == []
    icon = ROOT / comfy["Icon"].split("/main/")[1]
    text = icon.read_text(encoding="utf-8")
    assert 'width="400" height="400"' in text  # at most 800 x 400


def test_installing_brings_the_core_alone(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["setuptools"]["packages"] == ["ldcp_core"]
    assert not [
        file for file in (ROOT / "ldcp_core").iterdir() if file.is_dir() and "_" != file.name[0]
    ]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": "1ldcp"}, "is no name for the registry"),
        ({"name": "ld--cp"}, "is no name for the registry"),
        ({"version": "1.0"}, "is not X.Y.Z"),
        ({"urls": {"Repository": "https://github.com/..."}}, "project.urls.Repository"),
        ({"urls": {}}, "project.urls.Repository"),
    ],
)
def test_metadata_the_registry_would_refuse_are_named(
    pyproject: dict[str, Any], release: ModuleType, change: dict[str, Any], problem: str
) -> None:
    complete = filled(pyproject)
    (found,) = release.problems({**complete, "project": {**complete["project"], **change}})
    assert problem in found


def test_a_release_is_a_new_version_and_never_one_with_placeholders(tmp_path: Path) -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    ready = text.replace('PublisherId = ""', 'PublisherId = "me"').replace("...", "me/ldcp")
    old, new = tmp_path / "old.toml", tmp_path / "new.toml"
    old.write_text(ready, encoding="utf-8")

    def run(content: str, before: Path = old) -> tuple[int, str]:
        new.write_text(content, encoding="utf-8")
        command = [sys.executable, str(ROOT / ".ci" / "release.py"), str(before), str(new)]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout.strip() or done.stderr

    later = ready.replace('version = "0.', 'version = "9.')
    assert later != ready
    assert run(ready) == (0, "publish=false")
    assert run(later) == (0, "publish=true")
    assert run(ready, tmp_path / "none.toml") == (0, "publish=true")
    assert run(text)[0] == 0  # the version is the same: nothing to publish, nothing to refuse
    code, message = run(text, tmp_path / "none.toml")
    if text != ready:  # as long as the placeholders are there
        assert code == 1 and "PublisherId is empty" in message and "placeholder" in message


#: the first versions without the holes that pyproject.toml names
SAFE = {
    "torch": (2, 13),
    "pillow": (13, 0),
    "fsspec": (2026, 6),
    "pyarrow": (23, 0, 1),
    "diffusers": (0, 38),
    "transformers": (5, 10),
    "datasets": (5, 2),
    "tqdm": (4, 66, 3),
    "pytest": (9, 0, 3),
}


def test_no_version_with_a_published_hole_is_allowed_nor_one_above_what_is_tested(
    pyproject: dict[str, Any],
) -> None:
    def number(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = {n: number(v) for n, _, v in (line.partition("==") for line in lines) if v}
    extras = pyproject["project"]["optional-dependencies"].values()
    wanted = [line.partition(">=") for lines in extras for line in lines if "ldcp[" not in line]
    floors = {name: number(version) for name, _, version in wanted}
    assert {name: floors[name] for name in SAFE if floors[name] < SAFE[name]} == {}
    assert SAFE.keys() <= tested.keys()
    assert {name for name in floors.keys() & tested.keys() if floors[name] > tested[name]} == set()


def test_the_origin_of_every_asset_is_stated() -> None:
    text = (ROOT / "ASSETS.md").read_text(encoding="utf-8")
    stated = [*re.findall(r"`([^`]+)`", "".join(re.findall(r"(?m)^\|(.*?)\|", text)))]
    files = {file for pattern in stated for file in ROOT.glob(pattern)}
    kinds = {".png", ".svg", ".gz", ".safetensors", ".json", ".jsonl", ".txt"}
    folders = ("locales", "nodes", "subgraphs", "tests/core", "training", "workflows")
    assets = {f for name in folders for f in (ROOT / name).rglob("*") if f.suffix in kinds}
    missing = [f for f in assets if not files & {f, *f.parents}]
    assert len(assets) > 290 and missing == []


def test_the_changelog_knows_the_version(pyproject: dict[str, Any]) -> None:
    version = pyproject["project"]["version"]
    assert f"\n## {version}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["ci", "publish"])
def test_the_workflows_of_the_forge_can_be_read(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    file = ROOT / ".github" / "workflows" / f"{name}.yml"
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    assert workflow["permissions"]["contents"] == "read"
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert all(("uses" in step) != ("run" in step) for step in steps)
    if name == "ci":
        assert any(step.get("run") == "bash .ci/run" for step in jobs["linux"]["steps"])
        assert jobs["core"]["strategy"]["matrix"]["os"] == ["windows-latest", "macos-latest"]
    else:
        publish = steps[-1]
        assert publish["uses"].startswith("Comfy-Org/publish-node-action@")
        assert publish["if"] == "steps.release.outputs.publish == 'true'"


def test_actions_of_others_are_pinned_by_commit() -> None:
    workflows = [*(ROOT / ".github" / "workflows").glob("*.yml")]
    used = [re.findall(r"uses:\s*(\S+)", file.read_text(encoding="utf-8")) for file in workflows]
    assert all(used) and len(used) == 2
    loose = [name for names in used for name in names if not re.search(r"@[0-9a-f]{40}$", name)]
    assert loose == []


def test_ci_runs_the_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script
    for command in ("ruff check .", "ruff format --check .", "mypy"):
        assert command in script


def test_the_registrys_archive_is_small_and_lacks_nothing_that_the_nodes_need() -> None:
    lines = (ROOT / ".comfyignore").read_text(encoding="utf-8").splitlines()
    left_out = {line.rstrip("/") for line in lines if line and not line.startswith("#")}
    needed = ["__init__.py", "nodes", "ldcp_core", "locales", "subgraphs", "workflows", "LICENSE"]
    needed += ["README.md"]
    assert all((ROOT / name).exists() for name in left_out) and not left_out & {*needed}
    files = [file for name in needed for file in (ROOT / name, *(ROOT / name).rglob("*"))]
    assert sum(f.stat().st_size for f in files if f.is_file() and f.suffix != ".pyc") < 4 * 2**20
    of_training = ("from training", "import training", "from tests", "import tests")
    for file in (f for f in files if f.suffix == ".py"):
        code = file.read_text(encoding="utf-8").splitlines()
        assert not any(line.strip().startswith(of_training) for line in code), file
