"""What workflows and prompts say that were saved with an earlier version of this pack.

Commit 96b638f is the first version that others may have. Its ids, inputs and choices are written
down here as they were. ComfyUI can replace a node that is gone by another one; as long as this test
holds there is nothing to replace.
"""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfyui
HOW_TO_PRUNE = {"sparsity": "FLOAT", "ranking": "COMBO", "padding": "COMBO", "scope": "COMBO"}
#: node id -> the inputs in the order of their widgets, and the outputs
RELEASED = {
    "LDCPLoadGates": ({"gates_name": "COMBO"}, ["LDCP_GATES"]),
    "LDCPApplyDynamicPruning": (
        {
            "model": "MODEL",
            "gates": "LDCP_GATES",
            "sparsity": "FLOAT",
            "schedule": "LDCP_SCHEDULE",
            "full_weights": "COMBO",
            "sites": "STRING",
        },
        ["MODEL"],
    ),
    "LDCPStepSchedule": (
        {
            "mode": "COMBO",
            "steps": "STRING",
            "start_percent": "FLOAT",
            "end_percent": "FLOAT",
            "schedule": "LDCP_SCHEDULE",
        },
        ["LDCP_SCHEDULE"],
    ),
    "LDCPPruningReport": (
        {"model": "MODEL", "gates": "LDCP_GATES", "after": "LATENT,IMAGE"},
        ["STRING", "IMAGE"],
    ),
    "LDCPEstimateGates": (
        {"model": "MODEL", "criterion": "COMBO", **HOW_TO_PRUNE},
        ["LDCP_GATES"],
    ),
    "LDCPCalibrateGates": (
        {
            "model": "MODEL",
            "seed": "INT",
            "steps": "INT",
            "cfg": "FLOAT",
            "sampler_name": "COMBO",
            "scheduler": "COMBO",
            "positive": "CONDITIONING",
            "negative": "CONDITIONING",
            "latent_image": "LATENT",
            "denoise": "FLOAT",
            "criterion": "COMBO",
            **HOW_TO_PRUNE,
            "gates": "LDCP_GATES",
            "calibration": "LDCP_CALIBRATION",
        },
        ["LDCP_GATES", "LATENT", "LDCP_CALIBRATION"],
    ),
    "LDCPSaveGates": ({"gates": "LDCP_GATES", "filename_prefix": "STRING"}, []),
}
#: node id -> input -> what could be chosen
CHOICES = {
    "LDCPApplyDynamicPruning": {"full_weights": ["auto", "offload", "keep"]},
    "LDCPStepSchedule": {"mode": ["steps", "percent"]},
    "LDCPEstimateGates": {"criterion": ["l1", "l2"]},
    "LDCPCalibrateGates": {"criterion": ["flap", "l1", "l2"]},
}
SCOPES = ["mid", "up", "down", "mid+up", "all"]
SCOPES += ["mid+ff", "up+ff", "down+ff", "mid+up+ff", "all+ff", "ff"]
for node in ("LDCPEstimateGates", "LDCPCalibrateGates"):
    CHOICES[node]["ranking"] = ["per layer", "global"]
    CHOICES[node]["padding"] = ["zero", "extend"]
    CHOICES[node]["scope"] = SCOPES


@pytest.fixture
def info(comfy):
    return lambda node: comfy.nodes.NODE_CLASS_MAPPINGS[node].GET_NODE_INFO_V1()


@pytest.mark.parametrize("node", RELEASED)
def test_what_was_saved_with_the_first_version_still_fits_the_node(info, node):
    inputs, outputs = RELEASED[node]
    now, parts = info(node)["input"], ("required", "optional")
    kinds = {name: spec[0] for part in parts for name, spec in now.get(part, {}).items()}
    kinds = {name: kind if isinstance(kind, str) else "COMBO" for name, kind in kinds.items()}
    # widget values are saved without names: a new one comes last
    assert list(kinds.items())[: len(inputs)] == list(inputs.items())
    assert set(now["required"]) <= set(inputs)  # nor does an old prompt lack anything
    assert info(node)["output"][: len(outputs)] == outputs


@pytest.mark.parametrize("node", CHOICES)
def test_what_could_be_chosen_in_the_first_version_can_still_be_chosen(comfy, node):
    schema = comfy.nodes.NODE_CLASS_MAPPINGS[node].define_schema()
    offered = {i.id: i.options for i in schema.inputs if i.id in CHOICES[node]}
    for name, options in CHOICES[node].items():
        assert set(options) <= set(offered[name]), name
