"""Recognise a single checkpoint file from its first bytes and its list of tensors.

Users hand over whatever their model folder holds: Flux, LoRAs, half a download, a saved web page.
Loading one of those fails late and obscurely, so the file is identified here first. Of a
safetensors file only the header is read; a `.ckpt` is mapped into memory without touching its
weights and never runs pickled code.
"""

from __future__ import annotations

import json
import pickle
import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ldcp_core import export, gatefile
from training.errors import UserError, first_line

EXPECTED = (
    "a full checkpoint of Stable Diffusion 1.5, 2 or XL (U-Net, VAE and text encoders in one "
    ".safetensors or .ckpt file), such as v1-5-pruned-emaonly.safetensors"
)
FETCH_AGAIN = "download the file again and compare its size with the one on the download page"
TAKE_ANOTHER = "pass a checkpoint of SD1.5, SD2 or SDXL; other architectures are not supported"

UNET = "model.diffusion_model."
VAE = "first_stage_model."
#: family -> part -> what the keys of a text encoder begin with
TEXT_ENCODERS: dict[str, dict[str, str]] = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
#: width of the text embeddings -> what such a U-Net is called, and its family if that is supported
_WIDTHS = {
    768: ("an SD1.5", "sd15"),
    1024: ("a Stable Diffusion 2", "sd2"),
    1280: ("an SDXL refiner", None),
    2048: ("an SDXL", "sdxl"),
}

#: format in the metadata -> what it is, next step
_OWN = {
    gatefile.FORMAT: ("an LDCP gate file", "pass the checkpoint that the gates are for"),
    export.FORMAT: ("a pruned U-Net by training.export", "pass the model that it was made of"),
}
_PICKLED = {".ckpt", ".pt", ".pth", ".bin"}

# (what it is, next step, fragments one of which occurs in some key); the first match wins.
_RELATIVES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "a LoRA",
        "pass the checkpoint the LoRA was made for; the LoRA itself can be used in ComfyUI as ever",
        (".lora_down.", ".lora_up.", ".lora_A.", ".lora_B.", ".lora.", "lora_unet_", "lora_te")
        + (".hada_w", ".lokr_w"),
    ),
    (
        "a ControlNet",
        "pass the checkpoint it steers",
        ("control_model.", "input_hint_block.", "controlnet_cond_embedding."),
    ),
    ("a Flux model", TAKE_ANOTHER, ("double_blocks.0.img_attn.",)),
    ("a Stable Diffusion 3 model", TAKE_ANOTHER, ("joint_blocks.0.",)),
    (
        "a model of an EDM schedule (CosXL, Playground 2.5)",
        TAKE_ANOTHER,
        ("edm_mean", "edm_std", "edm_vpred."),
    ),
    (
        "a textual inversion embedding",
        "pass the checkpoint it was made for",
        ("emb_params", "string_to_param"),
    ),
)


@dataclass(frozen=True)
class Header:
    """Names and shapes of the tensors in a file, and its metadata."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str] = field(default_factory=dict)


def read_header(path: Path) -> Header:
    """Return what tensors `path` holds, without reading them.

    Raises:
        UserError: the file is empty, a web page, a Git LFS pointer, cut off, or no checkpoint.
    """
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path} is empty (0 bytes).", EXPECTED, FETCH_AGAIN)
    with path.open("rb") as file:
        start = file.read(512)
    _refuse_text(path, start)
    if path.suffix.lower() == ".safetensors":
        return _read_safetensors_header(path, size, start)
    if path.suffix.lower() in _PICKLED:
        state = read_pickled(path)
        return Header({key: tuple(value.shape) for key, value in state.items()})
    kind = "in GGUF format" if start.startswith(b"GGUF") else f"a {path.suffix or 'nameless'} file"
    raise UserError(f"{path} is {kind}.", EXPECTED, "pass the .safetensors version of the model")


def _refuse_text(path: Path, start: bytes) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(b"version https://git-lfs"):
        raise UserError(
            f"{path} is a Git LFS pointer, not the model: a short text that stands in for it.",
            EXPECTED,
            "run `git lfs pull` in that repository, or download the file itself",
        )
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise UserError(
            f"{path} is a web page that was saved under the model's name.",
            EXPECTED,
            "open the page in a browser, log in or accept the licence if it asks, and use its "
            "download button",
        )


def _read_safetensors_header(path: Path, size: int, start: bytes) -> Header:
    if start.startswith(b"PK"):
        raise UserError(
            f"{path} is a PyTorch checkpoint under a .safetensors name.",
            EXPECTED,
            "rename it to end in .ckpt",
        )
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if len(start) < 9 or start[8:9] != b"{" or length > 100_000_000:
        raise UserError(f"{path} is not a safetensors file.", EXPECTED, FETCH_AGAIN)
    if 8 + length > size:
        raise _cut_off(path, size, f"more than {8 + length:,}")
    with path.open("rb") as file:
        file.seek(8)
        raw = file.read(length)
    try:
        entries: dict[str, Any] = json.loads(raw)
        metadata = {key: str(value) for key, value in entries.pop("__metadata__", {}).items()}
        shapes = {key: tuple(map(int, entry["shape"])) for key, entry in entries.items()}
        end = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (
        *(ValueError, KeyError, TypeError, AttributeError, IndexError),
        *(OverflowError, RecursionError),
    ) as error:
        raise UserError(
            f"{path} has a damaged safetensors header ({error}).", EXPECTED, FETCH_AGAIN
        ) from error
    if 8 + length + end > size:
        raise _cut_off(path, size, f"{8 + length + end:,}")
    return Header(shapes, metadata)


def _cut_off(path: Path, size: int, wanted: str) -> UserError:
    return UserError(
        f"{path} is cut off: it holds {size:,} bytes of {wanted}.", EXPECTED, FETCH_AGAIN
    )


def read_pickled(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a PyTorch checkpoint, mapped lazily where its format allows.

    Raises:
        UserError: the file is damaged, or can be read only by running the code pickled in it.
    """
    with path.open("rb") as file:
        start = file.read(2)
    try:
        zipped = zipfile.is_zipfile(path)
        if start == b"PK" and not zipped:
            raise UserError(
                f"{path} is cut off: the directory at its end is missing.", EXPECTED, FETCH_AGAIN
            )
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} can't be read as plain weights{_named_code(error)}.",
            EXPECTED + "; pickled code is never run",
            "use the .safetensors version of the model, or convert it with a tool you trust",
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise nearly anything
        raise UserError(
            f"{path} is damaged ({first_line(error)}).", EXPECTED, FETCH_AGAIN
        ) from error
    for _ in range(2):  # some trainers wrap it twice
        if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
    if not isinstance(state, Mapping):
        raise UserError(f"{path} holds a {type(state).__name__}, no model.", EXPECTED, TAKE_ANOTHER)
    size = path.stat().st_size
    return {
        key: value
        for key, value in state.items()
        if isinstance(key, str) and isinstance(value, torch.Tensor) and _is_plain(value, size)
    }


def _is_plain(tensor: torch.Tensor, size: int) -> bool:
    """Whether a tensor is numbers in memory, not more than ``size`` bytes of a file can hold."""
    return (
        not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)
        and tensor.layout is torch.strided
        and tensor.nbytes <= size
    )


def _named_code(error: pickle.UnpicklingError) -> str:
    """What a pickle would run, where that is told; PyTorch's advice to run it is not passed on.

    >>> _named_code(pickle.UnpicklingError("Unsupported global: GLOBAL os.system was not an"))
    ' (it names os.system)'
    """
    found = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
    return f" (it names {found[1]})" if found else ""


def refuse_own(path: Path, header: Header) -> None:
    """Raises UserError for what this project has written itself."""
    if own := _OWN.get(header.metadata.get("format", "")):
        raise UserError(f"{path} is {own[0]}.", EXPECTED, own[1])


def check_single_file(path: Path, header: Header) -> str:
    """The family of a complete text-to-image checkpoint: "sd15", "sd2" or "sdxl".

    Raises:
        UserError: `header` is that of something else.
    """

    def other(found: str, next_step: str = TAKE_ANOTHER) -> UserError:
        return UserError(f"{path} is {found}.", EXPECTED, next_step)

    keys = header.shapes.keys()
    refuse_own(path, header)
    for name, next_step, fragments in _RELATIVES:
        if any(fragment in key for key in keys for fragment in fragments):
            raise other(name, next_step)
    if f"{UNET}input_blocks.0.0.weight" not in keys:
        raise other(*_part(header))
    channels = _inputs(header, f"{UNET}input_blocks.0.0.weight")
    if channels != 4:
        kind = {9: "an inpainting checkpoint", 8: "an InstructPix2Pix checkpoint"}
        raise other(
            f"{kind.get(channels, 'a checkpoint')} (its U-Net takes {channels} input channels "
            "instead of 4)",
            "train on the text-to-image checkpoint it was made from",
        )
    width = _text_width(header)
    if width not in _WIDTHS:
        raise other(f"no model that is known (text width {width})")
    called, family = _WIDTHS[width]
    if family is None:
        raise other(f"{called} checkpoint (text width {width})")
    if family != "sdxl" and f"{UNET}label_emb.0.0.weight" in keys:
        raise other(f"{called} unCLIP checkpoint")
    parts = {"VAE": f"{VAE}encoder.conv_in.weight"} | {
        part.replace("_", " "): prefix for part, prefix in TEXT_ENCODERS[family].items()
    }
    missing = [
        f"the {part}"
        for part, start in parts.items()
        if not any(key.startswith(start) for key in keys)
    ]
    if missing:
        raise other(
            f"{called} U-Net without {' and '.join(missing)}",
            "pass the full checkpoint, or a diffusers folder that has all parts",
        )
    return family


def scheduler_settings(header: Header) -> dict[str, Any]:
    """What the file says of its schedule, by the two keys that fine-tunes use."""
    found: dict[str, Any] = {}
    if "v_pred" in header.shapes:
        found["prediction_type"] = "v_prediction"
    if "ztsnr" in header.shapes:
        found["rescale_betas_zero_snr"] = True
    return found


def unet_depths(header: Header) -> dict[str, Any]:
    """How many ResBlocks and transformers an SDXL U-Net has, as diffusers' config says it.

    Derivatives have fewer of them: SSD-1B, Vega, KOALA.
    """
    keys = [key.removeprefix(UNET) for key in header.shapes if key.startswith(UNET)]
    found: dict[str, set[str]] = {}
    for key in keys:
        block, inside, number = key.partition(".1.transformer_blocks.")
        if inside:
            found.setdefault(block, set()).add(number.partition(".")[0])

    def depth(path: str, number: int) -> int:  # where there is none diffusers wants a number, too
        return len(found.get(f"{path}.{number}", ())) or 1

    down = (n for n in range(1, 9) if f"input_blocks.{n}.0.op.weight" in keys)
    stride = next(down, 3)  # the ResBlocks of a level, and what makes the map smaller
    middle = {key.split(".")[1] for key in keys if key.startswith("middle_block.")}
    kinds = {"1": "UNetMidBlock2DCrossAttn", "0": "UNetMidBlock2D"}
    return {
        "layers_per_block": stride - 1,
        "mid_block_type": next((kind for n, kind in kinds.items() if n in middle), None),
        "transformer_layers_per_block": [
            [depth("input_blocks", stride * level + n) for n in range(1, stride)]
            for level in range(3)
        ],
        "reverse_transformer_layers_per_block": [
            [depth("output_blocks", stride * level + n) for n in range(stride)]
            for level in range(3)
        ],
    }


def _text_width(header: Header) -> int:
    """Width of the text embeddings that the U-Net's first transformer takes; 0 where none is."""
    ends = ".1.transformer_blocks.0.attn2.to_k.weight"
    places = (f"{UNET}input_blocks.{n}{ends}" for n in range(1, 12))
    return next((width for key in places if (width := _inputs(header, key))), 0)


def _inputs(header: Header, key: str) -> int:
    """Input channels of a weight; 0 where there is none."""
    shape = header.shapes.get(key, ())
    return shape[1] if len(shape) > 1 else 0


def _part(header: Header) -> tuple[str, str]:
    """What a file without a whole checkpoint's U-Net is, and what to do about it."""
    keys = header.shapes.keys()
    if (
        f"{VAE}encoder.conv_in.weight" in keys
        or {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= keys
    ):
        return "a VAE alone", "pass the full checkpoint; it brings its own VAE"
    if {"conv_in.weight", "mid_block.resnets.0.conv1.weight"} <= keys:
        return (
            "the U-Net of a diffusers folder",
            "pass the folder that holds model_index.json, unet/ and all other parts",
        )
    if any("text_model.encoder.layers." in key for key in keys):
        return "a text encoder alone", "pass the full checkpoint"
    shown = ", ".join(sorted(keys)[:3]) or "none"
    return f"no model that is known here ({len(keys)} tensor(s), such as {shown})", TAKE_ANOTHER
