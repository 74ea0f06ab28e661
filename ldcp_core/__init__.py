"""The domain of LDCP: sites, gates, schedules, exact compact computation, cost, gate files.

Depends on torch, numpy and safetensors alone; ComfyUI's nodes and the training package both stand
on this one definition, so that what is trained is what runs.
"""

from .calibration import Calibration, Moments
from .cost import Cost, Latent, Savings, SiteSaving, savings, unet_cost
from .criteria import (
    MAGNITUDES,
    RANKINGS,
    Magnitude,
    Ranking,
    column_norms,
    expected_output,
    fluctuation,
    magnitude,
    scores_at,
)
from .gatefile import GateFileError, fingerprint, load_gates, save_gates, write_atomically
from .gates import (
    ALIGNMENT,
    PADDINGS,
    THRESHOLD,
    ChannelGate,
    Gates,
    Padding,
    aligned_counts,
    keep_by_rank,
    top_channels,
)
from .report import Report, ReportLayer, RunFacts, build_report, gates_report
from .report_image import report_image
from .resblock import (
    BlockGate,
    CompactResBlock,
    ConvWeights,
    ResBlockOps,
    SoftGate,
    block_gates,
    masked_forward,
)
from .schedule import ALWAYS, NEVER, Schedule, ScheduleError, StepRange, step_index
from .sites import DEFAULT_SCOPE, SCOPES, SD15, ResBlock, Site, Topology, blocks_of

__all__ = [
    "ALIGNMENT",
    "ALWAYS",
    "DEFAULT_SCOPE",
    "NEVER",
    "MAGNITUDES",
    "PADDINGS",
    "RANKINGS",
    "SCOPES",
    "SD15",
    "THRESHOLD",
    "BlockGate",
    "Calibration",
    "ChannelGate",
    "CompactResBlock",
    "ConvWeights",
    "Cost",
    "GateFileError",
    "Gates",
    "Latent",
    "Magnitude",
    "Moments",
    "Padding",
    "Ranking",
    "Report",
    "ReportLayer",
    "ResBlock",
    "ResBlockOps",
    "RunFacts",
    "Savings",
    "Schedule",
    "ScheduleError",
    "Site",
    "SiteSaving",
    "SoftGate",
    "StepRange",
    "Topology",
    "aligned_counts",
    "block_gates",
    "blocks_of",
    "build_report",
    "column_norms",
    "expected_output",
    "fingerprint",
    "fluctuation",
    "gates_report",
    "keep_by_rank",
    "load_gates",
    "magnitude",
    "masked_forward",
    "report_image",
    "save_gates",
    "savings",
    "scores_at",
    "step_index",
    "top_channels",
    "unet_cost",
    "write_atomically",
]
