"""What is measured: the cases, and which of them a run takes.

A *measurement* is a case and a provider. `selection("full")` is every measurement there is; "subset" is what runs in minutes on a CPU;
"quick" has other, tiny sizes and only shows that everything works.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Kind = Literal["layer", "video"]
Mode = Literal["both", "no_grad", "forward", "backward", "prepare"]
Reading = Literal["vcd", "fdl"]
Level = Literal["quick", "subset", "full"]

CHANNELS = {"relu1_1": 64, "relu2_1": 128, "relu3_1": 256, "relu4_1": 512, "relu5_1": 512}
SIZE, LARGE_SIZE, QUICK_SIZE = (272, 368), (480, 832), (80, 96)
FRAMES = (1, 8, 24, 49)
PROJECTIONS = (32, 256)
PATCH_SIZE = {"vcd": 1, "fdl": 5}

OURS = ("reference", "simd", "triton")
TRITON_MODES = ("triton_count", "triton_merge", "triton_tf32x3")
PLAIN = {"vcd": ("eager", "compile"), "fdl": ("published",)}
LABELS = {
    "eager": "eager PyTorch",
    "compile": "torch.compile",
    "published": "FDL as published",
    "vgg19": "VGG19 alone",
    "reference": "vcd_fast reference",
    "simd": "vcd_fast simd",
    "triton": "vcd_fast triton",
    "triton_count": "triton, counting",
    "triton_merge": "triton, merging",
    "triton_tf32x3": "triton, tf32x3",
}
"""Providers as people read them."""
MODES: dict[Mode, str] = {
    "both": "forward and backward",
    "no_grad": "value without gradient",
    "forward": "forward of training",
    "backward": "backward of training",
    "prepare": "the condition's side alone",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that every provider can be asked to compute.

    Attributes:
        kind: "layer": the sliced distance of one VGG19 feature map to the condition's, whose side is prepared beforehand by those who
            can; "video": the whole loss from pixels, the condition's side included.
        mode: see `MODES`.
        size: height and width of the image in pixels; a layer's map is smaller by its pooling.
        num_projections: K.
        reading: "vcd": directions in the channels, VCD's temporal weights; "fdl": FDL's patches and layers.
        layer: VGG19 ReLU, for kind "layer".
        frames: frames that are compared; a clip has the condition in front of them.
        dtype: of VGG19, for kind "video".
        memory_only: the peak is measured and no time.
    """

    kind: Kind
    mode: Mode
    size: tuple[int, int]
    num_projections: int
    reading: Reading = "vcd"
    layer: str | None = None
    frames: int = 1
    dtype: str = "float32"
    memory_only: bool = False

    @property
    def patch_size(self) -> int:
        return PATCH_SIZE[self.reading]

    @property
    def name(self) -> str:
        height, width = self.size
        what = self.layer if self.kind == "layer" else f"{self.frames}frames"
        parts = [self.reading, what, f"{height}x{width}", f"K{self.num_projections}", self.mode]
        parts += [self.dtype] if self.dtype != "float32" else []
        parts += ["memory"] if self.memory_only else []
        return "-".join(parts)


@dataclasses.dataclass(frozen=True)
class Measurement:
    case: Case
    provider: str

    @property
    def name(self) -> str:
        return f"{self.case.name}-{self.provider}"


def map_size(layer: str, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a layer's map for images of `size`: halved, rounded down, by every pooling in front of it."""
    halvings = int(layer[4]) - 1
    return size[0] >> halvings, size[1] >> halvings


def layer_cases(size: tuple[int, int], projections: tuple[int, ...], modes: tuple[Mode, ...]) -> list[Case]:
    return [Case("layer", mode, size, k, layer=layer) for mode in modes for k in projections for layer in CHANNELS]


def _with(case: Case, *providers: str) -> list[Measurement]:
    return [Measurement(case, provider) for provider in providers]


def _all(case: Case) -> list[Measurement]:
    """A case with every provider that knows its reading and mode."""
    ours = [] if case.mode == "prepare" else list(PLAIN[case.reading])
    vgg = ["vgg19"] if case.kind == "video" and case.mode == "both" and case.reading == "vcd" else []
    return _with(case, *ours, *OURS, *vgg)


def _memory_cases(size: tuple[int, int], projections: int, frames: dict[int, tuple[str, ...]]) -> list[Measurement]:
    """Peaks that show how memory grows with the frames; what is timed too has its peak measured anyway."""
    found = []
    for n, providers in frames.items():
        found += _with(Case("video", "both", size, projections, frames=n, memory_only=True), *providers)
    return found


def _quick() -> list[Measurement]:
    found = []
    for mode in MODES:
        found += _all(Case("layer", mode, QUICK_SIZE, 16, layer="relu2_1"))
    found += _all(Case("layer", "both", QUICK_SIZE, 16, "fdl", layer="relu5_1"))
    for reading in PATCH_SIZE:
        found += _all(Case("video", "both", QUICK_SIZE, 8, reading, frames=2))
    return found + _memory_cases(QUICK_SIZE, 8, {1: ("eager",), 3: ("eager",), 4: ("simd",)})


def _subset() -> list[Measurement]:
    found = []
    for case in layer_cases(SIZE, (256,), ("both",)):
        found += _with(case, "eager", *OURS, *TRITON_MODES)
    whole = Case("video", "both", SIZE, 256)
    found += _with(whole, "eager", *OURS, "vgg19")
    found += _with(dataclasses.replace(whole, frames=24), "simd", "triton")
    found += _memory_cases(SIZE, 256, {4: ("simd", "triton"), 2: ("eager",), 3: ("eager",)})
    for case in layer_cases(SIZE, (256,), ("no_grad", "prepare")):
        found += _with(case, "simd", "triton")
    for case in layer_cases(SIZE, (32,), ("both",)):
        found += _with(case, "eager", "simd", "triton")
    for mode in ("no_grad", "forward", "backward"):
        for layer in ("relu1_1", "relu4_1"):
            found += _with(Case("layer", mode, SIZE, 32, layer=layer), "eager", "simd", "triton")
    found += _all(Case("layer", "both", SIZE, 256, layer="relu4_1"))
    found += _with(dataclasses.replace(whole, num_projections=32), "eager", "simd", "triton")
    found += _all(Case("layer", "both", SIZE, 32, "fdl", layer="relu3_1"))
    found += _bfloat16() + _with(dataclasses.replace(whole, reading="fdl"), "published")
    return list(dict.fromkeys(found))


def _bfloat16() -> list[Measurement]:
    return _with(Case("video", "both", SIZE, 256, frames=8, dtype="bfloat16"), "eager", "triton", "vgg19")


def _full() -> list[Measurement]:
    found = _subset()
    training: tuple[Mode, ...] = ("both", "no_grad", "forward", "backward")
    for case in layer_cases(SIZE, PROJECTIONS, (*training, "prepare")):
        found += _all(case)
    for case in layer_cases(SIZE, PROJECTIONS, training):
        found += _all(dataclasses.replace(case, reading="fdl"))
    for size in (SIZE, LARGE_SIZE):
        for k in PROJECTIONS:
            for frames in FRAMES:
                for mode in training if frames == 1 else ("both",):
                    found += _all(Case("video", mode, size, k, frames=frames))
            found += _all(Case("video", "both", size, k, "fdl"))
    found += _all(Case("video", "both", SIZE, 256, "fdl", frames=8))
    return list(dict.fromkeys(found))


def selection(level: Level) -> list[Measurement]:
    """The measurements of a run, the most telling first."""
    return {"quick": _quick, "subset": _subset, "full": _full}[level]()
