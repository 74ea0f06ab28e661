"""A full-size SD1.5 with random weights in the true layout, through the stock loader.

``LDCP_TEST_CHECKPOINT`` names a checkpoint to use instead of the one that is made, once, in the
temporary folder (1.7 GB, the U-Net alone).
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfyui
TOLERANCE = 1e-5


def rms(x):
    return float(x.float().square().mean().sqrt())


@pytest.fixture(scope="module")
def checkpoint(comfy):
    named = os.environ.get("LDCP_TEST_CHECKPOINT")
    if named:
        return Path(named)
    path = Path(tempfile.gettempdir()) / "ldcp-tests" / "random_sd15_unet.safetensors"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        make_checkpoint(path)
    return path


def make_checkpoint(path):
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        unet = UNetModel(
            image_size=32,
            in_channels=4,
            out_channels=4,
            model_channels=320,
            num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 2, 4, 4],
            num_heads=8,
            use_spatial_transformer=True,
            transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
            transformer_depth_middle=1,
            transformer_depth_output=[1] * 9 + [0] * 3,
            context_dim=768,
            legacy=False,
        )
    generator, tensors = torch.Generator().manual_seed(15), {}
    for name, parameter in unet.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            noise *= parameter[0].numel() ** -0.5
        else:
            noise = 0.1 * noise + name.endswith("weight")
        tensors[f"model.diffusion_model.{name}"] = noise.half()
    partial = path.with_suffix(".part")
    save_file(tensors, partial)
    os.replace(partial, path)


@pytest.fixture(scope="module")
def full_size(comfy, checkpoint):
    comfy.folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
    loader = comfy.nodes.NODE_CLASS_MAPPINGS["CheckpointLoaderSimple"]()
    return loader.load_checkpoint(checkpoint.name)[0]


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
