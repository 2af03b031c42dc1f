"""The contract of observers. (PYTEST_DONT_REWRITE)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from cfsp_framework.api.components import Observer
from cfsp_framework.api.events import (
    BlockFinished,
    Event,
    PhaseFinished,
    PhaseStarted,
    RunFailed,
    RunFinished,
    RunStarted,
)
from cfsp_framework.api.records import BlockPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.host.observers import start_observing
from cfsp_framework.testing.contract import ComponentContract, checked_by_host, configure
from cfsp_framework.testing.recovery import build_plan

_BEGINNING: Sequence[Event] = (
    RunStarted(RunConfig.build(model="demo")),
    PhaseStarted("collect"),
    BlockFinished("collect", 0, 2),
    BlockFinished("collect", 1, 2),
    PhaseFinished("collect", 0.5),
)
_FINISHED = RunFinished(build_plan([BlockPlan(block=block, path="mlp", width=4, kept=(0, 2)) for block in range(2)]))


class ObserverContract(ComponentContract):
    """Set ``component = TheObserver()``. The working directory is a temporary folder, so that relative paths are harmless."""

    kind: ClassVar[str] = "observer"

    def test_every_event_is_heard(self, component: Observer) -> None:
        """``start()`` returns a function that takes every event of a run, however the run ends."""
        for end in (_FINISHED, RunFailed(RuntimeError("a run that failed")), RunFailed(KeyboardInterrupt())):
            with _in_temporary_folder(), checked_by_host(on_warning="error"):
                notify = start_observing([configure(component)])
                for event in (*_BEGINNING, end):
                    notify(event)

    def test_every_start_is_fresh(self, component: Observer) -> None:
        """Several runs of one process may be observed, in sequence or interleaved."""
        with _in_temporary_folder(), checked_by_host("start() is called twice", on_warning="error"):
            first, second = (start_observing([configure(component)]) for _ in range(2))
            for event in (*_BEGINNING, _FINISHED):
                first(event)
                second(event)


@contextmanager
def _in_temporary_folder() -> Generator[None]:
    with tempfile.TemporaryDirectory(prefix="cfsp-observer-") as folder, contextlib.chdir(folder):
        yield
