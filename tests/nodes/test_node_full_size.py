"""A full-size SD1.5 with random weights in the true layout, through the stock loader.

And SDXL, which takes 7 GB of disk and 16 GB of memory: with ``LDCP_TEST_SDXL=1``.
"""

from __future__ import annotations

import os
import time

import full_checkpoint
import pytest
import torch

pytestmark = pytest.mark.comfyui
TOLERANCE = 1e-5


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture(scope="module")
def full_size(comfy, sd15_checkpoint):
    comfy.folder_paths.add_model_folder_path("checkpoints", str(sd15_checkpoint.parent))
    loader = comfy.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
    return loader.load_checkpoint(sd15_checkpoint.name)[0]


@pytest.mark.parametrize(
    ("size", "padding"), [((32, 32), "zero"), ((32, 40), "extend")], ids=["256x256", "256x320"]
)
def test_dense_where_off_and_the_masked_reference_where_on(
    comfy, full_size, make_gates, sample, unpatched, masked, size, padding
):
    gates = make_gates(padding=padding, topology=comfy.core.SD15)
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.steps("0"))
    evaluated = []
    sample(comfy.patch.attach(full_size, layer), 2, size, evaluated=evaluated)
    (*first, pruned, _), (*second, off, _) = evaluated
    assert torch.equal(off, unpatched(full_size, *second))
    dense = unpatched(full_size, *first)
    with masked(full_size, gates):
        reference = unpatched(full_size, *first)
    sigma = float(first[1].max())
    assert rms(pruned - reference) / sigma <= TOLERANCE
    assert rms(dense - reference) / sigma >= 100 * TOLERANCE


def test_pruning_in_no_step_gives_the_unpatched_image(comfy, full_size, make_gates, sample):
    gates = make_gates(topology=comfy.core.SD15)
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.NEVER)
    off = sample(comfy.patch.attach(full_size, layer), 2)
    assert torch.equal(off, sample(full_size, 2))


@pytest.mark.skipif("LDCP_TEST_SDXL" not in os.environ, reason="LDCP_TEST_SDXL=1: takes 16 GB")
def test_sdxl_is_dense_where_off_and_the_masked_reference_where_on(
    comfy, comfyui_path, sample, unpatched, masked
):
    path = full_checkpoint.find_or_make_xl(comfyui_path)
    comfy.folder_paths.add_model_folder_path("checkpoints", str(path.parent))
    loader = comfy.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
    model, clip, _ = loader.load_checkpoint(path.name)
    (positive,) = comfy.nodes.NODE_CLASS_MAPPINGS["CLIPTextEncode"]().encode(clip, "a face")
    del clip
    assert comfy.model.model_topology(model.model).family == "SDXL"
    estimate = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPEstimateGates"]
    how = {"sparsity": 0.3, "ranking": "per layer", "padding": "zero", "scope": "all+ff"}
    (gates,) = estimate.execute(model, criterion="l1", **how).args
    layer = comfy.patch.Layer(gates, gates.keep_sets(), comfy.core.Schedule.steps("0"))
    evaluated, patched = [], comfy.patch.attach(model, layer)
    sample(patched, 2, evaluated=evaluated, positive=positive)
    (*first, pruned, _), (*second, off, _) = evaluated
    begun = time.process_time()
    assert torch.equal(off, unpatched(model, *second))
    print(f"\ndense: {time.process_time() - begun:.1f} s of CPU")
    dense = unpatched(model, *first)
    with masked(model, gates):
        reference = unpatched(model, *first)
    sigma = float(first[1].max())
    assert rms(pruned - reference) / sigma <= TOLERANCE
    assert rms(dense - reference) / sigma >= 100 * TOLERANCE
    record = comfy.patch.attached(patched).record
    text = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"].execute(patched).args[0]
    print(f"{record.full_bytes:,} bytes of gated layers, {record.saved_bytes:,} fewer resident")
    print(text.rsplit("total", 1)[-1])
