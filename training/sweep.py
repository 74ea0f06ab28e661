"""Gate files for every combination of criterion, scope, target and λ, and one table about them.

    python -m training.sweep --demo --criteria learned taylor random --scopes mid all+ff \\
        --targets 0.3 0.5 --output sweep/

The original project's ablation, target sparsity × λ, is ``--criteria learned --targets 0.1 0.3
--weights 0.003 0.01 0.02``, and draws a heat map. A run that was stopped goes on where it was: gate
files that are there and were made with the same settings are kept. ``--variants plain
recovered stages`` makes others of every learned one: without corrections, by `training.recover`, by
`training.stages`. Ends with `training.evaluate` over all of them, which gets every option that is
not listed here, such as ``--precision fp32 int8``, ``--rivals obs`` or ``--images pictures/``.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from ldcp_core import DEFAULT_SCOPE, RANK, GateFileError, Ranking, load_gates, save_gates
from training import evaluate, fit, recover, score, stages
from training.config import FitConfig
from training.console import explaining, log_progress
from training.criteria import CRITERIA
from training.errors import UserError
from training.evaluation.plots import Cell, heat_map
from training.learning.budget import BudgetKind
from training.learning.checkpoint import Checkpoints
from training.learning.stopping import Stopped
from training.model.precision import STORED
from training.options import (
    DEMO_SETTINGS,
    SEED,
    Options,
    add_demo,
    built,
    correction_rank,
    option,
    parser_of,
    with_demo,
)
from training.output import PICTURE, gate_output, output_file, output_folder, write
from training.provenance import derived, without_folders
from training.sample import Settings
from training.score import CUT, THRESHOLDS, Measurement, ScoreConfig, measure

log = logging.getLogger("training.sweep")

LEARNED = "learned"
Variant = Literal["plain", "recovered", "stages", "stages-recovered"]
WITHOUT_CUT: dict[str, Any] = {f.name: f.default for f in fields(ScoreConfig) if f.name in CUT}
WITHOUT_CUT["output"] = ""


@dataclass(frozen=True)
class SweepOptions(Options):
    """What to combine.

    All other options are those of `training.evaluate`; --device and --resolution are for all.
    """

    model: str = option("checkpoint file, diffusers folder or hub id")
    data: str = option("folder of images in any of FFHQ's layouts, or a data set")
    output: str = option("folder for the gate files and the table")
    criteria: tuple[str, ...] = option(
        "how to choose channels", (LEARNED,), choices=(LEARNED, *CRITERIA)
    )
    scopes: tuple[str, ...] = option("which layers", (DEFAULT_SCOPE,))
    targets: tuple[float, ...] = option("shares to prune", (ScoreConfig.target_sparsity,))
    weights: tuple[float, ...] = option("λ of learned gates", ())
    rankings: tuple[Ranking, ...] = option("of other criteria", (ScoreConfig.ranking,))
    thresholds: tuple[str, ...] = option(
        "instead of targets, such as sensitivity=0.5,1 (in σ) percentage=25,50",
        (),
        metavar="CRITERION=VALUES",
    )
    budget: BudgetKind = option("what targets are shares of", "parameters")
    correction_rank: int = correction_rank()
    max_steps: int | None = option("optimizer steps of a fit", None)
    variants: tuple[Variant, ...] = option("others to make of every learned gate file", ())
    samples: int = option("held-out samples of the evaluation", 48)
    seed: int = option("of everything random but the evaluation", 0, SEED)


@dataclass(frozen=True)
class Plan:
    """One gate file to make: ``weight`` is λ of a learned one.

    With a ``threshold`` that decides instead of target and ranking.
    """

    criterion: str
    scope: str
    target: float
    weight: float | None
    ranking: str
    threshold: float | None = None

    @property
    def name(self) -> str:
        """
        >>> Plan("taylor", "all+ff", 0.3, None, "global").name
        'taylor_global_all+ff_30'
        >>> Plan("learned", "mid", 0.1, 0.003, "global").name
        'learned_0.003_mid_10'
        >>> Plan("sensitivity", "mid", 0.3, None, "global", 0.75).name
        'sensitivity_at-0.75_mid'
        """
        if self.threshold is not None:
            return f"{self.criterion}_at-{self.threshold:g}_{self.scope}"
        how = self.weight if self.criterion == LEARNED else self.ranking.replace(" ", "-")
        words = [self.criterion, how, self.scope, f"{self.target * 100:g}"]
        return "_".join(str(word) for word in words if word is not None)


def plans(given: SweepOptions) -> Iterator[Plan]:
    """All combinations; learned gates have λ, the others a ranking, or a threshold alone."""
    thresholds = thresholds_of(given.thresholds, given.criteria)
    target = ScoreConfig.target_sparsity
    for criterion, scope in product(thresholds, given.scopes):
        for threshold in thresholds[criterion]:
            yield Plan(criterion, scope, target, None, ScoreConfig.ranking, threshold)
    for criterion, scope, target in product(given.criteria, given.scopes, given.targets):
        if criterion == LEARNED:
            for weight in given.weights or [None]:
                yield Plan(criterion, scope, target, weight, "global")
        elif criterion not in thresholds:
            for ranking in given.rankings:
                yield Plan(criterion, scope, target, None, ranking)


def thresholds_of(texts: Sequence[str], criteria: Sequence[str]) -> dict[str, list[float]]:
    """Criterion -> its thresholds.

    >>> thresholds_of(["sensitivity=0.5,1"], ["sensitivity", "taylor"])
    {'sensitivity': [0.5, 1.0]}

    Raises UserError for criteria that have none, or are not swept.
    """
    found = {}
    for text in texts:
        criterion, _, values = text.partition("=")
        try:
            found[criterion] = [float(value) for value in values.split(",")]
        except ValueError:
            found[criterion] = []
        if criterion not in THRESHOLDS or criterion not in criteria or not found[criterion]:
            raise UserError(
                f"--thresholds is {text!r}.",
                f"one of --criteria that has a threshold ({', '.join(THRESHOLDS)}), and numbers",
                "such as --criteria sensitivity --thresholds sensitivity=0.5,0.75",
            )
    return found


def config_of(plan: Plan, given: SweepOptions, demo: bool) -> FitConfig | ScoreConfig:
    """The settings of the plan's gate file; raises UserError for some that can't work."""
    settings: dict[str, Any] = dict(
        model=given.model,
        data=given.data,
        output=str(Path(given.output) / f"{plan.name}.safetensors"),
        scope=plan.scope,
        target_sparsity=plan.target,
        budget=given.budget,
        correction_rank=given.correction_rank,
        seed=given.seed,
    )
    if plan.criterion == LEARNED:
        if demo:
            settings = DEMO_SETTINGS | settings
        if plan.weight is not None:
            settings["sparsity_weight"] = plan.weight
        if given.max_steps is not None:
            settings["max_steps"] = given.max_steps
        return FitConfig(**settings)
    settings |= {"ranking": plan.ranking, "threshold": plan.threshold}
    return ScoreConfig(**settings, criterion=plan.criterion)


def make(
    config: FitConfig | ScoreConfig, measured: Callable[[ScoreConfig], Measurement] = measure
) -> None:
    """The gate file of these settings, made now unless it is there.

    Goes on with a fit that was stopped; raises Stopped when this one is.
    """
    if _made_with(Path(config.output), config):
        log.info("%s is there", config.output)
        return
    log.info("making %s", config.output)
    if isinstance(config, FitConfig):
        unfinished = Checkpoints.beside(Path(config.output), config.run.keep_checkpoints).paths()
        try:
            fit.fit(replace(config, run=replace(config.run, resume=bool(unfinished))))
        except Stopped as stopped:
            raise Stopped(f"{stopped} The same command goes on.") from stopped
    else:
        score.score(config, measured(replace(config, **WITHOUT_CUT)))


def make_variant(
    kind: Variant,
    of: Path,
    made: Mapping[Variant, Path | None],
    given: SweepOptions,
    options: evaluate.EvaluateOptions,
) -> Path | None:
    """The variant of a learned gate file, made now unless it is there, of these settings and newer.

    ``made`` are its variants so far. None where it brings nothing, so that there is none.
    """
    path = variant_of(kind, of)
    source = made["stages"] if kind == "stages-recovered" else of
    if source is None:
        return None
    found = _info_of(path)
    if found is not None and path.stat().st_mtime < source.stat().st_mtime:
        found = None
    if kind == "plain":
        if found is None:
            save_gates(replace(load_gates(of), corrections={}), path)
        return path
    settings: dict[str, Any] = dict(gates=str(source), model=given.model, data=given.data)
    settings |= dict(output=str(path), device=options.device, seed=given.seed)
    if kind == "stages":  # found by pictures of other seeds than the evaluation draws
        drawn = Settings(options.steps, options.guidance, resolution=options.resolution)
        config: stages.StagesConfig | recover.RecoverConfig = stages.StagesConfig(
            **settings,
            prompts=options.prompts,
            settings=drawn,
            correction_rank=given.correction_rank,
        )
    else:
        rank = given.correction_rank or RANK
        settings |= dict(correction_rank=rank, resolution=options.resolution)
        config = recover.RecoverConfig(**settings)
    recorded = (found or {}).get("stages" if kind == "stages" else "recovered", {})
    if derived(config).items() <= recorded.items():
        log.info("%s is there", path)
        return path
    log.info("making %s", path)
    try:
        if isinstance(config, stages.StagesConfig):
            stages.stage(config)
        else:
            recover.recover(config)
    except UserError as error:
        log.warning("%s is left out: %s", path.name, error)
        return None
    return path


def variant_of(kind: str, of: Path) -> Path:
    """
    >>> variant_of("stages", Path("sweep/learned_mid_30.safetensors")).name
    'learned_mid_30_stages.safetensors'
    """
    return of.with_stem(f"{of.stem}_{kind}")


def _made_with(path: Path, config: FitConfig | ScoreConfig) -> bool:
    """Whether this gate file is there and was made with these settings."""
    found = _info_of(path)
    if found is None:
        return False
    settings = config.to_json() if isinstance(config, FitConfig) else asdict(config)
    return bool(found.get("config") == without_folders(settings))


def _info_of(path: Path) -> Mapping[str, Any] | None:
    """What a gate file says of itself; None where it is missing or damaged, and so made anew."""
    try:
        return load_gates(path).info
    except (GateFileError, OSError):
        return None


@explaining
def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(SweepOptions, "sweep", __doc__, allow_abbrev=False)
    add_demo(parser)
    typed, others = parser.parse_known_args(argv)
    log_progress()
    demo = "demo" in typed
    given = built(parser, SweepOptions, with_demo(vars(typed), "model", "data"))
    folder = output_folder("--output", given.output, (given.model, given.data))
    options = ["--model", given.model, "--data", given.data, "--samples", str(given.samples)]
    options += ["--output", str(folder / "evaluation"), *others]
    chosen = list(dict.fromkeys(plans(given)))
    configs = [
        config_of(plan, given, demo) for plan in chosen
    ]  # all that can fail before the long part
    paths = [config.output for config in configs]
    wanted = evaluate.parse_arguments([*paths, *options])
    device, resolution = wanted.device, wanted.resolution
    configs = [replace(config, device=device, resolution=resolution) for config in configs]
    asked = {*given.variants} | ({"stages"} if "stages-recovered" in given.variants else set())
    variants = [kind for kind in get_args(Variant) if kind in asked]  # one rests on another
    stored = [precision for precision in wanted.precision if precision in STORED]
    if "stages" in variants and wanted.images is not None and stored:
        raise UserError(
            f"--variants stages can't be drawn with in {stored[0]}.",
            "fp32, bf16 or fp16 beside --images",
            "leave out --images, stages or the precision",
        )
    for config in configs:
        if isinstance(config, FitConfig):
            fit.checked_output(config)
        else:
            gate_output(config.output, (config.model, config.data))
        for kind in variants if isinstance(config, FitConfig) else ():
            gate_output(variant_of(kind, Path(config.output)), (config.model, config.data))
    output_file("--output", folder / "heatmap.png", PICTURE, (given.model, given.data))
    # settings that differ only in where they cut follow each other
    measured = lru_cache(maxsize=1)(measure)
    for config in configs:
        make(config, measured)
    for config in configs:
        made: dict[Variant, Path | None] = {}
        for kind in variants if isinstance(config, FitConfig) else ():
            made[kind] = make_variant(kind, Path(config.output), made, given, wanted)
        asked_for = dict.fromkeys(given.variants)
        paths += [str(path) for kind in asked_for if (path := made.get(kind)) is not None]
    status = evaluate.main([*paths, *options])
    learned = [plan for plan in chosen if plan.weight is not None]
    several = len({p.target for p in learned}) > 1 and len({p.weight for p in learned}) > 1
    if status == 0 and several:
        rows = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["rows"]
        picture = heat_map(cells(learned, {row["name"]: row for row in rows}))
        write(folder / "heatmap.png", picture)
        print(f"written: {folder / 'heatmap.png'}")
    return status


def cells(learned: Sequence[Plan], rows: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
    """What the heat map shows of the learned gates."""
    return [
        Cell(
            plan.scope,
            plan.target,
            plan.weight,
            rows[plan.name]["deviation"]["mean"],
            rows[plan.name]["channels_pruned"],
        )
        for plan in learned
        if plan.weight is not None
    ]


if __name__ == "__main__":
    sys.exit(main())
