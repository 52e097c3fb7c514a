"""What of this machine can be used, and what stands in the way: the checks behind `vcd doctor`.

Each check returns findings and raises nothing that its user could cause. None downloads or changes anything.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from vcd_fast.devices import free_port
from vcd_fast.errors import USER_ERRORS, describe
from vcd_fast.evaluation.collective import RANKS, check_all_reduce
from vcd_fast.evaluation.machine import PACKAGES, gib, gpu_driver, memory_bytes, requirements, versions, why_no_gpu

Status = Literal["ok", "note", "problem"]

WITHOUT = {
    "numba": "the distance on CPUs, faster",
    "triton": "the kernels of the distance, on GPUs",
    "xformers": "attention_backend: xformers; sdpa needs nothing",
}
LAUNCHER_PORT = 29500
LITTLE_SPACE, SOME_SPACE = 1 << 30, 10 << 30
TOLERANCE = 1e-4
UNITS = {"kB": 1e3, "MB": 1e6, "GB": 1e9}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a check says. A problem makes the machine unhealthy, a note does not."""

    check: str
    status: Status
    found: str
    advice: str = ""
    """what to do about it"""


def is_healthy(findings: list[Finding]) -> bool:
    return not any(finding.status == "problem" for finding in findings)


def check_versions(model_named: bool) -> list[Finding]:
    """Installed packages against what vcd_fast asks for; what only training needs is a problem if a model is named, and what only
    GPUs need is said where there is one."""
    wanted = requirements()
    found = versions()
    findings = [Finding("versions", "ok", ", ".join(f"{name} {value}" for name, value in found.items() if value))]
    for name, extra in PACKAGES.items():
        severity: Status = "problem" if extra == "core" or (extra == "train" and model_named) else "note"
        installed, specifier = found[name], wanted.get(name)
        command = "pip install " + ("-e ." if extra == "core" else f"-e '.[{extra}]'")
        if installed is None and extra == "gpu" and not torch.cuda.is_available():
            continue
        if installed is None:
            without = WITHOUT.get(name, "training, generating and scoring")
            findings.append(Finding("versions", severity, f"{name} is not installed: needed for {without}", command))
        elif specifier is not None and not specifier.contains(installed, prereleases=True):
            text = f"{name} {installed} is not {specifier}, which vcd_fast asks for"
            findings.append(Finding("versions", severity, text, command))
    if not wanted:
        text = "vcd_fast is not installed here, so what it asks for is not known"
        findings.append(Finding("versions", "note", text, "pip install -e ."))
    return findings


def check_video_writing(model_named: bool) -> list[Finding]:
    """Videos are written by PyAV's own libraries; no program called ffmpeg is needed."""
    try:
        import av

        av.Codec("libx264", "w")
    except ImportError:
        return []  # said by `check_versions`
    except ValueError:  # av.codec.codec.UnknownCodecError
        status: Status = "problem" if model_named else "note"
        return [Finding("video", status, "this PyAV has no libx264 to write videos with", "pip install -U av")]
    return [Finding("video", "ok", f"PyAV {av.__version__} writes H.264 by itself (no ffmpeg program is needed)")]


def check_devices() -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = f", {gib(memory_bytes())} of memory" if memory_bytes() else ""
    cpu = Finding("device", "ok", f"CPU: {cores} cores{memory}, {torch.get_num_threads()} threads")
    return [*_gpus(), cpu]


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        driver = gpu_driver()
        there = f"; there is one, with driver {driver}" if driver else ""
        advice = (
            "install the PyTorch that fits that driver, see https://pytorch.org/get-started/locally" if driver else ""
        )
        yield Finding("device", "note", f"no GPU that PyTorch can use: {why_no_gpu()}{there}", advice)
        return
    platform_of = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    driver = gpu_driver()
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        text = f"GPU {index}: {properties.name}, {gib(total)} of memory, {gib(free)} free, {platform_of}"
        text += f", compute capability {properties.major}.{properties.minor}" + (f", driver {driver}" if driver else "")
        yield Finding("device", "ok", text)


def check_backends() -> list[Finding]:
    """Run the distance and its gradient by every backend, on the GPU if there is one, against the reference."""
    from vcd_fast.distance import sliced_wasserstein

    gpu = torch.cuda.is_available()
    findings, values = [], {}
    for name, device in (("reference", "cpu"), ("simd", "cpu"), ("triton", "cuda" if gpu else "cpu")):
        x, y = torch.rand(2, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0)).to(device)
        x.requires_grad_()
        try:
            value = sliced_wasserstein(x, y, backend=name, num_projections=4)
            value.sum().backward()
            values[name] = torch.cat([value.detach().flatten(), x.grad.flatten()]).cpu()
        except Exception as error:  # a compiler that is missing, a driver too old: whatever it is, it is the finding
            status: Status = "problem" if name == "reference" else "note"
            text = f"{name} cannot run here: {describe(error).splitlines()[0]}"
            findings.append(Finding("distance", status, text))
            continue
        error = (values[name] - values["reference"]).norm() / values["reference"].norm()
        if error < TOLERANCE:
            findings.append(Finding("distance", "ok", f"{name} runs on {device}"))
        else:
            text = f"{name} runs on {device}, and is wrong by {error:.1g} of the reference"
            findings.append(Finding("distance", "problem", text, "set VCD_FAST_BACKEND=reference, and report this"))
    return findings


def check_vgg19() -> list[Finding]:
    """The network of the distance: there and whole, or how it gets there."""
    from vcd_fast.weights import VGG19_SOURCES, VGG19_VARIABLE, resolve

    try:
        file = resolve("VGG19 (ImageNet)", VGG19_SOURCES, variable=VGG19_VARIABLE, download=False)
    except FileNotFoundError as error:
        if os.environ.get(VGG19_VARIABLE):
            return [Finding("VGG19", "problem", describe(error), f"unset {VGG19_VARIABLE}, or name a file")]
        advice = f"without a network: fetch {VGG19_SOURCES[0].where} and set {VGG19_VARIABLE}=/path/to/file"
        return [Finding("VGG19", "note", "not on this machine: 0.5 GB are downloaded when it is first used", advice)]
    except (ValueError, OSError) as error:
        return [Finding("VGG19", "problem", describe(error))]
    return [Finding("VGG19", "ok", f"{file.path} ({file.source}), SHA-256 {file.sha256}")]


def check_model(name: str, settings: object) -> tuple[list[Finding], float]:
    """The weights of a family: what of `settings` (its `ModelSettings`) is not on this machine.

    Returns:
        findings, and the bytes that are still to be downloaded, as far as they are known.
    """
    from vcd_fast.models.base import family

    try:
        missing = family(name).missing_weights(settings)
    except USER_ERRORS as error:
        return [Finding(name, "problem", describe(error))], 0.0
    if not missing:
        return [Finding(name, "ok", f"weights {settings.weights}: nothing is missing")], 0.0
    found = [Finding(name, "problem", f"missing: {part.what}, {part.size}", part.command) for part in missing]
    return found, sum(_bytes(part.size) for part in missing)


def check_disk(to_download: float = 0.0) -> list[Finding]:
    """Free space where runs are written and where the hub's downloads go."""
    from huggingface_hub import constants

    places = {"here": (Path.cwd(), LITTLE_SPACE), "hub cache": (Path(constants.HF_HUB_CACHE), to_download)}
    findings = []
    for what, (path, needed) in places.items():
        existing = next(parent for parent in (path, *path.parents) if parent.exists())
        free = shutil.disk_usage(existing).free
        text = f"{what}: {gib(free)} free in {path}"
        if free < needed:
            findings.append(Finding("disk", "problem", f"{text}, and {gib(needed)} are needed"))
        else:
            findings.append(Finding("disk", "note" if free < SOME_SPACE else "ok", text))
    return findings


def check_ports() -> list[Finding]:
    """Where processes of a run meet."""
    try:
        port = free_port()
    except OSError as error:
        return [Finding("ports", "problem", f"no TCP port can be opened on 127.0.0.1: {describe(error)}")]
    findings = [Finding("ports", "ok", f"TCP port {port} of 127.0.0.1 is free for processes to meet")]
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind(("127.0.0.1", LAUNCHER_PORT))
        except OSError:
            text = f"port {LAUNCHER_PORT}, which the launcher takes by default, is in use (another run?)"
            findings.append(Finding("ports", "note", text, f"deepspeed --master_port {port} vcd_fast/train.py ..."))
    return findings


def check_collective() -> list[Finding]:
    try:
        seconds = check_all_reduce()
    except (RuntimeError, OSError) as error:
        advice = (
            "does 127.0.0.1 resolve, and does a firewall let processes of this machine talk? (GLOO_SOCKET_IFNAME=lo)"
        )
        return [Finding("collective", "problem", f"{RANKS} processes could not work together: {error}", advice)]
    return [Finding("collective", "ok", f"{RANKS} processes, gloo: all_reduce is right ({seconds:.1f} s)")]


def _bytes(size: str) -> float:
    """ "4.8 GB" -> 4.8e9; 0 for a size that is not known."""
    found = re.fullmatch(r"([\d.]+) ([kMG]B)", size)
    return float(found[1]) * UNITS[found[2]] if found else 0.0
