"""Where a command computes, and where its processes meet."""

from __future__ import annotations

import os
import socket

import torch


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this process; `auto` takes a GPU if there is one, that of `LOCAL_RANK`.

    Raises:
        ValueError: another name, or `cuda` where PyTorch can use no GPU.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {name!r}")
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ValueError("device: expected a CUDA or ROCm GPU, got none that this PyTorch can use; try --device cpu")
    if name == "cpu" or not available:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def free_port() -> int:
    """A TCP port of this machine that nothing listened on a moment ago."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
