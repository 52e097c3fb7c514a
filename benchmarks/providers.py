"""Who computes the distance: the plain formulas, and this library with each of its backends."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import OURS, PATCH_SIZE, Case
from benchmarks.inputs import Extractor, LayerInput, VideoInput, config_of, layer_input, video_input
from vcd_fast import VCDConfig, VCDLoss, sliced_wasserstein, sort_target
from vcd_fast.distance import SortedTarget
from vcd_fast.distance.streaming import streamed

TRITON_SETTINGS = {
    "triton_count": ("VCD_FAST_TRITON_METHOD", "count"),
    "triton_merge": ("VCD_FAST_TRITON_METHOD", "merge"),
    "triton_tf32x3": ("VCD_FAST_TRITON_PRECISION", "tf32x3"),
}


@dataclasses.dataclass(frozen=True)
class Workload:
    """A case made concrete for one provider."""

    variable: Tensor
    """what the gradient is taken with respect to; a leaf"""
    prepare: Callable[[], object]
    """the condition's side, as far as the provider can compute it apart"""
    loss: Callable[[object], Tensor]
    """what `prepare` returned -> a scalar"""


@functools.lru_cache(maxsize=2)
def _compiler_trouble(device: torch.device) -> str | None:
    """Why torch.compile cannot run here, or None."""
    try:
        torch.compile(lambda t: t * 2 + 1, dynamic=False)(torch.ones(4, device=device))
    except (
        Exception
    ) as error:  # the compiler's errors share no base class; whatever it was becomes the reason that is shown
        return f"torch.compile does not work here: {str(error).strip().splitlines()[0][:160]}"
    return None


def backend_of(provider: str) -> str | None:
    """The backend of this library that a provider stands for, or None for the others."""
    name = provider.split("_")[0]
    return name if name in OURS else None


@functools.lru_cache(maxsize=16)
def _backend_trouble(backend: str, reading: str, device: torch.device) -> str | None:
    """Why a backend of the library cannot run here: what the library itself says when asked for it by name, or None."""
    if backend == "triton" and device.type == "cpu":
        return "backend 'triton' needs a GPU: on a CPU its kernels run in an interpreter, to be tested"
    patch = PATCH_SIZE[reading]
    maps = torch.ones(1, 1, patch, patch, device=device)
    slicing = config_of(Case("layer", "both", (1, 1), 1, reading)).slicing
    try:
        sliced_wasserstein(maps, maps, backend=backend, num_projections=1, slicing=slicing, patch_size=patch)
    except ValueError as error:
        return str(error)
    return None


def why_not(provider: str, case: Case, device: torch.device) -> str | None:
    """Why this provider cannot run this case on this device, in a few words, or None."""
    if case.dtype == "bfloat16" and device.type != "cuda":
        return "bfloat16 is measured on a GPU only"
    if provider == "compile":
        return _compiler_trouble(device)
    backend = backend_of(provider)
    return None if backend is None else _backend_trouble(backend, case.reading, device)


@contextlib.contextmanager
def _settings(provider: str) -> Iterator[None]:
    """The environment in which the library's Triton backend takes a mode of its own."""
    name, value = TRITON_SETTINGS.get(provider, (None, None))
    before = os.environ.get(name) if name else None
    try:
        if name:
            os.environ[name] = value
        yield
    finally:
        if name and before is None:
            del os.environ[name]
        elif name:
            os.environ[name] = before


def workload(provider: str, case: Case, device: torch.device, weights: str) -> Workload:
    """A case's own inputs and functions; `weights` of VGG19 as `VGG19Features` takes them."""
    if case.kind == "layer":
        return layer_workload(provider, case, layer_input(case, device, weights))
    return video_workload(provider, case, video_input(case, device, weights))


def layer_workload(provider: str, case: Case, given: LayerInput) -> Workload:
    x = given.x.clone().requires_grad_()
    backend = backend_of(provider)
    if backend is not None:
        config = config_of(case).slicing_config

        def distance(target: SortedTarget) -> Tensor:
            with _settings(provider):
                return sliced_wasserstein(x, target, backend=backend).sum()

        return Workload(x, lambda: sort_target(given.y, given.filters, config=config, layer=case.layer), distance)
    function = _compiled(provider, plain.sliced_wasserstein)
    return Workload(x, lambda: None, lambda _: function(x, given.y, given.filters).sum())


def video_workload(provider: str, case: Case, given: VideoInput) -> Workload:
    config = config_of(case)
    video = given.video.clone().requires_grad_()
    if provider == "vgg19":
        return Workload(video, lambda: None, lambda _: _features_alone(video, given.extractor, config))
    if provider in OURS:
        options = {"projections": given.filters, "backend": provider, "check_range": False}
        criterion = VCDLoss(config, extractor=given.extractor, **options)
        return Workload(video, lambda: None, lambda _: criterion(video))
    num_frames = video.shape[1]
    temporal = [config.weight_of(i, num_frames) for i in range(1, num_frames)]
    extractor = _own_dtype_inside(given.extractor, next(iter(given.filters.values())).dtype)

    def loss(video: Tensor) -> Tensor:
        return plain.video_loss(video, extractor, given.filters, temporal)

    function = _compiled(provider, loss)
    return Workload(video, lambda: None, lambda _: function(video))


def _compiled(provider: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if provider != "compile":
        return function
    torch.compiler.reset()  # after eight shapes of one function the compiler falls back to eager mode, silently
    return torch.compile(function, dynamic=False)


def _dtype_of(extractor: Extractor) -> torch.dtype:
    return next(extractor.parameters()).dtype


def _own_dtype_inside(extractor: Extractor, outside: torch.dtype) -> Extractor:
    """Images to the extractor's dtype, its maps to that of the distance, as the library does it."""
    own = _dtype_of(extractor)
    return lambda images: {name: x.to(outside) for name, x in extractor(images.to(own)).items()}


def _features_alone(video: Tensor, extractor: Extractor, config: VCDConfig) -> Tensor:
    """The frames through the extractor, forward and backward, as many at a time as the library takes: what no distance can save."""
    at_once = VCDLoss(config, extractor=extractor).frames_at_once(video.device, *video.shape[-2:])
    own = _dtype_of(extractor)

    def evaluate(images: Tensor, _: slice) -> tuple[Tensor, Tensor]:
        total = sum(x.float().mean((1, 2, 3)) for x in extractor(images.to(own)).values())
        return total, total.detach()

    return streamed(video[:, 1:], evaluate, at_once)[0].mean()
