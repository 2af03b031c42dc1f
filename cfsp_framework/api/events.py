"""What observers hear while a run lasts. Never more often than once a block."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan, Report
    from cfsp_framework.config import RunConfig


@dataclass(frozen=True)
class RunStarted:
    """The components are chosen; nothing is open yet."""

    config: RunConfig


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins: one of ``seconds`` in ``report.json``; some come several times."""

    phase: str


@dataclass(frozen=True)
class PhaseFinished:
    """A phase ended well."""

    phase: str
    seconds: float
    """This time, not over all times."""


@dataclass(frozen=True)
class BlockFinished:
    """A block was measured, cut or compensated; one that an earlier run finished (``--resume``) is not told again."""

    phase: str
    block: int
    of: int
    """How many blocks the model has."""


@dataclass(frozen=True)
class RunFinished:
    """The result is in place."""

    plan: PruningPlan
    report: Report | None = None
    """None for ``cfsp plan``, as is the folder."""
    folder: Path | None = None


@dataclass(frozen=True)
class RunFailed:
    """The run ends with this error, Ctrl-C among them; nothing of it is left."""

    error: BaseException


Event = RunStarted | PhaseStarted | PhaseFinished | BlockFinished | RunFinished | RunFailed
