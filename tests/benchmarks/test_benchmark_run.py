"""Meters, clocks and one run of the suite from outside."""

import contextlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import estimate, memory, rows, session, timing
from benchmarks.cases import FRAMES, LARGE_SIZE, QUICK_SIZE, SIZE, Case, Measurement
from benchmarks.operations import Operation

ROOT = Path(__file__).parents[2]
TINY = Case("layer", "both", QUICK_SIZE, 8, layer="relu3_1")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set's peak cannot be reset here")
def test_process_peak_is_that_of_the_run_alone():
    def peak(count):
        return memory.process_peak(lambda: torch.ones(count, dtype=torch.uint8).add_(1)).bytes

    peak(1 << 27)  # an earlier, higher peak must not show
    assert peak(1 << 26) == pytest.approx(1 << 26, rel=0.1)
    assert peak(1 << 10) < 1 << 22


def test_peak_of_a_case_in_its_own_process():
    peak = memory.peak_in_fresh_process("reference", TINY, "random", 1)
    assert peak.meter.startswith("process peak")
    assert 100_000 < peak.bytes < estimate.needed_bytes("reference", TINY)


def test_a_killed_process_did_not_have_the_memory(monkeypatch):
    done = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(memory.OutOfMemory, match="does not fit in memory"):
        memory.peak_in_fresh_process("eager", TINY, "random", 1)
    done.returncode, done.stderr = 1, "Traceback\nValueError: no such thing"
    with pytest.raises(RuntimeError, match=r"failed in its own process \(exit 1\): ValueError: no such thing"):
        memory.peak_in_fresh_process("eager", TINY, "random", 1)


def test_quantiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 6.0]
    times = timing.summary(values, "clock")
    assert times.seconds == pytest.approx({"p20": 2.0, "p50": 3.5, "p80": 5.0})
    assert times.rounds == 6
    assert timing.summary([2.0], "clock").seconds == {"p20": 2.0, "p50": 2.0, "p80": 2.0}


def test_rounds_fit_the_budget():
    assert timing.rounds_for(0.1, 1.0, 3, 20) == 10
    assert timing.rounds_for(2.0, 1.0, 3, 20) == 3
    assert timing.rounds_for(0.0, 1.0, 3, 20) == 20


def test_gpu_clock_brackets_the_run_and_nothing_else(monkeypatch):
    """With stand-ins for the events: a time only passes inside `run`, which the clock must see alone."""
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]
            log.append("event")

        def elapsed_time(self, stop):
            return (stop.at - self.at) * 1000

    def pass_time(name, seconds):
        log.append(name)
        clock[0] += seconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(timing, "FLUSH_BYTES", 8)
    monkeypatch.setattr(torch.Tensor, "zero_", lambda tensor: pass_time("flush", 5.0))
    step = Operation(lambda: pass_time("before", 3.0), lambda: pass_time("run", 0.25))
    times = timing.gpu_times(step, torch.device("cpu"), budget=5.0, least=3, most=50)
    assert times.seconds == pytest.approx({"p20": 0.25, "p50": 0.25, "p80": 0.25})
    assert times.rounds == 20
    rounds = "".join(f"{word} " for word in log).split("wait")[1]
    assert rounds.split() == ["before", "flush", "event", "run", "event"] * 20


def test_memory_is_reckoned_before_it_is_asked_for():
    one, many = (estimate.needed_bytes("eager", Case("video", "both", SIZE, 256, frames=n)) for n in (1, 24))
    assert 1.7e9 < one < 3e9  # measured: 1.70 GB
    assert many > 24e9  # the slope measured over one to three frames is 1.06 GB
    ours = [estimate.needed_bytes("simd", Case("video", "both", LARGE_SIZE, 256, frames=n)) for n in FRAMES]
    assert max(ours) < 1.2 * min(ours)


def test_the_floor_is_that_of_the_design():
    """About 0.7 GB a frame of 272×368 with 256 directions, over the five layers."""
    layers = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    total = sum(estimate.floor_bytes(Case("layer", "both", SIZE, 256, layer=layer)) for layer in layers)
    assert 0.6e9 < total < 0.75e9
    assert estimate.floor_bytes(Case("video", "both", SIZE, 256)) is None


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.machine.COPY_BYTES", 1 << 20)
    threads = torch.get_num_threads()
    yield lambda **options: session.Run(
        **{
            "level": "subset",
            "device": torch.device("cpu"),
            "threads": 1,
            "weights": "random",
            "results": tmp_path / "results.json",
            "minutes": None,
            "longest": None,
            "with_memory": True,
            **options,
        }
    )
    torch.set_num_threads(threads)


def test_what_cannot_be_measured_is_left_out_with_the_reason(run, monkeypatch):
    made = run()
    assert made.obstacle(Measurement(TINY, "reference")) is None
    monkeypatch.setattr("benchmarks.machine.available_bytes", lambda _: 10**9)
    video = Measurement(Case("video", "both", SIZE, 256, frames=24), "eager")
    assert re.match(r"does not fit in memory: needs about \d+ GB, 1 GB are available", made.obstacle(video))
    assert "needs a GPU" in made.obstacle(Measurement(TINY, "triton"))
    assert "--longest" in run(longest=5.0).obstacle(video)
    assert "--minutes" in run(minutes=-1.0).obstacle(Measurement(TINY, "reference"))
    assert "--no-memory" in run(with_memory=False).obstacle(
        Measurement(Case(**{**vars(TINY), "memory_only": True}), "eager")
    )
    made.leave_out(video, "does not fit")
    made.leave_out(Measurement(TINY, "triton"), "needs a GPU")
    said = "\n".join(made.summary())
    assert "left out: does not fit\n    eager, 1 case: vcd-24frames-272x368-K256-both" in said
    assert "left out: needs a GPU\n    triton, 1 case: vcd-relu3_1-80x96-K8-both" in said


def test_a_row_has_what_the_schema_asks_for(run):
    made = run()
    times = timing.summary([0.1, 0.2, 0.3], "time.perf_counter")
    made.write(Measurement(TINY, "reference"), times, memory.Peak(1000, "meter"), None)
    (row,) = rows.load([made.results])
    assert (row["threads"], row["provider"], row["layer"], row["peak_bytes"]) == (1, "reference", "relu3_1", 1000)
    assert row["machine"]["copy_bytes_per_second"] > 1e6
    assert re.fullmatch(r"[0-9a-f]{12}(\+changes)?|unknown", row["commit"])


def test_the_suite_from_outside(tmp_path):
    """`--benchmark-only` gets past the `--benchmark-skip` of pyproject, from the root of a checkout that is not on sys.path."""
    results = tmp_path / "results.json"
    command = [sys.executable, "-c", "import sys, pytest; sys.path.remove(''); sys.exit(pytest.main(sys.argv[1:]))"]
    options = ["benchmarks/", "--benchmark-only", "--quick", "--no-memory", "--threads", "1", "--results", str(results)]
    chosen = ["-k", "relu2_1 and no_grad and (reference or triton)", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options, *chosen], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    (row,) = rows.load([results])
    assert (row["provider"], row["mode"], row["threads"], row["num_projections"]) == ("reference", "no_grad", 1, 16)
    assert row["accuracy"]["loss_error"] < 1e-5
    assert "left out: backend 'triton' needs a GPU" in done.stdout
    assert f"1 rows written to {results}" in done.stdout
