"""Call observers with the events of a run; an observer that fails does not end the run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cfsp_framework.api.components import Observer
from cfsp_framework.api.events import Event
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import warn_on_error


def start_observing(observers: Sequence[ConfiguredComponent[Observer]]) -> Callable[[Event], None]:
    """Start the observers, and return the function that calls all of them with an event.

    An observer that cannot start fails the run before it begins. An observer that fails later causes one warning, and
    still receives later events.

    Raises:
        PluginError, ConfigError: an observer cannot start.
    """
    listeners = [(observer, _start(observer)) for observer in observers]

    def notify(event: Event) -> None:
        for observer, listener in listeners:
            with warn_on_error(observer.usage), observer.call_component(type(event).__name__):
                listener(event)

    return notify


def _start(observer: ConfiguredComponent[Observer]) -> Callable[[Event], None]:
    with observer.call_component("start()") as component:
        listener: object = component.start()
    if not callable(listener):
        raise PluginError(
            f"{observer}: start() returned a {type(listener).__name__}, which cannot be called; return a function that "
            "takes an event."
        )
    return listener
