"""Recognise a diffusers folder by its topology, not by its widths or its name.

SD1.5 has four levels, two ResBlocks each, cross-attention in the upper three and in the middle, and
one text encoder. SD2 is the same with linear projections. SDXL has three levels, pooled text and
sizes beside the timestep, and two text encoders; how many transformers it has may differ. All
predict noise or v. A small model of such a shape is welcome; the refiner or a video model in the
same folder layout is not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from training.errors import UserError
from training.model.configs import NAMES
from training.model.configs.single_file import FETCH_AGAIN, TAKE_ANOTHER, read_header, refuse_own

EXPECTED = (
    "a diffusers folder of the topology of SD1.5, SD2 or SDXL with unet/, vae/, "
    "text_encoder/, tokenizer/ and scheduler/ (SDXL: and text_encoder_2/, tokenizer_2/)"
)
#: families -> their text encoders, each with a tokenizer
TEXT_ENCODERS = {
    "sd15": ("text_encoder",),
    "sd2": ("text_encoder",),
    "sdxl": ("text_encoder", "text_encoder_2"),
}
# File names in order of preference; diffusers calls the infix fp16 a variant.
_MODEL_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.fp16.bin",
)
_TEXT_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
    "pytorch_model.fp16.bin",
)
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
# The same of SDXL; derivatives have other numbers of ResBlocks and transformers.
_UNET_XL: dict[str, Any] = {
    **_UNET,
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "addition_embed_type": "text_time",
    "use_linear_projection": True,
}
for _free in ("mid_block_type", "layers_per_block", "transformer_layers_per_block"):
    del _UNET_XL[_free]
_UNETS = {"sd15": _UNET, "sd2": {**_UNET, "use_linear_projection": True}, "sdxl": _UNET_XL}


def weight_files(family: str) -> dict[str, tuple[str, ...]]:
    """The parts of a family that hold weights, and what their files are called."""
    texts = dict.fromkeys(TEXT_ENCODERS[family], _TEXT_FILES)
    return {"unet": _MODEL_FILES, "vae": _MODEL_FILES, **texts}


def check_folder_configs(folder: Path) -> str:
    """The family of the pipeline in `folder`: "sd15", "sd2" or "sdxl".

    Raises:
        UserError: its configs are those of something else.
    """
    index = _read_json(folder / "model_index.json") if _has(folder, "model_index.json") else {}
    found = _transformer_pipeline(folder, str(index.get("_class_name", "")))
    if found:
        raise UserError(f"{folder} is {found}.", EXPECTED, TAKE_ANOTHER)
    _refuse_other_folders(folder, index)
    _refuse_missing(folder, ("unet/config.json",))
    unet = _read_json(folder / "unet" / "config.json")
    family = _family(folder, unet)
    wanted = [f"{part}/config.json" for part in weight_files(family)]
    _refuse_missing(folder, (*wanted, "scheduler/scheduler_config.json"), TEXT_ENCODERS[family])
    _check_unet(folder, family, unet)
    _check_others(folder)
    _check_text(folder, family, unet)
    return family


def _family(folder: Path, config: Mapping[str, Any]) -> str:
    """Which family the U-Net of this config is of; raises UserError for the refiner."""
    if config.get("addition_embed_type") != "text_time":
        return "sd2" if config.get("use_linear_projection") else "sd15"
    if len(config.get("block_out_channels", ())) == 4:
        raise UserError(
            f"{folder} is the SDXL refiner (its U-Net has four levels and pooled text).",
            EXPECTED,
            "pass SDXL's base model",
        )
    return "sdxl"


def _refuse_missing(folder: Path, files: Sequence[str], encoders: Sequence[str] = ()) -> None:
    missing = [file for file in files if not _has(folder, file)]
    for encoder in encoders:
        part = encoder.replace("text_encoder", "tokenizer")
        if not any(all(_has(folder, part, f) for f in files) for files in TOKENIZER_FILES):
            missing.append(f"{part}/ (tokenizer.json, or vocab.json and merges.txt)")
    if missing:
        raise UserError(
            f"{folder} is incomplete: {', '.join(missing)} not found.",
            EXPECTED,
            "download the folder again, or save the pipeline again with save_pretrained()",
        )


def find_weights(folder: Path, family: str) -> dict[str, str]:
    """Return the weight file to use for each part, having checked that it is whole.

    Raises:
        UserError: a part has no weights, or its file is damaged.
    """
    chosen: dict[str, str] = {}
    for part, names in weight_files(family).items():
        present = [name for name in names if _has(folder, part, name)]
        if not present:
            raise UserError(
                f"{folder / part} holds no weights.",
                f"{names[0]} (or {', '.join(names[1:])})",
                "download that file as well",
            )
        chosen[part] = present[0]
        try:
            file = folder / part / present[0]
            refuse_own(file, read_header(file))
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


def _transformer_pipeline(folder: Path, class_name: str) -> str:
    """What a folder without a U-Net is called; "" for one with."""
    if not (folder / "transformer").is_dir():
        return ""
    known = {"StableDiffusion3": "a Stable Diffusion 3 folder", "Flux": "a Flux folder"}
    found = [what for prefix, what in known.items() if class_name.startswith(prefix)]
    return next(iter(found), f"a transformer pipeline ({class_name or 'no model_index.json'})")


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


def _check_unet(folder: Path, family: str, config: Mapping[str, Any]) -> None:
    path, wanted = folder / "unet" / "config.json", _UNETS[family]
    if config.get("in_channels", 4) in (8, 9):
        raise UserError(
            f"{folder} is an inpainting or editing model: its U-Net takes "
            f"{config['in_channels']} input channels instead of 4.",
            EXPECTED,
            "train on the text-to-image model it was made from",
        )
    for key, value in wanted.items():
        found = config.get(key, value)
        if isinstance(value, (int, bool)) and isinstance(found, list):
            found = found[0] if len(set(found)) == 1 else found
        if found != value:
            raise UserError(
                f"{path} says {key} = {found!r}.",
                f"{value!r}, as in {NAMES[family]}",
                TAKE_ANOTHER,
            )
    widths, levels = config.get("block_out_channels", []), len(wanted["down_block_types"])
    if len(widths) != levels or not isinstance(config.get("sample_size"), int):
        raise UserError(
            f"{path} says block_out_channels = {widths!r}, sample_size = "
            f"{config.get('sample_size')!r}.",
            f"{levels} widths and one whole number",
            TAKE_ANOTHER,
        )


def _check_others(folder: Path) -> None:
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise UserError(
            f"{folder} is a model whose prediction_type is {prediction!r}.",
            "a model that predicts the noise (epsilon) or v (v_prediction)",
            TAKE_ANOTHER,
        )
    if "sigma_data" in scheduler:
        raise UserError(
            f"{folder} is a model of an EDM schedule (sigma_data), as CosXL is.",
            "a schedule of betas",
            TAKE_ANOTHER,
        )
    vae = _read_json(folder / "vae" / "config.json")
    if vae.get("_class_name") != "AutoencoderKL" or vae.get("latent_channels", 4) != 4:
        raise UserError(
            f"{folder / 'vae'} is a {vae.get('_class_name')} with "
            f"{vae.get('latent_channels', 4)} latent channels.",
            "an AutoencoderKL with 4",
            "put the pipeline's own VAE back",
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise UserError(
            f"{folder / 'vae'} scales its latents by channel (latents_mean, latents_std).",
            "one scaling_factor, as in SD1.5, SD2 and SDXL",
            TAKE_ANOTHER,
        )


def _check_text(folder: Path, family: str, unet: Mapping[str, Any]) -> None:
    """The text encoders give what the U-Net takes."""
    encoders = {part: _read_json(folder / part / "config.json") for part in TEXT_ENCODERS[family]}
    for part, config in encoders.items():
        if not str(config.get("model_type", "")).startswith("clip_text"):
            raise UserError(
                f"{folder / part} is a {config.get('model_type')} model.",
                "a CLIP text model",
                TAKE_ANOTHER,
            )
    given = {"vectors": sum(_number(config, "hidden_size") for config in encoders.values())}
    taken = {"vectors": _number(unet, "cross_attention_dim")}
    if family == "sdxl":  # pooled text, and six numbers in so many channels each
        given["pooled vectors"] = _number(encoders["text_encoder_2"], "projection_dim")
        joined = _number(unet, "projection_class_embeddings_input_dim")
        taken["pooled vectors"] = joined - 6 * _number(unet, "addition_time_embed_dim")
    for what, width in given.items():
        if width != taken[what]:
            raise UserError(
                f"{folder} does not fit together: its text encoders give {what} of {width}, its "
                f"U-Net takes {taken[what]}.",
                "parts of one pipeline",
                "download the folder again",
            )


def _number(config: Mapping[str, Any], key: str) -> int:
    """A whole number of a config; 0 where there is none."""
    found = config.get(key)
    return found if isinstance(found, int) else 0
