"""The command line of a fit: one option per setting, and no second place for a default."""

from __future__ import annotations

import argparse
import math
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from ldcp_core import PADDINGS, SCOPES
from training.config import (
    PRESETS,
    SEEDS,
    Constant,
    FitConfig,
    Precision,
    Reconstruction,
    RunOptions,
)
from training.errors import UserError
from training.learning.budget import BudgetKind
from training.learning.learner import TRAVEL

DEMO = Path(__file__).parent / "demo"
#: what --demo stands for; every option can still be given
DEMO_SETTINGS: dict[str, Any] = {
    "model": str(DEMO / "pipeline"),
    "data": str(DEMO / "images"),
    "output": "gates.safetensors",
    "batch_size": 4,
    "gradient_accumulation": 1,
    "max_steps": 150,
}


def parse_arguments(argv: list[str] | None = None) -> FitConfig:
    """Command line to settings: defaults < --demo < --preset < what was typed."""
    defaults = {f.name: f.default for f in fields(FitConfig) if f.default is not MISSING}
    run = {f.name: f.default for f in fields(RunOptions)}
    parser = argparse.ArgumentParser(
        prog="python -m training.fit",
        description="Learn which channels of a Stable Diffusion 1.5 U-Net to keep.",
        argument_default=argparse.SUPPRESS,
    )
    add = parser.add_argument
    add("--model", help="hub id, diffusers folder, or single-file SD1.5 checkpoint")
    add("--data", help="folder of images (FFHQ in any layout), or a hub data set")
    add("--output", help="the gate file to write (.safetensors)")
    add("--demo", action="store_true", help="use the embedded demo model and drawn faces")
    add("--preset", choices=PRESETS, help="target sparsity and λ of the original project")
    add(
        "--target-sparsity",
        type=_sparsity,
        help="share of channels to prune (default 0.3); 'none' leaves λ fixed and prunes what that "
        "does: at 0.01 far less than 30%%, 12.5%% of the demo's",
    )
    add("--sparsity-weight", type=float, help="λ of the L1 penalty (default 0.01)")
    add(
        "--scope",
        help=f"which layers: {', '.join(SCOPES)}, or site names separated by commas, in which * "
        f"stands for anything (default {defaults['scope']})",
    )
    add("--budget", choices=get_args(BudgetKind), help="what the target is a share of (channels)")
    add("--floor", type=float, help=f"share of each layer that stays ({defaults['floor']})")
    add("--padding", choices=PADDINGS, help="how constants meet the border (default zero)")
    add("--constant", choices=get_args(Constant), help="stand-in of a pruned channel (mean)")
    add("--reconstruction", choices=get_args(Reconstruction), help="MSE target (teacher)")
    add("--resolution", type=int, help="pixels (default: the model's own)")
    add("--batch-size", type=int, help=f"images per forward ({defaults['batch_size']})")
    add("--gradient-accumulation", type=int, help="batches per step (4)")
    add("--reuse", type=int, help=f"how often a batch and its noise come ({defaults['reuse']})")
    add("--learning-rate", type=float, help=f"of the logits ({TRAVEL:g} / steps)")
    add("--epochs", type=float, help="end after so many passes over the images")
    add("--max-steps", type=int, help=f"end after so many steps ({defaults['max_steps']})")
    add("--precision", choices=get_args(Precision), help="of the frozen U-Net (fp32)")
    add("--device", help="auto, cpu, cuda, mps (auto)")
    add("--validation-fraction", type=float, help="share of images held out (0.1)")
    add("--seed", type=int, help="of everything random (0)")
    add("--resume", action="store_true", help="go on with the unfinished run of this --output")
    add(
        "--checkpoint-every",
        type=int,
        metavar="STEPS",
        help=f"save so often beside the output; 0: only when stopped ({run['checkpoint_every']})",
    )
    add(
        "--keep-checkpoints",
        type=int,
        metavar="COUNT",
        help=f"how many stay while it runs ({run['keep_checkpoints']})",
    )
    add(
        "--streaming",
        action="store_true",
        help="read a hub data set, or tables, as they come, without keeping them or a cache",
    )
    add("--cache", metavar="FOLDER", help="of latents and prompt embeddings (the user's cache)")
    add("--workers", type=int, help="threads that decode images for the cache (one per core)")
    add("--no-cache", action="store_true", help="keep latents and prompt embeddings in memory")
    add(
        "--gradient-checkpointing",
        action="store_true",
        help="less memory, more time: evaluate blocks again for the gradient",
    )
    add(
        "--sample-every",
        type=int,
        metavar="STEPS",
        help="draw images so often, dense and pruned, from fixed seeds (0: never)",
    )
    add("--tensorboard", action="store_true", help="write for TensorBoard (must be installed)")
    given = vars(parser.parse_args(argv))

    settings = dict(DEMO_SETTINGS) if given.pop("demo", False) else {}
    if preset := given.pop("preset", None):
        settings |= PRESETS[preset]
    settings |= given
    missing = [f"--{name}" for name in ("model", "data", "output") if name not in settings]
    if missing:
        parser.error(f"{', '.join(missing)} missing; or try --demo, which needs nothing")
    options = {name: settings.pop(name) for name in run if name in settings}
    return FitConfig(**settings, run=RunOptions(**options))


def parse_seed(text: str) -> int:
    """A seed off a command line; raises UserError for one that generators don't take."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if value not in SEEDS:
        raise UserError(f"A seed is {value}.", "from 0 up to 2**63", "change the seed")
    return value


def parse_count(text: str) -> int:
    """A number of things off a command line, from 1 up."""
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def parse_share(text: str) -> float:
    """A share off a command line, between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: write 0.3 for 30%")
    return value


def _sparsity(text: str) -> float | None:
    try:
        return None if text.lower() == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a share nor 'none'") from None
