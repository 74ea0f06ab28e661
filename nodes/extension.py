"""What ComfyUI gets from this pack. Node ids are part of users' workflows and never change."""

from comfy_api.latest import ComfyExtension, io

from .apply_node import LDCPApplyDynamicPruning
from .calibrate_node import LDCPCalibrateGates
from .compare_node import LDCPCompareShares
from .estimate_node import LDCPEstimateGates
from .load_node import LDCPLoadGates
from .queued import listen
from .report_node import LDCPPruningReport
from .save_node import LDCPSaveGates
from .schedule_node import LDCPStepSchedule

listen()


class LDCPExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LDCPLoadGates,
            LDCPApplyDynamicPruning,
            LDCPStepSchedule,
            LDCPPruningReport,
            LDCPEstimateGates,
            LDCPCalibrateGates,
            LDCPSaveGates,
            LDCPCompareShares,
        ]
