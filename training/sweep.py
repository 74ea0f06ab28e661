"""Gate files for every combination of criterion, scope, target and λ, and one table about them.

    python -m training.sweep --demo --criteria learned taylor random --scopes mid all+ff \\
        --targets 0.3 0.5 --output sweep/

The original project's ablation, target sparsity × λ, is ``--criteria learned --targets 0.1 0.3
--weights 0.003 0.01 0.02``. A run that was stopped goes on where it was: gate files that are there
and were made with the same settings are kept. Ends with `training.evaluate` over all of them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from ldcp_core import GateFileError, load_gates
from training import evaluate
from training.config import FitConfig
from training.criteria import CRITERIA
from training.errors import UserError
from training.fit import DEMO_SETTINGS, fit
from training.score import CUT, Measurement, ScoreConfig, measure, score

log = logging.getLogger("training.sweep")

LEARNED = "learned"
WITHOUT_CUT: dict[str, Any] = {f.name: f.default for f in fields(ScoreConfig) if f.name in CUT}
WITHOUT_CUT["output"] = ""


@dataclass(frozen=True)
class Plan:
    """One gate file to make: ``weight`` is λ of a learned one."""

    criterion: str
    scope: str
    target: float
    weight: float | None
    ranking: str

    @property
    def name(self) -> str:
        """
        >>> Plan("taylor", "all+ff", 0.3, None, "global").name
        'taylor_global_all+ff_30'
        >>> Plan("learned", "mid", 0.1, 0.003, "global").name
        'learned_0.003_mid_10'
        """
        learned = self.criterion == LEARNED
        how = (
            ""
            if learned and self.weight is None
            else f"_{self.weight if learned else self.ranking}"
        )
        return f"{self.criterion}{how.replace(' ', '-')}_{self.scope}_{self.target * 100:g}"


def plans(given: argparse.Namespace) -> Iterator[Plan]:
    """All combinations; learned gates have λ, the others a ranking."""
    for criterion, scope, target in product(given.criteria, given.scopes, given.targets):
        if criterion == LEARNED:
            for weight in given.weights or [None]:
                yield Plan(criterion, scope, target, weight, "global")
        else:
            for ranking in given.rankings:
                yield Plan(criterion, scope, target, None, ranking)


def make(
    plan: Plan,
    given: argparse.Namespace,
    folder: Path,
    measured: Callable[[ScoreConfig], Measurement] = measure,
) -> Path:
    """The plan's gate file, made now unless it is there."""
    path = folder / f"{plan.name}.safetensors"
    settings: dict[str, Any] = dict(
        model=given.model,
        data=given.data,
        output=str(path),
        scope=plan.scope,
        target_sparsity=plan.target,
        budget=given.budget,
        seed=given.seed,
    )
    config: FitConfig | ScoreConfig
    if plan.criterion == LEARNED:
        if given.demo:
            settings |= {k: v for k, v in DEMO_SETTINGS.items() if k not in settings}
        if plan.weight is not None:
            settings["sparsity_weight"] = plan.weight
        config = FitConfig(**settings | ({"max_steps": given.steps} if given.steps else {}))
    else:
        config = ScoreConfig(**settings, criterion=plan.criterion, ranking=plan.ranking)
    if _made_with(path, config):
        log.info("%s is there", path)
        return path
    log.info("making %s", path)
    if isinstance(config, FitConfig):
        fit(config)
    else:
        score(config, measured(replace(config, **WITHOUT_CUT)))
    return path


def _made_with(path: Path, config: FitConfig | ScoreConfig) -> bool:
    """Whether this gate file is there and was made with these settings."""
    if not path.exists():
        return False
    try:
        found = load_gates(path).info.get("config", {})
    except (GateFileError, OSError):
        return False
    names = ("model", "data", "output")  # stored without their folders
    settings = config.to_json() if isinstance(config, FitConfig) else asdict(config)
    wanted = {k: Path(v).name if k in names else v for k, v in settings.items()}
    return bool(found == wanted)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="checkpoint file, diffusers folder or hub id")
    add("--data", help="folder of images in any of FFHQ's layouts, or a data set")
    add("--demo", action="store_true", help="the embedded demo model and faces")
    add("--criteria", nargs="+", choices=(LEARNED, *CRITERIA), default=[LEARNED])
    add("--scopes", nargs="+", default=["mid"])
    add("--targets", nargs="+", type=float, default=[0.3], help="shares to prune")
    add("--weights", nargs="+", type=float, help="λ of learned gates")
    add("--rankings", nargs="+", default=["global"], help="of the other criteria")
    add("--budget", default="parameters", help="what targets are shares of (parameters)")
    add("--steps", type=int, help="optimizer steps of a fit")
    add("--samples", type=int, default=48, help="held-out samples of the evaluation")
    add("--seed", type=int, default=0)
    add("--output", required=True, help="folder for the gate files and the table")
    given = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "datasets", "diffusers", "transformers", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    if given.demo:
        given.model = given.model or DEMO_SETTINGS["model"]
        given.data = given.data or DEMO_SETTINGS["data"]
    if given.model is None or given.data is None:
        parser.error("--model and --data are missing; or use --demo")
    folder = Path(given.output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # plans that differ only in where they cut follow each other
        measured = lru_cache(maxsize=1)(measure)
        paths = [make(plan, given, folder, measured) for plan in plans(given)]
        return evaluate.main(
            [*map(str, paths), "--model", given.model, "--data", given.data]
            + ["--samples", str(given.samples), "--output", str(folder / "evaluation")]
        )
    except (UserError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
