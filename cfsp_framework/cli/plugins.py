"""``cfsp plugins``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cfsp_framework.cli.options import json_option, plugin_option, quiet_option, traceback_option

if TYPE_CHECKING:
    from cfsp_framework.host.scaffold import Kind


@click.group()
def plugins() -> None:
    """List, explain and check what plugins offer, and begin a plugin of your own."""


@plugins.command("list", short_help="Every component with its plugin and statistics.")
@click.option("--kind", metavar="KIND", help="Only this kind: criterion, allocator, compensator ...")
@plugin_option
@json_option
@traceback_option
def plugins_list(kind: str | None, plugins: tuple[str, ...], as_json: bool) -> None:
    """Every component: name, kind, plugin, distribution and version, the statistics it reads, summary.

    Above each table stands what leaves its plugin out, in any command: `-p no:PLUGIN`.
    """
    from cfsp_framework.host import catalog as catalogue
    from cfsp_framework.host.manager import load_plugins

    loaded = load_plugins(plugins)
    rows = catalogue.component_rows(loaded, kind)
    if as_json:
        click.echo(json.dumps({"components": rows, "plugins": catalogue.plugin_rows(loaded)}, indent=2))
    else:
        catalogue.show_components(rows, catalogue.plugin_rows(loaded))


@plugins.command("show", short_help="What one component does, and its options.")
@click.argument("name")
@plugin_option
@json_option
@traceback_option
def plugins_show(name: str, plugins: tuple[str, ...], as_json: bool) -> None:
    """The component called NAME: what it does, its options, its statistics and what they cost, where it is defined."""
    from cfsp_framework.host import catalog as catalogue
    from cfsp_framework.host.manager import load_plugins

    found = catalogue.component_details(load_plugins(plugins), name)
    if as_json:
        click.echo(json.dumps({"components": found}, indent=2))
    else:
        catalogue.show_details(found)


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
    from cfsp_framework.runtime.progress import Progress
    from cfsp_framework.testing import check as checking

    found = checking.find_target(target, plugins)
    visible = not (quiet or as_json) and sys.stderr.isatty()
    with Progress(visible=visible).bar("check", total=len(found.components)) as step:
        results = list(checking.run_contracts(found, step))
    if as_json:
        told = {"target": target, "passed": not checking.failed(results), "results": [one.as_json() for one in results]}
        click.echo(json.dumps(told, indent=2))
    elif not quiet:
        checking.show_results(found, results)
    ctx.exit(int(checking.failed(results)))


@plugins.command("new", short_help="A package for a plugin of your own.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(("criterion", "allocator", "collector", "compensator", "recovery")),
    required=True,
    help="What the plugin offers; a collector comes with a criterion that reads what it measures.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write it into this folder. [default: ./NAME]"
)
@plugin_option
@quiet_option
@json_option
@traceback_option
def plugins_new(name: str, kind: Kind, out: Path | None, plugins: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Write a package called NAME, say cfsp-peak: ready to install, test, change and publish.

    The component in it is called as the package without `cfsp-`.
    """
    from cfsp_framework.host import scaffold
    from cfsp_framework.host.manager import load_plugins

    names = scaffold.plugin_names(name, kind)
    scaffold.check_free(names, load_plugins(plugins))
    folder = out or Path(names.distribution)
    files = scaffold.write_plugin(names, folder)
    if as_json:
        click.echo(json.dumps(scaffold.describe_package(names, folder, files), indent=2))
    elif not quiet:
        click.echo(f"{folder}: {len(files)} files; the {names.what} is in {names.source}. Next:")
        for command in scaffold.next_commands(names, folder):
            click.echo(f"  {command}")
