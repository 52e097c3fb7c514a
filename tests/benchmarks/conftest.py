"""The suite's modules, which are not installed, and rows as a run would write them."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]

if (
    "benchmarks" not in sys.modules
):  # without the checkout's root on sys.path, where other folders would become importable too
    spec = importlib.util.spec_from_file_location(
        "benchmarks", ROOT / "benchmarks" / "__init__.py", submodule_search_locations=[str(ROOT / "benchmarks")]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tensors here are tiny: a second thread only waits for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def make_row():
    """make_row(case, provider, seconds, peak_bytes, **fields) -> a row."""
    from benchmarks import estimate, rows

    def make(case, provider, seconds=None, peak_bytes=None, **fields):
        return {
            "schema": rows.SCHEMA,
            "run": "2026-01-02T03:04:05+00:00 0",
            "time": "2026-01-02T03:04:05+00:00",
            "device": "cpu",
            "weights": "random",
            "threads": 2,
            "load_average": 0.1,
            "machine": {
                "slug": "some-cpu-2-cores",
                "cpu": "Some CPU",
                "cores": 2,
                "gpu": None,
                "memory_bytes": 24 << 30,
                "copy_bytes_per_second": 2e10,
            },
            "versions": {
                "python": "3.11.2",
                "vcd_fast": "0.1.0",
                "torch": "2.13.0",
                "numpy": "2.4.6",
                "triton": "3.9.0",
            },
            "commit": "0123456789ab",
            **rows.case_fields(case),
            "provider": provider,
            "seconds": None if seconds is None else {"p20": 0.9 * seconds, "p50": seconds, "p80": 1.2 * seconds},
            "rounds": 0 if seconds is None else 5,
            "clock": None if seconds is None else "time.perf_counter",
            "peak_bytes": peak_bytes,
            "meter": None if peak_bytes is None else "process peak (VmHWM)",
            "floor_bytes": estimate.floor_bytes(case),
            "accuracy": {
                "instance": case.name,
                "loss_error": 1e-7,
                "gradient_error": 2e-3,
                "cosine": 0.999998,
                "reference_loss_error": 1e-7,
                "reference_gradient_error": 2e-3,
                "one_tie": 2e-3,
            },
            **fields,
        }

    return make


@pytest.fixture(scope="session")
def run_rows(make_row):
    """run_rows(simd_layer=..., ...) -> the rows the targets are about, with round figures."""
    from benchmarks.cases import CHANNELS, SIZE, Case

    def make(simd_layer=0.08, simd_frame=1.5, simd_peak=750_000_000, simd_peak_4=740_000_000):
        made = []
        for layer in CHANNELS:
            case = Case("layer", "both", SIZE, 256, layer=layer)
            made += [make_row(case, "eager", 1.0, 10**9), make_row(case, "simd", simd_layer, 10**8)]
        for frames in (1, 2, 3):
            case = Case("video", "both", SIZE, 256, frames=frames)
            made.append(make_row(case, "eager", 10.0 if frames == 1 else None, 700_000_000 + frames * 10**9))
        case = Case("video", "both", SIZE, 256, frames=24)
        made.append(make_row(case, "simd", 24 * simd_frame, simd_peak))
        made.append(make_row(Case("video", "both", SIZE, 256, frames=4), "simd", None, simd_peak_4))
        return made

    return make
