"""Random pipelines of SD1.5's and SDXL's shape and a few images, small enough to learn on."""

from __future__ import annotations

import shutil
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
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from training import evaluate, fit, score
from training.learning import result as outcome
from training.model.load import DiffusionModel, load_model

WIDTHS = (16, 16, 32, 32)
#: of text encoders for `small_tokenizer`
TEXT = {
    "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
    "intermediate_size": 16, "num_attention_heads": 2,
}  # fmt: skip


def small_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's without merges, a token per letter: reading all 49,408 would take longest."""
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [], pad_token=pad_token, model_max_length=77)


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
    """Few samples to calibrate, align and validate with: they are not what is tested."""

    def shortened(part: Callable[..., Any]) -> Callable[..., Any]:
        short = {"calibration_batches": 1, "validation_samples": 2, "correction_samples": 10}
        return lambda config, *others: part(replace(config, **short), *others)

    monkeypatch.setattr(outcome, "ALIGNING_SAMPLES", 2)
    monkeypatch.setattr(fit, "measure_start", shortened(fit.measure_start))
    monkeypatch.setattr(outcome, "_corrected", shortened(outcome._corrected))
    monkeypatch.setattr(outcome, "_validated", shortened(outcome._validated))


@pytest.fixture(autouse=True)
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation of the U-Net is timed once: how long it takes is not what is tested."""
    monkeypatch.setattr(evaluate, "REPEATS", 1)


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
    text = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, **TEXT)
    CLIPTextModel(text).save_pretrained(root / "text_encoder")
    small_tokenizer().save_pretrained(root / "tokenizer")
    DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    ).save_pretrained(root / "scheduler")
    return root


@pytest.fixture(scope="session")
def pipeline_xl(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with SDXL's topology: two text encoders, which give 48 and 16 pooled channels."""
    root = tmp_path_factory.mktemp("pipeline-xl")
    for part in ("tokenizer", "scheduler"):
        shutil.copytree(pipeline / part, root / part)
    small_tokenizer(pad_token="!").save_pretrained(root / "tokenizer_2")
    torch.manual_seed(1)
    UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 3),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=48,
        attention_head_dim=(2, 4, 6),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    ).save_pretrained(root / "unet")
    vae = AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=8, sample_size=16, scaling_factor=0.13025
    )
    vae.save_pretrained(root / "vae")
    first = CLIPTextConfig(hidden_size=16, num_hidden_layers=2, **TEXT)
    CLIPTextModel(first).save_pretrained(root / "text_encoder")
    second = CLIPTextConfig(
        hidden_size=32, num_hidden_layers=2, projection_dim=16, hidden_act="gelu", **TEXT
    )
    CLIPTextModelWithProjection(second).save_pretrained(root / "text_encoder_2")
    return root


@pytest.fixture(scope="session")
def model(pipeline: Path) -> DiffusionModel:
    return load_model(str(pipeline))


@pytest.fixture(scope="session")
def model_xl(pipeline_xl: Path) -> DiffusionModel:
    return load_model(str(pipeline_xl))


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


@pytest.fixture(scope="session")
def source(pipeline: Path, images: Path) -> list[str]:
    """The options of a command that say what to work on."""
    return ["--model", str(pipeline), "--data", str(images)]


@pytest.fixture(scope="session")
def given(source: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gates of chance, without corrections."""
    output = tmp_path_factory.mktemp("given") / "gates.safetensors"
    options = ["--criterion", "random", "--scope", "mid+ff", "--samples", "2", "--timesteps", "2"]
    options += ["--correction-rank", "0", "--target-sparsity", "0.4", "--output", str(output)]
    assert score.main([*source, *options]) == 0
    return output
