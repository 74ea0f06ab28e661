"""Write a pruned model as a smaller one: a diffusers folder, or the U-Net alone in one file.

    python -m training.export gates.safetensors --demo --output pruned/
    python -m training.export gates.safetensors --model v1-5-pruned-emaonly.safetensors \\
        --precision fp16 --output pruned.safetensors

What gates prune is gone for good, and constants and corrections are folded into what is kept. The
images are those of the gates. `ldcp_core.export.load_exported` gives the U-Net back, to diffusers
or to what exports it further. The folder's scheduler is DDIM.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ldcp_core import load_gates
from ldcp_core.export import WEIGHTS, load_exported, save_exported
from training.console import explaining, log_progress
from training.errors import UserError
from training.model.load import DTYPES, DiffusionModel, load_model
from training.options import Bound, Options, Precision, option, parsed
from training.output import EXPORT, claimed, output_file, output_folder
from training.sample import pipeline_of


@dataclass(frozen=True)
class ExportOptions(Options):
    """What to export, how, and where to."""

    gates: str = option("gate file of the model", positional=True)
    model: str = option("checkpoint file, diffusers folder or hub id")
    output: str = option("folder, or for the U-Net alone a file name ending in .safetensors")
    sparsity: float | None = option(
        "share of the gated channels to prune by rank, instead of those pruned as learned",
        None,
        Bound(lambda value: 0 <= value <= 1, "from 0 to 1"),
    )
    precision: Precision = option("of the U-Net", "fp32")


def export(given: ExportOptions) -> Path:
    """Write the folder or file; returns the file of the U-Net. Raises UserError."""
    file = checked_output(given)
    gates = load_gates(given.gates)
    with claimed(Path(given.output)):
        model = load_model(given.model)
        file.parent.mkdir(parents=True, exist_ok=True)
        dtype = DTYPES[given.precision]
        save_exported(model.unet, gates, file, sparsity=given.sparsity, dtype=dtype)
        if file != Path(given.output):
            write_others(model, Path(given.output))
    before, after = (
        sum(p.numel() for p in unet.parameters()) for unet in (model.unet, load_exported(file))
    )
    print(f"U-Net: {after:,} of {before:,} parameters, {after / before:.1%}")
    print(f"wrote {given.output}; the U-Net takes {file.stat().st_size:,} bytes")
    return file


def checked_output(given: ExportOptions) -> Path:
    """The file of the U-Net; raises UserError where it or its folder can't be written."""
    output, inputs = Path(given.output), (given.gates, given.model)
    if output.suffix == ".safetensors":
        return output_file("--output", output, EXPORT, inputs)
    output_folder("--output", given.output, inputs)
    file = output_file("--output", output / "unet" / WEIGHTS, EXPORT, inputs)
    if output.is_dir() and any(output.iterdir()) and not file.exists():
        raise UserError(
            f"{output} is not empty, and holds no export of an earlier run.",
            "a new or empty folder, or that of an earlier run",
            "change --output",
        )
    return file


def write_others(model: DiffusionModel, folder: Path) -> None:
    """Everything of the pipeline but the weights of its U-Net."""
    pipe = pipeline_of(model)
    pipe.save_config(folder)
    pipe.unet.save_config(folder / "unet")
    for name, part in pipe.components.items():
        if name != "unet" and part is not None:
            part.save_pretrained(folder / name)


@explaining
def main(argv: list[str] | None = None) -> int:
    given = parsed(ExportOptions, argv, "export", __doc__, demo=("model",))
    log_progress()
    export(given)
    return 0


if __name__ == "__main__":
    sys.exit(main())
