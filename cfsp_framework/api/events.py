"""Events that observers get during a run, at most one for each block and phase."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan, Report
    from cfsp_framework.config import RunConfig


@dataclass(frozen=True)
class RunStarted:
    """The components are selected and every option is checked; the model is not open yet."""

    config: RunConfig
    """Options of the run."""


@dataclass(frozen=True)
class PhaseStarted:
    """A phase begins, one of ``seconds`` in ``report.json``; some phases run several times."""

    phase: str
    """Name of the phase."""


@dataclass(frozen=True)
class PhaseFinished:
    """A phase ended without an error."""

    phase: str
    """Name of the phase."""
    seconds: float
    """Of this occurrence, not the sum over all."""


@dataclass(frozen=True)
class BlockFinished:
    """A block was measured, cut or compensated; blocks from the ``--resume`` folder give no event."""

    phase: str
    """Name of the phase."""
    block: int
    """Index of the block, from 0."""
    of: int
    """Number of blocks of the model."""


@dataclass(frozen=True)
class RunFinished:
    """The output folder, or the plan, is complete."""

    plan: PruningPlan
    """The finished plan."""
    report: Report | None = None
    """None for ``cfsp plan``."""
    folder: Path | None = None
    """The checkpoint folder; None for ``cfsp plan``."""


@dataclass(frozen=True)
class RunFailed:
    """The run ends with an error, or with Ctrl-C; nothing was written."""

    error: BaseException
    """Exception that ends the run."""


Event = RunStarted | PhaseStarted | PhaseFinished | BlockFinished | RunFinished | RunFailed
