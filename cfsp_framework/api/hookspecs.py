"""The hooks a plugin may implement, each called once, when a run is set up. Mark implementations with ``@hookimpl``.

The first six return classes; the user picks one by its ``name``. Arguments are matched by name, so an implementation
may leave out those it does not need.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from cfsp_framework.api.components import Allocator, Collector, Compensator, Criterion, Observer, RecoveryScheduler
from cfsp_framework.api.data import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from cfsp_framework.api.records import RunResult

NAMESPACE = "cfsp_framework"
hookspec = pluggy.HookspecMarker(NAMESPACE)
hookimpl = pluggy.HookimplMarker(NAMESPACE)


@hookspec
def cfsp_collectors() -> Iterable[type[Collector]]:  # type: ignore[empty-body]
    """Offer activation collectors, each naming the statistic it provides and the site it listens at."""


@hookspec
def cfsp_allocators() -> Iterable[type[Allocator]]:  # type: ignore[empty-body]
    """Offer coarse allocators: the share of its channels each block keeps."""


@hookspec
def cfsp_criteria() -> Iterable[type[Criterion]]:  # type: ignore[empty-body]
    """Offer fine criteria: one score per channel of a block."""


@hookspec
def cfsp_compensators() -> Iterable[type[Compensator]]:  # type: ignore[empty-body]
    """Offer compensators: how the kept weights change once the channels are chosen."""


@hookspec
def cfsp_recovery_schedulers() -> Iterable[type[RecoveryScheduler]]:  # type: ignore[empty-body]
    """Offer recovery schedulers: what is trained after the cut, and with how much capacity."""


@hookspec
def cfsp_observers() -> Iterable[type[Observer]]:  # type: ignore[empty-body]
    """Offer observers: what is told of a run while it lasts."""


@hookspec(firstresult=True)
def cfsp_architecture(config: PreTrainedConfig) -> Architecture | None:
    """Say where the family of ``config`` keeps its blocks and feed-forwards, or None if it is not yours.

    Stops at the first answer; the built-ins answer last, so a plugin can take a family over.
    """


@hookspec
def cfsp_run_finished(result: RunResult) -> None:
    """Hear of every finished run, without being asked for: an upload, a note in an experiment tracker.

    Called when the checkpoint is in place; one that fails is a warning.
    """
