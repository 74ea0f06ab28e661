"""The Pruning Report: what the gates of a model prune, and what its last run did."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..ldcp_core import Gates, Report, ReportLayer, build_report, layers_as_learned, report_image
from .host.model import ModelError, find_blocks, model_topology
from .host.patch import attached
from .shared import CATEGORY, GatesType, schema, show_on_node

NOT_MEASURED = (
    "not measured: no run of this model yet; connect 'after' to the sampler's LATENT, or to an "
    "IMAGE made of it, and the report waits for the run"
)


def model_report(model: Any, gates: Gates | None = None) -> Report:
    """The report on all gates attached to ``model`` and its last run, or on ``gates`` alone.

    Raises ModelError for gates that do not fit, and where there is nothing to report on.
    """
    pruning = attached(model)
    if gates is not None:
        find_blocks(model.model, gates)
        layers, run, notes = layers_as_learned(gates), None, []
    elif pruning is not None:
        layers = [ReportLayer(la.gates, la.keep_sets, la.schedule) for la in pruning.layers]
        run = pruning.record
        notes = [layer.remark for layer in pruning.layers if layer.remark]
        notes += run.notes if run else [NOT_MEASURED]
    else:
        raise ModelError(
            "LDCP: this model is not pruned, so there is nothing to report on; connect the model "
            "that comes out of Apply Dynamic Pruning, or gates from Load Pruning Gates"
        )
    itemsize = model.model.get_dtype().itemsize
    return build_report(
        layers, model_topology(model.model), itemsize, run=run, notes=list(dict.fromkeys(notes))
    )


def as_image(report: Report) -> Tensor:
    """The drawn report as ComfyUI's IMAGE: float32 [1, height, width, 3] in [0, 1]."""
    pixels = numpy.array(report_image(report))
    return torch.from_numpy(pixels).float().div(255)[None]


class LDCPPruningReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPPruningReport",
            display_name="Pruning Report",
            category=CATEGORY,
            description="Shows what is pruned in each layer, how many bytes and operations that "
            "leaves out, and, after the sampler, what the run really did.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that comes out of Apply Dynamic Pruning. With gates "
                    "connected: any Stable Diffusion model (1.5, 2 or XL).",
                ),
                GatesType.Input(
                    "gates",
                    optional=True,
                    tooltip="Report on these gates as learned, whatever the model is pruned by: "
                    "Load Pruning Gates. Unconnected: what the model is pruned by, and its run.",
                ),
                io.MultiType.Input(
                    "after",
                    types=[io.Latent, io.Image],
                    optional=True,
                    tooltip="The sampler's latent, or an image made of it: the report waits for it "
                    "and shows what that run did. What comes in here is not used otherwise.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="The report as a plain text table."),
                io.Image.Output(display_name="image", tooltip="The report as one image."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **_: Any) -> float:
        """A new NaN, which equals nothing: the run changes while all inputs stay as they were."""
        return float("nan")

    @classmethod
    def execute(cls, model: Any, gates: Gates | None = None, after: Any = None) -> io.NodeOutput:
        report = model_report(model, gates)
        lines = report.gates_lines() + report.counted_lines() + report.measured_lines()
        lines += report.notes
        show_on_node("\n".join(lines), cls.hidden.unique_id if cls.hidden else None)
        image = as_image(report)
        return io.NodeOutput(report.text(), image, ui=ui.PreviewImage(image, cls=cls))
