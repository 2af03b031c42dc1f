"""Typed registries of what plugins offer."""

from __future__ import annotations

import difflib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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
    """Which plugin a component comes from: the name ``-p no:`` takes, its distribution and version."""

    plugin: str
    distribution: str | None = None
    version: str | None = None

    def __str__(self) -> str:
        if self.distribution is None:
            return f"plugin {self.plugin!r}"
        return f"plugin {self.plugin!r} of {self.distribution} {self.version}"


@dataclass(frozen=True)
class ConfiguredComponent(Generic[C_co]):
    """A configured component and its origin, so that what goes wrong in it can be named."""

    component: C_co
    origin: Origin
    usage: PluginUsage = field(default_factory=PluginUsage, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.component.kind} {self.component.name!r} ({self.origin})"

    @contextmanager
    def call_component(
        self, action: str, read_only_inputs: Mapping[str, Tensor | None] | None = None, *, thorough: bool = True
    ) -> Generator[C_co]:
        """Run the component's code, contained: see ``containment``. It may read the tensors it is ``read_only_inputs``."""
        with sandboxed(self, action, usage=self.usage, read_only_inputs=read_only_inputs, thorough=thorough):
            yield self.component

    def required(self) -> frozenset[Statistic]:
        """What the component's ``required()`` says, checked."""
        with self.call_component("required()") as component:
            found: object = component.required()
            required = frozenset(cast("Iterable[object]", found))
        for statistic in required:
            if not isinstance(statistic, Statistic):
                raise PluginError(f"{self}: required() returned {statistic!r}, which is not a Statistic.")
        return cast("frozenset[Statistic]", required)


class Registry(Mapping[str, type[C]]):
    """A read-only mapping from a component's name to its class and origin."""

    def __init__(self, kind: str, offers: Mapping[str, tuple[type[C], Origin]]) -> None:
        self.kind = kind
        self._offers = dict(sorted(offers.items()))

    def __getitem__(self, name: str) -> type[C]:
        return self._offer(name)[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._offers)

    def __len__(self) -> int:
        return len(self._offers)

    def __contains__(self, name: object) -> bool:  # Mapping's own expects a KeyError of __getitem__
        return name in self._offers

    def origin(self, name: str) -> Origin:
        """Who offers ``name``."""
        return self._offer(name)[1]

    def create(self, name: str, options: Mapping[str, object]) -> ConfiguredComponent[C]:
        """The component called ``name`` with its options validated."""
        cls, origin = self._offer(name)
        with sandboxed(f"{self.kind} {name!r} ({origin})", "its options", failed="failed to take its options"):
            try:
                return ConfiguredComponent(cls.model_validate(dict(options)), origin)
            except ValidationError as error:
                known = ", ".join(cls.model_fields) or "none"
                raise ConfigError(
                    f"Bad options for {self.kind} {name!r} ({origin}): {_validation_message(error, cls)}. "
                    f"Its options: {known}."
                ) from error

    def _offer(self, name: str) -> tuple[type[C], Origin]:
        try:
            return self._offers[name]
        except KeyError:
            raise ConfigError(f"Unknown {self.kind} {name!r}.{did_you_mean(name, self._offers)}") from None


class Plugins:
    """The typed face of the plugin manager: one registry per kind, one method per remaining hook."""

    def __init__(self, manager: pluggy.PluginManager, origins: Mapping[str, Origin]) -> None:
        self._manager = manager
        self.origins = dict(origins)
        self.collectors = self._registry("collector", "cfsp_collectors", Collector)
        self.allocators = self._registry("allocator", "cfsp_allocators", Allocator)
        self.criteria = self._registry("criterion", "cfsp_criteria", Criterion)
        self.compensators = self._registry("compensator", "cfsp_compensators", Compensator)
        self.recovery_schedulers = self._registry("recovery", "cfsp_recovery_schedulers", RecoveryScheduler)
        self.observers = self._registry("observer", "cfsp_observers", Observer)

    @property
    def registries(self) -> tuple[Registry[Component], ...]:
        """All registries, in the order of a run."""
        found = (
            self.collectors,
            self.allocators,
            self.criteria,
            self.compensators,
            self.recovery_schedulers,
            self.observers,
        )
        return cast("tuple[Registry[Component], ...]", found)

    def hooks(self, plugin: str) -> tuple[str, ...]:
        """The hooks a plugin implements, by name."""
        callers = self._manager.get_hookcallers(self._manager.get_plugin(plugin)) or []
        return tuple(sorted(caller.name for caller in callers))

    def architecture(self, config: PreTrainedConfig) -> Architecture | None:
        """The first plugin's answer to where this family keeps its feed-forwards; None where nobody knows it."""
        for implementation in reversed(self._manager.hook.cfsp_architecture.get_hookimpls()):
            answer = self._call(implementation, "cfsp_architecture", config=config)
            if isinstance(answer, Architecture):
                return answer
            if answer is not None:
                raise PluginError(
                    f"{self.origins[implementation.plugin_name]}: cfsp_architecture() returned {answer!r}, "
                    "not an Architecture or None."
                )
        return None

    def run_finished(self, result: RunResult) -> None:
        """Tell every plugin that wants to know. The result is in place by then: one that fails is a warning."""
        for implementation in self._manager.hook.cfsp_run_finished.get_hookimpls():
            with warn_on_error():
                self._call(implementation, "cfsp_run_finished", result=result)

    def collectors_for(self, required: Iterable[Statistic]) -> tuple[ConfiguredComponent[Collector], ...]:
        """Exactly one collector for every required statistic, in a stable order."""
        chosen: list[ConfiguredComponent[Collector]] = []
        for statistic in sorted(set(required)):
            names = [name for name, cls in self.collectors.items() if cls.provides == statistic]
            if not names:
                known = sorted(cls.provides.name for cls in self.collectors.values())
                raise PluginError(
                    f"No collector provides the statistic {statistic.name!r}.{did_you_mean(statistic.name, known)}"
                )
            if len(names) > 1:
                claims = " and ".join(f"{name!r} ({self.collectors.origin(name)})" for name in names)
                raise PluginError(
                    f"Two collectors provide the statistic {statistic.name!r}: {claims}. "
                    f"{_leave_one_out(*map(self.collectors.origin, names))}"
                )
            chosen.append(self.collectors.create(names[0], {}))
        return tuple(chosen)

    def _registry(self, kind: str, hook: str, base: type[C]) -> Registry[C]:
        """Ask every plugin what it offers for one hook; names are unique."""
        offers: dict[str, tuple[type[C], Origin]] = {}
        implementations: Sequence[pluggy.HookImpl] = getattr(self._manager.hook, hook).get_hookimpls()
        for implementation in sorted(implementations, key=lambda found: found.plugin_name):
            origin = self.origins[implementation.plugin_name]
            for offered in self._offered(implementation, hook):
                cls = _checked(offered, base, hook, origin)
                if cls.name in offers:
                    other, where = offers[cls.name]
                    if where == origin:
                        raise PluginError(
                            f"{origin}: {hook}() offered two classes called {cls.name!r}, {other.__name__} and {cls.__name__}."
                        )
                    raise PluginError(
                        f"{kind.capitalize()} {cls.name!r} is offered by both {where} and {origin}. "
                        f"{_leave_one_out(where, origin)}"
                    )
                offers[cls.name] = cls, origin
        return Registry(kind, offers)

    def _offered(self, implementation: pluggy.HookImpl, hook: str) -> list[object]:
        answer = self._call(implementation, hook)
        origin = self.origins[implementation.plugin_name]
        if not isinstance(answer, Iterable):
            raise PluginError(f"{origin}: {hook}() returned {answer!r}; it must return a list of classes.")
        with sandboxed(origin, f"{hook}()"):  # a hook written as a generator runs here
            return list(cast("Iterable[object]", answer))

    def _call(self, implementation: pluggy.HookImpl, hook: str, **arguments: object) -> object:
        wanted = {name: arguments[name] for name in (*implementation.argnames, *implementation.kwargnames)}
        with sandboxed(self.origins[implementation.plugin_name], f"{hook}()"):
            return implementation.function(**wanted)


def _checked(offered: object, base: type[C], hook: str, origin: Origin) -> type[C]:
    """``offered`` as a class that can be selected by name."""
    if not (isinstance(offered, type) and issubclass(offered, base)):
        raise PluginError(f"{origin}: {hook}() offered {offered!r}, which is not a subclass of {base.__name__}.")
    where = f"{origin}: {hook}() offered {offered.__name__}, which"
    attributes: dict[str, type] = {"name": str, "requires": AbstractSet}
    if issubclass(offered, Collector):
        attributes |= {"provides": Statistic, "site": Site}
    for attribute, expected in attributes.items():
        if attribute in offered.model_fields:
            raise PluginError(
                f"{where} declares `{attribute}` as an option; leave out its annotation or make it a ClassVar."
            )
        if not hasattr(offered, attribute):
            raise PluginError(f"{where} does not set `{attribute}`.")
        value: object = getattr(offered, attribute)
        if not isinstance(value, expected):
            raise PluginError(f"{where} sets `{attribute}` to {value!r}, not to a {expected.__name__}.")
    for statistic in cast("AbstractSet[object]", offered.requires):
        if not isinstance(statistic, Statistic):
            raise PluginError(f"{where} requires {statistic!r}, which is not a Statistic.")
    abstract = ", ".join(sorted(offered.__abstractmethods__))
    if getattr(offered, "start", None) is Collector.start and not hasattr(offered, "accumulator"):
        abstract = "start"
    if abstract:
        raise PluginError(f"{where} does not define {abstract}().")
    return offered


def _leave_one_out(*origins: Origin) -> str:
    """What to type so that one of several plugins remains: rather a third party's than a whole set of built-in ones."""
    installed = [origin for origin in origins if origin.distribution is not None]
    others = [origin for origin in installed if origin.distribution != "cfsp-framework"]
    flags = " or ".join(sorted({f"-p no:{origin.plugin}" for origin in others or installed}))
    if others:
        return f"Leave one out: {flags}."
    return (
        f"Give yours another name, or leave the built-in one out: {flags}." if installed else "Load one of them only."
    )


def _validation_message(error: ValidationError, cls: type[Component]) -> str:
    return "; ".join(
        _problem(".".join(map(str, e["loc"])) or "options", e["type"], e["msg"], cls) for e in error.errors()
    )


def _problem(option: str, what: str, message: str, cls: type[Component]) -> str:
    if what != "extra_forbidden":
        return f"{option}: {message}"
    close = difflib.get_close_matches(option, cls.model_fields, n=1)
    return f"there is no option {option!r}" + (f" (did you mean {close[0]!r}?)" if close else "")
