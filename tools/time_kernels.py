#!/usr/bin/env python3
"""Time every kernel of the fused distance on the GPU at hand, and say which method is fastest for which length of row.

    python tools/time_kernels.py                                 # the rows of VGG19's layers for a 272×368 frame, 256 directions
    python tools/time_kernels.py --lengths 4000 20000 --noise 0.05 --json times.json

Rows are compared with a target that differs from them by noise; how much of a row counting has to order depends on it. Milliseconds are
medians over launches with the cache flushed before each, GB/s are reckoned bytes over measured time. The table `_METHOD` in
`kernels/config.py` is where a result belongs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
LAYERS = ((64, 272, 368), (128, 136, 184), (256, 68, 92), (512, 34, 46), (512, 17, 23))
FORMS = {"even": 1, "odd": 2}


def median_ms(launch: Callable[[], object]) -> float:
    """Median milliseconds of a launch, cache flushed before each."""
    from vcd_fast.kernels.config import measured_ms

    return measured_ms(launch)


def methods() -> dict[str, Callable]:
    from vcd_fast.kernels.count import count_fwd
    from vcd_fast.kernels.library_sort import sort_fwd
    from vcd_fast.kernels.merge import merge_fwd
    from vcd_fast.kernels.rows import rows_fwd

    return {"rows": rows_fwd, "merge": merge_fwd, "count": count_fwd, "sort": sort_fwd}


def time_rows(m: int, rows: int, noise: float, device: str, timer: Callable = median_ms) -> list[dict]:
    """Every method that takes rows of m representatives, on `rows` rows of either form."""
    from vcd_fast.kernels import config
    from vcd_fast.kernels.half_list import single_places
    from vcd_fast.kernels.launch import row_pitch

    generator = torch.Generator(device=device).manual_seed(0)
    found = []
    for label, form in FORMS.items():
        y = torch.randn(1, rows, row_pitch(m + 4), device=device, generator=generator)
        v = y + noise * torch.randn(y.shape, device=device, generator=generator)
        w = (y[..., :m].abs() if form == FORMS["odd"] else y[..., :m]).sort(-1).values.contiguous()
        own = y[..., m : m + 4].sort(-1).values.contiguous()
        fixed = (w, own, single_places(w, own, form), form)
        for name, compare in methods().items():
            if name == "rows" and m > config.LONGEST_SHORT_ROW:
                continue
            ms = timer(lambda compare=compare, v=v, fixed=fixed: compare(v, *fixed))
            moved = config.bytes_per_value(name, m) * m * rows
            found.append({"kernel": name, "form": label, "m": m, "rows": rows, "ms": ms, "gb_s": moved / ms / 1e6})
    return found


def time_spectrum(
    shape: tuple[int, int, int], count: int, precision: str, device: str, timer: Callable = median_ms
) -> list[dict]:
    """Projection and gradient of one frame of a layer [C, H, W]."""
    from vcd_fast.distance.spectrum import half_plane
    from vcd_fast.kernels.project import project_fwd
    from vcd_fast.kernels.spectrum_gradient import spectrum_bwd

    channels, height, width = shape
    plane = half_plane(height, width, device)
    index = torch.cat([plane.representatives, plane.self_conjugate]).to(torch.int32)
    mirror = torch.full_like(index, -1)
    mirror[plane.mirrored] = plane.mirrors.to(torch.int32)
    z = torch.fft.rfft2(torch.rand(1, *shape, device=device)).flatten(-2).contiguous().view(torch.int64)
    directions = torch.nn.functional.normalize(torch.randn(count, channels, device=device), dim=1)
    m, singles = len(plane.representatives), len(plane.self_conjugate)
    values = project_fwd(z, index, directions, m, singles, precision=precision)
    signs = [v.sign().to(torch.int8) for v in values]
    gradient = torch.empty_like(z)
    work = {
        "project": (
            lambda: project_fwd(z, index, directions, m, singles, precision=precision),
            z.nbytes + sum(v.nbytes for v in values),
        ),
        "spectrum_gradient": (
            lambda: spectrum_bwd(
                z, index, mirror, directions, *signs, m, 1.0, 1.0, gradient, accumulate=False, precision=precision
            ),
            2 * z.nbytes + sum(s.nbytes for s in signs),
        ),
    }
    found = []
    for name, (launch, moved) in work.items():
        ms = timer(launch)
        row = {"kernel": name, "shape": list(shape), "precision": precision, "directions": count}
        found.append(
            {**row, "ms": ms, "gb_s": moved / ms / 1e6, "tflop_s": 4 * count * channels * len(index) / ms / 1e9}
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", help="representatives a row, default those of the layers")
    parser.add_argument("--directions", type=int, default=256)
    parser.add_argument("--noise", type=float, default=0.1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: there is no CUDA or ROCm device to time anything on", file=sys.stderr)
        return 1
    from vcd_fast.distance.spectrum import half_plane_sizes

    lengths = arguments.lengths or [half_plane_sizes(height, width)[0] for _, height, width in LAYERS]
    found = []
    for m in lengths:
        found += time_rows(m, arguments.directions, arguments.noise, "cuda")
    if not arguments.lengths:
        precisions = ("ieee", "tf32") if torch.version.hip else ("ieee", "tf32x3", "tf32")
        for shape in LAYERS:
            for precision in precisions:
                found += time_spectrum(shape, arguments.directions, precision, "cuda")
    for row in found:
        print(
            "  ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    for m in lengths:
        for label in FORMS:
            rows = [row for row in found if row.get("m") == m and row.get("form") == label]
            print(f"fastest for {label} rows of {m}: {min(rows, key=lambda row: row['ms'])['kernel']}")
    if arguments.json:
        report = {
            "gpu": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "noise": arguments.noise,
            "rows": found,
        }
        partial = arguments.json.with_name(arguments.json.name + ".part")
        partial.write_text(json.dumps(report, indent=1))
        os.replace(partial, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
