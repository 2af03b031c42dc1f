"""From names and options to configured components and the collectors they need, before any model is touched."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from cfsp_framework.api.components import (
    Allocator,
    Collector,
    Compensator,
    Component,
    Criterion,
    Observer,
    RecoveryScheduler,
)
from cfsp_framework.api.data import Statistic, Stream
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent, Plugins
from cfsp_framework.statistics import DOWN_INPUT_GRAM


@dataclass(frozen=True)
class Selection:
    """The components of a run."""

    criterion: ConfiguredComponent[Criterion]
    allocator: ConfiguredComponent[Allocator]
    compensator: ConfiguredComponent[Compensator]
    recovery: ConfiguredComponent[RecoveryScheduler]
    collectors: tuple[ConfiguredComponent[Collector], ...]
    second_pass: tuple[ConfiguredComponent[Collector], ...]
    """What the compensator needs measured block by block while cutting; empty where the first pass suffices."""
    observers: tuple[ConfiguredComponent[Observer], ...] = ()

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

    @property
    def chosen(self) -> tuple[ConfiguredComponent[Component], ...]:
        """All components that decide the result."""
        single = (self.criterion, self.allocator, self.compensator, self.recovery)
        return (*self.collectors, *self.second_pass, *single)

    def seconds(self) -> dict[str, float]:
        """How long the code of each component ran, the longest first; ``collector down-input-mean``, say."""
        spent: dict[str, float] = {}
        for chosen in (*self.chosen, *self.observers):
            name = f"{chosen.component.kind} {chosen.component.name}"
            spent[name] = spent.get(name, 0.0) + chosen.usage.seconds
        return dict(sorted(spent.items(), key=lambda one: -one[1]))

    def distributions(self) -> dict[str, str]:
        """The distributions the components come from, with their versions."""
        return {
            c.origin.distribution: c.origin.version or "?" for c in self.chosen if c.origin.distribution is not None
        }


def select(config: RunConfig, plugins: Plugins, *, planned: bool = False) -> Selection:
    """Choose and configure what ``config`` names; with a plan at hand only the compensator's statistics are needed."""
    criterion = plugins.criteria.create(config.components.criterion.name, config.components.criterion.options)
    allocator = plugins.allocators.create(config.components.allocator.name, config.components.allocator.options)
    compensator = plugins.compensators.create(config.components.compensator.name, config.components.compensator.options)
    recovery = plugins.recovery_schedulers.create(config.components.recovery.name, config.components.recovery.options)
    wanted = compensator.required()
    twice = any(statistic.heavy for statistic in wanted)
    required: set[Statistic] = set() if twice else set(wanted)
    if not planned:
        required |= criterion.required() | allocator.required() | recovery.required()
        required |= {DOWN_INPUT_GRAM} if curve_of(allocator) else set()
    second_pass = plugins.collectors_for(wanted) if twice else ()
    observers = tuple(plugins.observers.create(choice.name, choice.options) for choice in config.run.observers)
    first_pass = plugins.collectors_for(required)
    return Selection(criterion, allocator, compensator, recovery, first_pass, second_pass, observers)


def curve_of(allocator: ConfiguredComponent[Allocator]) -> Literal["plain", "compensated"] | None:
    """The removal-error curve the allocator asks for, checked."""
    with allocator.call_component("curve()") as component:
        curve = component.curve()
    if curve not in (None, "plain", "compensated"):
        raise PluginError(f"{allocator}: curve() returned {curve!r}, not 'plain', 'compensated' or None.")
    return curve


def stream_of(compensator: ConfiguredComponent[Compensator]) -> Stream:
    """The stream the compensator's statistics come from, checked."""
    with compensator.call_component("stream()") as component:
        stream: object = component.stream()
    if not isinstance(stream, Stream):
        raise PluginError(f"{compensator}: stream() returned {stream!r}, not Stream.DENSE or Stream.PRUNED.")
    return stream


def target_mix_of(compensator: ConfiguredComponent[Compensator]) -> float:
    """How far the compensator's target leans to the dense block's output, checked."""
    with compensator.call_component("target_mix()") as component:
        mix: object = component.target_mix()
    if not isinstance(mix, int | float) or not math.isfinite(mix):
        raise PluginError(f"{compensator}: target_mix() returned {mix!r}, not a finite number.")
    return float(mix)


def describe(component: Component) -> str:
    """``NAME:option=value,...`` with every option, as the command line takes it."""
    options = ",".join(f"{name}={_scalar(value)}" for name, value in component.model_dump(mode="json").items())
    return f"{component.name}:{options}" if options else component.name


def _scalar(value: object) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
