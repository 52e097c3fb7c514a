"""What the library set out to reach, held against rows. Nothing is assumed: a target without its rows is not measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.accuracy import Accuracy
from benchmarks.lookup import Results, median, say_bytes, say_seconds, say_times
from benchmarks.rows import Row

PASS, FAIL, NOT_MEASURED, NO_TARGET = "pass", "FAIL", "not measured", "for the record"
NUM_PROJECTIONS, HEIGHT, WIDTH = 256, 272, 368
FEW_FRAMES, MANY_FRAMES = 4, 24
OURS = {"cpu": "simd", "cuda": "triton"}


@dataclasses.dataclass(frozen=True)
class Target:
    name: str
    expected: str
    measured: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Line:
    """Bytes against frames, by least squares."""

    slope: float
    start: float
    frames: tuple[int, ...]

    def at(self, frames: float) -> float:
        return self.start + self.slope * frames


def line_through(points: Sequence[tuple[int, int]]) -> Line | None:
    """Through (frames, bytes) of at least two different numbers of frames."""
    if len({x for x, _ in points}) < 2:
        return None
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return Line(slope, mean_y - slope * mean_x, tuple(sorted({x for x, _ in points})))


def whole(results: Results, provider: str, **more: object) -> list[Row]:
    """Rows of the whole loss, forward and backward, at the size of the targets."""
    wanted = {
        "kind": "video",
        "mode": "both",
        "reading": "vcd",
        "height": HEIGHT,
        "width": WIDTH,
        "num_projections": NUM_PROJECTIONS,
        "dtype": "float32",
    }
    return results.where(provider=provider, **{**wanted, **more})


def memory_line(results: Results, provider: str = "eager") -> Line | None:
    """How the plain formula's peak grows with the frames that were measured."""
    rows = [row for row in whole(results, provider) if row["peak_bytes"] is not None]
    return line_through([(row["frames"], row["peak_bytes"]) for row in rows])


def _missing(name: str, expected: str, what: str) -> Target:
    return Target(name, expected, f"no rows of {what}", NOT_MEASURED)


def _verdict(reached: bool) -> str:
    return PASS if reached else FAIL


def _layers_speed(results: Results, ours: str, least: float) -> list[Target]:
    name = f"five layers, one frame, K={NUM_PROJECTIONS}: {ours} against eager PyTorch"
    plain, fast = (results.all_layers(provider, NUM_PROJECTIONS) for provider in ("eager", ours))
    if plain is None or fast is None:
        return [_missing(name, f">= {least:g}×", "eager" if plain is None else ours)]
    seconds = [sum(map(median, rows)) for rows in (plain, fast)]
    same = "" if len({row["run"] for row in plain + fast}) == 1 else ", of different runs"
    said = f"{say_times(seconds[0] / seconds[1])} ({say_seconds(seconds[0])} / {say_seconds(seconds[1])}{same})"
    stretch = " (stretch: 15×)" if ours == "triton" else ""
    found = [Target(name, f">= {least:g}×{stretch}", said, _verdict(seconds[0] / seconds[1] >= least))]
    answers = [Accuracy(**row["accuracy"]) for row in fast]
    worst = max(answer.loss_error for answer in answers)
    wrong = [problem for answer in answers for problem in answer.problems()]
    said = f"loss within {worst:.1e}; gradient off by at most {max(a.gradient_error for a in answers):.1e}, "
    said += f"the reference's own float32 by {max(a.reference_gradient_error for a in answers):.1e}"
    expected = "loss 1e-5, gradient by the accuracy rule"
    found.append(Target(f"five layers: {ours} is right", expected, said, _verdict(not wrong)))
    return found


def _video_speed(results: Results, ours: str) -> Target:
    name = f"whole loss, {MANY_FRAMES} frames: {ours} against eager PyTorch's time per frame"
    one = next((row for row in whole(results, "eager", frames=1) if row["seconds"]), None)
    many = next((row for row in whole(results, ours, frames=MANY_FRAMES) if row["seconds"]), None)
    if one is None or many is None:
        return _missing(name, ">= 5×", "eager, one frame" if one is None else f"{ours}, {MANY_FRAMES} frames")
    ratio = MANY_FRAMES * median(one) / median(many)
    said = f"{say_times(ratio)} ({say_seconds(median(one))} / {say_seconds(median(many) / MANY_FRAMES)} a frame)"
    return Target(name, ">= 5×", said, _verdict(ratio >= 5))


def _memory(results: Results, ours: str, share: int) -> list[Target]:
    small = f"peak for {MANY_FRAMES} frames: {ours} against what eager PyTorch would keep"
    flat = f"peak for {MANY_FRAMES} frames against {FEW_FRAMES}: {ours}"
    rows = {row["frames"]: row["peak_bytes"] for row in whole(results, ours) if row["peak_bytes"] is not None}
    line = memory_line(results)
    found = []
    if MANY_FRAMES not in rows or line is None:
        what = "eager over two numbers of frames" if line is None else f"{ours}, {MANY_FRAMES} frames"
        found.append(_missing(small, f"<= 1/{share}", what))
    else:
        kept = line.slope * MANY_FRAMES
        measured_on = ", ".join(map(str, line.frames))
        said = f"1/{kept / rows[MANY_FRAMES]:.1f} ({say_bytes(rows[MANY_FRAMES])} of {say_bytes(round(kept))}, "
        said += f"{say_bytes(round(line.slope))} a frame over {measured_on} frames)"
        found.append(Target(small, f"<= 1/{share}", said, _verdict(rows[MANY_FRAMES] <= kept / share)))
    if MANY_FRAMES not in rows or FEW_FRAMES not in rows:
        missing = [str(n) for n in (FEW_FRAMES, MANY_FRAMES) if n not in rows]
        found.append(_missing(flat, "within 10 %", f"{ours}, {' and '.join(missing)} frames"))
    else:
        change = rows[MANY_FRAMES] / rows[FEW_FRAMES] - 1
        said = f"{change:+.1%} ({say_bytes(rows[FEW_FRAMES])}, {say_bytes(rows[MANY_FRAMES])})"
        found.append(Target(flat, "within 10 %", said, _verdict(abs(change) <= 0.1)))
    return found


def _against_vgg(results: Results, ours: str) -> list[Target]:
    found = []
    for dtype, most in (("float32", 1.5), ("bfloat16", 3.0)):
        name, expected = f"whole loss against VGG19 alone in {dtype}: {ours}", f"<= {most:g}×"
        pairs = []
        for row in whole(results, ours, dtype=dtype):
            alone = [r for r in whole(results, "vgg19", dtype=dtype, frames=row["frames"]) if r["seconds"]]
            if row["seconds"] and alone:
                pairs.append((row["frames"], median(row) / median(alone[0])))
        if not pairs:
            found.append(_missing(name, expected, f"{ours} and VGG19 alone in {dtype}"))
            continue
        frames, ratio = max(pairs)
        found.append(Target(name, expected, f"{say_times(ratio)} ({frames} frames)", _verdict(ratio <= most)))
    return found


def _share_of_bandwidth(results: Results, ours: str) -> Target:
    name = f"five layers: share of the measured copy bandwidth that the least traffic takes, {ours}"
    rows = results.all_layers(ours, NUM_PROJECTIONS)
    if rows is None or any(row["floor_bytes"] is None for row in rows):
        return _missing(name, "no bound set", ours)
    floor = sum(row["floor_bytes"] for row in rows)
    bandwidth = results.machine["copy_bytes_per_second"]
    share = floor / bandwidth / sum(map(median, rows))
    said = f"{share:.1%} ({say_bytes(floor)} at {bandwidth / 1e9:.0f} GB/s)"
    return Target(name, "no bound set", said, NO_TARGET)


def targets(results: Results) -> list[Target]:
    """Those that apply to this machine."""
    ours = OURS[results.device]
    gpu = results.device == "cuda"
    found = _layers_speed(results, ours, 8.0 if gpu else 10.0)
    found.append(_video_speed(results, ours))
    found += _memory(results, ours, 40 if gpu else 20)
    if gpu:
        found += _against_vgg(results, ours)
    found.append(_share_of_bandwidth(results, ours))
    return found


def no_gpu() -> Target:
    return Target("everything on a GPU", "see the list there", "no rows of a GPU", NOT_MEASURED)
