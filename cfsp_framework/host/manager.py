"""Find and load plugins, and check their hooks.

``-p no:NAME`` blocks first; then entry points load by name, then ``-p module`` and ``-p file.py``. Every hook that offers
classes is called once, while loading; after that the host calls methods of the components.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import EntryPoint, entry_points, version
from pathlib import Path
from types import ModuleType

import pluggy

from cfsp_framework.api import hookspecs
from cfsp_framework.api.components import API_VERSION
from cfsp_framework.errors import ConfigError, PluginError, did_you_mean
from cfsp_framework.host.registry import Origin, Plugins
from cfsp_framework.host.sandbox import sandboxed


def load_plugins(specs: Sequence[str] = ()) -> Plugins:
    """Load the installed plugins and those given with ``-p``: a module, a ``file.py``, or ``no:NAME``.

    Raises:
        PluginError: a plugin cannot be imported, offers something unusable, or offers nothing.
        ConfigError: ``no:NAME`` names no plugin.
    """
    manager = pluggy.PluginManager(hookspecs.NAMESPACE)
    manager.add_hookspecs(hookspecs)
    origins: dict[str, Origin] = {}
    blocked = {spec.removeprefix("no:") for spec in specs if spec.startswith("no:")}
    points = sorted(entry_points(group=hookspecs.NAMESPACE), key=lambda point: point.name)
    for name in sorted(blocked - {point.name for point in points}):
        raise ConfigError(f"-p no:{name} names no plugin.{did_you_mean(name, [point.name for point in points])}")
    for point in points:
        if point.name not in blocked:
            _register(manager, origins, _origin(point), point.load, f"Disable it with -p no:{point.name}.")
    for spec in dict.fromkeys(specs):
        if not spec.startswith("no:"):
            _register(manager, origins, Origin(spec), partial(_import, spec), f"It was given with -p {spec}.")
    _check_hooks(manager, origins)
    return Plugins(manager, origins)


def _register(
    manager: pluggy.PluginManager, origins: dict[str, Origin], origin: Origin, load: Callable[[], object], remedy: str
) -> None:
    if origin.plugin in origins:
        raise PluginError(f"Two plugins are called {origin.plugin!r}: {origins[origin.plugin]} and {origin}.")
    with sandboxed(origin, "its import", failed="could not be loaded", remedy=f" {remedy}"):
        plugin = load()
        if (loaded := manager.get_name(plugin)) is not None:
            raise PluginError(f"{origin} is loaded already, as {origins[loaded]}. {remedy}")
        _check_api(plugin, origin, remedy)
        manager.register(plugin, name=origin.plugin)
    origins[origin.plugin] = origin


def _check_api(plugin: object, origin: Origin, remedy: str) -> None:
    """Refuse a plugin that declares a version of the plugin API that this host does not have.

    Raises:
        PluginError: it is newer than ``API_VERSION``, or not a positive whole number.
    """
    declared: object = getattr(plugin, "cfsp_api", None)
    if declared is None:  # taken for the first version
        return
    if not isinstance(declared, int) or isinstance(declared, bool) or declared < 1:
        raise PluginError(
            f"{origin} declares `cfsp_api = {declared!r}`; it must be a version of the plugin API, 1 or more."
        )
    if declared > API_VERSION:
        raise PluginError(
            f"{origin} is written for version {declared} of the plugin API; this cfsp-framework "
            f"({version('cfsp-framework')}) has version {API_VERSION}. Upgrade cfsp-framework, or install an older "
            f"{origin.distribution or 'version of it'}. {remedy}"
        )


def _origin(point: EntryPoint) -> Origin:
    return Origin(point.name, point.dist.name, point.dist.version) if point.dist else Origin(point.name)


def _import(spec: str) -> ModuleType:
    if not spec.endswith(".py"):
        return importlib.import_module(spec)
    path = Path(spec)
    if not path.is_file():
        raise ConfigError(f"-p {spec}: the file does not exist.")
    stem = path.resolve().parent.name if path.stem == "__init__" else path.stem
    module_spec = importlib.util.spec_from_file_location(f"_cfsp_plugin_{stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError(f"-p {spec}: this is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # pydantic and pickle look up the module of a class here
    module_spec.loader.exec_module(module)
    return module


def _check_hooks(manager: pluggy.PluginManager, origins: Mapping[str, Origin]) -> None:
    """Refuse hook wrappers, and unknown or missing hooks, which pluggy accepts silently."""
    known = [name for name in vars(hookspecs) if name.startswith("cfsp_")]
    for name, plugin in manager.list_name_plugin():
        callers = manager.get_hookcallers(plugin) or []
        for caller in callers:
            if not caller.has_spec():
                raise PluginError(
                    f"{origins[name]} implements an unknown hook, {caller.name}().{did_you_mean(caller.name, known)}"
                )
            if any(hook.plugin is plugin and (hook.wrapper or hook.hookwrapper) for hook in caller.get_hookimpls()):
                raise PluginError(
                    f"{origins[name]} wraps {caller.name}(), which cannot be wrapped; use a plain @hookimpl."
                )
        if not callers:
            raise PluginError(
                f"{origins[name]} implements no hook; was @hookimpl forgotten? Hooks: {', '.join(known)}."
            )
    manager.check_pending()
