"""What the documents say is what the code does: names, options, hooks, fields, links."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast, get_args, get_origin

import click
import pytest
import yaml
from click.testing import CliRunner

import cfsp_framework
from cfsp_framework import Allocator, Component, Event, Site, Statistic, Windows, statistics
from cfsp_framework.ablation.grid import expand
from cfsp_framework.api import hookspecs
from cfsp_framework.api.records import PruningPlan, Report
from cfsp_framework.cli.main import cli
from cfsp_framework.config import layered
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.statistics import DOWN_INPUT_GRAM
from cfsp_framework.testing import CONTRACTS

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CLI = ROOT / "docs" / "cli.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
HOOKS = ROOT / "docs" / "hooks.md"
STATISTICS = ROOT / "docs" / "statistics.md"
API = ROOT / "docs" / "api.md"
TESTING = ROOT / "docs" / "testing-plugins.md"
CRITERION = ROOT / "tests" / "fixtures" / "down_norm.py"
SHELVES = ("criteria", "allocators", "plugins")
DOCUMENTS = (README, *sorted((ROOT / "docs").rglob("*.md")), *(ROOT / shelf / "README.md" for shelf in SHELVES))

by_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def table(text: str, *headings: str) -> Iterator[list[str]]:
    """The rows under the table whose first headings are these, cell by cell."""
    lines = iter(text.splitlines())
    for line in lines:
        if cells(line)[: len(headings)] == list(headings):
            next(lines)
            for row in lines:
                if not row.startswith("|"):
                    return
                yield cells(row)
    raise AssertionError(f"there is no table with the headings {headings}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code(text: str) -> list[str]:
    """What stands between backticks."""
    return re.findall(r"`([^`]+)`", text)


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def test_the_readme_fits_on_two_screens() -> None:
    assert len(read(README).splitlines()) <= 120


def test_the_readme_lists_exactly_the_built_in_components() -> None:
    documented = {(kind, name) for kind, names, _ in table(read(README), "kind", "name") for name in code(names)}
    built_in = {
        (registry.kind, name)
        for registry in load_plugins().registries
        for name in registry
        if registry.origin(name).distribution == "cfsp-framework"
    }
    assert documented == built_in


def test_the_readme_criterion_is_the_tested_one_and_loads() -> None:
    [snippet] = [block for block in blocks(read(README), "python") if "@hookimpl" in block]
    assert snippet == read(CRITERION)
    assert len(snippet.splitlines()) <= 17
    plugins = load_plugins([str(CRITERION)])
    name = plugins.criteria["down-norm"].name
    assert f"-p {CRITERION.name} --criterion {name}" in read(README)


def test_the_readme_has_one_line_to_run_and_one_to_test() -> None:
    [commands] = [block for block in blocks(read(README), "bash") if "pip install" in block]
    lines = [line for line in commands.splitlines() if not line.startswith("#")]
    assert [line.rpartition(" && ")[2] for line in lines] == ["cfsp demo", ci_test_command()]


def ci_test_command() -> str:
    [command] = [line for line in read(ROOT / ".ci" / "run").splitlines() if line.startswith("python -m pytest")]
    return command


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def flags(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]


@pytest.mark.parametrize("model", [Report, PruningPlan])
def test_the_fields_of_the_json_files_are_documented(model: type[Report | PruningPlan]) -> None:
    heading = {Report: "report.json", PruningPlan: "pruning_plan.json"}[model]
    section = read(CLI).split(f"### `{heading}`")[1]
    documented = [name for cell, _ in table(section, "field", "meaning") for name in code(cell)]
    assert sorted(documented) == sorted(model.model_fields)


def hooks() -> dict[str, str]:
    """Every hook's name and its signature as it is written: ``cfsp_architecture(config: PreTrainedConfig) -> ...``."""
    tree = ast.parse(inspect.getsource(hookspecs))
    return {
        node.name: f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }


def test_every_hook_is_in_the_table_of_the_architecture() -> None:
    documented = {code(row[0])[0] for row in table(read(ARCHITECTURE), "hook")}
    expected = {f"{name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})" for name in hooks()}
    assert documented == expected


def test_every_hook_has_its_section_with_its_exact_signature_an_example_and_a_line_that_runs_it() -> None:
    sections = dict(re.findall(r"^## `(cfsp_.*?)`\n(.*?)(?=^## )", read(HOOKS), flags=re.DOTALL | re.MULTILINE))
    assert sorted(sections) == sorted(hooks().values())
    for name, signature in hooks().items():
        [example, *_] = blocks(sections[signature], "python")
        file = example.splitlines()[0].removeprefix("# ")
        assert f"@hookimpl\ndef {name}(" in example
        assert any(f"-p {file}" in line for line in blocks(sections[signature], "bash")), name
        assert sections[signature].strip().startswith("Called "), name


def test_the_events_are_documented_with_their_fields() -> None:
    documented = {code(event)[0]: code(fields) for event, fields, _ in table(read(HOOKS), "event")}
    assert documented == {event.__name__: [f.name for f in dataclasses.fields(event)] for event in get_args(Event)}


def test_what_is_public_is_on_the_api_page() -> None:
    shown = {
        module: set(re.findall(r"\w+", members)) if members else None
        for module, members in re.findall(
            r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", read(API), re.MULTILINE
        )
    }
    for name in cfsp_framework.__all__:
        value = getattr(cfsp_framework, name)
        module = getattr(value, "__module__", "cfsp_framework.api.components")
        found = (
            "cfsp_framework.api.events"
            if name == "Event"
            else "cfsp_framework.api.hookspecs"
            if name == "hookimpl"
            else module
        )
        found = found if found.startswith("cfsp_framework") else "cfsp_framework.api.components"
        assert found in shown, name
        members = shown[found]
        assert members is None or name in members, name


# --- statistics ------------------------------------------------------------------------------------------------------

SITES = {
    Site.BLOCK: "block",
    Site.FEED_FORWARD: "feed-forward",
    Site.DOWN_PROJECTION: "down projection",
    Site.GRADIENT: "gradient",
}
WINDOWS = {Windows.ALL: "all", Windows.FITTED: "fitted", Windows.HELD_OUT: "held out"}


def variants(cls: type[Component]) -> Iterator[Component]:
    """The component with every choice of its options that have a few."""
    choices = {
        name: (False, True) if field.annotation is bool else get_args(field.annotation)
        for name, field in cls.model_fields.items()
        if field.annotation is bool or get_origin(field.annotation) is Literal
    }
    for values in itertools.product(*choices.values()):
        yield cls.model_validate(dict(zip(choices, values, strict=True)))


def readers() -> dict[str, set[tuple[str, str]]]:
    """Kind and name of all that read a statistic, under whatever options."""
    found: dict[str, set[tuple[str, str]]] = {}
    plugins = load_plugins()
    for registry in (plugins.criteria, plugins.allocators, plugins.compensators, plugins.recovery_schedulers):
        for name, cls in registry.items():
            read_by = {statistic for variant in variants(cls) for statistic in variant.required()}
            if issubclass(cls, Allocator) and any(cast("Allocator", one).curve() for one in variants(cls)):
                read_by.add(DOWN_INPUT_GRAM)
            for statistic in read_by:
                found.setdefault(statistic.name, set()).add((registry.kind, name))
    return found


def test_every_statistic_is_documented_as_it_is_measured() -> None:
    rows = {code(row[0])[0]: row[1:] for row in table(read(STATISTICS), "statistic", "shape")}
    expected = {}
    for cls in load_plugins().collectors.values():
        windows = WINDOWS[cls.windows] + (", in order" if cls.ordered else "")
        expected[cls.provides.name] = (f"`{cls.provides.shape}`", windows, SITES[cls.site])
    assert {name: (row[0], row[3], row[4]) for name, row in rows.items()} == expected
    assert all(formula and unit for _, formula, unit, *_ in rows.values())


def test_every_statistic_s_cost_and_readers_are_documented() -> None:
    rows = {code(row[0])[0]: row[1:] for row in table(read(STATISTICS), "statistic", "work per token")}
    collectors = load_plugins().collectors.values()
    assert {name: heavy for name, (_, _, heavy, _) in rows.items()} == {
        cls.provides.name: "yes" if cls.provides.heavy else "no" for cls in collectors
    }
    documented = {
        name: {(part.split()[0], one) for part in reader.split("; ") for one in code(part)}
        for name, (*_, reader) in rows.items()
    }
    assert documented == readers()


def test_constants_of_statistics_are_called_as_documented() -> None:
    constants = {name: value for name, value in vars(statistics).items() if isinstance(value, Statistic)}
    assert {value.name.upper() for value in constants.values()} == set(constants)
    collected = {cls.provides.name for cls in load_plugins().collectors.values()}
    assert {name.removesuffix("_held_out") for name in collected} == {value.name for value in constants.values()}


def test_every_check_of_the_contracts_is_documented() -> None:
    documented = {(who.strip("`"), check): what for who, check, what in table(read(TESTING), "contract", "check")}
    checks = {
        (contract.__name__, name.removeprefix("test_").replace("_", " ")): inspect.getdoc(getattr(contract, name)) or ""
        for contract in CONTRACTS.values()
        for name in contract.checks()
    }
    everywhere = {check for _, check in checks if all((one.__name__, check) in checks for one in CONTRACTS.values())}
    assert documented == {
        ("all" if check in everywhere else who, check): " ".join(what.replace("``", "`").split())
        for (who, check), what in checks.items()
    }


# --- everything that is written down runs ----------------------------------------------------------------------------

NOT_RUN = {
    "docs/ablations.md",
    "docs/benchmarks.md",
    "docs/deploy.md",
    "docs/examples/cfsp-peak/README.md",  # .ci/example runs it, installed
    "docs/recovery.md",
}
"""Documents whose commands take longer than a test should; that their options exist is checked all the same."""
RUN = ("prune", "plan", "recover", "evaluate", "plugins")
HUB = {"--tasks", "--push-to-hub"}
"""Options of commands that are not run here: they read from the Hub, or write to it."""
PREPARED = {"README.md": ("cfsp prune demo out-uniform --allocator uniform",)}
"""What a document takes for granted."""
CHEAP = {
    "--samples": "2", "--seqlen": "32", "--evaluate-windows": "1", "--recovery-steps": "1", "--device": "cpu",
    "--calibration": "notes.txt", "--overwrite": None,
}  # fmt: skip
"""Options put behind what is written."""
_MODEL = re.compile(r"MODEL|[a-z][\w-]+/[A-Za-z][\w.-]+")
_DATA = re.compile(r"(?:demo|wikitext2|ptb|c4|fineweb-edu)$")
_FENCE = re.compile(r"^(<!-- not run: .*? -->\n)?```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[list[str]]:
    """The words of every ``cfsp`` command in a block of bash."""
    lines = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
    words = [shlex.split(line.partition(" #")[0]) for line in lines if line.strip() and not line.startswith("#")]
    torchrun = [one[one.index("-m") + 2 :] for one in words if one[0] == "torchrun"]
    found = [one[1:] for one in words if one[0] == "cfsp"] + torchrun
    return found


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that is named, and the words after its name."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(click.Context(command), words[0])
        assert found is not None, f"there is no command {words[0]!r}"
        command, words = found, words[1:]
    return command, words


def cheap(words: list[str]) -> list[str]:
    """The same command on the demo model and a little text."""
    command, _ = find_command(words)
    known = {flag for option in options(command) for flag in flags(option)}
    small = ["notes.txt" if before.startswith("--") and _DATA.match(word) else word for before, word in pairwise(words)]
    small = [words[0], *("demo" if _MODEL.fullmatch(word) else word for word in small)]
    for flag, value in CHEAP.items():
        if flag in known:
            small += [flag] if value is None else [flag, value]
    return small


@by_document
def test_every_option_of_every_command_line_exists(path: Path) -> None:
    for block in blocks(read(path), "bash"):
        for words in command_lines(block):
            command, rest = find_command(words)
            known = {flag for option in options(command) for flag in flags(option)} | {"--help", "-h"}
            for word in rest:
                if word.startswith("-"):
                    assert word.partition("=")[0] in known, f"{' '.join(words)}: {word}"


@by_document
def test_what_is_written_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each document from top to bottom in a folder of its own; a block that starts with ``# NAME.py`` is that file."""
    document = str(path.relative_to(ROOT))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("".join(f"{n} squared is {n * n}, and so on.\n" for n in range(400)))
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, object] = {"__name__": "documented"}
    for line in PREPARED.get(document, ()):
        run_line(shlex.split(line)[1:])
    for marked, language, body in _FENCE.findall(read(path)):
        file = re.match(r"# ([\w.]+\.\w+)\n", body)
        if file:
            (tmp_path / file[1]).write_text(body, encoding="utf-8")
        if language == "toml":
            tomllib.loads(body)
        elif language == "yaml" and "rows:" in body:
            assert expand("demo", yaml.safe_load(body))
        elif language == "yaml" and "preset" in body:
            (tmp_path / "run.yaml").write_text(body, encoding="utf-8")
            layered(None, tmp_path / "run.yaml", {"model": "demo"})
        elif marked or document in NOT_RUN:
            continue
        elif language == "python" and not file:
            exec(compile(body, document, "exec"), namespace)  # noqa: S102
        elif language == "bash":
            for words in command_lines(body):
                if words[0] in RUN and "torchrun" not in body and not HUB.intersection(words):
                    run_line(words)
            for line in body.splitlines():
                if line.startswith("python -m pytest"):
                    subprocess.run([sys.executable, *line.split()[1:], "-q", "-p", "no:cacheprovider"], check=True)


def run_line(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        done = CliRunner().invoke(cli, cheap(words))
    assert done.exit_code == 0, f"cfsp {' '.join(words)}\n{done.output}\n{done.exception!r}"


def test_the_site_builds_without_a_word(tmp_path: Path) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    arguments = [
        "build",
        "--quiet",
        "--strict",
        "-f",
        str(ROOT / "docs" / "site" / "mkdocs.yml"),
        "-d",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= pages
    written = "".join(page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html"))
    assert re.search(r"(?:src|href)=.?https?://[^ >]*(?:fonts|cdn)", written) is None  # nothing is fetched


@by_document
def test_links_and_paths_point_to_files(path: Path) -> None:
    text = read(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target:
            assert (path.parent / target.partition("#")[0]).exists(), target
    for file, name in re.findall(
        r"`((?:cfsp_framework|criteria|allocators|plugins|tests)/[\w/]+\.py)`(?:,\s`(\w+)`)?", text
    ):
        assert (ROOT / file).is_file(), file
        if name:
            assert re.search(rf"^\s*(?:class|def) {name}\b", read(ROOT / file), flags=re.MULTILINE), f"{file}: {name}"


@by_document
def test_python_in_the_documents_is_python(path: Path) -> None:
    for block in blocks(read(path), "python"):
        ast.parse(textwrap.dedent(block))


@pytest.mark.parametrize("shelf", ["allocators", "plugins"])
def test_the_plugins_in_the_shelves_documents_load(shelf: str, tmp_path: Path) -> None:
    [block] = blocks(read(ROOT / shelf / "README.md"), "python")
    plugin = tmp_path / f"{shelf}_readme.py"
    plugin.write_text(block, encoding="utf-8")
    assert len(load_plugins([str(plugin)]).origins) == len(load_plugins().origins) + 1


@by_document
def test_no_document_names_a_private_place(path: Path) -> None:
    text = read(path)
    assert re.search(r"(?<![\w.])/(work|home|root|tmp)/", text) is None
    assert "../shared" not in text
