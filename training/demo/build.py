"""Build the demo pipeline from nothing: draw, train the autoencoder, train the denoiser, export.

    python -m training.demo.build --output training/demo/pipeline --work demo-work

With `--emoji` a model of captioned emoji is built instead, starting as the demo:

    npm pack emoji-datasource-google@16.0.0
    python -m training.demo.build --emoji emoji-datasource-google-16.0.0.tgz --output emoji-model

The work folder keeps every stage, so an interrupted build continues where it stopped. With
`--images`, 256 pictures that it is not trained on are written too. Threads are limited to
`--threads` for the denoiser.
"""

import argparse
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from training.console import explaining
from training.errors import UserError
from training.output import output_folder

from .autoencoder import (
    add_colour_channel_,
    colour_targets,
    encode_all,
    standardise_,
    train_autoencoder,
    weakest_channel,
)
from .check import FIRST_SEED, MID, Draw, effect, load_pipeline, losses, noisy_probe
from .denoiser import (
    CONTINUED,
    WIDTHS,
    Recipe,
    State,
    new_scheduler,
    new_unet,
    renew_unused_,
    train_denoiser,
)
from .draw import METADATA, file_name, has_faces
from .emoji import EmojiPictures, read_emoji
from .faces import draw_face
from .text import WIDTH, new_text_encoder, tokenize, with_tokens, write_tokenizer

log = logging.getLogger("training.demo")

TRAIN_COUNT = 8_000
MONITOR_COUNT = 64
SAMPLE_COUNT, SAMPLE_SEED = 256, 1_000_000
#: what the work folder may hold
STAGES = {"images.npy", "captions.json", "vae", "latents.pt", "tokenizer", "denoiser.pt"}


@explaining
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the pipeline")
    parser.add_argument("--work", type=Path, default=Path("demo-work"), help="intermediate results")
    parser.add_argument("--images", type=Path, help="write unseen pictures into this folder")
    parser.add_argument("--emoji", type=Path, help="train on the emoji of this npm package")
    parser.add_argument("--autoencoder-minutes", type=float, default=10.0)
    parser.add_argument("--denoiser-minutes", type=float, default=108.0, help="of processor time")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    check_folders(args.output, args.work)
    args.work.mkdir(parents=True, exist_ok=True)
    draw: Draw = EmojiPictures(read_emoji(args.emoji)) if args.emoji else draw_face
    if args.images:
        write_sample_images(args.images, draw)
    captions = draw_training_set(args.work, draw)
    start = load_pipeline() if args.emoji else None
    if start and not (args.work / "vae").exists():
        start.vae.save_pretrained(args.work / "vae")
    vae, latents = autoencoder_stage(args.work, 60 * args.autoencoder_minutes)
    torch.set_num_threads(args.threads)
    recipe = replace(CONTINUED if start else Recipe(), seconds=60 * args.denoiser_minutes)
    denoiser_stage(args.work, args.output, vae, latents, captions, start, recipe, draw)
    return 0


def check_folders(output: Path, work: Path) -> None:
    """Raises UserError where a folder holds what was not built here: both are written over."""
    unet = output / "unet" / "config.json"
    ours = unet.exists() and json.loads(unet.read_text())["block_out_channels"] == list(WIDTHS)
    if {path.name for path in output_folder("--work", work, ()).glob("*")} - STAGES:
        raise UserError(f"{work} holds other files than a build's.", "", "change --work")
    if any(output_folder("--output", output, ()).glob("*")) and not ours:
        raise UserError(f"{output} holds no pipeline that was built here.", "", "change --output")


def draw_training_set(work: Path, draw: Draw) -> list[str]:
    """Draw `images.npy` and `captions.json` once, return the captions."""
    captions_path = work / "captions.json"
    if not captions_path.exists():
        images = np.lib.format.open_memmap(
            work / "images.npy", "w+", np.uint8, (TRAIN_COUNT, 128, 128, 3)
        )
        captions = []
        with Pool() as pool:
            for i, (pixels, caption) in enumerate(pool.imap(draw, range(TRAIN_COUNT), 64)):
                images[i] = np.asarray(pixels)
                captions.append(caption)
        captions_path.write_text(json.dumps(captions))
    return json.loads(captions_path.read_text())


def autoencoder_stage(work: Path, seconds: float) -> tuple[AutoencoderKL, Tensor]:
    """Train the autoencoder and encode the training set, or load both."""
    folder, latents_path = work / "vae", work / "latents.pt"
    if not latents_path.exists():
        images = np.load(work / "images.npy", mmap_mode="r")
        if folder.exists():  # put there by hand: only the denoiser is to be trained
            vae = AutoencoderKL.from_pretrained(folder)
        else:
            vae = _new_autoencoder(images, seconds)
        latents = encode_all(vae, images)
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        vae.save_pretrained(folder)
        torch.save(latents, latents_path)
    vae = AutoencoderKL.from_pretrained(folder)
    return vae, torch.load(latents_path, weights_only=True) * vae.config.scaling_factor


def _new_autoencoder(images: np.ndarray, seconds: float) -> AutoencoderKL:
    vae = train_autoencoder(images, 0.6 * seconds, seed=0)
    raw = encode_all(vae, images)
    targets = standardise_(vae, raw)
    targets[:, weakest_channel(raw)] = colour_targets(images)
    add_colour_channel_(vae, images, targets, 0.4 * seconds, seed=1)
    return vae


def denoiser_stage(
    work: Path,
    output: Path,
    vae: AutoencoderKL,
    latents: Tensor,
    captions: list[str],
    start: StableDiffusionPipeline | None,
    recipe: Recipe,
    draw: Draw,
) -> None:
    """Train U-Net and text encoder, watching the mid block, and export their moving averages.

    They start as those of `start`, where there is one.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = write_tokenizer(captions, work / "tokenizer")
    text, unet = new_text_encoder(tokenizer), new_unet(WIDTH)
    if start:
        text, unet = with_tokens(start.text_encoder, start.tokenizer, tokenizer), start.unet
        renew_unused_(unet)
    state = State.fresh(text, unet)
    checkpoint = work / "denoiser.pt"
    if checkpoint.exists():
        state.load(checkpoint)
        log.info("continuing at step %d", state.step)
    save = partial(
        save_and_export, checkpoint=checkpoint, folder=output, vae=vae, tokenizer=tokenizer
    )
    train_denoiser(
        state,
        latents,
        tokenize(tokenizer, captions),
        tokenize(tokenizer, [""]),
        recipe,
        {60.0: save, 300.0: mid_monitor(vae, tokenizer, draw)},
    )
    save(state)


def mid_monitor(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, draw: Draw
) -> Callable[[State], None]:
    """A callback that logs by how much the held-out loss depends on the mid block."""
    drawn = [draw(FIRST_SEED - 1 - i) for i in range(MONITOR_COUNT)]
    latents = encode_all(vae, np.stack([np.asarray(image) for image, _ in drawn]))
    ids = tokenize(tokenizer, [caption for _, caption in drawn])

    @torch.no_grad()
    def report(state: State) -> None:
        unet, text = state.ema
        probe = noisy_probe(latents * vae.config.scaling_factor, text(ids).last_hidden_state, 500)
        intact = losses(unet, probe)
        log.info(
            "step %d: held-out loss %.4f (t >= 500), mid block zeroed %s",
            state.step,
            intact.mean(),
            effect(unet, probe, intact, *MID),
        )

    return report


def save_and_export(
    state: State, checkpoint: Path, folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer
) -> None:
    """Write the checkpoint and, as float16, the pipeline with the averaged weights."""
    state.save(checkpoint)
    unet, text = state.ema
    export(folder, vae, tokenizer, text, unet)
    log.info("step %d, %.0f s: exported", state.step, state.elapsed)


def export(
    folder: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
) -> None:
    """Save in diffusers' layout; the models handed in stay as they are."""
    parts = []
    for model in (vae, unet):
        settings = {name: value for name, value in model.config.items() if name != "_name_or_path"}
        parts.append(type(model).from_config(settings))
        parts[-1].load_state_dict(model.state_dict())
    text_copy = CLIPTextModel(text.config)
    text_copy.load_state_dict(text.state_dict())
    pipe = StableDiffusionPipeline(
        vae=parts[0].half(),
        text_encoder=text_copy.half(),
        tokenizer=tokenizer,
        unet=parts[1].half(),
        scheduler=new_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    fresh = folder.with_name(folder.name + ".part")
    pipe.save_pretrained(fresh)
    file = fresh / "text_encoder" / "config.json"
    computed = json.loads(file.read_text()) | {"dtype": "float32"}  # computed in, as in SD1.5
    file.write_text(json.dumps(computed, indent=2) + "\n")
    shutil.rmtree(fresh / "tokenizer")
    shutil.copytree(tokenizer.name_or_path, fresh / "tokenizer")  # vocab.json and merges.txt
    if folder.exists():
        shutil.rmtree(folder)
    fresh.replace(folder)


def write_sample_images(folder: Path, draw: Draw) -> None:
    """Pictures in FFHQ's layout with captions in `metadata.jsonl`, from seeds of their own."""
    drawn = [draw(SAMPLE_SEED + i) for i in range(SAMPLE_COUNT)]
    lines = [
        json.dumps({"file_name": file_name(i), "text": caption})
        for i, (_, caption) in enumerate(drawn)
    ]
    has_faces(output_folder("--images", folder, ()), lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA).write_text("\n".join(lines) + "\n")
    for i, (picture, _) in enumerate(drawn):
        path = folder / file_name(i)
        path.parent.mkdir(exist_ok=True)
        picture.quantize(96).save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
