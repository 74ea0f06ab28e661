"""Load Stable Diffusion 1.5, 2 or XL, frozen, from whatever form a user has it in.

A hub id, a diffusers folder and the single file of a ComfyUI installation all become one
`DiffusionModel`, so that nothing after this knows where the weights came from. A single file loads
offline: its configs and tokenizer are part of this package. Every source is recognised from
headers and configs before a weight is read, and what is none of them is refused by name.
"""

from __future__ import annotations

import gzip
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
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
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from training.console import progress
from training.errors import UserError, first_line, refuse_unless_hub_id
from training.model.configs import NAMES, config_of, folder, single_file

log = logging.getLogger(__name__)

#: the precisions of the U-Net by the names that command lines take
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
#: a source that ends so is meant as a path
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
#: side of the largest images, in pixels: self-attention over them would take terabytes
LARGEST = 8192
EXPECTED = (
    "a diffusers folder, a checkpoint of SD1.5, SD2 or SDXL (.safetensors or .ckpt), or a "
    "hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
)


@dataclass(frozen=True)
class DiffusionModel:
    """The parts of one pipeline of SD1.5's, SD2's or SDXL's shape: in eval mode, no gradients.

    SDXL has a second text encoder, with a tokenizer that pads otherwise.
    """

    source: str
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: DDPMScheduler
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None

    @property
    def text_encoders(self) -> list[Any]:
        """One for SD1.5 and SD2, two for SDXL."""
        return [e for e in (self.text_encoder, self.text_encoder_2) if e is not None]

    @property
    def tokenizers(self) -> list[CLIPTokenizer]:
        """One per text encoder."""
        return [t for t in (self.tokenizer, self.tokenizer_2) if t is not None]

    def without_encoders(self) -> DiffusionModel:
        """The same U-Net without VAE and text encoders, whose memory can then be freed."""
        return replace(self, vae=None, text_encoder=None, text_encoder_2=None)

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels per latent pixel, 8 for Stable Diffusion."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def resolution(self) -> int:
        """The side in pixels that the model was made for; 512 for SD1.5, 1024 for SDXL."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def alphas_cumprod(self) -> Tensor:
        """Cumulative product of 1 - beta per training timestep, float32 [T] on the CPU."""
        return self.scheduler.alphas_cumprod


def load_model(
    source: str, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> DiffusionModel:
    """Load the frozen parts of a model of SD1.5's, SD2's or SDXL's shape.

    Args:
        source: a diffusers folder, a single-file checkpoint in the original layout (`.safetensors`
            or `.ckpt`), or a hub id. Only the last one uses the network. Of a checkpoint with EMA
            copies (`model_ema.*`) the plain weights are used, as ComfyUI does. Inpainting
            checkpoints (9 input channels) are refused. A folder's scheduler says whether the model
            predicts noise or v; how a single file says it, see `_looks_like_v`.
        dtype: the precision of the U-Net. VAE and text encoders are in float32: half precision
            would cost quality in the one pass they make, and SDXL's VAE overflows in float16.
        device: where to put them.

    Raises:
        UserError: the source can't be found, reached or read, or is of none of these families.
    """
    device = usable_device(device)
    path = Path(source).expanduser()
    if not os.path.exists(path):  # which says no to a name that is too long
        path = _download(source)
    log.info("loading the model %s", path.name)
    for library in (diffusers, transformers):  # which show a bar for every file of weights
        library.utils.logging.disable_progress_bar()
    load = _load_folder if path.is_dir() else _load_single_file
    model = load(path, source, dtype)
    for module in (model.unet, model.vae, *model.text_encoders):
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
    """The device of this name, or for "auto" a GPU where there is one.

    Raises UserError where it computes nothing.
    """
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        found = torch.ones(1, device=name)
        found.item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device {name} can't be used: {first_line(error)}",
            "auto, cpu, cuda or mps",
            "change --device",
        ) from error
    return found.device


# --- a diffusers folder ---------------------------------------------------------------------------


def _load_folder(root: Path, source: str, dtype: torch.dtype) -> DiffusionModel:
    family = folder.check_folder_configs(root)
    weights = folder.find_weights(root, family)

    def load(part: str, cls: Any, dtype: torch.dtype = torch.float32) -> Any:
        name = weights[part]
        return cls.from_pretrained(
            root / part,
            variant="fp16" if ".fp16." in name else None,
            use_safetensors=name.endswith(".safetensors"),
            local_files_only=True,
            low_cpu_mem_usage=True,
        ).to(dtype)

    def tokenizer(name: str) -> CLIPTokenizer:
        return CLIPTokenizer.from_pretrained(root / name, local_files_only=True)

    try:
        second = family == "sdxl"
        return DiffusionModel(
            source=source,
            unet=load("unet", UNet2DConditionModel, dtype),
            vae=load("vae", AutoencoderKL),
            text_encoder=load("text_encoder", CLIPTextModel),
            tokenizer=tokenizer("tokenizer"),
            scheduler=DDPMScheduler.from_pretrained(root / "scheduler", local_files_only=True),
            text_encoder_2=load("text_encoder_2", CLIPTextModelWithProjection) if second else None,
            tokenizer_2=tokenizer("tokenizer_2") if second else None,
        )
    except Exception as error:  # odd files make the libraries raise nearly anything
        raise UserError(
            f"{root} can't be loaded: {first_line(error)}",
            folder.EXPECTED,
            single_file.FETCH_AGAIN,
        ) from error


# --- a single file --------------------------------------------------------------------------------


def _load_single_file(path: Path, source: str, dtype: torch.dtype) -> DiffusionModel:
    header = single_file.read_header(path)
    family = single_file.check_single_file(path, header)
    second = family == "sdxl"
    settings = single_file.scheduler_settings(header)
    depths = single_file.unet_depths(header) if family == "sdxl" else {}
    unet = _convert(path, family, "unet", dtype, depths)
    if family == "sd2" and _looks_like_v(unet):
        settings["prediction_type"] = "v_prediction"
        unet.register_to_config(sample_size=96)
    return DiffusionModel(
        source=source,
        unet=unet,
        vae=_convert(path, family, "vae", torch.float32),
        text_encoder=_convert_text_encoder(path, family, "text_encoder"),
        tokenizer=_clip_tokenizer("!" if family == "sd2" else "<|endoftext|>"),
        scheduler=DDPMScheduler.from_pretrained(
            config_of(family, "scheduler"), local_files_only=True, **settings
        ),
        text_encoder_2=_convert_text_encoder(path, family, "text_encoder_2") if second else None,
        tokenizer_2=_clip_tokenizer("!") if second else None,
    )


def _looks_like_v(unet: UNet2DConditionModel) -> bool:
    """Whether these weights are those of SD2 at 768 pixels, which predicts v, or of a fine-tune.

    No file of SD2 says so. ComfyUI goes by the spread of one bias, which is larger there; so that
    the same file means the same, so does this.
    """
    bias = unet.get_parameter("up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias")
    return float(bias.detach().float().std(correction=0)) > 0.09


def _convert(
    path: Path, family: str, part: str, dtype: torch.dtype, changes: Mapping[str, Any] | None = None
) -> Any:
    """Build U-Net or VAE from its shipped config and fill all of it with the file's weights.

    ``changes`` are what the file has otherwise than the config.
    """
    cls, prefix, convert = {
        "unet": (UNet2DConditionModel, single_file.UNET, convert_ldm_unet_checkpoint),
        "vae": (AutoencoderKL, single_file.VAE, convert_ldm_vae_checkpoint),
    }[part]
    config = cls.load_config(config_of(family, part), local_files_only=True) | (changes or {})
    with torch.device("meta"):
        module = cls.from_config(config)
    try:
        state = convert(_read_tensors(path, prefix, dtype), config=config)
    except (KeyError, AttributeError) as error:
        raise _incomplete(path, family, part, [f"no {error}"]) from error
    expected = module.state_dict()
    wrong = [f"no {key}" for key in expected if state.get(key) is None]
    wrong += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if state.get(key) is not None and state[key].shape != tensor.shape
    ]
    if wrong:
        raise _incomplete(path, family, part, wrong)
    module.load_state_dict({key: state[key] for key in expected}, assign=True)
    return module


def _convert_text_encoder(path: Path, family: str, part: str) -> Any:
    """A text encoder from its shipped config, filled with the file's weights, in float32."""
    prefix = single_file.TEXT_ENCODERS[family][part]
    cls = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
    renamed = _named_as_clip if prefix.endswith(".transformer.") else _named_as_open_clip
    config = CLIPTextConfig.from_pretrained(config_of(family, part), local_files_only=True)
    try:
        module, loading = cls.from_pretrained(
            None,
            config=config,
            state_dict=renamed(_read_tensors(path, prefix, torch.float32), prefix, config),
            output_loading_info=True,
        )
    except RuntimeError as error:
        raise _incomplete(path, family, part, [str(error)]) from error
    missing = [f"no {key}" for key in loading["missing_keys"] if not key.endswith("position_ids")]
    if missing:
        raise _incomplete(path, family, part, missing)
    return module.to(torch.float32)


def _named_as_clip(state: dict[str, Tensor], prefix: str, config: Any) -> dict[str, Tensor]:
    """OpenAI's CLIP, which checkpoints hold under the names of transformers."""
    unused = ("position_ids", "text_projection.weight", "logit_scale")
    # Some old merges lack the level "text_model."; ComfyUI accepts them as well.
    return {
        f"text_model.{key.removeprefix(prefix).removeprefix('text_model.')}": tensor
        for key, tensor in state.items()
        if not key.endswith(unused)
    }


def _named_as_open_clip(state: dict[str, Tensor], prefix: str, config: Any) -> dict[str, Tensor]:
    """OpenCLIP, which checkpoints hold under its own names; of SD2's all layers but the last."""
    model = SimpleNamespace(config=config)  # the converter asks for no more
    found: dict[str, Tensor] = convert_open_clip_checkpoint(model, state, prefix=prefix)
    return found


def _incomplete(path: Path, family: str, part: str, wrong: Sequence[str]) -> UserError:
    return UserError(
        f"{path} is no complete {NAMES[family]} checkpoint: {len(wrong)} tensor(s) of the "
        f"{part.replace('_', ' ')} are missing or differ: {'; '.join(sorted(wrong)[:3])}.",
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
            f"{path} is damaged ({first_line(error)}).",
            single_file.EXPECTED,
            single_file.FETCH_AGAIN,
        ) from error


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return CLIP's tokenizer; only its merges are shipped, since the vocabulary follows from them.

    OpenCLIP's differs in its padding alone: the token of number 0, "!".

    Token order (OpenAI CLIP, `simple_tokenizer.py`): the 256 byte symbols, the same at the end of
    a word, one token per merge, start and end of text.
    """
    packed = (config_of("sd15", "tokenizer") / "merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()[1:]
    merges = [tuple(line.split()) for line in lines if line]
    symbols = sorted(ByteLevel.alphabet())
    tokens = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, merges, pad_token=pad_token, model_max_length=77)


# --- the hub --------------------------------------------------------------------------------------


def _download(source: str) -> Path:
    """Fetch the configs of a hub id, check them, then fetch one weight file per part."""
    refuse_unless_hub_id(source, SUFFIXES, EXPECTED)
    try:
        root = Path(snapshot_download(source, allow_patterns=["*.json", "*/*.json", "*/*.txt"]))
        family = folder.check_folder_configs(root)
        for part, names in folder.weight_files(family).items():
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
            f"is no such path here ({first_line(error)}).",
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
