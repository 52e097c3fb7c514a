"""What is compared: the base model, and LoRAs tuned from it that differ in one thing each.

FDL goes without relu5_4: of a 64×96 frame that is 4×6, and its patches are 5×5.
"""

from __future__ import annotations

from dataclasses import dataclass

from vcd_fast.distance.config import FDL_LAYERS


@dataclass(frozen=True)
class Arm:
    name: str
    says: str
    options: tuple[str, ...] = ()
    """of the trainer, after those all arms share"""


BASE = Arm("base", "not tuned")
ARMS = (
    Arm("vcd", "VCD"),
    Arm("vcd_amp", "amplitude only", ("--distance", "vcd_amp")),
    Arm("vcd_phase", "phase only", ("--distance", "vcd_phase")),
    Arm("vcd_no_temporal_weight", "without temporal weight", ("--distance", "vcd_no_temporal_weight")),
    Arm("vcd_l2", "L2 in place of the sliced distance", ("--distance", "vcd_l2")),
    Arm("vcd_feature", "features in place of their spectrum", ("--distance", "vcd_feature")),
    Arm("fdl", "FDL: 5×5 patches, four layers", ("--distance", "fdl", "--feature-layers", *FDL_LAYERS[:-1])),
    Arm("last_3", "VCD, last 3 steps", ("--backprop", "last:3")),
    Arm("spaced_3", "VCD, 3 spaced steps", ("--backprop", "spaced:3")),
    Arm("long", "VCD, three times the steps", ("--max-train-steps", "180")),
    Arm("step_cache", "VCD, step cache", ("--step-cache", "teacache", "--cache-threshold", "0.14")),
)
BY_NAME = {arm.name: arm for arm in (BASE, *ARMS)}
MOTIONS = (
    "pan_left", "pan_right", "pan_up", "pan_down", "zoom_in", "zoom_out", "rotate_clockwise", "rotate_counterclockwise", "still",
)  # fmt: skip
"""The whole picture's: a frame can be compared with the picture moved as it moved. Changes of light are what amplitudes forbid."""
