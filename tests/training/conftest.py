"""A random SD1.5-shaped pipeline and a few images, small enough to learn on in seconds."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from training import fit
from training.learning import result as outcome
from training.model.load import DiffusionModel, _clip_tokenizer, load_model

WIDTHS = (16, 16, 32, 32)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On models as small as these a second thread waits for longer than it computes."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that would download something fails instead."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where latents are kept: never the user's own cache. Shared by the tests of a session."""
    folder = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("LDCP_CACHE", str(folder))
    return folder


@pytest.fixture
def short_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few samples to calibrate and validate with: they are not what is tested."""

    def shortened(part: Callable[..., Any]) -> Callable[..., Any]:
        short = {"calibration_batches": 1, "validation_samples": 2}
        return lambda config, *others: part(replace(config, **short), *others)

    monkeypatch.setattr(fit, "calibrate", shortened(fit.calibrate))
    monkeypatch.setattr(outcome, "_validate", shortened(outcome._validate))


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits draw no curves, which would take most of their time."""
    monkeypatch.setattr(outcome, "curves_png", lambda *_: b"")
    monkeypatch.setattr(outcome, "scores_png", lambda *_: b"")


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with SD1.5's topology, random weights, 16-pixel images."""
    root = tmp_path_factory.mktemp("pipeline")
    torch.manual_seed(0)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=WIDTHS,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
    ).save_pretrained(root / "unet")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, sample_size=16).save_pretrained(
        root / "vae"
    )
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    _clip_tokenizer().save_pretrained(root / "tokenizer")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="session")
def model(pipeline: Path) -> DiffusionModel:
    return load_model(str(pipeline))


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of smooth noise in FFHQ's layout."""
    root = tmp_path_factory.mktemp("ffhq")
    folder = root / "images1024x1024" / "00000"
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(20):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((40, 40), Image.Resampling.BICUBIC).save(folder / f"{i:05d}.png")
    return root
