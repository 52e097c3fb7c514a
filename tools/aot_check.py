#!/usr/bin/env python3
"""Compile every kernel for GPUs that are not here and report what the compiler made of it: registers, spills, shared memory.

    python tools/aot_check.py                                   # every kernel, default targets, a table
    python tools/aot_check.py --thorough                        # also variants that differ little and take long
    python tools/aot_check.py --kernels rows --targets cuda:90 hip:gfx942 --json report.json

Every case is compiled with the configuration that the table in `kernels/config.py` would launch on that target. Nothing needs a GPU or a
driver: ptxas and cuobjdump come with triton. Results are kept in --cache under a hash of the sources, the triton version and the case.

Exit code 1 if a kernel does not compile, spills, or cannot be launched.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ("cuda:80", "cuda:90", "hip:gfx942")
# Per compute capability: registers, threads, blocks and shared bytes of an SM, shared bytes a block may have.
_SM = {
    80: (65536, 2048, 32, 164 * 1024, 163 * 1024),
    90: (65536, 2048, 32, 228 * 1024, 227 * 1024),
    100: (65536, 2048, 32, 228 * 1024, 227 * 1024),
}
_LDS = 64 * 1024
_MOST_THREADS = 1024


@dataclass(frozen=True)
class Case:
    """A kernel with the values of its constexprs and the types of its other parameters, in order; ':16' marks divisibility."""

    name: str
    module: str
    kernel: str
    signature: str
    constants: dict = field(hash=False)
    warps: int = 4
    stages: int = 2

    @property
    def thorough(self) -> bool:
        """Whether a default run leaves it out: it sorts, which takes long to compile, and another case differs by the last few lines."""
        return self.name in ("rows even 4096", "rows odd 256", "project_rows even 128", "tile_sort words")


def _architecture(target: str) -> str:
    backend, name = target.split(":")
    return f"sm_{name}" if backend == "cuda" else name


def cases(target: str) -> list[Case]:
    """Every kernel of the package, with the configurations of `target`."""
    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    from vcd_fast.kernels import config, half_list

    arch = _architecture(target)
    even, odd = half_list.EVEN.value, half_list.ODD.value
    layout = "i32, i32, i32, i32"  # directions, frames, all_directions, first_direction
    found = []
    for precision in config.PRECISIONS[: 2 if target.startswith("cuda") else 1]:
        c = config.candidates("project", 50000, arch)[0]
        found.append(
            Case(
                f"project {precision}",
                "project",
                "project_fwd_kernel",
                "*i64:16, *i32:16, *fp32:16, *fp32:16, *fp32:16, i32:16, i32:16, i32, i32, i32, i32, i32:16",
                {
                    "AMPLITUDE": True,
                    "PHASE": True,
                    "MIRRORED": False,
                    "PRECISION": precision,
                    "BLOCK_K": c.block_k,
                    "BLOCK_J": c.block_j,
                    "BLOCK_C": c.block_c,
                },
                c.warps,
                c.stages,
            )
        )
        c = config.candidates("spectrum_gradient", 50000, arch)[0]
        found.append(
            Case(
                f"spectrum_bwd {precision}",
                "spectrum_gradient",
                "spectrum_bwd_kernel",
                "*i64:16, *i32:16, *i32:16, *fp32:16, *i8:16, *i8:16, *i64:16, fp32, fp32, i32:16, i32:16, i32, i32, i32, i32:16, i32:16",
                {
                    "AMPLITUDE": True,
                    "PHASE": True,
                    "ACCUMULATE": True,
                    "PRECISION": precision,
                    "BLOCK_C": c.block_c,
                    "BLOCK_J": c.block_j,
                    "BLOCK_K": c.block_k,
                },
                c.warps,
                c.stages,
            )
        )
    for form, label in ((even, "even"), (odd, "odd")):
        shape = {"FORM": form, "S": 4, "POWER": 1}
        for m in (200, 3128):
            c = config.candidates("rows", m, arch)[0]
            found.append(
                Case(
                    f"rows {label} {c.block}",
                    "rows",
                    "rows_kernel",
                    f"*fp32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *fp32:16, i32, i32:16, {layout}",
                    {**shape, "BLOCK": c.block},
                    c.warps,
                )
            )
        c = config.candidates("project_rows", 96, arch)[0]
        found.append(
            Case(
                f"project_rows {label} {c.block}",
                "rows",
                "project_rows_kernel",
                "*i64:16, *i32:16, *fp32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *fp32:16, i32:16, i32, i32, i32:16, "
                + layout,
                {**shape, "PRECISION": "ieee", "BLOCK": c.block, "BLOCK_R": c.block_r, "BLOCK_C": c.block_c},
                c.warps,
            )
        )
        c = config.candidates("merge", 50000, arch)[0]
        found.append(
            Case(
                f"merge_sign {label}",
                "merge",
                "merge_sign_kernel",
                f"*i64:16, *fp32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *fp32:16, i32, i32:16, i32:16, {layout}",
                {**shape, "BLOCK": c.merge_block},
                c.merge_warps,
            )
        )
        c = config.candidates("sort", 50000, arch)[0]
        found.append(
            Case(
                f"sorted_sign {label}",
                "library_sort",
                "sorted_sign_kernel",
                f"*fp32:16, *i64:16, *fp32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *fp32:16, i32, i32:16, {layout}",
                {**shape, "BLOCK": c.block},
                c.warps,
            )
        )
        c = config.candidates("count", 50000, arch)[0]
        binned = {"FORM": form, "S": 4, "LOG_BINS": c.log_bins}
        tail = f"i32, i32:16, {layout}"
        for kernel, pointers in (
            ("count_kernel", "*fp32:16, *fp32:16, *i32:16, *i32:16"),
            (
                "count_sign_kernel",
                "*fp32:16, *fp32:16, *i8:16, *i32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *i64:16, *i32:16, *fp64:16",
            ),
            (
                "count_target_kernel",
                "*fp32:16, *fp32:16, *i32:16, *fp32:16, *fp32:16, *i8:16, *i32:16, *i32:16, *i32:16, *fp64:16",
            ),
        ):
            extra = {"OF_TARGET": False} if kernel == "count_kernel" else {}
            module = "count_target" if kernel == "count_target_kernel" else "count"
            constants = {**binned, **extra, "BLOCK": c.block}
            found.append(
                Case(
                    f"{kernel.removesuffix('_kernel')} {label}",
                    module,
                    kernel,
                    f"{pointers}, {tail}",
                    constants,
                    c.warps,
                )
            )
        found.append(
            Case(
                f"side {label}",
                "count",
                "side_kernel",
                f"*i32:16, *i32:16, *fp32:16, *fp32:16, *fp32:16, *i8:16, *i32:16, *i32:16, {tail}",
                {**binned, "BLOCK": c.scan_block},
                c.scan_warps,
            )
        )
        found.append(
            Case(
                f"straddle {label}",
                "count_straddle",
                "straddle_kernel",
                "*i64:16, *i32:16, *fp32:16, *fp32:16, *i32:16, *fp32:16, *fp32:16, *i32:16, *i8:16, *fp64:16, "
                f"i32, i32:16, i32:16, {layout}",
                {**binned, "BLOCK": c.merge.merge_block},
                c.merge.merge_warps,
            )
        )
    merge, words = config.candidates("merge", 50000, arch)[0], config.candidates("count", 50000, arch)[0].merge
    for label, c in (("values", merge), ("words", words)):
        found.append(
            Case(
                f"tile_sort {label}",
                "merge",
                "tile_sort_kernel",
                "*fp32:16, *i64:16, *i64:16, *i32:16, i32, i32:16",
                {"FORM": odd, "FROM_WORDS": label == "words", "BLOCK": c.sort_block},
                c.sort_warps,
            )
        )
    found.append(
        Case(
            "merge",
            "merge",
            "merge_kernel",
            "*i64:16, *i64:16, *i32:16, i32, i32:16",
            {"LENGTHS": True, "BLOCK": merge.merge_block},
            merge.merge_warps,
        )
    )
    return found


def _tools(name: str) -> list[str]:
    """The wheel's own binaries; of ptxas there may be two, and which one takes a kernel depends on the version of triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return [str(folder / n) for n in (name, f"{name}-blackwell") if (folder / n).exists()]


def _spilled_bytes(ptx: Path) -> int:
    name = re.search(r"\.target\s+(sm_\w+)", ptx.read_text()).group(1)
    for ptxas in _tools("ptxas"):
        command = [ptxas, "-v", f"--gpu-name={name}", str(ptx), "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=False).stderr
        if found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log):
            return int(found.group(1)) + int(found.group(2))
    raise RuntimeError(f"no ptxas of this triton assembles the kernel:\n{log}")


def _nvidia(compiled: object, capability: int, warps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder) / "kernel.cubin", Path(folder) / "kernel.ptx"
        cubin.write_bytes(compiled.asm["cubin"])
        ptx.write_text(compiled.asm["ptx"])
        usage = subprocess.run(
            [_tools("cuobjdump")[0], "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        registers = int(re.search(r"REG:(\d+)", usage).group(1))
        spill = _spilled_bytes(ptx)
    sm_registers, threads, blocks, sm_shared, most_shared = _SM[capability]
    shared = compiled.metadata.shared
    per_warp = -(-registers * 32 // 256) * 256
    resident = min(sm_registers // (per_warp * warps), threads // (32 * warps), blocks, sm_shared // (shared + 1024))
    return {
        "registers": registers,
        "spill": spill,
        "shared": shared,
        "blocks_per_sm": resident,
        "occupancy": round(resident * 32 * warps / threads, 2),
        "launches": shared <= most_shared and 32 * warps <= _MOST_THREADS,
    }


def _amd(compiled: object, warps: int) -> dict:
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:?\s+(\d+)", text).group(1))

    shared = compiled.metadata.shared
    return {
        "registers": number("vgpr_count"),
        "spill": number("vgpr_spill_count"),
        "scalar_spill": number("sgpr_spill_count"),  # into lanes of vector registers, not into memory
        "shared": shared,
        "launches": shared <= _LDS and 64 * warps <= _MOST_THREADS,
    }


def compile_case(case: Case, target: str) -> dict:
    """Compile one kernel in this process; -> registers, spills (bytes; AMD: registers), shared bytes, seconds, or an error."""
    import importlib

    sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"vcd_fast.kernels.{case.module}"), case.kernel)
    backend, name = target.split(":")
    gpu = GPUTarget("cuda", int(name), 32) if backend == "cuda" else GPUTarget("hip", name, 64)
    types = iter(part.strip() for part in case.signature.split(","))
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        if argument in case.constants:
            signature[argument] = "constexpr"
            continue
        kind, _, divisor = next(types).partition(":")
        signature[argument] = kind
        if divisor:
            attributes[(i,)] = [["tt.divisibility", int(divisor)]]
    if next(types, None) is not None:
        raise ValueError(f"{case.name}: more types than parameters of {case.kernel}")
    options = triton.compiler.make_backend(gpu).parse_options(
        {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    )
    row = {"case": case.name, "target": target, "warps": case.warps, "triton": triton.__version__}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        try:
            source = ASTSource(fn=kernel, signature=signature, constexprs=case.constants, attrs=attributes)
            compiled = triton.compile(source, target=gpu, options=options.__dict__)
        except Exception as error:  # a compiler may fail in any way; the report says how
            return row | {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1][:200]}"}
        row["seconds"] = round(time.perf_counter() - started, 1)
        return row | (_nvidia(compiled, int(name), case.warps) if backend == "cuda" else _amd(compiled, case.warps))


def _cached(case: Case, target: str, sources: str, cache: Path | None) -> dict:
    import triton

    key = json.dumps([asdict(case), target, triton.__version__, sources], sort_keys=True)
    path = cache and cache / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
    if path and path.exists():
        return json.loads(path.read_text())
    row = compile_case(case, target)
    if path and "error" not in row:
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(row))
        os.replace(partial, path)
    return row


def report(
    targets: tuple[str, ...] = TARGETS,
    kernels: str = "",
    thorough: bool = False,
    cache: Path | None = None,
    processes: int = 2,
) -> list[dict]:
    """A row per case and target, compiled in `processes` processes; `kernels` selects the cases whose name contains it."""
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("unset TRITON_INTERPRET: under it triton.jit makes nothing that could be compiled")
    sources = hashlib.sha256(
        b"".join(p.read_bytes() for p in sorted((ROOT / "kernels").glob("*.py"))) + Path(__file__).read_bytes()
    ).hexdigest()
    work = [
        (case, target, sources, cache)
        for target in targets
        for case in cases(target)
        if kernels in case.name and (thorough or not case.thorough)
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        return list(pool.map(_cached, *zip(*work, strict=True))) if work else []


def wrong(row: dict) -> str:
    """What is wrong with a row of the report, or ''."""
    if "error" in row:
        return row["error"]
    if row["spill"]:
        return f"spills {row['spill']}"
    return "" if row["launches"] else "cannot be launched: too much shared memory or too many threads"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", nargs="+", default=list(TARGETS), help="cuda:80, cuda:90, cuda:100, hip:gfx942, .."
    )
    parser.add_argument("--kernels", default="", help="only cases whose name contains this")
    parser.add_argument("--thorough", action="store_true", help="every variant")
    parser.add_argument("--cache", type=Path, help="folder to keep results in")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    rows = report(tuple(arguments.targets), arguments.kernels, arguments.thorough, arguments.cache, arguments.processes)
    print(f"{'kernel':24} {'target':11} {'warps':>5} {'regs':>5} {'spill':>5} {'shared':>7} {'blocks/SM':>9} {'s':>5}")
    for row in rows:
        figures = " ".join(
            f"{row.get(key, '-')!s:>{width}}"
            for key, width in (
                ("warps", 5),
                ("registers", 5),
                ("spill", 5),
                ("shared", 7),
                ("blocks_per_sm", 9),
                ("seconds", 5),
            )
        )
        print(f"{row['case']:24} {row['target']:11} {figures}  {wrong(row)}")
    if arguments.json:
        partial = arguments.json.with_name(arguments.json.name + ".part")
        partial.write_text(json.dumps(rows, indent=1))
        os.replace(partial, arguments.json)
    return any(wrong(row) for row in rows)


if __name__ == "__main__":
    sys.exit(main())
