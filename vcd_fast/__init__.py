"""vcd_fast: the Video Consistency Distance (arXiv 2510.19193) as a fast, low-memory loss, metric and fine-tuning reward."""

from vcd_fast.distance import (
    PRESETS,
    VCDConfig,
    VCDLoss,
    VGG19Features,
    sliced_wasserstein,
    sort_target,
    vcd_loss,
)
from vcd_fast.version import __version__

__all__ = [
    "PRESETS",
    "VCDConfig",
    "VCDLoss",
    "VGG19Features",
    "__version__",
    "sliced_wasserstein",
    "sort_target",
    "vcd_loss",
]
