"""Parts of `tools/gpu_session.py` that no other tool does: what machine this is, every kernel once, and that under NVIDIA's sanitizer.

python tools/gpu_parts.py machine FILE
python tools/gpu_parts.py every-kernel
python tools/gpu_parts.py sanitizer FILE
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

UNAVAILABLE = 69
"""exit code of a part that this machine cannot run; EX_UNAVAILABLE of sysexits.h"""
FOUND = 9
"""exit code of the sanitizer when it found something"""
CHECKS = ("memcheck", "racecheck")
SUMMARY = {"memcheck": r"ERROR SUMMARY: (\d+) error", "racecheck": r"RACECHECK SUMMARY: (\d+) hazard"}
PLACES = ("/usr/local/cuda/bin",)
LENGTHS = (20, 1000, 5000)
"""of rows: two that one program compares, and one that is too long for that"""
SHAPES = ((5, 9, 11), (3, 12, 14))
METHODS = ("auto", "rows", "merge", "count", "sort")


def use_tree() -> None:
    """Take the packages of this tree, whatever is installed.

    The root does not stay on sys.path: `kernels/` would pass for the package of that name, which diffusers and transformers probe for.
    """
    sys.path.insert(0, str(ROOT))
    try:
        import benchmarks  # noqa: F401
        import vcd_fast  # noqa: F401
    finally:
        sys.path.remove(str(ROOT))


def driver() -> str:
    """Version of the GPU's driver, or what there is instead."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"


def describe_machine() -> dict[str, Any]:
    import torch

    from benchmarks import machine

    found = {**machine.describe(torch.device("cuda")), "driver": driver()}
    return {"machine": found, "versions": machine.versions(), "commit": machine.commit()}


def once(launch: Callable[[], object]) -> float:
    """In place of a clock."""
    import torch

    launch()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1.0


def every_kernel(
    device: str,
    lengths: tuple[int, ...] = LENGTHS,
    shapes: tuple[tuple[int, int, int], ...] = SHAPES,
    methods: tuple[str, ...] = METHODS,
) -> list[str]:
    """Run every kernel: rows of either form by every method, projection and gradient, then the whole distance of small maps."""
    import torch
    from time_kernels import time_rows, time_spectrum

    from vcd_fast.distance.backends.triton_fused import sliced_terms
    from vcd_fast.distance.target import sort_target

    ran = [f"{row['kernel']} {row['form']} {m}" for m in lengths for row in time_rows(m, 2, 0.1, device, once)]
    for shape in shapes:
        ran += [f"{row['kernel']} {shape}" for row in time_spectrum(shape, 4, "ieee", device, once)]
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(1, 3, 6, 7, generator=generator).to(device) for _ in range(2))
    for method in methods:
        terms, gradient = sliced_terms(x, sort_target(y, num_projections=3), True, method=method)
        if not (terms.isfinite().all() and gradient.isfinite().all()):
            raise ValueError(f"method {method}: the distance or its gradient is not finite")
        ran.append(f"distance by {method}")
    return ran


# --- the sanitizer -----------------------------------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    places = [os.environ.get("PATH", ""), *(f"{os.environ[name]}/bin" for name in ("CUDA_HOME",) if name in os.environ)]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([*places, *PLACES]))


def judge(check: str, code: int, output: str) -> dict[str, Any]:
    """What a run of one tool of the sanitizer says. Only its own summary makes it clean: one that could not look has none."""
    summary = re.search(SUMMARY[check], output)
    tail = output.strip().splitlines()[-12:]
    if summary is None:
        return {"status": "not available", "reason": f"it ended with {code} and without a summary", "output": tail}
    if int(summary[1]) or code == FOUND:
        return {"status": "found", "errors": int(summary[1]), "output": output.splitlines()[-200:]}
    if code:
        return {"status": "failed", "reason": f"the kernels ended with {code} under it", "output": tail}
    return {"status": "clean", "errors": 0}


def sanitize(output: Path) -> int:
    """Every kernel under memcheck and racecheck; 0 clean, 1 not, `UNAVAILABLE` where it cannot be had."""
    command = [sys.executable, str(ROOT / "tools" / "gpu_parts.py"), "every-kernel"]
    found: dict[str, Any] = {}
    plain = subprocess.run(
        command, cwd=ROOT
    )  # compiles what is then only loaded, and shows that the script itself works
    sanitizer = find_sanitizer()
    if plain.returncode:
        found["script"] = {"status": "failed", "reason": f"without the sanitizer it ended with {plain.returncode}"}
    elif sanitizer is None:
        found["script"] = {"status": "not available", "reason": "there is no compute-sanitizer on PATH or in CUDA_HOME"}
    else:
        # PyTorch's cache of memory would hide what lies behind a tensor
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for check in CHECKS:
            words = [sanitizer, "--tool", check, "--target-processes", "all", "--error-exitcode", str(FOUND), *command]
            done = subprocess.run(
                words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            print(done.stdout, flush=True)
            found[check] = judge(check, done.returncode, done.stdout)
            write(output, found)
    write(output, found)
    states = {entry["status"] for entry in found.values()}
    return 1 if states & {"found", "failed"} else UNAVAILABLE if "not available" in states else 0


def write(path: Path, content: object) -> None:
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(draft, path)


def main(words: list[str]) -> int:
    use_tree()
    if words == ["every-kernel"]:
        print("\n".join(every_kernel("cuda")))
        return 0
    if len(words) == 2 and words[0] == "machine":
        write(Path(words[1]), describe_machine())
        return 0
    if len(words) == 2 and words[0] == "sanitizer":
        return sanitize(Path(words[1]))
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
