"""What holds for every observer. PYTEST_DONT_REWRITE"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
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
from cfsp_framework.api.records import BlockPlan, ModelIdentity, PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.testing.contract import ComponentContract
from cfsp_framework.testing.errors import ContractError
from cfsp_framework.testing.guards import call_component

_BEGINNING: Sequence[Event] = (
    RunStarted(RunConfig.build(model="demo")),
    PhaseStarted("collect"),
    BlockFinished("collect", 0, 2),
    BlockFinished("collect", 1, 2),
    PhaseFinished("collect", 0.5),
)
_PLAN = PruningPlan(
    model=ModelIdentity(source="demo", family="llama", fingerprint="", parameters=64),
    calibration=None,
    ratio=0.5,
    budget="channels",
    round_to=1,
    seed=0,
    components={},
    versions={},
    blocks=tuple(BlockPlan(block=block, path="mlp", width=4, kept=(0, 2)) for block in range(2)),
)


class ObserverContract(ComponentContract):
    """Subclass it and set ``component``. Files are written into a folder that is removed, where paths are relative."""

    kind: ClassVar[str] = "observer"

    def test_every_event_is_heard(self, component: Observer) -> None:
        """``start()`` returns a function that takes every event of a run, however the run ends."""
        for end in (RunFinished(_PLAN), RunFailed(RuntimeError("a run that failed")), RunFailed(KeyboardInterrupt())):
            with _elsewhere():
                listener = _started(component)
                for event in (*_BEGINNING, end):
                    with call_component(type(event).__name__, "an event"):
                        listener(event)

    def test_every_start_is_fresh(self, component: Observer) -> None:
        """Several runs of one process may be observed, one after the other or in turn."""
        with _elsewhere():
            first, second = _started(component), _started(component)
            for event in (*_BEGINNING, RunFinished(_PLAN)):
                with call_component("start() called twice", "listeners that hear different runs"):
                    first(event)
                    second(event)


def _started(component: Observer) -> Callable[[Event], None]:
    with call_component("start()", "nothing"):
        listener: object = component.start()
    if not callable(listener):
        raise ContractError(f"start() returned {listener!r}; return a function that takes an event.")
    return listener


@contextmanager
def _elsewhere() -> Generator[None]:
    with tempfile.TemporaryDirectory(prefix="cfsp-observer-") as folder, contextlib.chdir(Path(folder)):
        yield
