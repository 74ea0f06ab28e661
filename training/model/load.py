"""Load Stable Diffusion 1.5, frozen, from whatever form a user has it in.

A hub id, a diffusers folder and the single file of a ComfyUI installation all become one
`DiffusionModel`, so that nothing after this knows where the weights came from. A single file loads
offline: its configs and tokenizer are part of this package. Every source is recognised from
headers and configs before a weight is read, and what is not SD1.5 is refused by name.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from training.console import progress
from training.errors import UserError
from training.model.configs import SD15, folder, single_file

log = logging.getLogger(__name__)

#: the precisions of the U-Net by the names that command lines take
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: side of the largest images, in pixels: self-attention over them would take terabytes
LARGEST = 8192
EXPECTED = (
    "a diffusers folder, a Stable Diffusion 1.5 checkpoint (.safetensors or .ckpt), or a hub id "
    "such as stable-diffusion-v1-5/stable-diffusion-v1-5"
)


@dataclass(frozen=True)
class DiffusionModel:
    """The parts of one SD1.5-shaped pipeline: in eval mode, no parameter requires a gradient."""

    source: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler

    def without_encoders(self) -> DiffusionModel:
        """The same U-Net without VAE and text encoder, whose memory can then be freed."""
        return replace(self, vae=None, text_encoder=None)

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, 8 for SD1.5."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side of the images the model was made for, in pixels; 512 for SD1.5."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of 1 - beta per training timestep, float32 [T] on the CPU."""
        return self.scheduler.alphas_cumprod


def load_model(
    source: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiffusionModel:
    """Load the frozen parts of an SD1.5-shaped model.

    Args:
        source: a diffusers folder, a single-file checkpoint in the original layout (`.safetensors`
            or `.ckpt`), or a hub id. Only the last one uses the network. Of a checkpoint with EMA
            copies (`model_ema.*`) the plain weights are used, as ComfyUI does. Checkpoints are
            taken to predict noise; inpainting checkpoints (9 input channels) are refused.
        dtype: the precision of all parts, whatever the files hold.
        device: where to put them.

    Raises:
        UserError: the source can't be found, reached or read, or is not SD1.5.
    """
    device = usable_device(device)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # which says no to a name that is too long
        path = _download(source)
    log.info("loading the model %s", path.name)
    with _no_progress_bars():
        load = _load_folder if path.is_dir() else _load_single_file
        model = load(path, source, dtype)
    for module in (model.unet, model.vae, model.text_encoder):
        module.requires_grad_(False).eval().to(device)
    return model


def check_resolution(resolution: int, vae_scale_factor: int) -> None:
    """Raises UserError for a side of images, in pixels, that the U-Net can't halve three times.

    Or that no memory would do for: more than `LARGEST`.
    """
    multiple = 8 * vae_scale_factor
    if resolution % multiple or not multiple <= resolution <= LARGEST:
        usable = min(max(multiple, resolution // multiple * multiple), LARGEST)
        raise UserError(
            f"--resolution is {resolution}.",
            f"a multiple of {multiple} pixels for this model, at most {LARGEST}",
            f"use --resolution {usable}",
        )


def usable_device(name: str | torch.device) -> torch.device:
    """The device of this name; raises UserError where it computes nothing."""
    try:
        found = torch.ones(1, device=name)
        found.item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} can't be used: {single_file.first_line(error)}",
            "cpu, cuda or mps",
            "change --device",
        ) from error
    return found.device


@torch.no_grad()
def embed_prompts(model: DiffusionModel, prompts: Sequence[str]) -> Tensor:
    """Return the text encoder's last hidden states, [B, T, D] (SD1.5: T = 77, D = 768).

    Prompts are padded to T tokens and cut beyond, without a mask, as SD1.5 was trained.
    """
    tokens = model.tokenizer(
        list(prompts),
        padding="max_length",
        max_length=model.text_encoder.config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return model.text_encoder(tokens.to(model.text_encoder.device)).last_hidden_state


@torch.no_grad()
def encode_images(model: DiffusionModel, pixels: Tensor) -> Tensor:
    """Return scaled latents [B, 4, H/f, W/f] of `pixels` [B, 3, H, W] in [-1, 1].

    They are the mean of the VAE's posterior, which repeats exactly, times the VAE's
    `scaling_factor` (0.18215 for SD1.5).
    """
    posterior = model.vae.encode(pixels.to(model.vae.device, model.vae.dtype)).latent_dist
    return posterior.mode() * model.vae.config.scaling_factor


# --- a diffusers folder ---------------------------------------------------------------------------


def _load_folder(root: Path, source: str, dtype: torch.dtype) -> DiffusionModel:
    folder.check_folder_configs(root)
    weights = folder.find_weights(root)

    def load(part: str, cls: Any) -> Any:
        name = weights[part]
        return cls.from_pretrained(
            root / part,
            variant="fp16" if ".fp16." in name else None,
            use_safetensors=name.endswith(".safetensors"),
            local_files_only=True,
            low_cpu_mem_usage=True,
        ).to(dtype)

    try:
        return DiffusionModel(
            source=source,
            unet=load("unet", UNet2DConditionModel),
            vae=load("vae", AutoencoderKL),
            text_encoder=load("text_encoder", CLIPTextModel),
            tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True),
            scheduler=DDPMScheduler.from_pretrained(root / "scheduler", local_files_only=True),
        )
    except Exception as error:  # odd files make the libraries raise nearly anything
        raise UserError(
            f"{root} can't be loaded: {single_file.first_line(error)}",
            folder.EXPECTED,
            single_file.FETCH_AGAIN,
        ) from error


# --- a single file --------------------------------------------------------------------------------


def _load_single_file(path: Path, source: str, dtype: torch.dtype) -> DiffusionModel:
    single_file.check_single_file(path, single_file.read_header(path))
    unet = _convert(path, UNet2DConditionModel, "unet", convert_ldm_unet_checkpoint, dtype)
    vae = _convert(path, AutoencoderKL, "vae", convert_ldm_vae_checkpoint, dtype)
    return DiffusionModel(
        source=source,
        unet=unet,
        vae=vae,
        text_encoder=_convert_text_encoder(path, dtype),
        tokenizer=_clip_tokenizer(),
        scheduler=DDPMScheduler.from_pretrained(SD15 / "scheduler", local_files_only=True),
    )


def _convert(path: Path, cls: Any, part: str, convert: Any, dtype: torch.dtype) -> Any:
    """Build `cls` from its shipped config and fill all of it with the file's weights."""
    config = cls.load_config(SD15 / part, local_files_only=True)
    prefix = {"unet": single_file.UNET, "vae": single_file.VAE}[part]
    with torch.device("meta"):
        module = cls.from_config(config)
    try:
        state = convert(_read_tensors(path, prefix, dtype), config=config)
    except (KeyError, AttributeError) as error:
        raise _incomplete(path, part, [f"no {error}"]) from error
    expected = module.state_dict()
    wrong = [f"no {key}" for key in expected if state.get(key) is None]
    wrong += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if state.get(key) is not None and state[key].shape != tensor.shape
    ]
    if wrong:
        raise _incomplete(path, part, wrong)
    module.load_state_dict({key: state[key] for key in expected}, assign=True)
    return module


def _convert_text_encoder(path: Path, dtype: torch.dtype) -> CLIPTextModel:
    prefix = single_file.TEXT_ENCODER
    unused = ("position_ids", "text_projection.weight", "logit_scale")
    # Some old merges lack the level "text_model."; ComfyUI accepts them as well.
    state = {
        f"text_model.{key.removeprefix(prefix).removeprefix('text_model.')}": tensor
        for key, tensor in _read_tensors(path, prefix, dtype).items()
        if not key.endswith(unused)
    }
    try:
        module, report = CLIPTextModel.from_pretrained(
            None,
            config=CLIPTextConfig.from_pretrained(SD15 / "text_encoder", local_files_only=True),
            state_dict=state,
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise _incomplete(path, "text encoder", [str(error)]) from error
    missing = [f"no {key}" for key in report["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise _incomplete(path, "text encoder", missing)
    return module.to(dtype)


def _incomplete(path: Path, part: str, wrong: Sequence[str]) -> UserError:
    return UserError(
        f"{path} is no complete SD1.5 checkpoint: {len(wrong)} tensor(s) of the {part} are missing "
        f"or differ: {'; '.join(sorted(wrong)[:3])}.",
        single_file.EXPECTED,
        single_file.FETCH_AGAIN,
    )


def _read_tensors(path: Path, prefix: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return copies, in `dtype`, of the tensors whose key starts with `prefix`."""
    if path.suffix.lower() != ".safetensors":
        state = single_file.read_pickled(path)
        return {k: v.to(dtype, copy=True) for k, v in state.items() if k.startswith(prefix)}
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith(prefix)]
            shown = progress(keys, f"reading {prefix.rstrip('.')}", unit="tensor")
            return {key: file.get_tensor(key).to(dtype, copy=True) for key in shown}
    except SafetensorError as error:
        raise UserError(
            f"{path} is damaged ({single_file.first_line(error)}).",
            single_file.EXPECTED,
            single_file.FETCH_AGAIN,
        ) from error


def _clip_tokenizer() -> CLIPTokenizer:
    """Return CLIP's tokenizer; only its merges are shipped, since the vocabulary follows from them.

    Token order (OpenAI CLIP, `simple_tokenizer.py`): the 256 byte symbols, the same at the end of
    a word, one token per merge, start and end of text.
    """
    merges = gzip.decompress((SD15 / "tokenizer" / "merges.txt.gz").read_bytes()).decode("utf-8")
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    tokens = symbols + [f"{symbol}</w>" for symbol in symbols]
    tokens += [line.replace(" ", "") for line in merges.splitlines()[1:] if line]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as name:
        files = Path(name)
        vocabulary = json.dumps({token: i for i, token in enumerate(tokens)})
        (files / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (files / "merges.txt").write_text(merges, encoding="utf-8", newline="\n")
        return CLIPTokenizer.from_pretrained(name, model_max_length=77, local_files_only=True)


# --- the hub --------------------------------------------------------------------------------------


def _download(source: str) -> Path:
    """Fetch the configs of a hub id, check them, then fetch one weight file per part."""
    if not _could_be_hub_id(source):
        raise UserError(
            f"There is no file or folder {source}.",
            EXPECTED,
            f"check the spelling; the path is taken from {Path.cwd()}",
        )
    try:
        root = Path(snapshot_download(source, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
        folder.check_folder_configs(root)
        for part, names in folder.WEIGHTS.items():
            _download_first(source, part, names)
    except GatedRepoError as error:
        raise UserError(
            f"The hub model {source} asks its users to accept a licence first.",
            EXPECTED,
            f"accept it at https://huggingface.co/{source}, then run `hf auth login`",
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"There is no model {source} on the hub that you may read, and no such path here.",
            EXPECTED,
            "check the spelling; for a private model run `hf auth login`",
        ) from error
    except UserError:
        raise
    except Exception as error:  # the transport's own exceptions differ between hub versions
        raise UserError(
            f"The hub could not be reached for {source}, it is not in the local cache, and there "
            f"is no such path here ({str(error).splitlines()[0] if str(error) else error!r}).",
            EXPECTED,
            "check the connection and HF_HUB_OFFLINE, or pass a checkpoint file you already have",
        ) from error
    return root


def _download_first(source: str, part: str, names: Sequence[str]) -> None:
    for name in names:
        try:
            hf_hub_download(source, f"{part}/{name}")
            return
        except LocalEntryNotFoundError:  # not reachable, which is not the same as not there
            if name == names[-1]:
                raise
        except EntryNotFoundError:
            continue


def _could_be_hub_id(source: str) -> bool:
    """True for `owner/name` without a file suffix; everything else is meant as a path.

    >>> _could_be_hub_id("owner/name"), _could_be_hub_id("models/sd.safetensors")
    (True, False)
    """
    suffixes = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)) and not source.endswith(suffixes)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep the libraries' bars for every weight file out of the log."""
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    shown = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, was_shown in zip(libraries, shown, strict=True):
            if was_shown:
                library.enable_progress_bar()
