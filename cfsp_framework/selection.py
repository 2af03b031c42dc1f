"""From names and options to configured components and the collectors they need, before any model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .api import Allocator, Collector, Compensator, Component, Criterion, RecoveryScheduler, Statistic
from .config import RunConfig
from .plugins import Chosen, Plugins
from .statistics import DOWN_INPUT_GRAM


@dataclass(frozen=True)
class Selection:
    """The components of a run."""

    criterion: Chosen[Criterion]
    allocator: Chosen[Allocator]
    compensator: Chosen[Compensator]
    recovery: Chosen[RecoveryScheduler]
    collectors: tuple[Chosen[Collector], ...]
    second_pass: tuple[Chosen[Collector], ...]
    """What the compensator needs measured block by block while cutting; empty where the first pass suffices."""

    @property
    def measures(self) -> bool:
        """Whether calibration windows are needed."""
        return bool(self.collectors or self.second_pass)

    def describe(self) -> dict[str, str]:
        """Each kind's component with every option it runs with, defaults included."""
        return {
            chosen.component.kind: describe(chosen.component)
            for chosen in (self.criterion, self.allocator, self.compensator, self.recovery)
        }

    def distributions(self) -> dict[str, str]:
        """The distributions the components come from, with their versions."""
        chosen: Sequence[Chosen[Component]] = (
            self.criterion,
            self.allocator,
            self.compensator,
            self.recovery,
            *self.collectors,
            *self.second_pass,
        )
        return {c.origin.distribution: c.origin.version or "?" for c in chosen if c.origin.distribution is not None}


def select(config: RunConfig, plugins: Plugins, *, planned: bool = False) -> Selection:
    """Choose and configure what ``config`` names; with a plan at hand only the compensator's statistics are needed."""
    criterion = plugins.criteria.create(config.criterion.name, config.criterion.options)
    allocator = plugins.allocators.create(config.allocator.name, config.allocator.options)
    compensator = plugins.compensators.create(config.compensator.name, config.compensator.options)
    recovery = plugins.recovery_schedulers.create(config.recovery.name, config.recovery.options)
    wanted = _required(compensator)
    twice = any(statistic.heavy for statistic in wanted)
    required: set[Statistic] = set() if twice else set(wanted)
    if not planned:
        required |= _required(criterion) | _required(allocator) | _required(recovery)
        required |= {DOWN_INPUT_GRAM} if allocator.component.curve() else set()
    second_pass = plugins.collectors_for(wanted) if twice else ()
    return Selection(criterion, allocator, compensator, recovery, plugins.collectors_for(required), second_pass)


def _required(chosen: Chosen[Component]) -> frozenset[Statistic]:
    with chosen.blamed("required()") as component:
        return frozenset(component.required())


def describe(component: Component) -> str:
    """``NAME:option=value,...`` with every option, as the command line takes it."""
    options = ",".join(f"{name}={_scalar(value)}" for name, value in component.model_dump(mode="json").items())
    return f"{component.name}:{options}" if options else component.name


def _scalar(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
