"""Choose and configure the components of a run and the collectors they need, before a model is opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cfsp_framework.api.components import (
    Allocator,
    Collector,
    Compensator,
    Component,
    Criterion,
    Observer,
    RecoveryScheduler,
    SearchingAllocator,
)
from cfsp_framework.api.data import BlockSummary, FitnessOptions, RecoveryPlan, Statistic, Stream, TrainableBlock
from cfsp_framework.config import Choice, RunConfig
from cfsp_framework.errors import ConfigError, PluginError
from cfsp_framework.host.registry import C, ConfiguredComponent, Plugins, Registry
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan


CurveKind = Literal["plain", "compensated"]


@dataclass(frozen=True)
class Selection:
    """The components of a run."""

    criterion: ConfiguredComponent[Criterion]
    allocator: ConfiguredComponent[Allocator]
    compensator: ConfiguredComponent[Compensator]
    recovery: ConfiguredComponent[RecoveryScheduler]
    collectors: tuple[ConfiguredComponent[Collector], ...]
    second_pass: tuple[ConfiguredComponent[Collector], ...]
    """Collectors of the compensator that run block by block while cutting; empty if the first pass suffices."""
    observers: tuple[ConfiguredComponent[Observer], ...] = ()
    probes: bool = False
    """Whether the sensitivity of every block is measured for the allocator."""
    starts: tuple[ConfiguredComponent[Allocator], ...] = ()
    """Allocators whose shares a searching allocator starts from."""
    searches: bool = False
    """Whether the allocator is called, and searches; a run with a plan calls none."""

    @property
    def measures(self) -> bool:
        """Whether calibration windows are needed."""
        return bool(self.collectors or self.second_pass or self.probes or self.searches)

    @property
    def curve(self) -> CurveKind | None:
        """The kind of removal-error curve that the allocator or one of its starts asks for."""
        return _joint_curve_kind((self.allocator, *self.starts))

    def describe(self) -> dict[str, str]:
        """Return each kind's component with all its options, defaults included."""
        return {
            chosen.component.kind: describe(chosen.component)
            for chosen in (self.criterion, self.allocator, self.compensator, self.recovery)
        }

    @property
    def chosen(self) -> tuple[ConfiguredComponent[Component], ...]:
        """All components that decide the result."""
        single = (self.criterion, self.allocator, self.compensator, self.recovery)
        return (*self.collectors, *self.second_pass, *self.starts, *single)

    def seconds(self) -> dict[str, float]:
        """Return the time that the code of each component took, by kind and name, the longest first."""
        spent: dict[str, float] = {}
        for chosen in (*self.chosen, *self.observers):
            name = f"{chosen.component.kind} {chosen.component.name}"
            spent[name] = spent.get(name, 0.0) + chosen.usage.seconds
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    def distributions(self) -> dict[str, str]:
        """Return the distributions of the components with their versions."""
        return {
            c.origin.distribution: c.origin.version or "?" for c in self.chosen if c.origin.distribution is not None
        }


def select(config: RunConfig, plugins: Plugins, *, planned: bool = False) -> Selection:
    """Choose and configure the components that ``config`` names.

    A run with a plan (``planned``) measures the compensator's statistics only.
    """

    def create(registry: Registry[C], choice: Choice) -> ConfiguredComponent[C]:
        return registry.create(choice.name, choice.options)

    components = config.components
    criterion = create(plugins.criteria, components.criterion)
    allocator = create(plugins.allocators, components.allocator)
    compensator = create(plugins.compensators, components.compensator)
    recovery = create(plugins.recovery_schedulers, components.recovery)
    compensator_statistics = compensator.required()
    twice = any(statistic.heavy for statistic in compensator_statistics)
    starts: tuple[ConfiguredComponent[Allocator], ...] = ()
    required: set[Statistic] = set() if twice else set(compensator_statistics)
    if not planned:
        required |= criterion.required() | allocator.required() | recovery.required()
        starts = _create_starts(allocator, plugins)
        required = required.union(*(start.required() for start in starts))
        required |= {DOWN_INPUT_GRAM_RELATIVE} if _joint_curve_kind((allocator, *starts)) else set()
    second_pass = plugins.collectors_for(compensator_statistics) if twice else ()
    observers = tuple(create(plugins.observers, choice) for choice in config.run.observers)
    first_pass = plugins.collectors_for(required)
    probes = not planned and any(map(needs_sensitivity, (allocator, *starts)))
    searches = not planned and isinstance(allocator.component, SearchingAllocator)
    return Selection(
        criterion, allocator, compensator, recovery, first_pass, second_pass, observers, probes, starts, searches
    )


def _create_starts(
    allocator: ConfiguredComponent[Allocator], plugins: Plugins
) -> tuple[ConfiguredComponent[Allocator], ...]:
    """Create the allocators that a searching one starts from, with their default options.

    Raises:
        ConfigError: a name is unknown, or that of an allocator that searches.
    """
    if not isinstance(allocator.component, SearchingAllocator):
        return ()
    with allocator.call_component("starts()"):
        names = list(dict.fromkeys(str(name) for name in allocator.component.starts()))
    starts = tuple(plugins.allocators.create(name, {}) for name in names)
    for start in starts:
        if isinstance(start.component, SearchingAllocator):
            raise ConfigError(f"{allocator} cannot start from {start.component.name!r}, which searches itself.")
    return starts


def get_fitness_options(allocator: ConfiguredComponent[Allocator]) -> FitnessOptions:
    """Return what the fitness of a searching allocator measures.

    Raises:
        PluginError: ``fitness()`` returns something else, or impossible values.
    """
    assert isinstance(allocator.component, SearchingAllocator)
    with allocator.call_component("fitness()"):
        options: object = allocator.component.fitness()
    if not isinstance(options, FitnessOptions):
        raise PluginError(f"{allocator}: fitness() returned {options!r}, not FitnessOptions.")
    if options.metric not in ("kl", "nll", "acceptance") or options.windows < 1 or options.stride < 1:
        raise PluginError(f"{allocator}: fitness() returned {options!r}; windows and stride are at least 1.")
    return options


def _joint_curve_kind(allocators: Sequence[ConfiguredComponent[Allocator]]) -> CurveKind | None:
    """Return the only kind of curve that allocators ask for, or None.

    Raises:
        ConfigError: they ask for different kinds; a block summary holds one.
    """
    kinds: dict[CurveKind, ConfiguredComponent[Allocator]] = {
        kind: allocator for allocator in allocators if (kind := get_curve_kind(allocator))
    }
    if len(kinds) > 1:
        raise ConfigError(f"{' and '.join(map(str, kinds.values()))} need different removal-error curves; name one.")
    return next(iter(kinds), None)


def get_curve_kind(allocator: ConfiguredComponent[Allocator]) -> CurveKind | None:
    """Return the kind of removal-error curve that the allocator asks for.

    Raises:
        PluginError: ``curve()`` returns something else.
    """
    with allocator.call_component("curve()") as component:
        curve = component.curve()
    if curve not in (None, "plain", "compensated"):
        raise PluginError(f"{allocator}: curve() returned {curve!r}, not 'plain', 'compensated' or None.")
    return curve


def needs_sensitivity(allocator: ConfiguredComponent[Allocator]) -> bool:
    """Return whether the allocator asks for the sensitivity of every block.

    Raises:
        PluginError: ``sensitivity()`` returns something else.
    """
    with allocator.call_component("sensitivity()") as component:
        needed: object = component.sensitivity()
    if not isinstance(needed, bool):
        raise PluginError(f"{allocator}: sensitivity() returned {needed!r}, not True or False.")
    return needed


def get_stream(compensator: ConfiguredComponent[Compensator]) -> Stream:
    """Return the stream that the compensator's statistics come from.

    Raises:
        PluginError: ``stream()`` returns something else.
    """
    with compensator.call_component("stream()") as component:
        stream: object = component.stream()
    if not isinstance(stream, Stream):
        raise PluginError(f"{compensator}: stream() returned {stream!r}, not Stream.DENSE or Stream.PRUNED.")
    return stream


def get_target_mix(compensator: ConfiguredComponent[Compensator]) -> float:
    """Return how far the compensator's target leans to the dense block's output.

    Raises:
        PluginError: ``target_mix()`` returns something else than a finite number.
    """
    with compensator.call_component("target_mix()") as component:
        mix: object = component.target_mix()
    if not isinstance(mix, int | float) or not math.isfinite(mix):
        raise PluginError(f"{compensator}: target_mix() returned {mix!r}, not a finite number.")
    return float(mix)


def schedule_recovery(
    scheduler: ConfiguredComponent[RecoveryScheduler],
    summaries: Sequence[BlockSummary],
    plan: PruningPlan,
    blocks: Sequence[TrainableBlock],
) -> RecoveryPlan | None:
    """Return the scheduler's recovery plan for the pruned model; None if nothing is to be trained.

    Raises:
        PluginError: it is not a recovery plan, or names blocks or targets that the model does not have.
    """
    with scheduler.call_component("schedule()") as component:
        recovery: object = component.schedule(summaries, plan, blocks)
    if recovery is None:
        return None
    if not isinstance(recovery, RecoveryPlan):
        raise PluginError(f"{scheduler}: schedule() returned a {type(recovery).__name__}, not a RecoveryPlan or None.")
    numbers = [block.block for block in recovery.blocks]
    if len({*numbers}) < len(numbers) or not {*numbers} <= {block.block for block in blocks}:
        raise PluginError(
            f"{scheduler}: its recovery plan names blocks {numbers}; name each of 0 to {len(blocks) - 1} at most once."
        )
    if not any(block.rank for block in recovery.blocks):
        raise PluginError(f"{scheduler}: its recovery plan trains no block; return None if nothing is to be trained.")
    known = {path for block in blocks for path in (*block.feed_forward, *block.attention)}
    if unknown := [path for path in recovery.targets if path not in known]:
        raise PluginError(
            f"{scheduler}: its recovery plan targets {unknown[0]!r}, which no block has. Available: "
            f"{', '.join(sorted(known))}."
        )
    return recovery


def describe(component: Component) -> str:
    """Return ``NAME:option=value,...`` with every option, as the command line takes it."""
    return str(Choice(name=component.name, options=component.model_dump(mode="json")))
