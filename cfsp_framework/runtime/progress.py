"""How long a run takes, told while it runs (a terminal) and afterwards (seconds per phase)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from cfsp_framework.api.events import Event, PhaseFinished, PhaseStarted, RunFailed

_SPEED_PERIOD = 600.0
"""Seconds whose steps tell how long the rest takes: longer than a slow step."""


class Progress:
    """Times the phases of a run and, where ``visible``, draws a bar for whatever takes more than a second."""

    def __init__(self, visible: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.notify: Callable[[Event], None] = lambda event: None
        """Tells the observers, once there are some."""
        self._console = Console(file=sys.stderr)
        self._visible = visible and self._console.is_terminal
        self._bars: Bars | None = None

    @property
    def visible(self) -> bool:
        """Whether bars are drawn."""
        return self._visible

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time what runs inside as the phase ``name``; the same name again adds up."""
        self.notify(PhaseStarted(name))
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.notify(PhaseFinished(name, seconds))

    @contextmanager
    def report_failure(self) -> Generator[None]:
        """Tell the observers of whatever ends the run."""
        try:
            yield
        except BaseException as error:
            self.notify(RunFailed(error))
            raise

    @contextmanager
    def bar(self, what: str, total: int) -> Generator[Callable[[], None]]:
        """Yield a function to call after each of ``total`` steps; the bar appears once a second has passed.

        A bar inside another one stands below it while it runs.
        """
        if not self._visible:
            yield lambda: None
            return
        started = time.perf_counter()
        with self._display() as bars:
            task = bars.add_task(what, total=total, visible=False)
            try:
                yield lambda: bars.update(task, advance=1, visible=time.perf_counter() - started > 1)
            finally:
                bars.remove_task(task)

    @contextmanager
    def _display(self) -> Generator[Bars]:
        """What draws the bars; a terminal has room for one such thing at a time."""
        if self._bars is not None:
            yield self._bars
            return
        try:
            with Bars(
                *_columns(), console=self._console, transient=True, speed_estimate_period=_SPEED_PERIOD
            ) as self._bars:
                yield self._bars
        finally:
            self._bars = None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _columns() -> tuple[ProgressColumn, ...]:
    return TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
