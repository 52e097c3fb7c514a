"""Time and peak memory of every case and provider, each only after it gave the right answer. See `cases` and `gate`."""

import time

import pytest

from benchmarks import providers, timing
from benchmarks.estimate import expected_seconds
from benchmarks.memory import OutOfMemory
from benchmarks.operations import operation


def test_distance(benchmark, run, possible):
    if benchmark.disabled:
        pytest.skip("pytest-benchmark's clock is disabled: run without -n and --benchmark-disable")
    case, peak = possible.case, None
    accuracy = run.accuracy(possible)
    if accuracy is not None and (problems := accuracy.problems(case.dtype)):
        pytest.fail(f"no time for {possible.name}: on {accuracy.instance}, {'; '.join(problems)}", pytrace=False)
    benchmark.group = case.name
    try:
        if case.memory_only:
            peak = benchmark.pedantic(run.peak, (possible,), rounds=1)
        elif run.wants_memory(case):
            peak = run.peak(possible)
    except OutOfMemory as error:
        run.leave_out(possible, str(error))
        pytest.skip(str(error))
    times = None if case.memory_only else _times(benchmark, run, possible)
    if peak is not None:
        benchmark.extra_info["peak_bytes"] = peak.bytes
    run.write(possible, times, peak, accuracy)


def _times(benchmark, run, measurement):
    if run.device.type == "cuda":
        # the host's clock measures nothing on a GPU: it shows how long it took to measure
        return benchmark.pedantic(run.gpu_times, (measurement,), rounds=1)
    case = measurement.case
    step = operation(providers.workload(measurement.provider, case, run.device, run.weights), case.mode)
    plan = timing.cpu_plan(expected_seconds(measurement.provider, case), run.level == "full")
    rounds = plan.most
    if plan.warm_up:
        step.before()
        start = time.perf_counter()
        step.run()
        rounds = timing.rounds_for(time.perf_counter() - start, plan.budget, plan.least, plan.most)
    benchmark.pedantic(step.run, setup=step.before, rounds=rounds)
    return timing.summary(benchmark.stats.stats.data, "time.perf_counter")
