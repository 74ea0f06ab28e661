"""Runs this folder inside ComfyUI's own Python when this one lacks ComfyUI's requirements.

See tests/conftest.py for how ComfyUI is found.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]


def test_the_node_tests_pass_inside_comfyui(comfyui_path, comfyui_python, report_note, tmp_path):
    if comfyui_python is None:  # ComfyUI is no requirement of this repository
        missing = "a ComfyUI" if comfyui_path is None else f"a Python that can run {comfyui_path}"
        message = (
            f"NODE TESTS SKIPPED: {missing} was not found; set COMFYUI_PATH to a ComfyUI and "
            "COMFYUI_PYTHON to its Python"
        )
        report_note.append(message)
        pytest.skip(message)
    environment = {**os.environ, "COMFYUI_PATH": str(comfyui_path)}
    if importlib.util.find_spec("diffusers"):
        exchange = [sys.executable, "-m", "tests.nodes.exchange", str(tmp_path)]
        subprocess.run(exchange, cwd=REPOSITORY, check=True)
        environment["LDCP_TEST_EXCHANGE"] = str(tmp_path)
    run = subprocess.run(
        [comfyui_python, "-m", "pytest", HERE, "-q", "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2400,
    )
    summary = (run.stdout.strip().splitlines() or ["no output"])[-1]
    report_note.append(f"node tests inside {comfyui_path}: {summary}")
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", summary), summary


def test_the_pack_imports_without_comfyui():
    name = "ldcp_pack_without_comfyui"
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "__init__.py")
    before = set(sys.modules)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert set(sys.modules) - before <= {name}
