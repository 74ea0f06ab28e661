"""Recognise a diffusers folder as SD1.5 by its topology, not by its widths.

What gates need is SD1.5's shape: four levels, two ResBlocks each, cross-attention in the upper
three and in the middle, one text encoder, noise prediction. A small model of that shape is
welcome; SDXL, SD2 or a video model in the same folder layout is not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.model.configs.single_file import FETCH_AGAIN, TAKE_SD15, read_header

EXPECTED = (
    "a diffusers folder of Stable Diffusion 1.5's topology with unet/, vae/, text_encoder/, "
    "tokenizer/ and scheduler/"
)
CONFIGS = {
    "unet": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "scheduler": "scheduler_config.json",
}
# File names in order of preference; diffusers calls the infix fp16 a variant.
_MODEL_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
WEIGHTS: dict[str, tuple[str, ...]] = {
    "unet": _MODEL_FILES,
    "vae": _MODEL_FILES,
    "text_encoder": (
        "model.safetensors",
        "pytorch_model.bin",
        "model.fp16.safetensors",
        "pytorch_model.fp16.bin",
    ),
}
TOKENIZER_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))

# What SD1.5's U-Net config says; a missing entry means the default given here.
_UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "layers_per_block": 2,
    "transformer_layers_per_block": 1,
    "in_channels": 4,
    "out_channels": 4,
    "resnet_time_scale_shift": "default",
    "only_cross_attention": False,
    "dual_cross_attention": False,
    "addition_embed_type": None,
    "class_embed_type": None,
    "num_class_embeds": None,
    "encoder_hid_dim_type": None,
    "time_cond_proj_dim": None,
    "use_linear_projection": False,
}


def check_folder_configs(folder: Path) -> None:
    """Raise `UserError` unless the configs in `folder` are those of an SD1.5-shaped pipeline."""
    index = _read_json(folder / "model_index.json") if _has(folder, "model_index.json") else {}
    name = str(index.get("_class_name", ""))
    family = _foreign_family(folder, name)
    if family:
        raise UserError(f"{folder} is {family}.", EXPECTED, TAKE_SD15)
    _refuse_other_folders(folder, index)
    missing = [f"{part}/{file}" for part, file in CONFIGS.items() if not _has(folder, part, file)]
    if not any(all(_has(folder, "tokenizer", f) for f in files) for files in TOKENIZER_FILES):
        missing.append("tokenizer/ (tokenizer.json, or vocab.json and merges.txt)")
    if missing:
        raise UserError(
            f"{folder} is incomplete: {', '.join(missing)} not found.",
            EXPECTED,
            "download the folder again, or save the pipeline again with save_pretrained()",
        )
    _check_unet(folder)
    _check_others(folder)


def find_weights(folder: Path) -> dict[str, str]:
    """Return the weight file to use for each part, having checked that it is whole.

    Raises:
        UserError: a part has no weights, or its file is damaged.
    """
    chosen: dict[str, str] = {}
    for part, names in WEIGHTS.items():
        present = [name for name in names if _has(folder, part, name)]
        if not present:
            raise UserError(
                f"{folder / part} holds no weights.",
                f"{names[0]} (or {', '.join(names[1:])})",
                "download that file as well",
            )
        chosen[part] = present[0]
        try:
            read_header(folder / part / present[0])
        except UserError as error:
            raise UserError(error.found, f"the {part} weights", error.next_step) from error
    return chosen


def _has(folder: Path, *names: str) -> bool:
    return folder.joinpath(*names).is_file()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}).", "a config", FETCH_AGAIN) from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}.", "a JSON object", FETCH_AGAIN)
    return data


def _foreign_family(folder: Path, class_name: str) -> str:
    if "StableDiffusionXL" in class_name or (folder / "text_encoder_2" / "config.json").is_file():
        has_transformer = (folder / "transformer").is_dir()
        return f"a {class_name or 'two-encoder'} folder" if has_transformer else "an SDXL folder"
    if (folder / "transformer").is_dir():
        known = {"StableDiffusion3": "a Stable Diffusion 3 folder", "Flux": "a Flux folder"}
        for prefix, what in known.items():
            if class_name.startswith(prefix):
                return what
        return f"a transformer pipeline ({class_name or 'no model_index.json'})"
    return ""


def _refuse_other_folders(folder: Path, index: dict[str, Any]) -> None:
    """A folder with no trace of a pipeline gets a hint about what it does hold."""
    if index or (folder / "unet").is_dir():
        return
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.ckpt"))
    if _has(folder, "config.json") and files:
        raise UserError(
            f"{folder} is one part of a pipeline.", EXPECTED, f"pass {folder.parent} instead"
        )
    next_step = (
        f"to use a checkpoint in it, pass the file, for example {files[0]}"
        if files
        else "pass the folder that holds model_index.json"
    )
    raise UserError(f"{folder} is not a diffusers folder.", EXPECTED, next_step)


def _check_unet(folder: Path) -> None:
    path = folder / "unet" / CONFIGS["unet"]
    config = _read_json(path)
    if config.get("use_linear_projection"):
        raise UserError(
            f"{folder} is a Stable Diffusion 2 folder (linear projections).", EXPECTED, TAKE_SD15
        )
    if config.get("in_channels", 4) in (8, 9):
        raise UserError(
            f"{folder} is an inpainting or editing model: its U-Net takes "
            f"{config['in_channels']} input channels instead of 4.",
            EXPECTED,
            "train on the text-to-image model it was made from",
        )
    for key, wanted in _UNET.items():
        found = config.get(key, wanted)
        if isinstance(wanted, (int, bool)) and isinstance(found, list):
            found = found[0] if len(set(found)) == 1 else found
        if found != wanted:
            raise UserError(
                f"{path} says {key} = {found!r}.", f"{wanted!r}, as in SD1.5", TAKE_SD15
            )
    widths = config.get("block_out_channels", [])
    if len(widths) != 4 or not isinstance(config.get("sample_size"), int):
        raise UserError(
            f"{path} says block_out_channels = {widths!r}, sample_size = "
            f"{config.get('sample_size')!r}.",
            "four widths and one whole number",
            TAKE_SD15,
        )


def _check_others(folder: Path) -> None:
    prediction = _read_json(folder / "scheduler" / CONFIGS["scheduler"]).get(
        "prediction_type", "epsilon"
    )
    if prediction != "epsilon":
        raise UserError(
            f"{folder} is a {prediction} model (Stable Diffusion 2 and some fine-tunes are).",
            "a model that predicts noise (epsilon)",
            TAKE_SD15,
        )
    vae = _read_json(folder / "vae" / CONFIGS["vae"])
    if vae.get("_class_name") != "AutoencoderKL" or vae.get("latent_channels", 4) != 4:
        raise UserError(
            f"{folder / 'vae'} is a {vae.get('_class_name')} with "
            f"{vae.get('latent_channels', 4)} latent channels.",
            "an AutoencoderKL with 4",
            "put the pipeline's own VAE back",
        )
    width = _read_json(folder / "unet" / CONFIGS["unet"]).get("cross_attention_dim")
    text = _read_json(folder / "text_encoder" / CONFIGS["text_encoder"])
    if not str(text.get("model_type", "")).startswith("clip_text"):
        raise UserError(
            f"{folder / 'text_encoder'} is a {text.get('model_type')} model.",
            "a CLIP text model",
            TAKE_SD15,
        )
    if text.get("hidden_size") != width:
        raise UserError(
            f"{folder} does not fit together: its text encoder gives vectors of "
            f"{text.get('hidden_size')}, its U-Net takes {width}.",
            "parts of one pipeline",
            "download the folder again",
        )
