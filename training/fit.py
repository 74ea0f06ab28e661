"""Learn which channels of a Stable Diffusion U-Net to keep, and write a gate file.

    python -m training.fit --demo
    python -m training.fit --model v1-5-pruned-emaonly.safetensors --data ffhq/ \\
        --output gates.safetensors --target-sparsity 0.3
    accelerate launch --multi_gpu -m training.fit ...

U-Net, VAE and text encoders are frozen; one score per channel is learned from two competing losses,
the MSE against the dense model's output and the L1 of the scores (see `training.learning.learner`).
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from ldcp_core import Latent, fingerprint
from ldcp_core.diffusers import topology_of
from training.config import FitConfig
from training.console import explaining, log_progress
from training.data.cache import CacheNotWritable, default_cache
from training.data.encoding import WORKERS, CachedImages, FreshImages, Images
from training.data.images import Position, open_dataset
from training.data.splits import Split
from training.data.streaming import Data, StreamedImages
from training.errors import UserError
from training.learning.budget import Budget
from training.learning.checkpoint import Checkpoints, check_identity
from training.learning.learner import TARGET_TOLERANCE, GateLearner
from training.learning.loop import Learning, run
from training.learning.processes import Processes
from training.learning.recorders import (
    CsvHistory,
    Recorder,
    SampleImages,
    TensorBoard,
    summary_writer,
)
from training.learning.result import FitResult, finish
from training.learning.sample_sheet import SampleSheet
from training.learning.start import measure_start
from training.learning.stopping import Stopped
from training.model.encode import embed_prompts
from training.model.load import DiffusionModel, usable_device
from training.options import (
    DEMO_SETTINGS,
    add_demo,
    built,
    parser_of,
    with_demo,
)
from training.output import (
    HISTORY,
    PAGE,
    PICTURE,
    claimed,
    gate_output,
    output_file,
    output_folder,
)
from training.session import check_target, fit_to, frozen_model, sites_in
from training.step.denoising import Denoising

__all__ = ["FitResult", "fit", "main", "parse_arguments"]

log = logging.getLogger("training.fit")

#: settings that a resumed run may change: paths, checked by content, and what comes after learning
MAY_CHANGE = (
    *("model", "data", "output", "device"),
    *("correction_rank", "correction_samples", "recover"),
)
#: the original project's two settings: target sparsity and λ
PRESETS: dict[str, dict[str, float]] = {
    "quality": {"target_sparsity": 0.1, "sparsity_weight": 0.003},
    "balanced": {"target_sparsity": 0.3, "sparsity_weight": 0.01},
}
#: sample images
SAMPLES = 4


def parse_arguments(argv: list[str] | None) -> FitConfig:
    """Command line to settings: defaults < --demo < --preset < what was typed."""
    parser = parser_of(FitConfig, "fit", __doc__)
    add_demo(parser)
    parser.add_argument(
        "--preset", choices=PRESETS, help="target sparsity and λ of the original project"
    )
    given = vars(parser.parse_args(argv))
    preset = PRESETS.get(given.pop("preset", ""), {})
    demo = with_demo({"demo": given.pop("demo", False)}, *DEMO_SETTINGS)
    return built(parser, FitConfig, demo | preset | given)


def fit(config: FitConfig) -> FitResult | None:
    """Run a whole fit; raises UserError for everything a user can put right.

    Of several processes the first one writes and returns the result, the others None.
    """
    output = checked_output(config)
    processes = Processes.launched(cpu=config.device == "cpu" or not torch.cuda.is_available())
    with claimed(output) if processes.first else nullcontext():
        return _fit(config, output, processes)


def _fit(config: FitConfig, output: Path, processes: Processes) -> FitResult | None:
    if not processes.first:
        logging.getLogger("training").setLevel(logging.ERROR)
    if config.run.tensorboard:
        summary_writer()  # a missing package shows before anything is computed
    checkpoints = Checkpoints.beside(output, config.run.keep_checkpoints)
    if not config.run.resume:
        checkpoints.refuse_overwriting()
    resumed = checkpoints.load() if config.run.resume else None
    data, train, held_out = _opened(config)  # first: a wrong path shows before a model loads
    device = processes.device or usable_device(config.device)
    model = frozen_model(config.model, config.precision, device)
    side = fit_to(model, data, config.resolution)
    sites = sites_in(topology_of(model.unet), config.scope)
    budget = Budget(config.budget, sites, config.padding, Latent(side, side))
    learner = GateLearner(sites, config.seed, budget, config.floor).to(device)
    if config.target_sparsity is not None:
        check_target(config.target_sparsity, config.floor, budget, sites, config.scope)
    batch_size = config.batch_size * processes.world
    identity = _identity(config, batch_size, data, train, model.unet)
    if resumed is not None:
        check_identity(resumed, identity)
    many = "a stream of" if config.streaming else str(len(train))
    log.info("%s: %s images to learn from, %d held out", data.source, many, len(held_out))
    images = _encoded(config, data, model, processes)
    if held_out:  # where none can be read this raises UserError, now instead of after learning
        any(batch.ids for batch in images.batches(held_out, 1))
    sheet = _sample_sheet(config, data, held_out or train, model) if processes.first else None
    empty_prompt = embed_prompts(model, [""]) if config.recover else None
    if isinstance(images, CachedImages):
        model = model.without_encoders()
    if config.run.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    denoising = Denoising(model, config.seed)
    position = Position()
    stream = images.batches(
        train,
        batch_size,
        seed=config.seed,
        epochs=None,
        position=position,
        share=processes.share,
    )
    steps = _optimizer_steps(config, len(train), batch_size)
    learning = Learning(config, denoising, learner, stream, position, steps, processes)

    if resumed is None:
        learning.begin(measure_start(config, denoising, sites, stream, processes))
        _say_if_short(config, learning)
    else:
        learning.load_state_dict(resumed.state["learning"])
        data.broken |= resumed.state["broken"]
        log.info("going on after step %d of %d (%s)", learning.step, steps, resumed.path)
    log.info(
        "%d channels at %d sites; pruning all of them moves the output by %.3g (MSE)",
        sum(site.channels for site in sites),
        len(sites),
        learning.start.effect,
    )

    def save() -> None:
        if not processes.first:
            return
        state = {"learning": learning.state_dict(), "broken": data.broken}
        try:
            checkpoints.save(learning.step, identity, state)
        except OSError as error:
            log.warning("The checkpoint of step %d can't be written: %s.", learning.step, error)

    try:
        with _recorded(config, output, learning, sheet) as record:
            run(learning, config.run.checkpoint_every, save, record)
        if not processes.first:
            return None
        result = finish(
            config, learning, denoising, data, images, train, held_out, output, sheet, empty_prompt
        )
    except BaseException:
        log.warning("%s", checkpoints.advice())
        raise
    checkpoints.clear()
    return result


def _opened(config: FitConfig) -> tuple[Data, Sequence[int], Sequence[int]]:
    """The images, and which of them to learn from and to hold out."""
    if config.streaming:
        stream = StreamedImages(config.data, Split.of(config).rows or 0)
        return stream, *stream.split()
    data = open_dataset(config.data)
    return data, *Split.of(config).apply(data)


def _encoded(
    config: FitConfig, data: Data, model: DiffusionModel, processes: Processes
) -> Images | StreamedImages:
    """The images out of the cache, which is built first; the images themselves where there is none.

    Raises UserError when a cache that is needed, or was asked for, can't be written.
    """
    if isinstance(data, StreamedImages):
        data.encode_with(model)
        return data
    if config.run.no_cache:
        if processes.world > 1:
            raise UserError(
                f"--no-cache was given to {processes.world} processes.",
                "a cache: it tells each process which images can be read, without reading them",
                "leave out --no-cache",
            )
        return FreshImages(data, model)
    images = CachedImages(data, model, Path(config.run.cache or default_cache()))
    try:
        images.build(model, processes.rank, processes.world, config.run.workers or WORKERS)
        processes.wait()
        images.build(model)  # opens what the others made (and makes it, on another machine's disk)
    except CacheNotWritable as error:
        if config.run.cache is not None or processes.world > 1:
            raise
        log.warning("%s\n  Going on without a cache.", error)
        return FreshImages(data, model)
    return images


def _sample_sheet(
    config: FitConfig, data: Data, indices: Sequence[int], model: DiffusionModel
) -> SampleSheet | None:
    """What draws sample images, from the captions of a few images; None when not asked for."""
    if not config.run.sample_every:
        return None
    captions = dict.fromkeys(data.captions(indices).values())
    prompts = [caption for caption in captions if caption][:SAMPLES] or [""] * SAMPLES
    assert data.resolution is not None
    return SampleSheet(model, prompts, data.resolution)


@contextmanager
def _recorded(
    config: FitConfig, output: Path, learning: Learning, sheet: SampleSheet | None
) -> Iterator[Callable[[Learning], None]]:
    """All recorders of the run, as one function to call after each step."""
    if not learning.processes.first:
        yield lambda learning: None
        return
    recorders: list[Recorder] = [CsvHistory(output.with_suffix(".history.csv"), learning)]
    if config.run.tensorboard:
        recorders.append(TensorBoard(output.with_suffix(".tensorboard"), learning))
    if sheet is not None:
        folder = output.with_suffix(".samples")
        recorders.append(SampleImages(folder, sheet, config.run.sample_every))

    def record(learning: Learning) -> None:
        for recorder in recorders:
            recorder.record(learning)

    try:
        yield record
    finally:
        for recorder in recorders:
            recorder.close()


def _identity(
    config: FitConfig,
    batch_size: int,
    data: Data,
    train: Sequence[int],
    unet: torch.nn.Module,
) -> dict[str, Any]:
    """What two runs must share for one to go on where the other stopped."""
    settings = {**config.to_json(), "batch_size": batch_size}
    for name in MAY_CHANGE:
        del settings[name]
    return {
        **{"--" + name.replace("_", "-"): value for name, value in settings.items()},
        "weights of --model": fingerprint(dict(unet.named_parameters())),
        "images of --data": data.digest(train),
    }


def _say_if_short(config: FitConfig, learning: Learning) -> None:
    """Say at the start what learning can't reach, and the cut at the end has to make up for."""
    target, (low, high) = config.target_sparsity, learning.reach()
    if target is not None and low < target - TARGET_TOLERANCE:
        log.warning(
            "A short run: %d steps bring the sparsity to between %.1f and %.1f%%, and the target "
            "is %.1f%%. The rest is cut by what each channel does alone, not by what was learned. "
            "Give it more --max-steps%s.",
            learning.steps,
            100 * low,
            100 * high,
            100 * target,
            "" if config.learning_rate is None else ", or a larger --learning-rate",
        )


def _optimizer_steps(config: FitConfig, images: int, batch_size: int) -> int:
    if config.epochs is None:
        return config.max_steps
    per_epoch = images * config.reuse / (batch_size * config.gradient_accumulation)
    return max(1, min(config.max_steps, round(config.epochs * per_epoch)))


def checked_output(config: FitConfig) -> Path:
    """The gate file to write; raises UserError where it, or what lies beside it, can't be."""
    inputs = (config.model, config.data)
    output = gate_output(config.output, inputs)
    pictures = {".curves.png": PICTURE, ".scores.png": PICTURE}
    for suffix, kind in ({".history.csv": HISTORY, ".html": PAGE} | pictures).items():
        output_file("--output", output.with_suffix(suffix), kind, inputs)
    for suffix in (".checkpoints", ".samples", ".tensorboard"):
        folder = output.with_suffix(suffix)
        if folder.exists():
            output_folder("--output", folder, inputs)
    for picture in output.with_suffix(".samples").glob("step-*.png"):
        output_file("--output", picture, PICTURE, inputs)
    if config.run.cache is not None:
        output_folder("--cache", config.run.cache, inputs)
    return output


@explaining
def main(argv: list[str] | None = None) -> int:
    log_progress()
    try:
        fit(parse_arguments(argv))
    except Stopped as stopped:
        typed = [word for word in (sys.argv[1:] if argv is None else argv) if word != "--resume"]
        command = shlex.join(["python", "-m", "training.fit", *typed, "--resume"])
        if os.environ.get("RANK", "0") == "0":  # of several processes one says it
            print(f"{stopped} Go on with:\n  {command}", file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("interrupted: no gate file was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
