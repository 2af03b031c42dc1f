"""Write the generated parts of docs/cli.md: presets, components' options, and a section for each command.

    python docs/site/cli_reference.py           # update docs/cli.md
    python docs/site/cli_reference.py --check   # exit with 1 if it is not up to date

A generated part stands between the lines ``<!-- generated: NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click

from cfsp_framework.cli.main import cli
from cfsp_framework.config import PRESETS, format_scalar
from cfsp_framework.host.manager import load_plugins

PAGE = Path(__file__).parents[1] / "cli.md"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Format a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return (
        "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines).replace("| --- ", "|---") + "\n"
    )


def code(text: object) -> str:
    """Format text as code in a cell of a table."""
    return "`" + str(text).replace("|", "\\|") + "`"


def presets() -> str:
    """Return the table of presets."""
    kinds = ("criterion", "allocator", "compensator")
    rows = [
        [
            code(name),
            *(code(preset.get(kind, "none")) for kind in kinds),
            "yes" if preset.get("rebalance", True) else "no",
        ]
        for name, preset in PRESETS.items()
    ]
    return table(("preset", *kinds, "rebalanced"), rows)


def components() -> str:
    """Return the table of components that have options."""
    rows = []
    for registry in load_plugins().registries:
        for name, component in registry.items():
            options = [describe_option(key, field) for key, field in component.model_fields.items()]
            if options:
                rows.append([f"{registry.kind} {code(name)}", ", ".join(options)])
    return table(("component", "options and defaults"), rows)


def describe_option(name: str, field: Any) -> str:
    """Return `name=default` of a component's option, with its choices."""
    values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    choices = f" ({', '.join(map(code, values))})" if values else ""
    return code(f"{name}={format_scalar(field.default)}") + choices


def walk(command: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """Yield every command that is not a group, with its context."""
    if not isinstance(command, click.Group):
        yield command, context
        return
    for name in command.list_commands(context):
        subcommand = command.get_command(context, name)
        assert subcommand is not None
        yield from walk(subcommand, click.Context(subcommand, context, name))


def commands() -> str:
    """Return a section for every command."""
    sections = []
    for command, context in walk(cli, click.Context(cli, info_name="cfsp", **cli.context_settings)):
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        rows = [describe(option, context) for option in command.params if isinstance(option, click.Option)]
        text = inspect.cleandoc(command.help or "")
        options = table(("option", "default", "meaning"), rows)
        sections.append(f"### `{context.command_path}`\n\n```text\n{usage}\n```\n\n{text}\n\n{options}")
    return "\n".join(sections)


def describe(option: click.Option, context: click.Context) -> list[str]:
    """Return flags, default and meaning of an option."""
    text, metavar = option.help or "", "" if option.is_flag else option.make_metavar(context)
    stated = re.search(r" ?\[default: (.*?)\]|; default: (.*?)(?=\.$)", text)
    if option.secondary_opts:  # --switch/--no-switch
        default = option.opts[0]
    elif stated:
        default = stated[1] or stated[2]
    elif option.show_default:
        default = str(option.default)
    else:
        default = "required" if option.required else "off" if option.is_flag else "none"
    metavar = metavar[1:-1] if metavar.startswith("[") else metavar  # [a|b]
    flags = [code(f"{flag} {metavar}".rstrip()) for flag in (*option.opts, *option.secondary_opts)]
    text = text.replace(stated[0], "") if stated else text
    return [", ".join(flags), default.replace("|", "\\|"), text.replace("|", "\\|")]


def update(page: str) -> str:
    """Return the page with its generated parts replaced."""
    for generate in (presets, components, commands):
        marker = f"<!-- generated: {generate.__name__} -->"
        before, _, rest = page.partition(marker + "\n")
        assert rest, f"docs/cli.md has no line {marker}"
        page = f"{before}{marker}\n\n{generate()}\n<!-- end -->\n{rest.partition('<!-- end -->' + chr(10))[2]}"
    return page


def main() -> None:
    """Rewrite docs/cli.md, or with `--check` exit with 1 if it differs."""
    page = PAGE.read_text(encoding="utf-8")
    updated = update(page)
    if "--check" in sys.argv:
        sys.exit(updated != page)
    PAGE.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
