"""The types that travel between LDCP's nodes: `Gates` and `Schedule` of `ldcp_core`."""

from comfy_api.latest import io

GatesType = io.Custom("LDCP_GATES")
ScheduleType = io.Custom("LDCP_SCHEDULE")

CATEGORY = "model_patches/LDCP"
