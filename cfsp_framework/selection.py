"""From names and options to configured components and the collectors they need, before any model is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .api import Allocator, Collector, Compensator, Component, Criterion, RecoveryScheduler, Statistic
from .config import RunConfig
from .plugins import Chosen, Plugins


@dataclass(frozen=True)
class Selection:
    """The components of a run."""

    criterion: Chosen[Criterion]
    allocator: Chosen[Allocator]
    compensator: Chosen[Compensator]
    recovery: Chosen[RecoveryScheduler]
    collectors: tuple[Chosen[Collector], ...]

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
        )
        return {c.origin.distribution: c.origin.version or "?" for c in chosen if c.origin.distribution is not None}


def select(config: RunConfig, plugins: Plugins, *, planned: bool = False) -> Selection:
    """Choose and configure what ``config`` names; with a plan at hand only the compensator's statistics are needed."""
    criterion = plugins.criteria.create(config.criterion.name, config.criterion.options)
    allocator = plugins.allocators.create(config.allocator.name, config.allocator.options)
    compensator = plugins.compensators.create(config.compensator.name, config.compensator.options)
    recovery = plugins.recovery_schedulers.create(config.recovery.name, config.recovery.options)
    readers: Sequence[Chosen[Component]] = [compensator] if planned else [criterion, allocator, compensator, recovery]
    required: set[Statistic] = set()
    for chosen in readers:
        with chosen.blamed("required()") as component:
            required |= component.required()
    return Selection(criterion, allocator, compensator, recovery, plugins.collectors_for(required))


def describe(component: Component) -> str:
    """``NAME:option=value,...`` with every option, as the command line takes it."""
    options = ",".join(f"{name}={_scalar(value)}" for name, value in component.model_dump(mode="json").items())
    return f"{component.name}:{options}" if options else component.name


def _scalar(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
