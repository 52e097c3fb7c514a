"""No time without the right answer: a provider's loss and gradient are compared with the reference before it is timed.

The truth is the library's reference backend in float64. Values that tie in float32 swap ranks, so that even the reference's own float32
gradient is off, by some thousandths: a provider may be off by twice as much, or by what one swapped pair makes. How far float32 is off
depends on the order of operations; of two that are equal on paper (channels reversed and maps transposed, or not) the larger error counts.

The inputs make the question well posed. Maps of photographs have channels with few active pixels: there the spectrum has bins that are
real but for rounding and whose angle is π or -π by chance, and bins that are zero but for rounding, whose gradient explodes; two float32
programs differ then by percents in the loss and without bound in the gradient, and neither is wrong. So the gate adds to the maps, for
all providers alike, a little fixed texture and one impulse that makes the self-conjugate bins positive. The plain formula and the
reference then agree in float64 to 1e-12. Directions are independent of each other, so fewer of them do; a layer's map has the size of
the case, a video has smaller frames.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor, nn

from benchmarks import inputs, providers
from benchmarks.accuracy import Accuracy
from benchmarks.cases import Case, map_size
from benchmarks.inputs import Extractor, LayerInput, VideoInput
from benchmarks.operations import value_and_gradient
from vcd_fast.media import read_image, resize_crop

CONDITION = "cat.jpg"
TEXTURE = 0.05
"""of the maps' standard deviation"""
IMPULSE = 1.1
"""of the largest self-conjugate bin besides the mean's"""
VALUES = 1 << 20
"""projected values of a part: map size times directions, if the case has that many directions"""
LARGEST_SIZE = (144, 192)


def gate_case(case: Case) -> Case:
    """The instance of a case on which providers are compared."""
    size, directions = case.size, case.num_projections
    if case.kind == "video":
        size = tuple(min(a, b) for a, b in zip(size, LARGEST_SIZE, strict=True))
    height, width = map_size(case.layer, size) if case.kind == "layer" else size
    directions = min(directions, max(16, VALUES // (height * width)))
    return dataclasses.replace(case, mode="both", size=size, num_projections=directions, frames=1, memory_only=False)


def _varied(values: Tensor) -> Tensor:
    """Maps or filters [.., C, H, W] with the order of channels and of the two directions in space changed."""
    return values.flip(-3).transpose(-2, -1).contiguous()


def offset(maps: Tensor) -> Tensor:
    """[C, H, W] to be added to maps [B, C, H, W]: texture, and the impulse; float64. See the module's text."""
    maps = maps.double()
    generator = torch.Generator().manual_seed(inputs.SEED)
    texture = torch.rand(maps.shape[1:], generator=generator, dtype=torch.float64).to(maps.device)
    added = TEXTURE * maps.std() * texture
    spectrum = torch.fft.rfft2(maps + added).real
    height, width = maps.shape[-2:]
    rows = [0] if height % 2 else [0, height // 2]
    columns = [0] if width % 2 else [0, width // 2]
    others = [spectrum[..., i, j] for i in rows for j in columns if i or j]
    if others:
        added[:, 0, 0] += IMPULSE * torch.stack(others).abs().amax((0, 1))
    return added


class _Conditioned(nn.Module):
    """An extractor whose maps are offset, and perhaps varied."""

    def __init__(self, extractor: Extractor, offsets: dict[str, Tensor], varied: bool) -> None:
        super().__init__()
        self.extractor, self.offsets, self.varied = extractor, offsets, varied

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        found = {name: x + self.offsets[name].to(x.dtype) for name, x in self.extractor(images).items()}
        return {name: _varied(x) for name, x in found.items()} if self.varied else found


@functools.lru_cache(maxsize=2)
def _clip(case: Case, device: torch.device) -> Tensor:
    """[1, 2, 3, H, W]: another photograph as the condition, and a frame."""
    other = resize_crop(read_image(inputs.PICTURES / CONDITION), *case.size).to(device)
    return torch.stack([other, inputs.clip(1, case.size, device)[0, 1]])[None]


@functools.lru_cache(maxsize=1)
def _offsets(case: Case, device: torch.device, weights: str) -> dict[str, Tensor]:
    layers = inputs.config_of(case).layers if case.kind == "video" else (case.layer,)
    with torch.no_grad():
        maps = inputs.vgg19(weights, layers, device, torch.float32)(_clip(case, device)[0])
    return {name: offset(maps[name]) for name in layers}


def _given(
    case: Case, device: torch.device, weights: str, dtype: torch.dtype | None, varied: bool
) -> LayerInput | VideoInput:
    """The gate's inputs, everything in `dtype` (None: as the case says)."""
    layers = inputs.config_of(case).layers if case.kind == "video" else (case.layer,)
    inside = getattr(torch, case.dtype) if dtype is None or case.kind == "layer" else dtype
    extractor = inputs.vgg19(weights, layers, device, inside)
    extractor = _Conditioned(extractor, _offsets(case, device, weights), varied)
    video = _clip(case, device).to(dtype or torch.float32)
    filters = {name: inputs.filters(case, name, device).to(dtype or torch.float32) for name in layers}
    if varied:
        filters = {name: _varied(value) for name, value in filters.items()}
    if case.kind == "video":
        return VideoInput(video, extractor, filters)
    with torch.no_grad():  # the maps are the question: float32 in any case
        maps = extractor(video[0].to(inside))[case.layer].to(dtype or torch.float32)
    return LayerInput(maps[1:], maps[:1], filters[case.layer])


def _answer(
    provider: str,
    case: Case,
    device: torch.device,
    weights: str,
    dtype: torch.dtype | None = None,
    varied: bool = False,
) -> tuple[Tensor, Tensor]:
    make = providers.layer_workload if case.kind == "layer" else providers.video_workload
    value, gradient = value_and_gradient(make(provider, case, _given(case, device, weights, dtype, varied)))
    return value, _varied(gradient) if varied and case.kind == "layer" else gradient


@functools.lru_cache(maxsize=2)
def _truth(case: Case, device: torch.device, weights: str) -> tuple[Tensor, Tensor]:
    return _answer("reference", case, device, weights, torch.float64)


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm()).item()


@functools.lru_cache(maxsize=256)
def _reference_errors(case: Case, device: torch.device, weights: str) -> tuple[float, float]:
    truth = _truth(case, device, weights)
    answers = [_answer("reference", case, device, weights, varied=varied) for varied in (False, True)]
    return tuple(max(relative_error(answer[i], truth[i]) for answer in answers) for i in (0, 1))


@functools.lru_cache(maxsize=256)
def _accuracy(provider: str, case: Case, device: torch.device, weights: str) -> Accuracy:
    truth, true_gradient = _truth(case, device, weights)
    value, gradient = _answer(provider, case, device, weights)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), true_gradient.flatten(), dim=0)
    errors = relative_error(value, truth), relative_error(gradient, true_gradient), cosine.item()
    height, width = map_size(case.layer or "relu1_1", case.size)  # of several layers the largest: the least tolerance
    # every entry of the gradient with respect to the projected values is ±1/n; a swap changes two of them by 2/n
    one_tie = (8 / (height * width * case.num_projections)) ** 0.5
    return Accuracy(case.name, *errors, *_reference_errors(case, device, weights), one_tie)


def accuracy(provider: str, case: Case, device: torch.device, weights: str) -> Accuracy:
    """A provider against float64 on the gate's instance of a case; computed once per instance."""
    return _accuracy(provider, gate_case(case), device, weights)
