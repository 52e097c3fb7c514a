"""Every kernel compiles for the GPUs that are planned for, without spilling and within a budget of registers and shared memory.

Compiling needs no GPU, but processes in which triton does not interpret; what they found is kept in pytest's cache until a kernel changes.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CUDA = ("cuda:80", "cuda:90")
AMD = ("hip:gfx942",)
# Registers per thread. The budget keeps as many blocks on an SM as the comment in the table says, or is the most a block may have.
CUDA_REGISTERS = {
    "project ieee": 168,  # 3 blocks of 4 warps
    "project tf32x3": 168,
    "spectrum_bwd ieee": 168,
    "spectrum_bwd tf32x3": 128,  # 2 blocks of 8 warps
    "rows even 256": 64,
    "rows odd 4096": 128,  # the most 16 warps can have
    "project_rows odd 128": 255,
    "merge_sign even": 64,
    "merge_sign odd": 64,  # 4 blocks of 8 warps
    "sorted_sign even": 64,
    "sorted_sign odd": 64,
    "count even": 48,
    "count odd": 48,
    "count_sign even": 64,
    "count_sign odd": 64,
    "count_target even": 64,
    "count_target odd": 80,  # 3 blocks of 8 warps
    "side even": 80,
    "side odd": 128,
    "straddle even": 80,
    "straddle odd": 104,  # 2 blocks of 8 warps
    "tile_sort values": 64,
    "merge": 64,
}
SHARED_BYTES = 64 * 1024  # what an AMD block may have, and far below NVIDIA's limit
AMD_REGISTERS = 256  # of 512: two waves on every SIMD


KERNELS = {"project", "spectrum_bwd", "rows", "project_rows", "merge_sign", "tile_sort", "merge"}
KERNELS |= {"count", "count_sign", "count_target", "side", "straddle", "sorted_sign"}


@pytest.fixture(scope="module")
def report(tmp_path_factory, pytestconfig):
    """Rows of tools/aot_check.py for every kernel and target."""
    folder = tmp_path_factory.mktemp("aot")
    cache = pytestconfig.cache.mkdir("aot_check") if hasattr(pytestconfig, "cache") else folder / "cache"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/aot_check.py", "--cache", str(cache), "--json", str(folder / "report.json")]
    done = subprocess.run(
        [*command, "--targets", *CUDA, *AMD], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (folder / "report.json").exists(), f"exit code {done.returncode}\n{done.stderr}"
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("target", CUDA + AMD)
def test_every_kernel_compiles_within_its_budget(target, report):
    rows = [row for row in report if row["target"] == target]
    assert {row["case"].split()[0] for row in rows} == KERNELS
    assert target not in CUDA or {row["case"] for row in rows} == set(CUDA_REGISTERS)
    for row in rows:
        name = f"{row['case']} on {target}"
        assert "error" not in row, f"{name}: {row.get('error')}"
        assert row["launches"], name
        assert row["spill"] == 0, f"{name} spills {row['spill']}"
        budget = CUDA_REGISTERS[row["case"]] if target in CUDA else AMD_REGISTERS
        assert row["registers"] <= budget, f"{name} uses {row['registers']} registers"
        assert row["shared"] <= SHARED_BYTES, f"{name} uses {row['shared']} bytes of shared memory"


def test_every_kernel_that_is_launched_is_compiled_here():
    table = (ROOT / "tools" / "aot_check.py").read_text()
    launched = set()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        launched |= set(re.findall(r"^\s*(\w+_kernel)\[", path.read_text(), re.M))
    assert len(launched) == len(KERNELS)
    for name in launched:
        assert f'"{name}"' in table, f"{name} is launched, but tools/aot_check.py does not compile it"
