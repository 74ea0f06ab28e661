"""A gate file learned on a diffusers model prunes the same channels in ComfyUI.

The files come from the training room (tests/nodes/exchange.py), which has packages that ComfyUI's
Python usually lacks; `test_in_comfyui.py` makes them and names their folder.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.comfyui
TOLERANCE = 2e-5
TIMESTEP = 500  # that of tests/nodes/exchange.py


@pytest.fixture(scope="module")
def folder(report_note):
    named = os.environ.get("LDCP_TEST_EXCHANGE")
    if named is None:  # ComfyUI's Python has no diffusers to make them with
        message = (
            "EXCHANGE TEST SKIPPED: make the files with `python -m tests.nodes.exchange FOLDER` in "
            "the training environment and set LDCP_TEST_EXCHANGE to FOLDER"
        )
        report_note.append(message)
        pytest.skip(message)
    return Path(named)


@pytest.fixture(scope="module")
def model(small_model, folder):
    """ComfyUI's U-Net with the weights of the diffusers model, every one of them."""
    import comfy.utils

    patcher = small_model()
    unet = patcher.model.diffusion_model
    weights = load_file(folder / "unet.safetensors")
    names = comfy.utils.unet_to_diffusers(patcher.model.model_config.unet_config)
    state = {ours: weights[theirs] for theirs, ours in names.items() if theirs in weights}
    unet.load_state_dict({k: v.reshape(unet.state_dict()[k].shape) for k, v in state.items()})
    assert len(state) == len(weights)
    return patcher


def noise(model, outputs):
    """ComfyUI's prediction of the noise for the input that diffusers saw."""
    sampling = model.model.model_sampling
    sigma = sampling.sigma(torch.tensor([float(TIMESTEP)]))
    x = outputs["x"] * (sigma**2 + 1).sqrt()
    options = {
        "wrappers": model.wrappers,  # as the host merges them in before it samples
        "sigmas": sigma,
        "sample_sigmas": torch.tensor([float(sigma), 0.0]),
    }
    denoised = model.model.apply_model(
        x, sigma.expand(2), c_crossattn=outputs["context"], transformer_options=options
    )
    return (x - denoised) / sigma


def test_the_numbers_are_those_of_diffusers(comfy, model, folder):
    outputs = load_file(folder / "outputs.safetensors")
    gates = comfy.core.load_gates(folder / "gates.safetensors")
    assert gates.sparsity == pytest.approx(0.5, abs=0.01)
    assert (noise(model, outputs) - outputs["dense"]).abs().max() <= TOLERANCE

    pruned = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    found = noise(pruned, outputs)
    assert (found - outputs["masked"]).abs().max() <= TOLERANCE
    assert (found - outputs["compact"]).abs().max() <= TOLERANCE
    assert (found - outputs["dense"]).abs().max() >= 100 * TOLERANCE


def test_the_fingerprint_of_the_same_weights_agrees(comfy, model, small_model, folder):
    gates = comfy.core.load_gates(folder / "gates.safetensors")
    assert not comfy.identity.differs_from_training(model, gates)
    assert comfy.identity.differs_from_training(small_model(seed=4), gates)
