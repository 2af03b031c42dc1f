"""Run contracts without a test: find the components that a target names, check them, and print the results."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import groupby
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from cfsp_framework.api.components import Component
from cfsp_framework.api.hookspecs import NAMESPACE
from cfsp_framework.config import parse_choice
from cfsp_framework.errors import ConfigError, did_you_mean, one_line
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Origin, Plugins
from cfsp_framework.testing import CONTRACTS
from cfsp_framework.testing.contract import describe, variants
from cfsp_framework.testing.errors import ContractError, NotApplicable

Verdict = Literal["pass", "fail", "skip"]
_COLUMN_WIDTH = 14
"""Least width of a component's column."""
_CHECK_WIDTH = 52
"""Width that the column of checks leaves free for others."""


@dataclass(frozen=True)
class Result:
    """The verdict of one check on one component."""

    kind: str
    name: str
    component: str
    """The name with the options of the check."""
    check: str
    verdict: Verdict
    message: str = ""

    def as_json(self) -> dict[str, str]:
        """Return the result for JSON output."""
        return asdict(self)


@dataclass(frozen=True)
class Target:
    """Components to check, and the plugins that they come from."""

    components: tuple[Component, ...]
    skipped: tuple[Result, ...]
    """Components with an option that has no default."""
    origins: tuple[Origin, ...]
    plugins: Plugins


def find_target(word: str, specs: Sequence[str] = ()) -> Target:
    """Find what ``word`` names: a plugin, a distribution, a component with or without options, a module, or a file.

    Raises:
        ConfigError: it names nothing that can be checked.
        PluginError: a plugin cannot be loaded.
    """
    if word.endswith(".py"):
        return _find_components(load_plugins([*specs, word]), lambda origin: origin.plugin == word, word)
    plugins = load_plugins(specs)
    by_module = {point.module: point.name for point in entry_points(group=NAMESPACE)}
    for matches in (
        lambda origin: origin.plugin == word,
        lambda origin: _normalize(origin.distribution) == _normalize(word),
        lambda origin: origin.plugin == by_module.get(word),
    ):
        if any(map(matches, plugins.origins.values())):
            return _find_components(plugins, matches, word)
    choice: Any = parse_choice(word)
    name, options = choice["name"], choice["options"]
    registries = [registry for registry in plugins.registries if name in registry]
    if registries:
        components = list[Component]()
        for registry in registries:
            components += [registry.create(name, options).component] if options else variants(registry[name])
        origins = dict.fromkeys(registry.origin(name) for registry in registries)
        return Target(tuple(components), (), tuple(origins), plugins)
    if ":" not in word and _is_importable(word):
        return _find_components(load_plugins([*specs, word]), lambda origin: origin.plugin == word, word)
    known = {*plugins.origins, *(name for registry in plugins.registries for name in registry)}
    suggestion = did_you_mean(name, known).partition(" Available:")[0]
    raise ConfigError(
        f"{word!r} is not a plugin, component, distribution, module or file.py.{suggestion} `cfsp plugins list` shows "
        "all; -p loads a file or module first."
    )


def run_contracts(target: Target, step: Callable[[], None] = lambda: None) -> Iterator[Result]:
    """Run every check of every component, in order; ``step`` is called for each component."""
    collectors = tuple(target.plugins.collectors.values())
    for component in target.components:
        step()
        contract = type("Contract", (CONTRACTS[component.kind],), {"collectors": collectors})()
        for check in contract.checks():
            verdict, message = _run_check(getattr(contract, check), component)
            label = check.removeprefix("test_")
            yield Result(component.kind, component.name, describe(component), label, verdict, message)
    yield from target.skipped


def show_results(target: Target, results: Sequence[Result]) -> None:
    """Print tables of checks and components, the messages of failures, and a summary."""
    console = Console(highlight=False, markup=False)
    for origin in map(str, target.origins):
        console.print(f"{origin[0].upper()}{origin[1:]}", soft_wrap=True)
    for kind, group in groupby((result for result in results if result.check), lambda result: result.kind):
        of_kind = list(group)
        names = list(dict.fromkeys(result.name for result in of_kind))
        columns = max(1, (console.width - _CHECK_WIDTH) // max(_COLUMN_WIDTH, 3 + max(map(len, names))))
        for start in range(0, len(names), columns):
            console.print(_make_table(kind, of_kind, names[start : start + columns]))
    failures: dict[tuple[str, str], list[str]] = {}  # checks by component and message
    for result in results:
        if result.verdict == "fail":
            failures.setdefault((f"{result.kind} {result.component}", result.message), []).append(result.check)
    for (component, message), checks in failures.items():
        console.print(f"FAIL {component}: {', '.join(map(_in_words, checks))}", style="bold", soft_wrap=True)
        console.print(f"  {message}", soft_wrap=True)
    for result in results:
        if not result.check:
            console.print(f"Not checked: {result.message}", soft_wrap=True)
    console.print(summarize(results), soft_wrap=True)


def summarize(results: Sequence[Result]) -> str:
    """Count the verdicts, in one line."""
    checked = [result for result in results if result.check]
    passed, failures, skipped = (sum(r.verdict == verdict for r in checked) for verdict in ("pass", "fail", "skip"))
    components = len({(result.kind, result.component) for result in checked})
    line = (
        f"{components} component{'s' * (components != 1)}: {passed} checks passed, {failures} failed, "
        f"{skipped} do not apply."
    )
    if find_spec("hypothesis") is None:
        line += " With hypothesis (pip install 'cfsp-framework[test]') more cases are tried."
    return line


def failed(results: Sequence[Result]) -> bool:
    """Return whether a check failed."""
    return any(result.verdict == "fail" for result in results)


def _make_table(kind: str, results: Sequence[Result], names: Sequence[str]) -> Table:
    """Make a table with a row for each check and a column for each component, the worst verdict of its options."""
    table = Table(title=f"{kind}: checks", title_justify="left")
    table.add_column("check", overflow="fold")
    for name in names:
        table.add_column(name, no_wrap=True)
    for check in dict.fromkeys(result.check for result in results):
        cells = list[str]()
        for name in names:
            verdicts = {result.verdict for result in results if result.check == check and result.name == name}
            cells.append("FAIL" if "fail" in verdicts else "pass" if "pass" in verdicts else "-")
        table.add_row(_in_words(check), *cells)
    return table


def _in_words(check: str) -> str:
    return check.replace("_", " ")


def _run_check(check: Callable[[Component], None], component: Component) -> tuple[Verdict, str]:
    try:
        check(component)
    except NotApplicable as reason:
        return "skip", str(reason)
    except ContractError as error:
        return "fail", str(error)
    except Exception as error:  # noqa: BLE001  (a failure that no check expects must not end the other checks)
        return "fail", f"It raised {one_line(error)}"
    return "pass", ""


def _find_components(plugins: Plugins, matches: Callable[[Origin], bool], word: str) -> Target:
    """Find all components of the plugins that match, with every value of their switches."""
    origins = tuple(filter(matches, plugins.origins.values()))
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


def _normalize(name: str | None) -> str | None:
    """Return a distribution's name as PEP 503 normalises it."""
    return None if name is None else re.sub(r"[-_.]+", "-", name).lower()


def _is_importable(word: str) -> bool:
    """Return whether a module exists, without importing it."""
    try:
        return find_spec(word) is not None
    except (ImportError, ValueError):
        return False
