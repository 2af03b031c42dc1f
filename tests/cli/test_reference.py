"""The generated parts of docs/cli.md are those of the command line."""

from __future__ import annotations

import runpy
from pathlib import Path

import click

from cfsp_framework.cli.main import cli

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_the_command_line_is_up_to_date() -> None:
    script = runpy.run_path(str(DOCS / "site" / "cli_reference.py"))
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert script["update"](page) == page, "run python docs/site/cli_reference.py"


def test_the_page_has_every_command() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    assert all(f"### `cfsp {name}" in page for name in cli.list_commands(click.Context(cli)))
