"""What plugins offer: every component with its origin, options and statistics, as plain data and as tables."""

from __future__ import annotations

import difflib
import inspect
import json
import types
from collections.abc import Iterator, Sequence
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
from cfsp_framework.statistics import DOWN_INPUT_GRAM

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_LENGTHS = {"minLength": "at least {} long", "minItems": "at least {} long", "maxLength": "at most {} long"}
_OTHERS = {"multipleOf": "a multiple of {}", "pattern": "like {}", **_LENGTHS, "maxItems": "at most {} long"}
_FIRST = ("criterion", "allocator", "compensator", "recovery")
"""What people look for; collectors come last, because nobody has to name them."""


def component_rows(plugins: Plugins, kind: str | None = None) -> list[dict[str, Any]]:
    """Every component of every registry, or of one.

    Raises:
        ConfigError: there is no such ``kind``.
    """
    kinds = [registry.kind for registry in plugins.registries]
    if kind is not None and kind not in kinds:
        raise ConfigError(f"There is no kind {kind!r} of component.{did_you_mean(kind, kinds)}")
    return [
        _row(registry, name, plugins)
        for registry in plugins.registries
        if kind in (None, registry.kind)
        for name in registry
    ]


def plugin_rows(plugins: Plugins) -> list[dict[str, Any]]:
    """Every plugin, also one without components, which knows families or hears of finished runs."""
    offering = [registry.origin(name) for registry in plugins.registries for name in registry]
    return [
        {**_origin(origin), "hooks": list(plugins.hooks(name)), "components": offering.count(origin)}
        for name, origin in plugins.origins.items()
    ]


def component_details(plugins: Plugins, name: str) -> list[dict[str, Any]]:
    """Everything about the components called ``name``: one name may stand for a criterion and an allocator.

    Raises:
        ConfigError: nobody offers the name.
    """
    found = [
        {**_row(registry, name, plugins), **_details(registry[name], plugins)}
        for registry in plugins.registries
        if name in registry
    ]
    if not found:
        known = [known for registry in plugins.registries for known in registry]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"Unknown component {name!r}. {hint}`cfsp plugins list` shows all.")
    return found


def _row(registry: Registry[Component], name: str, plugins: Plugins) -> dict[str, Any]:
    cls = registry[name]
    row: dict[str, Any] = {
        "kind": registry.kind,
        "name": name,
        **_origin(registry.origin(name)),
        "requires": sorted(statistic.name for statistic in _required(cls)),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
    }
    if issubclass(cls, Collector):
        row["provides"] = cls.provides.name
    return row


def _origin(origin: Origin) -> dict[str, str | None]:
    """``leave_out`` is what the command line takes; a module or file that was asked for is just not asked for."""
    installed = origin.distribution is not None
    return {
        "plugin": origin.plugin,
        "distribution": f"{origin.distribution} {origin.version}" if installed else None,
        "leave_out": f"-p no:{origin.plugin}" if installed else None,
    }


def _required(cls: type[Component]) -> frozenset[Statistic]:
    """What the component requires with its default options."""
    try:
        return cls().required()
    except Exception:  # noqa: BLE001  (an option without a default, or a third party's mistake)
        return cls.requires


def _details(cls: type[Component], plugins: Plugins) -> dict[str, Any]:
    schema = cls.model_json_schema()["properties"] if cls.model_fields else {}
    details: dict[str, Any] = {
        "description": inspect.getdoc(cls) or "",
        "module": cls.__module__,
        "defined_in": f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}",
        "options": {
            name: {
                "type": _type_name(field.annotation),
                "allowed": ", ".join(_allowed(schema[name])),
                "required": field.is_required(),
                "default": schema[name].get("default"),
                "description": field.description or "",
            }
            for name, field in cls.model_fields.items()
        },
        "statistics": [_statistic(statistic, plugins) for statistic in sorted(_required(cls))],
        "depends_on_options": cls.required is not Component.required,
    }
    if issubclass(cls, Allocator) and (curve := _curve(cls)):
        details["curve"] = curve
    if issubclass(cls, Collector):
        details["measures"] = _statistic(cls.provides, plugins)
        details["read_by"] = [
            f"{registry.kind} {name}"
            for registry in plugins.registries
            for name, reader in registry.items()
            if cls.provides in _required(reader)
        ]
    return details


def _curve(cls: type[Allocator]) -> str | None:
    """Which removal-error curve the allocator asks for with its default options."""
    try:
        return cls().curve()
    except Exception:  # noqa: BLE001  (as above)
        return None


def _statistic(statistic: Statistic, plugins: Plugins) -> dict[str, Any]:
    collectors = [cls for cls in plugins.collectors.values() if cls.provides == statistic]
    return {
        "name": statistic.name,
        "shape": statistic.shape,
        "summary": statistic.summary,
        "collectors": [cls.name for cls in collectors],
        "cost": ", ".join(_cost(statistic, collectors[0])) if collectors else "nobody measures it",
    }


def _cost(statistic: Statistic, collector: type[Collector]) -> Iterator[str]:
    """What measuring takes beside the pass over the calibration windows: what is held, and what else has to run."""
    size = statistic.shape.strip("() ,").replace(", ", " x ")
    numbers = f"{size} float32 numbers" if size else "one float32 number"
    where = "block" if collector.site is Site.BLOCK else "feed-forward"
    held = "for every block at once" if collector.site is Site.GRADIENT else f"of one {where} at a time"
    yield f"{numbers} {held if statistic.heavy else f'a {where}'}"
    if collector.site is Site.GRADIENT:
        yield "a backward pass through the whole model"
    if collector.windows is Windows.HELD_OUT:
        yield "every tenth window"
    if collector.windows is Windows.FITTED:
        yield "nine windows of ten"
    if collector.ordered:
        yield "one process only"


def _type_name(annotation: Any) -> str:
    """``float or null``, or the values a Literal allows."""
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "null"
    if isinstance(annotation, types.UnionType) or get_origin(annotation) is Union:
        return " or ".join(map(_type_name, get_args(annotation)))
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


def _allowed(schema: dict[str, Any]) -> Iterator[str]:
    """The bounds of an option, from its JSON schema."""
    for part in (schema, *schema.get("anyOf", ())):
        yield from (f"{sign} {part[key]:g}" for key, sign in _BOUNDS.items() if key in part)
        yield from (words.format(part[key]) for key, words in _OTHERS.items() if key in part)


def show_components(rows: Sequence[dict[str, Any]], plugins: Sequence[dict[str, Any]]) -> None:
    """The list of components, a table for each kind and plugin; then the plugins that offer none."""
    console = Console(highlight=False, markup=False)
    if not plugins:
        console.print("No plugin offers anything. Is the package installed, and not left out with -p no:NAME?")
        return
    by_kind = sorted(rows, key=lambda row: (_place(row["kind"]), row["kind"], row["plugin"]))
    for _, group in groupby(by_kind, itemgetter("kind", "plugin")):
        console.print(_component_table(list(group)))
    for row in plugins:
        if not row["components"]:
            console.print(f"no component: {_with_remedy(row)}, {', '.join(row['hooks'])}")
    console.print("`cfsp plugins show NAME` explains one.")


def _place(kind: str) -> int:
    return _FIRST.index(kind) if kind in _FIRST else len(_FIRST) + (kind == "collector")


def _component_table(rows: Sequence[dict[str, Any]]) -> Table:
    collectors = rows[0]["kind"] == "collector"
    title = f"{rows[0]['kind']}: {_with_remedy(rows[0])}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name, and the statistic" if collectors else "name", no_wrap=True)
    if not collectors:
        table.add_column("reads", no_wrap=True)
    table.add_column("summary", ratio=1)
    for row in rows:
        summary = row["summary"].replace("`", "")
        if collectors:
            table.add_row(f"{row['name']}\n{row['provides']}", summary)
        else:
            table.add_row(row["name"], "\n".join(row["requires"]), summary)
    return table


def _offered_by(row: dict[str, Any]) -> str:
    return f"{row['plugin']} of {row['distribution']}" if row["distribution"] else row["plugin"]


def _with_remedy(row: dict[str, Any]) -> str:
    """``cfsp-criteria of cfsp-framework 0.1.0 (-p no:cfsp-criteria)``."""
    return f"{_offered_by(row)} ({row['leave_out']})" if row["leave_out"] else _offered_by(row)


def show_details(found: Sequence[dict[str, Any]]) -> None:
    """Each component's description, options and statistics."""
    console = Console(highlight=False, markup=False)
    for details in found:
        console.print(f"{details['kind']} {details['name']}, plugin {_offered_by(details)}", style="bold")
        if details["leave_out"]:
            console.print(f"Left out by {details['leave_out']}")
        console.print(f"Defined in {details['module']}, {_near(details['defined_in'])}", soft_wrap=True)
        console.print(Padding(Markdown(details["description"]), (1, 0)))
        if details["options"]:
            console.print(_option_table(details["options"]))
        if "measures" in details:
            console.print(_statistic_table("Measures", [details["measures"]]))
            console.print(f"Read by: {', '.join(details['read_by']) or 'no component'}")
        else:
            _show_statistics(details, console)
        console.print()


def _show_statistics(details: dict[str, Any], console: Console) -> None:
    if details["statistics"]:
        title = "Reads, with these defaults" if details["depends_on_options"] else "Reads"
        console.print(_statistic_table(title, details["statistics"]))
    else:
        console.print(f"Reads no statistics{' by default' if details['depends_on_options'] else ''}.")
    if "curve" in details:
        console.print(
            f"Asks for every block's {details['curve']} removal-error curve: a matrix of F x F numbers, "
            f"{DOWN_INPUT_GRAM.name}, of one feed-forward at a time, and its elimination."
        )


def _option_table(options: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="Options", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("name", no_wrap=True)
    table.add_column("type", ratio=2)
    table.add_column("default", no_wrap=True)
    table.add_column("meaning", ratio=3)
    for name, option in options.items():
        kind = " ".join(filter(None, (option["type"], option["allowed"])))
        table.add_row(name, kind, "required" if option["required"] else _yaml(option["default"]), option["description"])
    return table


def _statistic_table(title: str, statistics: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("statistic", no_wrap=True)
    table.add_column("meaning", ratio=1)
    table.add_column("cost", ratio=1)
    for statistic in statistics:
        table.add_row(statistic["name"], f"{statistic['shape']} {statistic['summary']}", statistic["cost"])
    return table


def _yaml(value: object) -> str:
    """A default as ``NAME:option=value`` takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _near(path: str) -> str:
    """A path from here, where it lies below."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
