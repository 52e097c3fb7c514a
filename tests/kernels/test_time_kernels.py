"""tools/time_kernels.py runs every kernel it says it times; the clock is not the test's."""

import importlib.util
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def tool():
    path = Path(__file__).parents[2] / "tools" / "time_kernels.py"
    spec = importlib.util.spec_from_file_location("time_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def once(launch):
    launch()
    return 2.0


def test_rows_of_both_forms_by_every_method(tool, device):
    found = tool.time_rows(20, 1, 0.1, str(device), once)
    assert [(row["form"], row["kernel"]) for row in found] == [
        (form, kernel) for form in ("even", "odd") for kernel in ("rows", "merge", "count", "sort")
    ]
    assert found[0]["gb_s"] == pytest.approx(9 * 20 / 2.0 / 1e6)


def test_projection_and_gradient(tool, device):
    found = tool.time_spectrum((3, 5, 6), 4, "ieee", str(device), once)
    assert [row["kernel"] for row in found] == ["project", "spectrum_gradient"]
    assert all(row["ms"] == 2.0 and row["tflop_s"] > 0 for row in found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tool, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["time_kernels.py"])
    assert tool.main() == 1
    assert "no CUDA or ROCm device" in capsys.readouterr().err
