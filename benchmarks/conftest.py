"""Options of the suite, the run they describe, and what it says at its end."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cases import Measurement, selection
from benchmarks.session import Run
from vcd_fast.devices import pick_device

RUN = pytest.StashKey[Run]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vcd_fast", "benchmarks of vcd_fast")
    size = group.addoption
    size("--full", action="store_true", help="everything that fits in memory; hours on a CPU")
    size("--quick", action="store_true", help="tiny sizes: shows that the suite works, the figures mean nothing")
    size("--threads", type=int, default=2, help="CPU threads, whatever OMP_NUM_THREADS says (default 2)")
    size("--device", default="auto", help="auto, cpu or cuda")
    size("--weights", default="random", help="VGG19's: random (default, the same everywhere), imagenet or a path")
    size("--results", type=Path, help="file that rows are added to (default benchmarks/results/<machine>-<date>.json)")
    size("--minutes", type=float, help="begin nothing after so many (default 8, none with --full)")
    size("--longest", type=float, help="leave out rounds expected to take more seconds on a CPU (default: none)")
    size("--no-memory", action="store_true", help="measure no peaks: each takes a process of its own on a CPU")


def _level(config: pytest.Config) -> str:
    full, quick = config.getoption("full"), config.getoption("quick")
    if full and quick:
        raise pytest.UsageError("--full and --quick: expected one of them")
    return "full" if full else "quick" if quick else "subset"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measurement" in metafunc.fixturenames:
        chosen = selection(_level(metafunc.config))
        metafunc.parametrize("measurement", chosen, ids=lambda measurement: measurement.name)


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Run:
    config = request.config
    level, threads = _level(config), config.getoption("threads")
    if threads < 1:
        raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
    minutes = config.getoption("minutes")
    made = Run(
        level,
        pick_device(config.getoption("device")),
        threads,
        config.getoption("weights"),
        config.getoption("results"),
        8.0 if minutes is None and level == "subset" else minutes,
        config.getoption("longest"),
        not config.getoption("no_memory"),
    )
    if level == "subset":
        chosen = set(selection("subset"))
        for measurement in selection("full"):
            if measurement not in chosen:
                made.leave_out(measurement, "only with --full")
    config.stash[RUN] = made
    return made


@pytest.fixture
def possible(run: Run, measurement: Measurement) -> Measurement:
    """The measurement, if it can be made; else the test is skipped with the reason."""
    if reason := run.obstacle(measurement):
        run.leave_out(measurement, reason)
        pytest.skip(reason)
    return measurement


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    made = config.stash.get(RUN, None)
    if made is None:
        return
    terminalreporter.section("benchmarks of vcd_fast")
    for line in made.summary():
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"next: python -m benchmarks.report --targets {made.results}")
