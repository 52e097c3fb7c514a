import dataclasses
import math

import pytest

from vcd_fast import PRESETS, VCDConfig, VCDLoss
from vcd_fast.distance.config import FDL_LAYERS, VCD_LAYERS, SlicingConfig, resolve_config


def test_presets_are_the_papers():
    assert set(PRESETS) == {"vcd", "vcd_amp", "vcd_phase", "vcd_no_temporal_weight", "vcd_l2", "vcd_feature", "fdl"}
    default = PRESETS["vcd"]
    assert default == VCDConfig()
    assert (default.layers, default.num_projections, default.p, default.slicing) == (VCD_LAYERS, 256, 1, "channel")
    assert PRESETS["vcd_amp"].parts == ("amplitude",)
    assert PRESETS["vcd_phase"].parts == ("phase",)
    assert PRESETS["vcd_feature"].parts == ("feature",)
    assert PRESETS["vcd_feature"].part_weights == (2.0,)
    assert PRESETS["vcd_l2"].distance == "l2"
    assert PRESETS["vcd_no_temporal_weight"].weight_of(7, 10) == 1
    fdl = PRESETS["fdl"]
    assert (fdl.slicing, fdl.patch_size, fdl.layers, fdl.temporal_weight) == ("patch", 5, FDL_LAYERS, "none")


def test_linear_weight_is_that_of_equation_two():
    config = VCDConfig()
    for n in (2, 5, 25):
        for i in range(2, n + 1):  # 1-based, as in the paper
            assert config.weight_of(i - 1, n) == (n - i + 1) / n


def test_weight_falls_with_the_distance_from_the_condition():
    last = VCDConfig(condition_frame=-1)
    assert [last.weight_of(f, 4) for f in range(4)] == [0.25, 0.5, 0.75, 1.0]
    middle = VCDConfig(condition_frame=1)
    assert [middle.weight_of(f, 4) for f in range(4)] == [0.75, 1.0, 0.75, 0.5]
    with pytest.raises(ValueError, match="condition_frame"):
        VCDConfig(condition_frame=4).weight_of(0, 4)


def test_temporal_weight_may_be_a_function():
    assert VCDConfig(temporal_weight=lambda frame, n: frame * 10 + n).weight_of(3, 5) == 35


def test_frozen_and_hashable():
    assert len({VCDConfig(), VCDConfig(), VCDConfig(seed=1)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        VCDConfig().seed = 1


def test_slicing_config_is_the_part_a_layer_needs():
    config = VCDConfig(p=2, seed=4, distance="l2")
    assert config.slicing_config == SlicingConfig(p=2, seed=4)
    assert type(config.slicing_config) is SlicingConfig


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"distance": "l1"}, ValueError, "distance: expected one of 'swd', 'l2', got 'l1'"),
        ({"domain": "time"}, ValueError, "domain: expected one of"),
        ({"slicing": "row"}, ValueError, "slicing: expected one of"),
        ({"fft_norm": None}, ValueError, "fft_norm: expected one of"),
        ({"layer_reduction": "max"}, ValueError, "layer_reduction: expected one of"),
        ({"p": 3}, ValueError, "p: expected 1 or 2, got 3"),
        ({"p": 0}, ValueError, "p: expected at least 1"),
        ({"p": 1.0}, TypeError, "p: expected a whole number"),
        ({"num_projections": 0}, ValueError, "num_projections: expected at least 1"),
        ({"num_projections": True}, TypeError, "num_projections: expected a whole number"),
        ({"patch_size": 0}, ValueError, "patch_size: expected at least 1"),
        ({"seed": "x"}, TypeError, "seed: expected a whole number"),
        ({"amplitude_weight": -1}, ValueError, "amplitude_weight: expected a finite number of at least 0"),
        ({"phase_weight": math.nan}, ValueError, "phase_weight: expected a finite number"),
        ({"phase_weight": "1"}, TypeError, "phase_weight: expected a number"),
        ({"amplitude_weight": 0, "phase_weight": 0}, ValueError, "expected one of them above 0"),
        ({"layers": "relu1_1"}, TypeError, "layers: expected a sequence of names"),
        ({"layers": ()}, ValueError, "layers: expected at least one name"),
        ({"layers": ("a", "a")}, ValueError, "each once"),
        ({"temporal_weight": "cosine"}, ValueError, "temporal_weight: expected 'linear', 'none' or a function"),
        ({"condition_frame": 0.5}, TypeError, "condition_frame: expected a whole number"),
    ],
    ids=str,
)
def test_bad_values_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        VCDConfig(**changes)


def test_resolving_names_and_changes():
    assert resolve_config("vcd_amp", {"seed": 3}) == dataclasses.replace(PRESETS["vcd_amp"], seed=3)
    assert resolve_config(VCDConfig(p=2), {}) == VCDConfig(p=2)
    with pytest.raises(ValueError, match="config: expected one of vcd, vcd_amp"):
        VCDLoss("vdc")
    with pytest.raises(
        TypeError, match=r"unknown option num_projection: expected fields of VCDConfig \(.*num_projections"
    ):
        VCDLoss(num_projection=3)
    with pytest.raises(TypeError, match="config: expected a preset's name or a VCDConfig, got dict"):
        VCDLoss({"p": 2})
