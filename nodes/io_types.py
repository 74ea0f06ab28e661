"""Types that travel between LDCP's nodes: `Gates`, `Schedule`, `Calibration` of `ldcp_core`."""

from comfy_api.latest import io

GatesType = io.Custom("LDCP_GATES")
ScheduleType = io.Custom("LDCP_SCHEDULE")
CalibrationType = io.Custom("LDCP_CALIBRATION")

CATEGORY = "model_patches/LDCP"
