"""Dense against any number of gate files: quality and cost in one table, with their uncertainty.

    python -m training.evaluate a.safetensors b.safetensors --demo --output evaluation
    python -m training.evaluate a.safetensors --model sd15.safetensors --data ffhq/ \\
        --images images/ --output evaluation
    python -m training.evaluate a.safetensors --demo --precision fp32 fp8 int8 --unstructured l1
    python -m training.evaluate a.safetensors --demo --baselines --rivals obs structural

All gate files, in every --precision, meet the same images, which all of them held out, the same
noise and timesteps. Where the held-out deviations of two overlap, they share a rank. Bytes and
times are measured. With --baselines, as many channels as learned gates keep are chosen by cheaper
means as well; with --rivals, channels are removed for good as others do, until as few weights are
left; with --unstructured, single weights are set to zero. With --images, pictures are drawn from
every model with the same prompts and seeds and compared with the dense ones, their prompts and a
reference; what needs weights that are not there is left out, and the report says which file to put
where. Writes PREFIX.md, PREFIX.json, PREFIX.png (quality against cost) and, with
--images, PREFIX.grid.png.
"""

from __future__ import annotations

import io
import json
import logging
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ldcp_core import ALWAYS, Gates, Latent, PercentRange, markdown, one_line, savings
from ldcp_core.diffusers import timestep_at
from training.benchmarking import machine
from training.benchmarking.timing import Variant, stopwatch
from training.benchmarking.variants import Inputs
from training.console import explaining, log_progress, name_of
from training.data.cache import default_cache, digest
from training.data.encoding import FreshImages, Images
from training.data.images import open_dataset
from training.data.splits import Split, unseen
from training.errors import UserError
from training.evaluation.baselines import baselines
from training.evaluation.images import compare_images
from training.evaluation.networks import CLIP, INCEPTION, VGG, load_networks
from training.evaluation.plots import grid, plot
from training.evaluation.reference import Reference
from training.evaluation.report import render
from training.evaluation.rivals import KINDS, Rival, rivals
from training.evaluation.statistics import bootstrap, by_timestep, ranks, summary
from training.evaluation.unstructured import Unstructured, unstructured_of
from training.model.load import DiffusionModel, load_model, usable_device
from training.model.precision import PRECISIONS, storage_of
from training.options import (
    COUNT,
    FINITE,
    SEED,
    Options,
    device,
    option,
    parsed,
)
from training.output import PICTURE, output_files, output_folder, report_of, write
from training.provenance import is_number, is_text, read
from training.sample import (
    DENSE,
    Candidate,
    Settings,
    Shot,
    check_fits,
    image_paths,
    named_gates,
    read_prompts,
    sample,
)
from training.session import fit_to
from training.step.denoising import Denoising, FixedProblems

log = logging.getLogger("training.evaluate")

#: an image with guidance, as often as this for the time of an evaluation
BATCH, REPEATS = 2, 5
#: a deviation says something about gates from this many times that of rounding alone
ABOVE_ROUNDING = 3


def candidates_of(gates: Mapping[str, Gates], precisions: Sequence[str]) -> dict[str, Candidate]:
    """Dense and every gate file in every precision, by name; the first is the reference.

    >>> list(candidates_of({}, ["fp32", "int8"]))
    ['dense', 'dense-int8']
    """
    found: dict[str, Candidate] = {}
    for precision in precisions:
        for name, of in {DENSE: None, **gates}.items():
            full = name if precision == precisions[0] else f"{name}-{precision}"
            if full in found:
                raise UserError(f"Two models are called {full!r}.", "different file names")
            found[full] = Candidate(of, precision)
    return found


def evaluate(
    model: DiffusionModel,
    images: Images,
    held_out: Sequence[int],
    candidates: Mapping[str, Candidate | Rival | Unstructured],
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """Quality on the held-out ones of ``images`` and cost of every candidate, JSON-able.

    The first candidate is what deviations are from. The model is one in float32.
    """
    resolution = images.data.resolution
    assert resolution is not None
    reference = next(iter(candidates.values()))
    batches = images.batches(held_out, 8, epochs=None)
    heldout = FixedProblems(Denoising(model, 0), batches, samples, seed)
    rounding: dict[str, float] = {}  # precision -> what it does to the dense model by itself
    if reference.precision != Candidate.precision:
        with reference.running(model.unet):
            rounding[reference.precision] = heldout.refer_to_this().mean().item()
    side = resolution // model.vae_scale_factor
    inputs = Inputs.random(model.unet, BATCH, side, seed)
    timesteps = heldout.timesteps.numpy()
    parameters = sum(p.numel() for p in model.unet.parameters())
    rows, deviations = [], {}
    for name, candidate in candidates.items():
        deviation, loss, cost = measured(name, candidate, model, heldout, inputs)
        cost |= counted(candidate, parameters, side)
        found = {"name": name, **described(name, candidate), **cost, "loss": summary(loss)}
        found["sparsity"] = 1 - found["parameters_left"]
        if isinstance(candidate, Unstructured):
            with candidate.running(model.unet):
                layers = candidate.layers(model.unet)
            zeros = sum(layer["parameters"] - layer["nonzero"] for layer in layers)
            found |= {"sparsity": zeros / parameters, "layers": layers}
        steps = model.alphas_cumprod.numel()
        found["loss_by_timestep"] = by_timestep(loss, timesteps, steps)
        if candidate is not reference:
            deviations[name] = deviation
            found["deviation"] = summary(deviation)
            found["deviation_interval"] = bootstrap(deviation)
            found["deviation_by_timestep"] = by_timestep(deviation, timesteps, steps)
            if isinstance(candidate, Candidate) and candidate.gates is None:
                rounding.setdefault(candidate.precision, float(deviation.mean()))
            elif candidate.precision in rounding and candidate.precision != Candidate.precision:
                found["rounding"] = rounding[candidate.precision]
        rows.append(found)
        log.info(
            "%s: deviation %.3g, %.0f ms", one_line(name), deviation.mean(), 1000 * cost["seconds"]
        )
    places = ranks(deviations)
    for found in rows[1:]:
        found["rank"] = places[found["name"]]
    return {
        "format": "ldcp.evaluation",
        "version": 1,
        "samples": len(timesteps),
        "held_out": len(held_out),
        "resolution": resolution,
        "reference_precision": reference.precision,
        "machine": machine.describe(model.unet.device),
        "rows": rows,
        "notes": notes_on_rounding(rows),
    }


def measured(
    name: str,
    candidate: Candidate | Rival | Unstructured,
    model: DiffusionModel,
    heldout: FixedProblems,
    inputs: Inputs,
) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Deviations from dense and denoising losses, float64 [N] each, and bytes and seconds.

    Of gates with stages each sample is that of the stage its timestep lies in. The bytes are those
    of the largest stage, the time is the mean over the schedule.
    """
    stages = candidate.by_stage() if isinstance(candidate, Candidate) else [(None, candidate)]
    timesteps = heldout.timesteps
    deviation, loss = torch.zeros(2, len(timesteps), dtype=torch.float64)
    size, seconds = 0, 0.0
    for stretch, running in stages:
        schedule = ALWAYS.during(stretch)
        within = torch.tensor(
            [schedule.is_active(-1, float(t), timestep_at) for t in timesteps], dtype=torch.bool
        )
        with running.running(model.unet) as bytes_there:
            found = heldout.as_it_is(name if stretch is None else f"{name}, {stretch}")
            seconds += share_of(stretch) * median_seconds(model, inputs)
        size = max(size, bytes_there)
        deviation[within], loss[within] = (values.double()[within] for values in found)
    return deviation.numpy(), loss.numpy(), {"bytes": size, "seconds": seconds}


def notes_on_rounding(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for every row whose deviation is hardly more than that of its precision alone."""
    return [
        f"{markdown(r['name'])}: {r['precision']} moves the output of the dense model by "
        f"{r['rounding']:.1e} already, so that its deviation says little about what is "
        "pruned; compare in fp32"
        for r in rows
        if "rounding" in r and r["deviation"]["mean"] < ABOVE_ROUNDING * r["rounding"]
    ]


def described(name: str, candidate: Candidate | Rival | Unstructured) -> dict[str, Any]:
    """What a candidate is; raises UserError for a gate file that says so in other than words."""
    if not isinstance(candidate, Candidate):
        return candidate.described()
    gates = candidate.gates
    info = {"criterion": DENSE, "scope": ""} if gates is None else gates.info
    return {
        "precision": candidate.precision,
        "criterion": read(info, "criterion", "unknown", is_text, "a line of text", name),
        "scope": read(info, "scope", "unknown", is_text, "a line of text", name),
        "target": read(info, "target_sparsity", None, is_number, "a number", name),
        "channels_pruned": 0.0 if gates is None else mean_sparsity(gates),
        "zeroed": False,
        "beside": candidate.beside,
    }


def mean_sparsity(gates: Gates) -> float:
    """Share of the gated channels that is pruned; with stages the mean over the schedule."""
    return sum(
        share_of(stretch) * (1 - sum(int(keep.sum()) for keep in kept.values()) / gates.channels)
        for stretch, kept in gates.by_stage()
    )


def share_of(stretch: PercentRange | None) -> float:
    """How much of the schedule a stretch (None: all of it) is."""
    return 1.0 if stretch is None else stretch.end - stretch.start


def counted(
    candidate: Candidate | Rival | Unstructured, parameters: int, side: int
) -> dict[str, float]:
    """Shares of the U-Net's ``parameters`` and of its FLOPs that are left, by the cost model.

    Of gates with stages the parameters are those of the largest, the FLOPs the mean over the
    schedule.
    """
    if not isinstance(candidate, Candidate):
        return candidate.counted(parameters, side)
    gates = candidate.gates
    if gates is None:
        return {"parameters_left": 1.0, "flops_left": 1.0}
    found = []
    for stretch, keep_sets in gates.by_stage():
        counts = {site: int(keep.sum()) for site, keep in keep_sets.items()}
        cost = savings(gates.topology, counts, gates.padding, Latent(side, side))
        found.append((cost, share_of(stretch)))
    return {
        "parameters_left": max(1 - cost.parameter_share for cost, _ in found),
        "flops_left": sum((1 - cost.flop_share) * share for cost, share in found),
    }


def median_seconds(model: DiffusionModel, inputs: Inputs) -> float:
    """Measured time of one evaluation of the U-Net as it runs now: one to warm up, then a few."""
    seconds = stopwatch(model.unet.device)
    run = Variant("", "", lambda: inputs.run(model.unet))
    seconds(run)
    return statistics.median(seconds(run) for _ in range(REPEATS))


@dataclass(frozen=True)
class EvaluateOptions(Options):
    """What to compare, on what; of images as well where a folder for them is given."""

    model: str = option("checkpoint file, diffusers folder or hub id")
    data: str = option("the images that the fits held a part of out")
    gates: tuple[str, ...] = option("gate files", (), nargs="*", positional=True)
    samples: int = option("held-out samples (images × timesteps)", 96, COUNT)
    seed: int = option("of noise and timesteps", 1000, SEED)
    resolution: int | None = option("pixels (default: the model's own)", None, COUNT)
    precision: tuple[str, ...] = option(
        "of the U-Net; several: every model in each, against dense in the first",
        ("fp32",),
        choices=PRECISIONS,
    )
    baselines: bool = option(
        "as many channels as learned gates keep by own effect, FLAP, L1 magnitude and chance", False
    )
    rivals: tuple[str, ...] = option(
        "other ways to leave as few weights as learned gates do", (), choices=KINDS
    )
    fine_tune_steps: int = option("rivals: structural, after removing channels", 200, COUNT)
    unstructured: tuple[str, ...] = option(
        "single weights at zero for comparison: l1, sensitivity, percentage, or l1=0.1,0.35",
        (),
        metavar="KIND[=AMOUNTS]",
    )
    device: str = device()
    output: str | None = option(
        "write PREFIX.md, .json, .png and .grid.png", None, metavar="PREFIX"
    )
    images: str | None = option(
        "draw images of every model there and compare them", None, metavar="FOLDER"
    )
    prompts: str | None = option(
        "images: a text file, a prompt per line (default: nine faces)", None
    )
    seeds: int = option("images: how many per prompt", 1, COUNT)
    steps: int = option("images: of DDIM", Settings.steps, COUNT)
    guidance: float = option("images: classifier-free", Settings.guidance, FINITE)
    reference: str | None = option(
        "images: folder or data set for FID, KID, CMMD, precision, recall (default: --data)", None
    )
    inception: str | None = option(f"{INCEPTION.name}: {INCEPTION.metrics}", None, metavar="FILE")
    vgg: str | None = option(f"{VGG.name}: {VGG.metrics}", None, metavar="FILE")
    clip: str | None = option(f"a CLIP of transformers: {CLIP.metrics}", None, metavar="FOLDER")
    cache: str | None = option(
        "of the reference's features (default: the user's cache)", None, metavar="FOLDER"
    )


def parse_arguments(argv: Sequence[str] | None) -> EvaluateOptions:
    """The options of a command line; raises UserError for some that can't work."""
    options = parsed(EvaluateOptions, argv, "evaluate", __doc__, demo=("model", "data"))
    check(options)
    return options


@explaining
def main(argv: Sequence[str] | None = None) -> int:
    log_progress()
    given = parse_arguments(argv)
    precisions = list(dict.fromkeys(given.precision))
    gates = named_gates(given.gates)
    pruned = candidates_of(gates, precisions)
    zeroed = unstructured_of(given.unstructured, precisions[0])
    candidates: dict[str, Candidate | Rival | Unstructured] = {**pruned, **zeroed}
    for name, candidate in candidates.items():  # what a file says of itself makes sense
        described(name, candidate)
    data = open_dataset(given.data)
    seen, held_out = unseen(data, [Split.of_file(of.info, name) for name, of in gates.items()])
    learned = to_stand_beside(gates)
    for asked in ("baselines", "rivals"):
        if getattr(given, asked) and not learned:
            raise UserError(
                f"--{asked} was given without learned gates.",
                "gates by training.fit, without stages",
            )
    prompts, where = read_prompts(given.prompts), usable_device(given.device)
    for precision in precisions:  # a missing package shows before anything is computed
        storage_of(precision, where)
    folder = Path(given.cache or default_cache())
    networks = None
    if given.images is not None:  # what can't be drawn shows before anything is computed
        for name, each in pruned.items():
            each.check_drawable(name)
        image_paths(Path(given.images), candidates, shots_of(prompts, given.seeds))
        images = open_dataset(given.reference or given.data)
        networks = load_networks(
            given.inception, given.vgg, given.clip, folder / "metrics", str(where)
        )
    model = load_model(given.model, device=where)
    for of in gates.values():
        check_fits(model, of)
    side = fit_to(model, data, given.resolution)
    fresh = FreshImages(data, model)
    for name in learned if given.baselines else ():
        denoising = Denoising(model, given.seed)
        candidates |= baselines(name, pruned[name], denoising, fresh, seen, given.seed)
    for name in learned if given.rivals else ():
        given_to = Denoising(model, given.seed), fresh, seen, given.fine_tune_steps, given.seed
        left = counted(pruned[name], 0, side)
        share = left["parameters_left"]
        candidates |= rivals(given.rivals, name, pruned[name], share, *given_to)
    result = evaluate(model, fresh, held_out, candidates, given.samples, given.seed)
    paths: dict[str, list[Path]] = {}
    if networks is not None and given.images is not None:
        images.resolution = data.resolution
        shots = shots_of(prompts, given.seeds)
        settings = Settings(given.steps, given.guidance, resolution=given.resolution)
        paths = sample(model, candidates, shots, settings, Path(given.images))
        found = compare_images(paths, prompts, networks, Reference(images, folder), model.vae)
        result |= {"images": found.single, "sets": found.sets}
        result["notes"] += found.notes
        result["reference"] = {
            "source": name_of(images.source),
            "images": len(images) - len(images.broken),
            "resolution": images.resolution,
        }
    print(render(result))
    if given.output is not None:
        first = {name: files[: len(prompts)] for name, files in paths.items()}
        save(result, first, prompts, given.output)
    return 0


def to_stand_beside(gates: Mapping[str, Gates]) -> list[str]:
    """The names of learned gates without stages, of those that keep the same channels the first."""
    found: dict[str, str] = {}
    for name, of in gates.items():
        if of.info.get("criterion") == "learned" and not of.stages:
            kept = digest(f"{site} {keep.tolist()}" for site, keep in of.keep_sets().items())
            found.setdefault(kept, name)
    return list(found.values())


def check(given: EvaluateOptions) -> None:
    """Raises UserError for options that can't work, before anything expensive starts."""
    usable_device(given.device)
    if not given.gates and not given.unstructured and len(set(given.precision)) < 2:
        raise UserError(
            "There is nothing to compare the dense model with.",
            "gate files, several of --precision, or --unstructured",
            "make a gate file with training.fit or training.score",
        )
    of_images = ("prompts", "reference", "inception", "vgg", "clip")
    named = [f"--{name}" for name in of_images if getattr(given, name) is not None]
    if named and given.images is None:
        raise UserError(
            f"{', '.join(named)} given without --images.",
            "a folder to draw images into",
            "add --images FOLDER",
        )
    inputs = [*given.gates, given.model, given.data, *(getattr(given, name) for name in of_images)]
    if given.output is not None:
        kinds = report_of("ldcp.evaluation") | {".png": PICTURE, ".grid.png": PICTURE}
        output_files("--output", given.output, kinds, inputs)
    for name in ("images", "cache"):
        if getattr(given, name) is not None:
            output_folder(f"--{name}", getattr(given, name), inputs)


def shots_of(prompts: Sequence[str], seeds: int) -> list[Shot]:
    """Every prompt ``seeds`` times, in turn, each time with a seed of its own.

    So that more seeds add images to those that are there.
    """
    return [Shot(prompts[n % len(prompts)], 42 + n) for n in range(seeds * len(prompts))]


def save(
    result: Mapping[str, Any],
    paths: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    prefix: str,
) -> None:
    """Write the report, its numbers and its pictures."""
    files = {
        ".json": (json.dumps(result, indent=1) + "\n").encode("utf-8"),
        ".md": render(result).encode("utf-8"),
        ".png": plot(result["rows"]),
    }
    if paths:
        buffer = io.BytesIO()
        grid(paths, prompts).save(buffer, format="png", optimize=True)
        files[".grid.png"] = buffer.getvalue()
    for suffix, content in files.items():
        write(Path(prefix + suffix), content)
    print(f"written: {', '.join(prefix + suffix for suffix in files)}")


if __name__ == "__main__":
    sys.exit(main())
