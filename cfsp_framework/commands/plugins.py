"""``cfsp plugins``."""

from __future__ import annotations

import json
import sys

import click

from .options import json_option, plugin_option, quiet_option, traceback_option


@click.group()
def plugins() -> None:
    """List, explain, check and begin the components plugins offer."""


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


@plugins.command("check", short_help="Whether a plugin does what its kinds promise.")
@click.argument("target")
@plugin_option
@quiet_option
@json_option
@traceback_option
@click.pass_context
def plugins_check(ctx: click.Context, target: str, plugins: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Run the contracts of every component TARGET names, with its default options and each value of its switches.

    TARGET is a plugin (what -p no: takes), a component (NAME or NAME:option=value,...), a distribution, a module, or a
    file.py. The exit code is 1 if a check fails.
    """
    from cfsp_framework.progress import Progress
    from cfsp_framework.testing import checking

    found = checking.find_target(target, plugins)
    visible = not (quiet or as_json) and sys.stderr.isatty()
    with Progress(visible=visible).bar("check", total=len(found.components)) as step:
        results = list(checking.run_contracts(found, lambda component: step()))
    if as_json:
        told = {"target": target, "passed": not checking.failed(results), "results": [one.as_json() for one in results]}
        click.echo(json.dumps(told, indent=2))
    elif not quiet:
        checking.show_results(found, results)
    ctx.exit(int(checking.failed(results)))
