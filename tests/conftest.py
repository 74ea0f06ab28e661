"""Finding a real ComfyUI for the tests in tests/nodes.

They run inside ComfyUI's own code. ComfyUI is looked for at ``$COMFYUI_PATH``, two levels above
this repository (an installed node pack), and at ``~/comfy/ComfyUI``.

ComfyUI's requirements are usually not those of training, so there are two ways to run:

- pytest runs in a Python that has ComfyUI's requirements: the tests run there, directly;
- any other Python: one test starts a second pytest in ComfyUI's own Python, found at
  ``$COMFYUI_PYTHON`` or in a ``venv`` or ``.venv`` folder beside ComfyUI's main.py.

Where neither is possible they are skipped, and the last lines of the report say so.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
#: imported by ComfyUI itself, and seldom found elsewhere
COMFYUI_REQUIRES = ("torch", "torchsde", "torchvision", "aiohttp", "av", "einops", "transformers")
NOTES = pytest.StashKey[list[str]]()


def find_comfyui() -> Path | None:
    """The ComfyUI to test in."""
    named = os.environ.get("COMFYUI_PATH")
    usual = [REPOSITORY.parent.parent, Path.home() / "comfy" / "ComfyUI"]
    for place in [Path(named)] if named else usual:
        if (place / "comfy" / "model_patcher.py").is_file() and (place / "nodes.py").is_file():
            return place.resolve()
    return None


def find_comfyui_python(comfyui: Path) -> Path | None:
    """The interpreter that ComfyUI runs with, when it is not this one."""
    named = os.environ.get("COMFYUI_PYTHON")
    places = [Path(named)] if named else []
    for folder in ("venv", ".venv"):
        places += [comfyui / folder / "bin/python", comfyui / folder / "Scripts/python.exe"]
    return next((place for place in places if place.is_file()), None)


COMFYUI = find_comfyui()
#: whether the node tests run in this Python
IN_PROCESS = COMFYUI is not None and all(map(importlib.util.find_spec, COMFYUI_REQUIRES))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NOTES] = []


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without ComfyUI's requirements leave its tests to the one that starts a second pytest."""
    needs_comfyui = collection_path.name.startswith(("test_node_", "comfy_server", "browser"))
    return True if needs_comfyui and not IN_PROCESS else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for note in terminalreporter.config.stash[NOTES]:
        terminalreporter.write_line(note, bold=True)


@pytest.fixture(scope="session")
def report_note(request: pytest.FixtureRequest) -> list[str]:
    """Lines appended here are printed at the end of the report."""
    return request.config.stash[NOTES]


@pytest.fixture(scope="session")
def comfyui_path() -> Path | None:
    return COMFYUI


@pytest.fixture(scope="session")
def comfyui_python() -> Path | None:
    """The Python to run ComfyUI with; skips where the node tests run in this one."""
    if IN_PROCESS:  # nothing is left out: a second pytest would run the same tests again
        pytest.skip(f"the node tests run in this Python, inside {COMFYUI}")
    return None if COMFYUI is None else find_comfyui_python(COMFYUI)
