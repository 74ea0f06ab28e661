"""Choosing the sampler steps in which pruning is on."""

from __future__ import annotations

from comfy_api.latest import io

from ..ldcp_core import Schedule, ScheduleError
from .io_types import CATEGORY, ScheduleType
from .schema import schema

MODES = ["steps", "percent"]


def parse(mode: str, steps: str, start_percent: float, end_percent: float) -> Schedule:
    """The schedule that the widgets describe; raises ScheduleError when they cannot be meant."""
    if mode == "steps":
        return Schedule.steps(steps)
    return Schedule.percent(start_percent, end_percent)


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
                    "the log says so.",
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
        )

    @classmethod
    def validate_inputs(
        cls,
        mode: str | None,
        steps: str | None,
        start_percent: float | None,
        end_percent: float | None,
    ) -> bool | str:
        if None in (mode, steps, start_percent, end_percent):
            return True  # a widget is connected to another node, its value not known yet
        if mode not in MODES:
            return f"unknown mode {mode!r}: choose one of {', '.join(MODES)}"
        try:
            parse(mode, steps, start_percent, end_percent)
        except ScheduleError as error:
            return str(error)
        return True

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
