"""The Video Consistency Distance: a floor that knows nothing of the models it is used on."""

from vcd_fast.distance.config import PRESETS, SlicingConfig, VCDConfig
from vcd_fast.distance.features import FeatureExtractor, VGG19Features
from vcd_fast.distance.sliced import sliced_wasserstein
from vcd_fast.distance.target import SortedTarget, sort_target
from vcd_fast.distance.vcd import Target, VCDDetails, VCDLoss, vcd_loss

__all__ = [
    "PRESETS",
    "FeatureExtractor",
    "SlicingConfig",
    "SortedTarget",
    "Target",
    "VCDConfig",
    "VCDDetails",
    "VCDLoss",
    "VGG19Features",
    "sliced_wasserstein",
    "sort_target",
    "vcd_loss",
]
