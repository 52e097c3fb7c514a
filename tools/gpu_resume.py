"""A pytest plugin for runs in parts: what an earlier call finished is not run again, and nothing is begun after a moment.

`pytest -p gpu_resume`, with this folder on PYTHONPATH. GPU_SESSION_DONE names the file in which finished tests are noted, one per line as they
finish, so that a run that is killed loses only the test under way; GPU_SESSION_UNTIL is in seconds since 1970. The exit code is 75 where
everything that ran was fine and something is left for another call.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from gpu_parts import ROOT, use_tree

MORE = 75
OVER = "left for the next call: the time of this one is over"


def read_done(path: Path) -> dict[str, str]:
    """Test -> "passed" or "skipped". A line that was cut off counts for nothing."""
    lines = path.read_text().split("\n")[:-1] if path.is_file() else []
    return {test: outcome for outcome, _, test in (line.partition(" ") for line in lines)}


class Resume:
    """In each process: deselects and stops. In the one that reports: notes."""

    def __init__(self, path: Path, until: float, reports: bool) -> None:
        self.path, self.until, self.reports = path, until, reports
        self.done = read_done(path)
        self.left = 0
        self._skipped: dict[str, bool | None] = {}  # None: not finished

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        finished = [item for item in items if item.nodeid in self.done]
        if finished:
            config.hook.pytest_deselected(items=finished)
            items[:] = [item for item in items if item.nodeid not in self.done]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        if time.time() > self.until:
            pytest.skip(OVER)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test is finished with its teardown, if no phase of it failed."""
        if not self.reports:
            return
        if report.skipped and OVER in str(report.longrepr):
            self.left += 1
            self._skipped[report.nodeid] = None
        elif report.failed:
            self._skipped[report.nodeid] = None
        elif report.skipped:
            self._skipped[report.nodeid] = True
        if report.when == "teardown":
            skipped = self._skipped.pop(report.nodeid, False)
            if skipped is not None:
                self._note(report.nodeid, "skipped" if skipped else "passed")

    def _note(self, test: str, outcome: str) -> None:
        self.done[test] = outcome
        with self.path.open("a") as file:
            file.write(f"{outcome} {test}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if not self.reports:
            return
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.done:
            session.exitstatus = 0  # an earlier call has finished them all
        elif exitstatus == pytest.ExitCode.OK and self.left:
            session.exitstatus = MORE


def pytest_configure(config: pytest.Config) -> None:
    path, until = os.environ.get("GPU_SESSION_DONE"), float(os.environ.get("GPU_SESSION_UNTIL", "inf"))
    if not path:
        raise pytest.UsageError("GPU_SESSION_DONE: expected the file in which finished tests are noted, got nothing")
    if config.rootpath == ROOT:
        use_tree()  # before any test imports what is installed
    config.pluginmanager.register(Resume(Path(path), until, not hasattr(config, "workerinput")), "gpu_resume_notes")
