"""``cfsp plugins``."""

from __future__ import annotations

import json

import click

from .options import json_option, plugin_option, traceback_option


@click.group()
def plugins() -> None:
    """List and explain the components plugins offer."""


@plugins.command("list", short_help="Every component with its plugin and statistics.")
@plugin_option
@json_option
@traceback_option
def plugins_list(plugins: tuple[str, ...], as_json: bool) -> None:
    """Every component: name, kind, plugin (what -p no: takes), distribution, required statistics, summary."""
    from cfsp_framework import console
    from cfsp_framework.plugins import load_plugins

    rows = console.component_rows(load_plugins(plugins))
    if as_json:
        click.echo(json.dumps({"components": rows}, indent=2))
    else:
        console.show_components(rows)


@plugins.command("show", short_help="What one component does, and its options.")
@click.argument("name")
@plugin_option
@json_option
@traceback_option
def plugins_show(name: str, plugins: tuple[str, ...], as_json: bool) -> None:
    """The component called NAME: its options with types and defaults, its statistics, where it is defined."""
    from cfsp_framework import console
    from cfsp_framework.plugins import load_plugins

    found = console.component_details(load_plugins(plugins), name)
    if as_json:
        click.echo(json.dumps({"components": found}, indent=2))
    else:
        console.show_details(found)
