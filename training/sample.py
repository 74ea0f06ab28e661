"""Draw images from the dense model and from pruned ones: the same prompts, seeds and steps.

    python -m training.sample --demo --gates gates.safetensors --output images/
    accelerate launch -m training.sample --model sd15.safetensors --prompts prompts.txt \\
        --gates a.safetensors b.safetensors --output images/

One folder per model (``dense``, and the name of each gate file), one PNG per prompt and seed, which
says in its metadata how it was made. Images that are there already are not drawn again; several
processes share the work.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from diffusers import (
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ldcp_core import Gates, PercentRange, fingerprint, load_gates, one_line
from ldcp_core.diffusers import compact_blocks, pruned, topology_of
from training.console import explaining, log_progress, name_of, progress
from training.data.cache import digest
from training.data.images import open_image
from training.errors import UserError
from training.learning.processes import Processes
from training.model.load import DiffusionModel, check_resolution, load_model
from training.model.precision import PRECISIONS, STORED, in_precision
from training.options import (
    COUNT,
    FINITE,
    SEED,
    Options,
    device,
    option,
    parsed,
)
from training.output import PICTURE, output_file, output_folder, write

log = logging.getLogger("training.sample")

#: the nine prompts of the original project
PROMPTS = (
    "a beautiful face",
    "an elderly face",
    "a face with long hair",
    "a face with a beard",
    "a clean-shaven face",
    "a face with sunglasses",
    "a face with makeup",
    "a old person's face",
    "a dog's face",
)
DENSE = "dense"
Pipeline: TypeAlias = StableDiffusionPipeline | StableDiffusionXLPipeline


@dataclass(frozen=True)
class Shot:
    """One image to draw: a prompt and the seed of its initial noise."""

    prompt: str
    seed: int

    def file(self, number: int) -> str:
        return f"{number:03d}_{self.seed}.png"


@dataclass(frozen=True)
class Settings(Options):
    """How images are drawn."""

    steps: int = option("of DDIM", 30, COUNT)
    guidance: float = option("classifier-free", 7.5, FINITE)
    batch_size: int = option("images drawn at once", 4, COUNT)
    resolution: int | None = option("pixels (default: the model's own)", None, COUNT)


@dataclass(frozen=True)
class SampleOptions(Options):
    """What to draw, and from which models."""

    model: str = option("checkpoint file, diffusers folder or hub id")
    output: str = option("folder for the images")
    gates: tuple[str, ...] = option("gate files", (), nargs="*")
    prompts: str | None = option("a text file, a prompt per line (default: nine faces)", None)
    seeds: tuple[int, ...] = option("of the initial noise, each with every prompt", (42,), SEED)
    settings: Settings = field(default_factory=Settings)
    precision: str = option("of the U-Net", "fp32", choices=PRECISIONS)
    device: str = device()


def pipeline_of(model: DiffusionModel) -> Pipeline:
    """diffusers' own pipeline around the model's parts, with DDIM."""
    parts = {
        "vae": model.vae,
        "text_encoder": model.text_encoder,
        "tokenizer": model.tokenizer,
        "unet": model.unet,
        "scheduler": DDIMScheduler.from_config(model.scheduler.config),
    }
    if model.text_encoder_2 is None:
        unchecked = {"safety_checker": None, "requires_safety_checker": False}
        pipe: Pipeline = StableDiffusionPipeline(**parts, **unchecked, feature_extractor=None)
    else:
        second = {"text_encoder_2": model.text_encoder_2, "tokenizer_2": model.tokenizer_2}
        pipe = StableDiffusionXLPipeline(**parts, **second, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Candidate:
    """One model to draw with or to measure: ``gates`` (None: dense) and a precision.

    ``beside`` names the gates that it is a baseline of. Of gates with stages ``stage`` chooses one;
    None switches between them.
    """

    gates: Gates | None = None
    precision: str = "fp32"
    beside: str = ""
    stage: int | None = None

    def by_stage(self) -> list[tuple[PercentRange | None, Candidate]]:
        """Of every stage the stretch of the schedule (None: all of it) and what runs there."""
        if self.gates is None or not self.gates.stages:
            return [(None, self)]
        stretches = (stretch for stretch, _ in self.gates.by_stage())
        return [(stretch, replace(self, stage=number)) for number, stretch in enumerate(stretches)]

    @contextmanager
    def running(self, unet: UNet2DConditionModel) -> Iterator[int]:
        """Context in which the U-Net is this one; yields its bytes (`in_precision`).

        Gates that switch between stages do so in place, and the bytes are those of the dense U-Net.
        """
        gates = self.gates
        if gates is not None and gates.stages and self.stage is None:
            with in_precision(unet, self.precision, {}) as size, pruned(unet, gates):
                yield size
            return
        blocks = {}
        if gates is not None:
            keep_sets = gates.by_stage()[self.stage or 0][1]
            blocks = compact_blocks(unet, gates.pruned(keep_sets))
        with in_precision(unet, self.precision, blocks) as size:
            yield size

    def check_drawable(self, name: str) -> None:
        """Raises UserError where images can't be drawn with it."""
        if self.precision in STORED and self.gates is not None and self.gates.stages:
            raise UserError(
                f"{name} has stages, and can't be drawn with in {self.precision}.",
                "fp32, bf16 or fp16",
            )

    def stamp(self) -> str:
        """What tells its images from those of other gates or another precision."""
        found = [self.precision]
        if self.gates is not None:
            found += [self.gates.padding, *map(str, self.gates.stages)]
            for site, keep in sorted(self.gates.keep_sets().items()):
                constant = self.gates.constant(site)
                found += [site, str(keep.tolist()), str(constant.tolist())]
            for site, correction in sorted(self.gates.corrections.items()):
                found += [site, *(str(part.tolist()) for part in vars(correction).values())]
        return digest(found)


class Runnable(Protocol):
    """What images are drawn with: a `Candidate`, or what `training.evaluation` compares it with."""

    @property
    def gates(self) -> Gates | None: ...

    def running(self, unet: UNet2DConditionModel) -> AbstractContextManager[int]: ...

    def stamp(self) -> str: ...


def check_fits(model: DiffusionModel, gates: Gates | None) -> None:
    """Raises UserError when there are gates, and not for this model's architecture."""
    if gates is not None and not topology_of(model.unet).fits(gates.topology):
        raise UserError(
            f"The gates were made for {gates.topology}.",
            f"gates for {topology_of(model.unet)}",
            "choose gates of this model, or the model of these gates",
        )


def check_one_stage(name: str, gates: Gates) -> None:
    """Raises UserError for gates that do not prune the same in all of the schedule."""
    if gates.stages:
        raise UserError(
            f"{name} has {len(gates.stages)} stages.",
            "gates that prune the same in every step",
            "give the gates that the stages were made of; training.sample draws with stages",
        )


def draw(
    pipe: Pipeline, shots: Sequence[Shot], settings: Settings, output_type: str = "pil"
) -> Iterator[Any]:
    """One image per shot, each from its own seed, so that batches do not matter.

    Those of ``output_type`` "latent" are tensors [4, h, w].
    """
    for start in range(0, len(shots), settings.batch_size):
        part = shots[start : start + settings.batch_size]
        generators = [torch.Generator().manual_seed(shot.seed) for shot in part]
        yield from pipe(
            [shot.prompt for shot in part],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            generator=generators,
            output_type=output_type,
            height=settings.resolution,
            width=settings.resolution,
        ).images


def sample(
    model: DiffusionModel,
    chosen: Mapping[str, Runnable],
    shots: Sequence[Shot],
    settings: Settings,
    output: Path,
) -> dict[str, list[Path]]:
    """Draw what is missing of every candidate's images; name -> the paths of all of them.

    Under accelerate every process draws its part. Raises UserError for gates of another
    architecture, and for a resolution that the model can't take.
    """
    from accelerate import PartialState

    pipe, state = pipeline_of(model), PartialState()
    resolution = settings.resolution or model.resolution
    check_resolution(resolution, model.vae_scale_factor)
    of_model = {
        "resolution": str(resolution),
        "model": name_of(model.source),
        "weights": fingerprint(dict(model.unet.named_parameters())),
    }
    paths = image_paths(output, chosen, shots)
    for candidate in chosen.values():
        check_fits(model, candidate.gates)
    for name, candidate in chosen.items():
        facts = {**of_model, "gates": name, "candidate": candidate.stamp()}
        missing = [
            (path, shot)
            for path, shot in zip(paths[name], shots, strict=True)
            if not _is_there(path, _facts(shot, settings) | facts)
        ]
        with state.split_between_processes(missing) as mine, candidate.running(model.unet):
            images = draw(pipe, [shot for _, shot in mine], settings)
            drawn = progress(images, f"drawing {one_line(name)}", len(mine), unit="image")
            for image, (path, shot) in zip(drawn, mine, strict=True):
                _save(image, path, _facts(shot, settings) | facts)
    state.wait_for_everyone()
    return paths


def image_paths(output: Path, names: Iterable[str], shots: Sequence[Shot]) -> dict[str, list[Path]]:
    """Where every model's images go; raises UserError where something else lies there."""
    paths = {}
    for name in names:
        files = [output / name / shot.file(number) for number, shot in enumerate(shots)]
        paths[name] = [output_file("the folder for images", file, PICTURE, ()) for file in files]
    return paths


def _facts(shot: Shot, settings: Settings) -> dict[str, str]:
    return {
        "prompt": shot.prompt,
        "seed": str(shot.seed),
        "steps": str(settings.steps),
        "guidance": str(settings.guidance),
    }


def _is_there(path: Path, facts: Mapping[str, str]) -> bool:
    """Whether this very image lies there already."""
    try:
        with open_image(path) as image:
            found = getattr(image, "text", {})
    except (OSError, ValueError):  # not there, or torn
        return False
    return all(found.get(key) == value for key, value in facts.items())


def _save(image: Image.Image, path: Path, facts: Mapping[str, str]) -> None:
    metadata = PngInfo()
    for key, value in facts.items():
        metadata.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, format="png", pnginfo=metadata)
    write(path, buffer.getvalue())


def read_prompts(path: str | None) -> tuple[str, ...]:
    """The lines of a prompt file; without one, the nine prompts of the original project."""
    if path is None:
        return PROMPTS
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}.", "a text file, a prompt per line") from (
            error
        )
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise UserError(f"{path} holds no prompt.", "a text file, a prompt per line")
    return found


def named_gates(paths: Sequence[str]) -> dict[str, Gates]:
    """Gate files by the names of their files, which must differ."""
    found: dict[str, Gates] = {}
    for path in paths:
        name = Path(path).stem
        if name in found or name == DENSE:
            raise UserError(f"Two models are called {name!r}.", "different file names")
        found[name] = load_gates(path)
    return found


@explaining
def main(argv: list[str] | None = None) -> int:
    given = parsed(SampleOptions, argv, "sample", __doc__, demo=("model",))
    log_progress()
    output = output_folder("--output", given.output, (given.model,))
    prompts, gates = read_prompts(given.prompts), named_gates(given.gates)
    shots = [Shot(prompt, seed) for prompt in prompts for seed in given.seeds]
    image_paths(output, (DENSE, *gates), shots)  # before the model loads
    processes = Processes.launched(cpu=given.device == "cpu" or not torch.cuda.is_available())
    model = load_model(given.model, device=processes.device or given.device)
    chosen = {name: Candidate(of, given.precision) for name, of in {DENSE: None, **gates}.items()}
    for name, candidate in chosen.items():
        candidate.check_drawable(name)
    paths = sample(model, chosen, shots, given.settings, output)
    print(f"{sum(map(len, paths.values()))} images in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
