"""Hooks that a plugin implements with ``@hookimpl``; each is called once, when a run is set up.

The first six return component classes, which users select by ``name``. Arguments are matched by name, so an
implementation may omit those it does not need.
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
    """Offer activation collectors, each naming the statistic it provides and the site it measures at."""


@hookspec
def cfsp_allocators() -> Iterable[type[Allocator]]:  # type: ignore[empty-body]
    """Offer coarse allocators: they give the share of its channels each block keeps."""


@hookspec
def cfsp_criteria() -> Iterable[type[Criterion]]:  # type: ignore[empty-body]
    """Offer fine criteria: they give one score per channel of a block."""


@hookspec
def cfsp_compensators() -> Iterable[type[Compensator]]:  # type: ignore[empty-body]
    """Offer compensators: they change the kept weights after the channels are selected."""


@hookspec
def cfsp_recovery_schedulers() -> Iterable[type[RecoveryScheduler]]:  # type: ignore[empty-body]
    """Offer recovery schedulers: they plan the training after the cut, with a capacity for each block."""


@hookspec
def cfsp_observers() -> Iterable[type[Observer]]:  # type: ignore[empty-body]
    """Offer observers: they get the events of a run."""


@hookspec(firstresult=True)
def cfsp_architecture(config: PreTrainedConfig) -> Architecture | None:
    """Describe the blocks and feed-forwards of the family of ``config``; return None for families of other plugins.

    The first result counts. The built-in plugin is called last, so a plugin can replace its description of a family.
    """


@hookspec
def cfsp_run_finished(result: RunResult) -> None:
    """React to a finished run: upload the checkpoint, add a note to an experiment tracker.

    Called for every run after its checkpoint is complete; a failure becomes a warning.
    """
