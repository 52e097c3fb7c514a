"""What a figure was measured on: hardware, versions, commit."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path

import torch

from vcd_fast.version import __version__

ROOT = Path(__file__).parents[1]
COPY_BYTES = 1 << 28


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (found := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.M)):
        return found.group(1).strip()
    return platform.processor() or platform.machine()


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def available_bytes(device: torch.device) -> int:
    """Memory that can be had now without swapping."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    info = Path("/proc/meminfo")
    if info.is_file() and (found := re.search(r"^MemAvailable:\s*(\d+) kB$", info.read_text(), re.M)):
        return int(found.group(1)) * 1024
    return memory_bytes(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy: the best of several."""
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * COPY_BYTES / best


def describe(device: torch.device) -> dict[str, object]:
    """The `machine` of a row. `slug` names results files."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    words = gpu or f"{cpu_model()} {cores()} cores"
    return {
        "slug": re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-"),
        "cpu": cpu_model(),
        "cores": cores(),
        "gpu": gpu,
        "memory_bytes": memory_bytes(device),
        "copy_bytes_per_second": copy_bandwidth(device),
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "vcd_fast": __version__}
    for name in ("torch", "numpy", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    if torch.version.cuda or torch.version.hip:
        found["cuda"] = torch.version.cuda or f"ROCm {torch.version.hip}"
    return found


def commit() -> str:
    """Of the checkout, with `+changes` where tracked files of the package or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        name = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "vcd_fast", "kernels", "benchmarks/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{name}+changes" if changed else name


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
