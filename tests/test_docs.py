"""What the documents say is what the code does: names, options, hooks, fields, links."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from cfsp_framework import hookspecs
from cfsp_framework.cli import cli
from cfsp_framework.config import PRESETS, Choice, RunConfig
from cfsp_framework.planning import PruningPlan
from cfsp_framework.plugins import load_plugins
from cfsp_framework.report import Report

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
CLI = ROOT / "docs" / "cli.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
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


def commands(command: click.Command = cli, path: str = "cfsp") -> Iterator[tuple[str, click.Command]]:
    """Every command with its path: (`cfsp plugins list`, ...)."""
    yield path, command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            yield from commands(found, f"{path} {name}")


def options(command: click.Command) -> list[click.Option]:
    return [parameter for parameter in command.params if isinstance(parameter, click.Option)]


def flags(option: click.Option) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def test_every_command_is_documented() -> None:
    text = read(CLI)
    for path, command in commands():
        if not isinstance(command, click.Group):
            arguments = [p.name.upper() for p in command.params if isinstance(p, click.Argument) and p.name]
            assert re.search(rf"^{' '.join([path, *arguments])}  ", text, flags=re.MULTILINE), path


def test_every_option_is_documented_with_the_commands_that_have_it() -> None:
    rows = list(table(read(CLI), "option", "default", "commands"))
    documented = {
        (command.strip(), flag)
        for cell, _, names, _ in rows
        for command in names.split(",")
        for flag in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", " ".join(code(cell)))
    }
    existing = {
        (path.removeprefix("cfsp "), flag)
        for path, command in commands()
        for option in options(command)
        for flag in flags(option)
    }
    assert documented == existing


def test_the_defaults_documented_are_those_of_a_run() -> None:
    defaults = {code(cell)[0].split()[0]: default for cell, default, *_ in table(read(CLI), "option", "default")}
    for name, field in RunConfig.model_fields.items():
        if isinstance(field.default, str | int | float | Choice) and not isinstance(field.default, bool):
            assert defaults["--" + name.replace("_", "-")] == f"`{field.default}`"


def test_the_options_of_components_are_documented() -> None:
    documented = dict(table(read(CLI), "component", "options and defaults"))
    for registry in load_plugins().registries:
        for name, cls in registry.items():
            cell = documented.pop(f"{registry.kind} `{name}`", "")
            given = dict(part.split("=") for part in code(cell) if "=" in part)
            written = {
                key: "null" if value == "null" else ast.literal_eval(literal(value)) for key, value in given.items()
            }
            expected = {key: "null" if f.default is None else f.default for key, f in cls.model_fields.items()}
            assert written == expected, name
    assert not documented


def literal(value: str) -> str:
    """A YAML scalar as Python writes it."""
    if value in ("true", "false"):
        return value.capitalize()
    return value if re.fullmatch(r"[\d.]+", value) else repr(value)


def test_the_presets_are_documented() -> None:
    documented = {code(row[0])[0]: [code(cell)[0] for cell in row[1:4]] for row in table(read(CLI), "preset")}
    expected = {
        name: [str(preset.get(kind, "none")) for kind in ("criterion", "allocator", "compensator")]
        for name, preset in PRESETS.items()
    }
    assert documented == expected


@pytest.mark.parametrize("model", [Report, PruningPlan])
def test_the_fields_of_the_json_files_are_documented(model: type[Report | PruningPlan]) -> None:
    heading = {Report: "report.json", PruningPlan: "pruning_plan.json"}[model]
    section = read(CLI).split(f"### `{heading}`")[1]
    documented = [name for cell, _ in table(section, "field", "meaning") for name in code(cell)]
    assert sorted(documented) == sorted(model.model_fields)


def test_every_hook_is_documented_with_its_arguments() -> None:
    documented = {code(row[0])[0] for row in table(read(ARCHITECTURE), "hook")}
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("cfsp_")}
    assert documented == {f"{name}({', '.join(inspect.signature(hook).parameters)})" for name, hook in hooks.items()}


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
