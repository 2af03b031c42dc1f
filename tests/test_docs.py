"""Compare the documents with the code: names, options, hooks, fields and links match, and commands and snippets run."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import itertools
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast, get_args, get_origin

import click
import pytest
import yaml
from click.testing import CliRunner

import cfsp_framework
from cfsp_framework import Allocator, Component, Event, Statistic, statistics
from cfsp_framework.ablation.grid import expand
from cfsp_framework.api import hookspecs
from cfsp_framework.api.records import PruningPlan, Report
from cfsp_framework.cli.main import cli
from cfsp_framework.config import layered
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.testing import CONTRACTS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README, CLI, HOOKS, STATISTICS = ROOT / "README.md", DOCS / "cli.md", DOCS / "hooks.md", DOCS / "statistics.md"
CRITERION = ROOT / "tests" / "fixtures" / "down_norm.py"
SHELVES = [ROOT / shelf / "README.md" for shelf in ("criteria", "allocators", "plugins")]
DOCUMENTS = (README, *sorted(DOCS.rglob("*.md")), *SHELVES)
PLUGINS = load_plugins()

by_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def table(text: str, *headings: str) -> Iterator[list[str]]:
    """Yield the rows, cell by cell, of the table whose first headings are these."""
    lines = iter(text.splitlines())
    for line in lines:
        if cells(line)[: len(headings)] == list(headings):
            next(lines)
            yield from map(cells, itertools.takewhile(lambda row: row.startswith("|"), lines))
            return
    raise AssertionError(f"no table has the headings {headings}")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def code(text: str) -> list[str]:
    """Return the spans between backticks."""
    return re.findall(r"`([^`]+)`", text)


def fenced(text: str, language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into an empty folder that holds a short text, ``notes.txt``."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("".join(f"{n} squared is {n * n}, and so on.\n" for n in range(400)))
    return tmp_path


def test_the_readme_has_at_most_120_lines_and_the_glossary_at_most_20_terms() -> None:
    assert len(read(README).splitlines()) <= 120
    terms = [term for term, _ in table(read(DOCS / "glossary.md"), "term", "meaning")]
    assert len(terms) == len(set(terms)) <= 20


def test_the_readme_has_one_row_for_each_built_in_component_but_collectors() -> None:
    documented = [(kind, code(name)) for kind, name, _ in table(read(README), "kind", "name")]
    built_in = [
        (registry.kind, [name])
        for registry in PLUGINS.registries
        if registry.kind != "collector"
        for name in registry
        if registry.origin(name).distribution == "cfsp-framework"
    ]
    assert sorted(documented) == sorted(built_in)


def test_the_criterion_of_the_readme_is_the_tested_one_and_runs(folder: Path) -> None:
    [snippet] = [block for block in fenced(read(README), "python") if "@hookimpl" in block]
    assert snippet == read(CRITERION)
    assert len(snippet.splitlines()) <= 17
    (folder / CRITERION.name).write_text(snippet, encoding="utf-8")
    lines = re.findall(rf"`cfsp ([^`\n]*{CRITERION.name}[^`\n]*)`", read(README))
    assert [line.split()[0] for line in lines] == ["prune", "plugins"]
    for line in lines:
        run_command(shlex.split(line))


def test_the_last_test_command_of_the_readme_is_the_one_of_ci() -> None:
    [ci] = [line for line in read(ROOT / ".ci" / "run").splitlines() if line.startswith("python -m pytest")]
    [command] = re.findall(r"^.*pip install.*pytest.*$", read(README), flags=re.MULTILINE)
    assert command.rpartition(" && ")[2] == ci


def commands(command: click.Command = cli, path: str = "cfsp") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its path: (`cfsp plugins list`, ...)."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            subcommand = command.get_command(context, name)
            assert subcommand is not None
            yield from commands(subcommand, f"{path} {name}")


def flags(command: click.Command) -> set[str]:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {flag for option in options for flag in (*option.opts, *option.secondary_opts)}


@pytest.mark.parametrize(("model", "heading"), [(Report, "report.json"), (PruningPlan, "pruning_plan.json")])
def test_fields_of_json_files_are_documented(model: type[Report | PruningPlan], heading: str) -> None:
    section = read(CLI).split(f"### `{heading}`")[1]
    documented = [name for cell, _ in table(section, "field", "meaning") for name in code(cell)]
    assert sorted(documented) == sorted(model.model_fields)


def signatures() -> dict[str, str]:
    """Return every hook's signature: ``cfsp_architecture(config: PreTrainedConfig) -> ...``."""
    return {
        node.name: f"{node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"
        for node in ast.parse(inspect.getsource(hookspecs)).body
        if isinstance(node, ast.FunctionDef) and node.returns is not None
    }


def test_every_hook_is_in_the_architecture_and_has_a_section_with_signature_example_and_command() -> None:
    arguments = {name: ", ".join(inspect.signature(getattr(hookspecs, name)).parameters) for name in signatures()}
    rows = {code(row[0])[0] for row in table(read(DOCS / "architecture.md"), "hook")}
    assert rows == {f"{name}({names})" for name, names in arguments.items()}
    sections = dict(re.findall(r"^## `(cfsp_.*?)`\n(.*?)(?=^## )", read(HOOKS), flags=re.DOTALL | re.MULTILINE))
    assert sorted(sections) == sorted(signatures().values())
    for name, signature in signatures().items():
        [example, *_] = fenced(sections[signature], "python")
        file = example.splitlines()[0].removeprefix("# ")
        assert f"@hookimpl\ndef {name}(" in example
        assert any(f"-p {file}" in block for block in fenced(sections[signature], "bash")), name
        assert sections[signature].strip().startswith("Called "), name  # when


def test_events_are_documented_with_their_fields() -> None:
    documented = {code(event)[0]: code(fields) for event, fields, _ in table(read(HOOKS), "event")}
    assert documented == {event.__name__: [f.name for f in dataclasses.fields(event)] for event in get_args(Event)}


def test_every_public_name_is_on_the_api_page() -> None:
    directive = re.compile(r"^::: ([\w.]+)(?:\n    options:\n      members: \[(.*)\])?", flags=re.MULTILINE)
    shown = {module: re.findall(r"\w+", members) for module, members in directive.findall(read(DOCS / "api.md"))}
    for name in cfsp_framework.__all__:
        origin = getattr(getattr(cfsp_framework, name), "__module__", "")
        if not origin.startswith("cfsp_framework"):  # a constant, or an object of another library
            origin = next(module for module in shown if hasattr(importlib.import_module(module), name))
        assert origin in shown, name
        assert not shown[origin] or name in shown[origin], name


def test_every_check_of_the_contracts_is_documented() -> None:
    rows = table(read(DOCS / "testing-plugins.md"), "contract", "check")
    documented = {(contract.strip("`"), check): description for contract, check, description in rows}
    checks = {
        (contract.__name__, name.removeprefix("test_").replace("_", " ")): inspect.getdoc(getattr(contract, name)) or ""
        for contract in CONTRACTS.values()
        for name in contract.checks()
    }
    common = {
        check for _, check in checks if all((contract.__name__, check) in checks for contract in CONTRACTS.values())
    }
    assert documented == {
        ("all" if check in common else name, check): " ".join(description.replace("``", "`").split())
        for (name, check), description in checks.items()
    }


def variants(cls: type[Component]) -> Iterator[Component]:
    """Yield a component with every combination of its boolean and literal options."""
    choices = {
        name: (False, True) if field.annotation is bool else get_args(field.annotation)
        for name, field in cls.model_fields.items()
        if field.annotation is bool or get_origin(field.annotation) is Literal
    }
    for values in itertools.product(*choices.values()):
        yield cls.model_validate(dict(zip(choices, values, strict=True)))


def readers() -> dict[str, set[tuple[str, str]]]:
    """Return kind and name of the components that read each statistic, under any options."""
    by_statistic: dict[str, set[tuple[str, str]]] = {}
    for registry in (PLUGINS.criteria, PLUGINS.allocators, PLUGINS.compensators, PLUGINS.recovery_schedulers):
        for name, cls in registry.items():
            required = {statistic for variant in variants(cls) for statistic in variant.required()}
            if issubclass(cls, Allocator) and any(cast("Allocator", variant).curve() for variant in variants(cls)):
                required.add(statistics.DOWN_INPUT_GRAM_RELATIVE)
            for statistic in required:
                by_statistic.setdefault(statistic.name, set()).add((registry.kind, name))
    return by_statistic


def test_statistics_are_documented_as_they_are_measured() -> None:
    rows = {code(row[0])[0]: row[1:] for row in table(read(STATISTICS), "statistic", "shape")}
    assert all(formula and unit for _, formula, unit, *_ in rows.values())
    costs = {code(row[0])[0]: row[1:] for row in table(read(STATISTICS), "statistic", "work per token")}
    expected, heavy = {}, {}
    for cls in PLUGINS.collectors.values():
        statistic, site = cls.provides, cls.site.value.replace("_", " ").replace("feed forward", "feed-forward")
        windows = cls.windows.value.replace("_", " ") + (", in order" if cls.ordered else "")
        expected[statistic.name] = (f"`{statistic.shape}`", windows, site)
        heavy[statistic.name] = "yes" if statistic.heavy else "no"
    assert {name: (row[0], row[3], row[4]) for name, row in rows.items()} == expected
    assert {name: row[2] for name, row in costs.items()} == heavy
    documented = {
        name: {(part.split()[0], reader) for part in row[3].split("; ") for reader in code(part)}
        for name, row in costs.items()
    }
    assert {name: parts for name, parts in documented.items() if parts} == readers()
    constants = {value.name: name for name, value in vars(statistics).items() if isinstance(value, Statistic)}
    assert constants == {name: name.upper() for name in (name.removesuffix("_held_out") for name in expected)}


# --- commands and snippets run ---------------------------------------------------------------------------------------

NOT_RUN = {f"docs/{page}.md" for page in ("ablations", "benchmarks", "deploy", "recovery", "examples/cfsp-peak/README")}
"""Documents whose commands take longer than a test should; the existence of their options is checked.
``.ci/example`` runs those of the example."""
RUN = ("prune", "plan", "recover", "evaluate", "plugins")
HUB = {"--tasks", "--push-to-hub"}
"""Options of commands that are not run here, because they read from the Hub or write to it."""
SMALL = "--samples 2 --seqlen 32 --evaluate-windows 1 --recovery-steps 1 --device cpu --calibration notes.txt".split()  # noqa: SIM905
"""Options appended to a documented command that has them, to make it fast and local."""
_MODEL = re.compile(r"MODEL|(?!USER/)[A-Za-z][\w-]+/[A-Za-z][\w.-]+")
_DATA = re.compile(r"(?:demo|wikitext2|ptb|c4|fineweb-edu)$")
_FENCE = re.compile(r"^(<!-- not run: .*? -->\n)?```(\w+)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[list[str]]:
    """Return the words of every ``cfsp`` command in a block of bash, those under torchrun last."""
    lines = [part for line in text.replace("\\\n", " ").splitlines() for part in line.split(" && ")]
    words = [shlex.split(line.partition(" #")[0]) for line in lines if line.strip() and not line.startswith("#")]
    under_torchrun = [line[line.index("-m") + 2 :] for line in words if line[0] == "torchrun"]
    return [line[1:] for line in words if line[0] == "cfsp"] + under_torchrun


def find_command(words: list[str]) -> tuple[click.Command, list[str]]:
    """Return the named command and the words after its name."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        subcommand = command.get_command(click.Context(command), words[0])
        assert subcommand is not None, f"{words[0]!r} is not a command"
        command, words = subcommand, words[1:]
    return command, words


def shrink(words: list[str]) -> list[str]:
    """Return the same command on the demo model and a short text."""
    known = flags(find_command(words)[0])
    local = [
        "notes.txt" if option.startswith("--") and _DATA.match(word) else "demo" if _MODEL.fullmatch(word) else word
        for option, word in itertools.pairwise(words)
    ]
    small = [part for pair in zip(SMALL[::2], SMALL[1::2], strict=True) if pair[0] in known for part in pair]
    return [words[0], *local, *small, *({"--overwrite"} & known)]


def run_command(words: list[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(cli, shrink(words))
    assert result.exit_code == 0, f"cfsp {' '.join(words)}\n{result.output}\n{result.exception!r}"


@by_document
def test_every_option_of_every_command_line_exists(path: Path) -> None:
    for words in itertools.chain.from_iterable(map(command_lines, fenced(read(path), "bash"))):
        command, rest = find_command(words)
        used = {word.partition("=")[0] for word in rest if word.startswith("-")}
        assert used <= flags(command) | {"--help", "-h"}, " ".join(words)


@by_document
def test_commands_and_snippets_run(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each document from top to bottom in its own folder; a block that starts with ``# NAME.py`` is that file."""
    document = str(path.relative_to(ROOT))
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, object] = {"__name__": "documented"}
    for marked, language, body in _FENCE.findall(read(path)):
        file = re.match(r"# ([\w.]+\.\w+)\n", body)
        if file:
            (folder / file[1]).write_text(body, encoding="utf-8")
        if language == "python":
            ast.parse(body)
        if language == "toml":
            tomllib.loads(body)
        elif language == "yaml" and "rows:" in body:
            assert expand("demo", yaml.safe_load(body))
        elif language == "yaml" and "preset" in body:
            (folder / "run.yaml").write_text(body, encoding="utf-8")
            layered(None, folder / "run.yaml", {"model": "demo"})
        elif marked or document in NOT_RUN:
            continue
        elif path.name == "README.md" and "@hookimpl" in body:
            (folder / "plugin.py").write_text(body, encoding="utf-8")
            assert len(load_plugins(["plugin.py"]).origins) == len(PLUGINS.origins) + 1
        elif language == "python" and not file:
            exec(compile(body, document, "exec"), namespace)  # noqa: S102
        elif language == "bash":
            for words in command_lines(body):
                if words[0] in RUN and "torchrun" not in body and not HUB.intersection(words):
                    run_command(words)
            for line in re.findall(r"^python (-m pytest.*)", body, flags=re.MULTILINE):
                subprocess.run([sys.executable, *line.split(), "-q", "-p", "no:cacheprovider"], check=True)


@by_document
def test_links_and_paths_point_to_files_of_the_repository(path: Path) -> None:
    text = read(path)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" in target or (path.parent / target.partition("#")[0]).exists(), target
    source = r"`((?:cfsp_framework|criteria|allocators|plugins|tests)/[\w/]+\.py)`(?:,\s`(\w+)`)?"
    for file, name in re.findall(source, text):
        assert (ROOT / file).is_file(), file
        assert not name or re.search(rf"^\s*(?:class|def) {name}\b", read(ROOT / file), flags=re.MULTILINE), name
    assert re.search(r"(?<![\w.])/(work|home|root|tmp)/|\.\./shared", text) is None


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocstrings")
    pytest.importorskip("material")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = shlex.split(f"{sys.executable} -m mkdocs build --quiet --strict -f docs/site/mkdocs.yml -d {tmp_path}")
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    pages = {page.name: read(page) for page in tmp_path.glob("*.html")}
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= set(pages)
    external = re.compile(r"(?:src|href)=.?https?://[^ >]*(?:fonts|cdn)")
    assert [name for name, page in pages.items() if external.search(page)] == []
