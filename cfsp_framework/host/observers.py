"""Tells observers what happens. A run of hours does not end because a log could not be written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cfsp_framework.api.components import Observer
from cfsp_framework.api.events import Event
from cfsp_framework.errors import PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import warn_on_error


def start_observing(observers: Sequence[ConfiguredComponent[Observer]]) -> Callable[[Event], None]:
    """Start them, and return what tells all of them an event.

    An observer that cannot start fails the run, before it has cost anything. One that fails later is warned about once
    and goes on being told.

    Raises:
        PluginError, ConfigError: an observer cannot start.
    """
    listeners = [(chosen, _started(chosen)) for chosen in observers]

    def tell(event: Event) -> None:
        for chosen, listener in listeners:
            with warn_on_error(chosen.usage), chosen.call_component(type(event).__name__):
                listener(event)

    return tell


def _started(chosen: ConfiguredComponent[Observer]) -> Callable[[Event], None]:
    with chosen.call_component("start()") as component:
        listener: object = component.start()
    if not callable(listener):
        raise PluginError(
            f"{chosen}: start() returned a {type(listener).__name__}, which cannot be called with an event."
        )
    return listener
