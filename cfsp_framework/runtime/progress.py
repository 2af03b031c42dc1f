"""Show how long a run takes: progress bars on a terminal, and seconds per phase."""

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
"""Seconds of steps that the remaining time is estimated from: longer than a slow step."""


class Progress:
    """Time the phases of a run and, if ``visible``, draw a bar for a step loop that takes more than a second."""

    def __init__(self, visible: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.notify: Callable[[Event], None] = lambda event: None
        """Pass an event to the observers; the run sets it."""
        self._console = Console(file=sys.stderr)
        self.visible = visible and self._console.is_terminal
        self._bars: Bars | None = None

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Time the context as the phase ``name``; phases of one name add up."""
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
        """Notify the observers of an exception that ends the run."""
        try:
            yield
        except BaseException as error:
            self.notify(RunFailed(error))
            raise

    def note(self, text: str) -> None:
        """Print a sentence where the bars are drawn."""
        if self.visible:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, description: str, total: int) -> Generator[Callable[[], None]]:
        """Yield a function to call after each of ``total`` steps; the bar appears once a second has passed.

        A bar inside another one stands below it while it runs.
        """
        if not self.visible:
            yield lambda: None
            return
        started = time.perf_counter()
        with self._display() as bars:
            task = bars.add_task(description, total=total, visible=False)
            try:
                yield lambda: bars.update(task, advance=1, visible=time.perf_counter() - started > 1)
            finally:
                bars.remove_task(task)

    @contextmanager
    def _display(self) -> Generator[Bars]:
        """Yield the display that draws the bars; a terminal has room for one."""
        if self._bars is not None:
            yield self._bars
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
        display = Bars(*columns, console=self._console, transient=True, speed_estimate_period=_SPEED_PERIOD)
        try:
            with display as self._bars:
                yield self._bars
        finally:
            self._bars = None


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")
