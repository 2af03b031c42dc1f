"""Typed registries of the components that plugins offer, and configured components."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, cast

import pluggy
from pydantic import ValidationError

from cfsp_framework.api.components import (
    Allocator,
    Collector,
    Compensator,
    Component,
    Criterion,
    Observer,
    RecoveryScheduler,
)
from cfsp_framework.api.data import Architecture, Site, Statistic
from cfsp_framework.errors import ConfigError, PluginError, did_you_mean
from cfsp_framework.host.sandbox import PluginUsage, sandboxed, warn_on_error

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig

    from cfsp_framework.api.records import RunResult

C = TypeVar("C", bound=Component)
C_co = TypeVar("C_co", bound=Component, covariant=True)


@dataclass(frozen=True)
class Origin:
    """The plugin of a component: the name that ``-p no:`` takes, its distribution and version."""

    plugin: str
    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        if self.distribution is None:
            return f"plugin {self.plugin!r}"
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@dataclass(frozen=True)
class ConfiguredComponent(Generic[C_co]):
    """A component with validated options, the plugin it comes from, and a record of its usage."""

    component: C_co
    origin: Origin
    usage: PluginUsage = field(default_factory=PluginUsage, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.component.kind} {self.component.name!r} ({self.origin})"

    @contextmanager
    def call_component(
        self, action: str, read_only_inputs: Mapping[str, Tensor | None] | None = None, *, thorough: bool = True
    ) -> Generator[C_co]:
        """Provide the component for a call in the sandbox, see ``sandboxed``."""
        with sandboxed(self, action, usage=self.usage, read_only_inputs=read_only_inputs, thorough=thorough):
            yield self.component

    def required(self) -> frozenset[Statistic]:
        """Return the statistics that the component requires.

        Raises:
            PluginError: ``required()`` fails or returns something else.
        """
        with self.call_component("required()") as component:
            required = frozenset(cast("Iterable[object]", component.required()))
        for statistic in required:
            if not isinstance(statistic, Statistic):
                raise PluginError(f"{self}: required() returned {statistic!r}, which is not a Statistic.")
        return cast("frozenset[Statistic]", required)


class Registry(Mapping[str, type[C]]):
    """A read-only mapping from the names of one kind of component to their classes."""

    def __init__(self, kind: str, offers: Mapping[str, tuple[type[C], Origin]]) -> None:
        self.kind = kind
        self._offers = dict(sorted(offers.items()))

    def __getitem__(self, name: str) -> type[C]:
        return self._get(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, name: object) -> bool:  # that of Mapping expects a KeyError from __getitem__
        return name in self._offers

    def origin(self, name: str) -> Origin:
        """Return the plugin that offers ``name``."""
        return self._get(name)[1]

    def create(self, name: str, options: Mapping[str, object]) -> ConfiguredComponent[C]:
        """Make the component called ``name`` with its options validated.

        Raises:
            ConfigError: the name or an option is unknown, or an option has a bad value.
        """
        cls, origin = self._get(name)
        label = f"{self.kind} {name!r} ({origin})"
        with sandboxed(label, "its options", failed="failed to take its options"):
            try:
                return ConfiguredComponent(cls.model_validate(dict(options)), origin)
            except ValidationError as error:
                known = ", ".join(cls.model_fields) or "none"
                raise ConfigError(
                    f"Bad options for {label}: {_describe_problems(error, cls)}. Its options: {known}."
                ) from error

    def _get(self, name: str) -> tuple[type[C], Origin]:
        try:
            return self._offers[name]
        except KeyError:
            raise ConfigError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._offers)}") from None


class Plugins:
    """The loaded plugins: a registry for each kind of component, and a method for each other hook."""

    def __init__(self, manager: pluggy.PluginManager, origins: Mapping[str, Origin]) -> None:
        self._manager = manager
        self.origins = dict(origins)
        self.collectors = self._register("collector", "cfsp_collectors", Collector)
        self.allocators = self._register("allocator", "cfsp_allocators", Allocator)
        self.criteria = self._register("criterion", "cfsp_criteria", Criterion)
        self.compensators = self._register("compensator", "cfsp_compensators", Compensator)
        self.recovery_schedulers = self._register("recovery", "cfsp_recovery_schedulers", RecoveryScheduler)
        self.observers = self._register("observer", "cfsp_observers", Observer)

    @property
    def registries(self) -> tuple[Registry[Component], ...]:
        """All registries, in the order of a run."""
        registries = (
            self.collectors,
            self.allocators,
            self.criteria,
            self.compensators,
            self.recovery_schedulers,
            self.observers,
        )
        return cast("tuple[Registry[Component], ...]", registries)

    def hooks(self, plugin: str) -> tuple[str, ...]:
        """Return the names of the hooks that a plugin implements."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(plugin)) or []
        return tuple(sorted(caller.name for caller in callers))

    def architecture(self, config: PreTrainedConfig) -> Architecture | None:
        """Return where a model family keeps its feed-forwards, from the first plugin that knows it; else None."""
        for implementation in reversed(self._manager.hook.cfsp_architecture.get_hookimpls()):
            architecture = self._call(implementation, "cfsp_architecture", config=config)
            if isinstance(architecture, Architecture):
                return architecture
            if architecture is not None:
                raise PluginError(
                    f"{self.origins[implementation.plugin_name]}: cfsp_architecture() returned {architecture!r}, "
                    "not an Architecture or None."
                )
        return None

    def run_finished(self, result: RunResult) -> None:
        """Call every ``cfsp_run_finished``. The result is in place by then, so that a failure is a warning."""
        for implementation in self._manager.hook.cfsp_run_finished.get_hookimpls():
            with warn_on_error():
                self._call(implementation, "cfsp_run_finished", result=result)

    def collectors_for(self, required: Iterable[Statistic]) -> tuple[ConfiguredComponent[Collector], ...]:
        """Return exactly one collector for every required statistic, in a stable order.

        Raises:
            PluginError: a statistic has no collector, or several.
        """
        configured: list[ConfiguredComponent[Collector]] = []
        for statistic in sorted(set(required)):
            names = [name for name, cls in self.collectors.items() if cls.provides == statistic]
            if not names:
                known = [cls.provides.name for cls in self.collectors.values()]
                raise PluginError(
                    f"No collector provides the statistic {statistic.name!r}.{did_you_mean(statistic.name, known)}"
                )
            if len(names) > 1:
                claims = " and ".join(f"{name!r} ({self.collectors.origin(name)})" for name in names)
                raise PluginError(
                    f"Two collectors provide the statistic {statistic.name!r}: {claims}. "
                    f"{_suggest_remedy(*map(self.collectors.origin, names))}"
                )
            configured.append(self.collectors.create(names[0], {}))
        return tuple(configured)

    def _register(self, kind: str, hook: str, base: type[C]) -> Registry[C]:
        """Call one hook of every plugin, and register the classes that they offer under unique names."""
        offers: dict[str, tuple[type[C], Origin]] = {}
        implementations: Iterable[pluggy.HookImpl] = getattr(self._manager.hook, hook).get_hookimpls()
        for implementation in sorted(implementations, key=lambda implementation: implementation.plugin_name):
            origin = self.origins[implementation.plugin_name]
            offered = self._call(implementation, hook)
            if not isinstance(offered, Iterable):
                raise PluginError(f"{origin}: {hook}() returned {offered!r}; it must return a list of classes.")
            with sandboxed(origin, f"{hook}()"):  # a hook that is a generator runs here
                classes = list(cast("Iterable[object]", offered))
            for cls in (_check_class(value, base, hook, origin) for value in classes):
                if cls.name in offers:
                    other, first = offers[cls.name]
                    if first == origin:
                        raise PluginError(
                            f"{origin}: {hook}() offered two classes called {cls.name!r}, {other.__name__} and {cls.__name__}."
                        )
                    raise PluginError(
                        f"{kind.capitalize()} {cls.name!r} is offered by both {first} and {origin}. "
                        f"{_suggest_remedy(first, origin)}"
                    )
                offers[cls.name] = cls, origin
        return Registry(kind, offers)

    def _call(self, implementation: pluggy.HookImpl, hook: str, **arguments: object) -> object:
        """Call a plugin's implementation of a hook with those arguments that it names."""
        named = {name: arguments[name] for name in (*implementation.argnames, *implementation.kwargnames)}
        with sandboxed(self.origins[implementation.plugin_name], f"{hook}()"):
            return implementation.function(**named)


def _check_class(offered: object, base: type[C], hook: str, origin: Origin) -> type[C]:
    """Return ``offered`` if it is a finished component class, else raise a PluginError."""
    if not (isinstance(offered, type) and issubclass(offered, base)):
        raise PluginError(f"{origin}: {hook}() offered {offered!r}, which is not a subclass of {base.__name__}.")
    subject = f"{origin}: {hook}() offered {offered.__name__}, which"
    attributes: dict[str, type] = {"name": str, "requires": AbstractSet}
    if issubclass(offered, Collector):
        attributes |= {"provides": Statistic, "site": Site}
    for attribute, expected in attributes.items():
        if attribute in offered.model_fields:
            raise PluginError(
                f"{subject} declares `{attribute}` as an option; leave out its annotation or make it a ClassVar."
            )
        if not hasattr(offered, attribute):
            raise PluginError(f"{subject} does not set `{attribute}`.")
        value: object = getattr(offered, attribute)
        if not isinstance(value, expected):
            raise PluginError(f"{subject} sets `{attribute}` to {value!r}, not to a {expected.__name__}.")
    for statistic in cast("AbstractSet[object]", offered.requires):
        if not isinstance(statistic, Statistic):
            raise PluginError(f"{subject} requires {statistic!r}, which is not a Statistic.")
    if getattr(offered, "start", None) is Collector.start and not hasattr(offered, "accumulator"):
        raise PluginError(f"{subject} neither sets `accumulator` nor defines start().")
    if abstract := ", ".join(sorted(offered.__abstractmethods__)):
        raise PluginError(f"{subject} does not define {abstract}().")
    return offered


def _suggest_remedy(*origins: Origin) -> str:
    """Return the ``-p no:NAME`` that resolves a conflict, of a third party rather than of a set of built-in plugins."""
    installed = [origin for origin in origins if origin.distribution is not None]
    others = [origin for origin in installed if origin.distribution != "cfsp-framework"]
    flags = " or ".join(sorted({f"-p no:{origin.plugin}" for origin in others or installed}))
    if others:
        return f"Disable one of them: {flags}."
    return f"Rename yours, or disable the built-in one: {flags}." if installed else "Load one of them only."


def _describe_problems(error: ValidationError, cls: type[Component]) -> str:
    return "; ".join(
        _describe_unknown(".".join(map(str, problem["loc"])), cls)
        if problem["type"] == "extra_forbidden"
        else f"{'.'.join(map(str, problem['loc'])) or 'options'}: {problem['msg']}"
        for problem in error.errors()
    )


def _describe_unknown(option: str, cls: type[Component]) -> str:
    close = difflib.get_close_matches(option, cls.model_fields, n=1)
    return f"unknown option {option!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
