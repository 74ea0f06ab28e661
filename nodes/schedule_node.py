"""Choosing the sampler steps in which pruning is on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ldcp_core import Schedule
from .inputs import check_offered, check_share, check_text
from .queued import inputs_of
from .shared import CATEGORY, ScheduleType, schema

MODES = ["steps", "percent"]
WIDGETS = ("mode", "steps", "start_percent", "end_percent")


def parse(mode: str, steps: str, start_percent: float, end_percent: float) -> Schedule:
    """The schedule that the widgets describe; raises ValueError when they cannot be meant."""
    check_offered("mode", mode, MODES)
    if mode == "steps":
        check_text("steps", steps)
        return Schedule.steps(steps)
    check_share("start_percent", start_percent)
    check_share("end_percent", end_percent)
    return Schedule.percent(start_percent, end_percent)


def problem(mode: Any, steps: Any, start_percent: Any, end_percent: Any) -> str | None:
    """Why these widgets cannot be meant, as far as they are known (None: not yet)."""
    used = {"steps": (steps,), "percent": (start_percent, end_percent)}
    if mode is None or None in used.get(mode, ()):
        return None
    try:
        parse(mode, steps, start_percent, end_percent)
    except ValueError as error:
        return str(error)
    return None


class LDCPStepSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LDCPStepSchedule",
            display_name="Pruning Step Schedule",
            category=CATEGORY,
            description="Chooses the sampler steps in which Apply Dynamic Pruning prunes. All "
            "other steps run the original model, bit for bit. Chain several to join their ranges.",
            inputs=[
                io.Combo.Input(
                    "mode",
                    options=MODES,
                    default="steps",
                    tooltip="steps: ranges of sampler steps. percent: a stretch of the full "
                    "denoising schedule, whatever the number of steps.",
                ),
                io.String.Input(
                    "steps",
                    default="0-",
                    tooltip="Mode steps: ranges such as '0-4, 10-19' or '5-' (to the end), 0-based "
                    "and inclusive. Counted from the first step this sampler runs, also with "
                    "denoise below 1 or a start step. A range past the last step prunes nothing; "
                    "Apply Dynamic Pruning says so after the run.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Mode percent: where pruning begins, 0.0 is pure noise.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Mode percent: where pruning ends, 1.0 is the finished image.",
                ),
                ScheduleType.Input(
                    "schedule",
                    optional=True,
                    tooltip="Another Pruning Step Schedule: pruning is on in the ranges of either.",
                ),
            ],
            outputs=[
                ScheduleType.Output(
                    display_name="schedule",
                    tooltip="When to prune, for Apply Dynamic Pruning or another schedule.",
                )
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, steps: str | None = None) -> bool | str:
        """Names one input, because ComfyUI repeats the answer for each (see `queued`)."""
        widgets = {**inputs_of(cls.hidden.unique_id if cls.hidden else None), "steps": steps}
        return problem(**{name: widgets.get(name) for name in WIDGETS}) or True

    @classmethod
    def execute(
        cls,
        mode: str,
        steps: str,
        start_percent: float,
        end_percent: float,
        schedule: Schedule | None = None,
    ) -> io.NodeOutput:
        found = parse(mode, steps, start_percent, end_percent)
        return io.NodeOutput(found if schedule is None else schedule | found)
