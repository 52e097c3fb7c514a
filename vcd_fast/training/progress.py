"""Progress as a person wants to see it: a bar with the time left in a terminal, a line per step in a log file."""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Speaks on one rank only."""

    def __init__(self, enabled: bool):
        self.enabled = enabled
        self.console = Console(quiet=not enabled, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        self._task = None
        self._first: tuple[int, float] | None = None

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)

    @contextlib.contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[None]:
        """A bar around a loop that calls `advance`; in anything but a terminal nothing is drawn."""
        outer = self._bar, self._task
        if self.enabled and self.console.is_terminal and outer[0] is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as self._bar:
                self._task = self._bar.add_task(title, total=total, completed=done)
                try:
                    yield
                finally:
                    self._bar, self._task = outer
        elif self._bar is not None:
            self._task = self._bar.add_task(title, total=total, completed=done)
            try:
                yield
            finally:
                self._bar.remove_task(self._task)
                self._bar, self._task = outer
        else:
            yield

    def advance(self, done: int) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def step(self, step: int, total: int, values: dict[str, str]) -> None:
        """The line of a step, with the time left by the pace of the steps since the first line."""
        now = time.perf_counter()
        self._first = self._first or (step, now)
        first, started = self._first
        left = (
            f"{datetime.timedelta(seconds=round((now - started) / (step - first) * (total - step)))}"
            if step > first
            else "-"
        )
        self.say(
            f"step {step}/{total}  " + "  ".join(f"{name} {value}" for name, value in values.items()) + f"  left {left}"
        )
        self.advance(step)
