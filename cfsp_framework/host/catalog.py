"""List and explain what plugins offer: components with origin, options and statistics, as plain data and as tables."""

from __future__ import annotations

import difflib
import inspect
import json
import types
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from rich import box
from rich.console import Console
from rich.markdown import Markdown
from rich.padding import Padding
from rich.table import Table

from cfsp_framework.api.components import Allocator, Collector, Component
from cfsp_framework.api.data import Site, Statistic, Windows
from cfsp_framework.errors import ConfigError, did_you_mean
from cfsp_framework.host.registry import Origin, Plugins, Registry
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

Row = dict[str, Any]

_LIMITS = {
    "minimum": ">= {:g}",
    "exclusiveMinimum": "> {:g}",
    "maximum": "<= {:g}",
    "exclusiveMaximum": "< {:g}",
    "multipleOf": "a multiple of {}",
    "pattern": "like {}",
    "minLength": "at least {} long",
    "minItems": "at least {} long",
    "maxLength": "at most {} long",
    "maxItems": "at most {} long",
}
"""Keys of JSON schema that limit an option, in words."""
_KINDS = ("criterion", "allocator", "compensator", "recovery", "observer", "collector")
"""The order of the list; collectors come last because a run chooses them itself."""


def component_rows(plugins: Plugins, kind: str | None = None) -> list[Row]:
    """Describe every component, or those of one kind.

    Raises:
        ConfigError: the ``kind`` is unknown.
    """
    kinds = [registry.kind for registry in plugins.registries]
    if kind is not None and kind not in kinds:
        raise ConfigError(f"Unknown kind {kind!r} of component.{did_you_mean(kind, kinds)}")
    return [
        _describe(registry, name)
        for registry in plugins.registries
        if kind in (None, registry.kind)
        for name in registry
    ]


def plugin_rows(plugins: Plugins) -> list[Row]:
    """Describe every plugin, also one without components, such as one that only implements ``cfsp_architecture``."""
    origins = [registry.origin(name) for registry in plugins.registries for name in registry]
    return [
        {**_describe_origin(origin), "hooks": list(plugins.hooks(name)), "components": origins.count(origin)}
        for name, origin in plugins.origins.items()
    ]


def component_details(plugins: Plugins, name: str) -> list[Row]:
    """Describe the components called ``name`` in detail; components of different kinds may share a name.

    Raises:
        ConfigError: the name is unknown.
    """
    details = [
        {**_describe(registry, name), **_describe_details(registry[name], plugins)}
        for registry in plugins.registries
        if name in registry
    ]
    if not details:
        known = [known for registry in plugins.registries for known in registry]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"Unknown component {name!r}. {hint}`cfsp plugins list` shows all.")
    return details


def _describe(registry: Registry[Component], name: str) -> Row:
    cls = registry[name]
    row: Row = {
        "kind": registry.kind,
        "name": name,
        **_describe_origin(registry.origin(name)),
        "requires": sorted(statistic.name for statistic in _required(cls)),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
    }
    if issubclass(cls, Collector):
        row["provides"] = cls.provides.name
    return row


def _describe_origin(origin: Origin) -> dict[str, str | None]:
    """Describe a plugin; ``leave_out`` is the flag that disables an installed one."""
    installed = origin.distribution is not None
    return {
        "plugin": origin.plugin,
        "distribution": f"{origin.distribution} {origin.version}" if installed else None,
        "leave_out": f"-p no:{origin.plugin}" if installed else None,
    }


def _required(cls: type[Component]) -> frozenset[Statistic]:
    """Return the statistics that the component requires with its default options."""
    try:
        return cls().required()
    except Exception:  # noqa: BLE001  (an option without a default, or a defect of a plugin)
        return cls.requires


def _describe_details(cls: type[Component], plugins: Plugins) -> Row:
    schema = cls.model_json_schema()["properties"] if cls.model_fields else {}
    details: Row = {
        "description": inspect.getdoc(cls) or "",
        "module": cls.__module__,
        "defined_in": _find_definition(cls),
        "options": {
            name: {
                "type": _type_name(field.annotation),
                "allowed": ", ".join(_limits(schema[name])),
                "required": field.is_required(),
                "default": schema[name].get("default"),
                "description": field.description or "",
            }
            for name, field in cls.model_fields.items()
        },
        "statistics": [_describe_statistic(statistic, plugins) for statistic in sorted(_required(cls))],
        "depends_on_options": cls.required is not Component.required,
    }
    if issubclass(cls, Allocator) and (curve := _curve(cls)):
        details["curve"] = curve
    if issubclass(cls, Allocator) and _asks_for_sensitivity(cls):
        details["sensitivity"] = True
    if issubclass(cls, Collector):
        details["measures"] = _describe_statistic(cls.provides, plugins)
        details["read_by"] = [
            f"{registry.kind} {name}"
            for registry in plugins.registries
            for name, reader in registry.items()
            if cls.provides in _required(reader)
        ]
    return details


def _curve(cls: type[Allocator]) -> str | None:
    """Return the kind of removal-error curve that the allocator asks for with its default options."""
    try:
        return cls().curve()
    except Exception:  # noqa: BLE001  (as above)
        return None


def _asks_for_sensitivity(cls: type[Allocator]) -> bool:
    """Return whether the allocator asks for the blocks' sensitivities with its default options."""
    try:
        return cls().sensitivity()
    except Exception:  # noqa: BLE001  (as above)
        return False


def _describe_statistic(statistic: Statistic, plugins: Plugins) -> Row:
    collectors = [cls for cls in plugins.collectors.values() if cls.provides == statistic]
    return {
        "name": statistic.name,
        "shape": statistic.shape,
        "summary": statistic.summary,
        "collectors": [cls.name for cls in collectors],
        "cost": ", ".join(_costs(statistic, collectors[0])) if collectors else "no collector measures it",
    }


def _costs(statistic: Statistic, collector: type[Collector]) -> Iterator[str]:
    """List what measuring adds to the pass over the calibration windows: memory, and other work."""
    size = statistic.shape.strip("() ,").replace(", ", " x ")
    numbers = f"{size} float32 numbers" if size else "one float32 number"
    place = "block" if collector.site is Site.BLOCK else "feed-forward"
    duration = "for every block at once" if collector.site is Site.GRADIENT else f"of one {place} at a time"
    yield f"{numbers} {duration if statistic.heavy else f'a {place}'}"
    if collector.site is Site.GRADIENT:
        yield "a backward pass through the whole model"
    if collector.windows is not Windows.ALL:
        yield "every tenth window" if collector.windows is Windows.HELD_OUT else "nine windows of ten"
    if collector.ordered:
        yield "one process only"


def _find_definition(cls: type[Component]) -> str:
    """Return file and line of a class; a class made by a function has those of its base."""
    for base in cls.__mro__:
        try:
            return f"{inspect.getsourcefile(base)}:{inspect.getsourcelines(base)[1]}"
        except (OSError, TypeError):
            continue
    return cls.__module__


def _type_name(annotation: Any) -> str:
    """Return ``float or null``, or the values that a Literal allows."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return " or ".join(map(_type_name, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _limits(schema: Row) -> Iterator[str]:
    """List the limits of an option in its JSON schema, in words."""
    for part in (schema, *schema.get("anyOf", ())):
        yield from (words.format(part[key]) for key, words in _LIMITS.items() if key in part)


def show_components(rows: Iterable[Row], plugins: Sequence[Row]) -> None:
    """Print a table of components for each kind and plugin, then the plugins without components."""
    console = Console(highlight=False, markup=False)
    if not plugins:
        console.print("Plugins offer nothing. Is the package installed, and not disabled with -p no:NAME?")
        return
    by_kind = sorted(rows, key=lambda row: (_KINDS.index(row["kind"]), row["plugin"]))
    for _, group in groupby(by_kind, itemgetter("kind", "plugin")):
        console.print(_component_table(list(group)))
    for row in plugins:
        if not row["components"]:
            console.print(f"no component: {_plugin_label(row)}, {', '.join(row['hooks'])}")
    console.print("`cfsp plugins show NAME` explains one.")


def _component_table(rows: Sequence[Row]) -> Table:
    collectors = rows[0]["kind"] == "collector"
    headings = ("name, and the statistic",) if collectors else ("name", "reads")
    table = _table(f"{rows[0]['kind']}: {_plugin_label(rows[0])}", *headings, summary=1)
    for row in rows:
        reads = "\n".join(row["requires"])
        cells = (f"{row['name']}\n{row['provides']}",) if collectors else (row["name"], reads)
        table.add_row(*cells, row["summary"].replace("`", ""))
    return table


def _table(title: str, *fixed: str, **ratios: int) -> Table:
    """Make a table of columns that do not wrap and columns that share the remaining width."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for heading in fixed:
        table.add_column(heading, no_wrap=True)
    for heading, ratio in ratios.items():
        table.add_column(heading, ratio=ratio)
    return table


def _plugin_label(row: Row, *, remedy: bool = True) -> str:
    """Return ``cfsp-criteria of cfsp-framework 0.1.0 (-p no:cfsp-criteria)``."""
    label = f"{row['plugin']} of {row['distribution']}" if row["distribution"] else row["plugin"]
    return f"{label} ({row['leave_out']})" if remedy and row["leave_out"] else label


def show_details(components: Sequence[Row]) -> None:
    """Print each component's description, options and statistics."""
    console = Console(highlight=False, markup=False)
    for details in components:
        label = _plugin_label(details, remedy=False)
        console.print(f"{details['kind']} {details['name']}, plugin {label}", style="bold")
        if details["leave_out"]:
            console.print(f"Disabled by {details['leave_out']}")
        console.print(f"Defined in {details['module']}, {_relative(details['defined_in'])}", soft_wrap=True)
        console.print(Padding(Markdown(details["description"]), (1, 0)))
        if details["options"]:
            console.print(_option_table(details["options"]))
        if "measures" in details:
            console.print(_statistic_table("Measures", [details["measures"]]))
            console.print(f"Read by: {', '.join(details['read_by']) or 'no component'}")
        else:
            _show_statistics(details, console)
        console.print()


def _show_statistics(details: Row, console: Console) -> None:
    if details["statistics"]:
        title = "Reads, with these defaults" if details["depends_on_options"] else "Reads"
        console.print(_statistic_table(title, details["statistics"]))
    else:
        console.print(f"Reads no statistics{' by default' if details['depends_on_options'] else ''}.")
    if "curve" in details:
        console.print(
            f"Asks for every block's {details['curve']} removal-error curve: a matrix of F x F numbers, "
            f"{DOWN_INPUT_GRAM_RELATIVE.name}, of one feed-forward at a time, and its elimination."
        )
    if "sensitivity" in details:
        console.print(
            "Asks for every block's sensitivity: a few windows pass on from each block with half of its channels cut, "
            "about half a forward over as many tokens as there are blocks times 1024."
        )


def _option_table(options: dict[str, Row]) -> Table:
    table = Table(title="Options", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("type", ratio=2)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", ratio=3)
    for name, option in options.items():
        default = option["default"] if isinstance(option["default"], str) else json.dumps(option["default"])
        values = " ".join(filter(None, (option["type"], option["allowed"])))
        table.add_row(name, values, "required" if option["required"] else default, option["description"])
    return table


def _statistic_table(title: str, statistics: Sequence[Row]) -> Table:
    table = _table(title, "statistic", meaning=1, cost=1)
    for statistic in statistics:
        table.add_row(statistic["name"], f"{statistic['shape']} {statistic['summary']}", statistic["cost"])
    return table


def _relative(path: str) -> str:
    """Return a path relative to the working directory, if it lies below."""
    folder = Path.cwd()
    return str(Path(path).relative_to(folder)) if Path(path).is_relative_to(folder) else path
