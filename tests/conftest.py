"""What must be settled before any test module is imported."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()

# Triton decides when it is imported whether kernels are compiled or interpreted, and other libraries import it. Without a GPU the whole
# run therefore interprets; with one, kernels are compiled and the same tests run on it.
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")


# Files that start processes of their own and take minutes; begun last, one worker would wait for the other.
LONG = ("training", "cli", "test_readme.py", "test_packaging.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.relative_to(HERE).parts[0] not in LONG)
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
