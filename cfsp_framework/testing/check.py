"""Contracts run without a test: finding what a word on the command line means, and a verdict for every check."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from cfsp_framework.api.components import Component
from cfsp_framework.api.hookspecs import NAMESPACE
from cfsp_framework.config import parse_choice
from cfsp_framework.errors import ConfigError, did_you_mean
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Origin, Plugins, Registry
from cfsp_framework.testing import CONTRACTS
from cfsp_framework.testing.contract import describe, variants
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.guards import restored
from cfsp_framework.testing.samples import one_line

Verdict = Literal["pass", "fail", "skip"]
_ROOM = 14
"""The least width of a component's column."""


@dataclass(frozen=True)
class Result:
    """What one check found of one component."""

    kind: str
    name: str
    component: str
    """With the options it was checked with."""
    check: str
    verdict: Verdict
    message: str = ""

    def as_json(self) -> dict[str, str]:
        """For programs."""
        return {**vars(self)}


@dataclass(frozen=True)
class Target:
    """What is to be checked, and where it comes from."""

    components: tuple[Component, ...]
    skipped: tuple[Result, ...]
    """Components that cannot be made without being told an option."""
    origins: tuple[Origin, ...]
    plugins: Plugins


def find_target(word: str, specs: Sequence[str] = ()) -> Target:
    """What ``word`` names: a plugin, a distribution, a component with or without options, a module, or a file.

    Raises:
        ConfigError: it names nothing that can be checked.
        PluginError: a plugin cannot be loaded.
    """
    if word.endswith(".py"):
        return _of_plugins(load_plugins([*specs, word]), lambda origin: origin.plugin == word, word)
    plugins = load_plugins(specs)
    by_module = {point.module: point.name for point in entry_points(group=NAMESPACE)}
    for matches in (
        lambda origin: origin.plugin == word,
        lambda origin: _normal(origin.distribution) == _normal(word),
        lambda origin: origin.plugin == by_module.get(word),
    ):
        if any(map(matches, plugins.origins.values())):
            return _of_plugins(plugins, matches, word)
    choice = parse_choice(word)
    found = [registry for registry in plugins.registries if choice["name"] in registry]
    if found:
        return _of_component(plugins, found, word)
    if ":" not in word and _importable(word):
        return _of_plugins(load_plugins([*specs, word]), lambda origin: origin.plugin == word, word)
    known = {*plugins.origins, *(name for registry in plugins.registries for name in registry)}
    close = did_you_mean(str(choice["name"]), known).partition(" Available:")[0]
    raise ConfigError(
        f"{word!r} is no plugin, component, distribution, module or file.py.{close} `cfsp plugins list` shows all; "
        "-p loads a file or module first."
    )


def run_contracts(target: Target, told: Callable[[str], None] = lambda component: None) -> Iterator[Result]:
    """Every check of every component, in order; ``told`` hears which component is next."""
    collectors = tuple(target.plugins.collectors.values())
    for component in target.components:
        label = describe(component)
        told(f"{component.kind} {label}")
        contract = type("Contract", (CONTRACTS[component.kind],), {"collectors": collectors})()
        for check in contract.checks():
            verdict, message = _verdict(getattr(contract, check), component)
            yield Result(component.kind, component.name, label, check.removeprefix("test_"), verdict, message)
    yield from target.skipped


def show_results(target: Target, results: Sequence[Result]) -> None:
    """A table of checks and components for each kind, and what the failures say."""
    console = Console(highlight=False, markup=False)
    for origin in target.origins:
        console.print(f"{str(origin)[0].upper()}{str(origin)[1:]}", soft_wrap=True)
    for kind, group in groupby((one for one in results if one.check), lambda one: one.kind):
        of_kind = list(group)
        names = list(dict.fromkeys(one.name for one in of_kind))
        room = max(1, (console.width - 52) // max(_ROOM, 3 + max(map(len, names))))
        for start in range(0, len(names), room):
            console.print(_table(kind, of_kind, names[start : start + room]))
    for one in results:
        if one.verdict == "fail":
            console.print(f"FAIL {one.kind} {one.component}: {_words(one.check)}", style="bold", soft_wrap=True)
            console.print(f"  {one.message}", soft_wrap=True)
        elif one.verdict == "skip" and not one.check:
            console.print(f"Not checked: {one.message}", soft_wrap=True)
    console.print(summary(results), soft_wrap=True)


def summary(results: Sequence[Result]) -> str:
    """The verdicts counted, in one line."""
    checked = [one for one in results if one.check]
    counts = {verdict: sum(one.verdict == verdict for one in checked) for verdict in ("pass", "fail", "skip")}
    components = len({(one.kind, one.component) for one in checked})
    told = (
        f"{components} component{'s' * (components != 1)}: {counts['pass']} checks passed, {counts['fail']} failed, "
        f"{counts['skip']} do not apply."
    )
    if find_spec("hypothesis") is None:
        told += " With hypothesis (pip install 'cfsp-framework[test]') more cases are tried."
    return told


def failed(results: Sequence[Result]) -> bool:
    """Whether something is to be changed."""
    return any(one.verdict == "fail" for one in results)


def _table(kind: str, results: Sequence[Result], names: Sequence[str]) -> Table:
    """Options of one component are one column: the worst verdict counts."""
    table = Table(title=f"{kind}: checks", title_justify="left")
    table.add_column("check", overflow="fold")
    for name in names:
        table.add_column(name, no_wrap=True)
    for check in dict.fromkeys(one.check for one in results):
        cells = list[str]()
        for name in names:
            found = {one.verdict for one in results if one.check == check and one.name == name}
            cells.append("FAIL" if "fail" in found else "pass" if "pass" in found else "-")
        table.add_row(_words(check), *cells)
    return table


def _words(check: str) -> str:
    return check.replace("_", " ")


def _verdict(check: Callable[[Component], None], component: Component) -> tuple[Verdict, str]:
    try:
        with restored():
            check(component)
    except NotApplicable as reason:
        return "skip", str(reason)
    except ContractError as error:
        return "fail", str(error)
    except Exception as error:  # noqa: BLE001  (what no check foresaw is a failure too, not the end of the others)
        return "fail", f"It raised {one_line(error)}"
    return "pass", ""


def _of_plugins(plugins: Plugins, matches: Callable[[Origin], bool], word: str) -> Target:
    origins = tuple(origin for origin in plugins.origins.values() if matches(origin))
    components, skipped = list[Component](), list[Result]()
    for registry in plugins.registries:
        for name, cls in registry.items():
            if registry.origin(name) in origins:
                try:
                    components += variants(cls)
                except ConfigError as error:
                    skipped.append(Result(registry.kind, name, name, "", "skip", str(error)))
    if not components and not skipped:
        raise ConfigError(f"{word!r} offers no component; only components have contracts.")
    return Target(tuple(components), tuple(skipped), origins, plugins)


def _of_component(plugins: Plugins, registries: Sequence[Registry[Any]], word: str) -> Target:
    choice = parse_choice(word)
    name, options = str(choice["name"]), choice["options"]
    assert isinstance(options, dict)
    components = list[Component]()
    for registry in registries:
        components += [registry.create(name, options).component] if options else variants(registry[name])
    origins = tuple(dict.fromkeys(registry.origin(name) for registry in registries))
    return Target(tuple(components), (), origins, plugins)


def _normal(name: str | None) -> str | None:
    return None if name is None else re.sub(r"[-_.]+", "-", name).lower()


def _importable(word: str) -> bool:
    """Whether a module is there; what happens when it is imported is another matter."""
    if not all(part.isidentifier() for part in word.split(".")):
        return False
    try:
        return find_spec(word) is not None
    except (ImportError, ValueError):
        return False
