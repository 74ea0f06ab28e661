"""Importing the pack is quick, and brings none of the libraries that only training needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.comfyui
REPOSITORY = Path(__file__).resolve().parents[2]

# ComfyUI itself imports transformers: only what the pack adds counts. Processor time, because a
# busy machine would fail a test of wall-clock time.
SCRIPT = """
import asyncio, json, sys, time
from comfy.cli_args import args
args.cpu = True
import nodes
before = set(sys.modules)
start = time.process_time()
assert asyncio.run(nodes.load_custom_node(sys.argv[1]))
print(json.dumps({
    "seconds": time.process_time() - start,
    "added": sorted({name.split(".")[0] for name in set(sys.modules) - before}),
    "nodes": sorted(name for name in nodes.NODE_CLASS_MAPPINGS if name.startswith("LDCP")),
}))
"""


@pytest.fixture(scope="module")
def imported(comfy):
    comfyui = os.path.dirname(os.path.abspath(comfy.nodes.__file__))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(REPOSITORY)],
        cwd=comfyui,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.strip().splitlines()[-1])


def test_all_nodes_are_registered(imported):
    assert imported["nodes"] == [
        "LDCPApplyDynamicPruning",
        "LDCPCalibrateGates",
        "LDCPCompareShares",
        "LDCPEstimateGates",
        "LDCPLoadGates",
        "LDCPPruningReport",
        "LDCPSaveGates",
        "LDCPStepSchedule",
    ]


def test_it_takes_less_than_half_a_second(imported):
    assert imported["seconds"] < 0.5


def test_it_loads_no_training_library(imported):
    heavy = {"diffusers", "transformers", "datasets", "accelerate", "matplotlib", "PIL", "tqdm"}
    assert not heavy & set(imported["added"])
