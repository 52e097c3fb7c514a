"""The choices that make a Video Consistency Distance, and the named sets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, get_args

Distance = Literal["swd", "l2"]
Domain = Literal["frequency", "feature"]
Slicing = Literal["channel", "flat", "patch"]
Norm = Literal["backward", "ortho", "forward"]
TemporalWeight = Literal["linear", "none"] | Callable[[int, int], float]
LayerReduction = Literal["sum", "mean"]

VCD_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
FDL_LAYERS = ("relu1_2", "relu2_2", "relu3_4", "relu4_4", "relu5_4")


def _one_of(argument: str, value: object, choices: object) -> None:
    names = get_args(choices)
    if value not in names:
        raise ValueError(f"{argument}: expected one of {', '.join(map(repr, names))}, got {value!r}")


def _finite(argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{argument}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{argument}: expected a finite number of at least 0, got {value!r}")


def _whole(argument: str, value: object, at_least: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected a whole number, got {value!r}")
    if at_least is not None and value < at_least:
        raise ValueError(f"{argument}: expected at least {at_least}, got {value}")


@dataclasses.dataclass(frozen=True)
class SlicingConfig:
    """How two feature maps are compared: the part of a `VCDConfig` that `sliced_wasserstein` needs.

    Attributes:
        domain: "frequency": compare amplitude and phase of the FFT; "feature": the features themselves.
        slicing: what a sample is. "channel": a frequency bin, a point in R^C, projected on `num_projections` unit directions
            (Heitz et al., CVPR 2021); "flat": a single coefficient, all C·H·W of them one distribution, nothing projected; "patch": a
            `patch_size`² × C neighbourhood, valid convolution (FDL, Ni et al., CVPR 2024).
        p: exponent of the cost |x - y|^p.
        num_projections: directions K of the channel and patch readings.
        patch_size: side of the patches of the patch reading.
        seed: draws the directions, with the name of the layer.
        amplitude_weight, phase_weight: factors of the two terms; a term of weight 0 is not computed. In the feature domain there is
            one term and its factor is their sum (Eq. 5 of the paper adds the same term twice).
        fft_norm: normalisation of the FFT as `torch.fft` names it.
    """

    domain: Domain = "frequency"
    slicing: Slicing = "channel"
    p: int = 1
    num_projections: int = 256
    patch_size: int = 5
    seed: int = 0
    amplitude_weight: float = 1.0
    phase_weight: float = 1.0
    fft_norm: Norm = "backward"

    def __post_init__(self) -> None:
        _one_of("domain", self.domain, Domain)
        _one_of("slicing", self.slicing, Slicing)
        _one_of("fft_norm", self.fft_norm, Norm)
        _whole("p", self.p, 1)
        if self.p > 2:
            raise ValueError(f"p: expected 1 or 2, got {self.p}")
        _whole("num_projections", self.num_projections, 1)
        _whole("patch_size", self.patch_size, 1)
        _whole("seed", self.seed, None)
        _finite("amplitude_weight", self.amplitude_weight)
        _finite("phase_weight", self.phase_weight)
        if self.amplitude_weight + self.phase_weight == 0:
            raise ValueError("amplitude_weight and phase_weight: expected one of them above 0, got 0 and 0")

    @property
    def parts(self) -> tuple[str, ...]:
        """The terms that are computed: "amplitude" and "phase" where their weight is not 0, or "feature"."""
        if self.domain == "feature":
            return ("feature",)
        return tuple(name for name in ("amplitude", "phase") if getattr(self, f"{name}_weight") > 0)

    @property
    def part_weights(self) -> tuple[float, ...]:
        """Factors of `parts`."""
        if self.domain == "feature":
            return (float(self.amplitude_weight + self.phase_weight),)
        return tuple(float(getattr(self, f"{name}_weight")) for name in self.parts)


@dataclasses.dataclass(frozen=True)
class VCDConfig(SlicingConfig):
    """A Video Consistency Distance (arXiv 2510.19193, Eq. 2) and its ablations. See `SlicingConfig` for the other fields.

    Attributes:
        distance: "swd": sliced Wasserstein; "l2": the Euclidean norm of the difference of all coefficients (the paper's Eq. 4).
        layers: feature maps that are compared.
        temporal_weight: "linear": (N - d)/N for a frame d frames from the condition, which is Eq. 2's (N - i + 1)/N; "none": 1; or a
            function of (0-based frame, num_frames).
        layer_reduction: "sum" (as FDL; the paper does not say) or "mean" over layers.
        condition_frame: 0-based position of the frame that is the condition, negative from the end; it is left out of the distance.
    """

    distance: Distance = "swd"
    layers: tuple[str, ...] = VCD_LAYERS
    temporal_weight: TemporalWeight = "linear"
    layer_reduction: LayerReduction = "sum"
    condition_frame: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _one_of("distance", self.distance, Distance)
        _one_of("layer_reduction", self.layer_reduction, LayerReduction)
        if not callable(self.temporal_weight) and self.temporal_weight not in ("linear", "none"):
            raise ValueError(
                f"temporal_weight: expected 'linear', 'none' or a function of (frame, num_frames), got {self.temporal_weight!r}"
            )
        if isinstance(self.layers, str) or not all(isinstance(name, str) for name in self.layers):
            raise TypeError(f"layers: expected a sequence of names, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(f"layers: expected at least one name, each once, got {self.layers!r}")
        _whole("condition_frame", self.condition_frame, None)

    @property
    def slicing_config(self) -> SlicingConfig:
        names = [field.name for field in dataclasses.fields(SlicingConfig)]
        return SlicingConfig(**{name: getattr(self, name) for name in names})

    def weight_of(self, frame: int, num_frames: int) -> float:
        """Temporal weight of the 0-based `frame` of a clip of `num_frames`."""
        if callable(self.temporal_weight):
            return float(self.temporal_weight(frame, num_frames))
        if self.temporal_weight == "none":
            return 1.0
        return (num_frames - abs(frame - self.condition_position(num_frames))) / num_frames

    def condition_position(self, num_frames: int) -> int:
        """`condition_frame` counted from the start of a clip of `num_frames`."""
        position = self.condition_frame + num_frames if self.condition_frame < 0 else self.condition_frame
        if not 0 <= position < num_frames:
            raise ValueError(f"condition_frame: expected a frame of a clip of {num_frames}, got {self.condition_frame}")
        return position


PRESETS: dict[str, VCDConfig] = {
    "vcd": VCDConfig(),
    "vcd_amp": VCDConfig(phase_weight=0.0),
    "vcd_phase": VCDConfig(amplitude_weight=0.0),
    "vcd_no_temporal_weight": VCDConfig(temporal_weight="none"),
    "vcd_l2": VCDConfig(distance="l2"),
    "vcd_feature": VCDConfig(domain="feature"),
    # The published settings of FDL (fdl-pytorch 1.0), each frame against the condition as if they were an image pair.
    "fdl": VCDConfig(slicing="patch", patch_size=5, layers=FDL_LAYERS, temporal_weight="none"),
}


def resolve_config(config: str | VCDConfig, changes: dict[str, object]) -> VCDConfig:
    """A preset's name or a config, with some fields replaced.

    Raises:
        ValueError: unknown preset. TypeError: unknown field, or `config` is neither.
    """
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(f"config: expected one of {', '.join(PRESETS)}, got {config!r}")
        config = PRESETS[config]
    elif not isinstance(config, VCDConfig):
        raise TypeError(f"config: expected a preset's name or a VCDConfig, got {type(config).__name__}")
    names = [field.name for field in dataclasses.fields(VCDConfig)]
    if unknown := sorted(set(changes) - set(names)):
        raise TypeError(f"unknown option {', '.join(unknown)}: expected fields of VCDConfig ({', '.join(names)})")
    return dataclasses.replace(config, **changes)
