"""``cfsp plugins``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cfsp_framework.cli.options import OUT, Output, output_options

if TYPE_CHECKING:
    from cfsp_framework.host.scaffold import Kind


@click.group()
def plugins() -> None:
    """List, explain and check what plugins offer, and create a plugin."""


@plugins.command("list", short_help="List every component with its plugin and statistics.")
@click.option("--kind", metavar="KIND", help="Only this kind: criterion, allocator, compensator ...")
@output_options(quiet=None)
def plugins_list(kind: str | None, plugins: tuple[str, ...], output: Output) -> None:
    """List every component: name, kind, plugin, distribution and version, the statistics it reads, summary.

    Above each table stands the option that disables its plugin in any command: `-p no:PLUGIN`.
    """
    from cfsp_framework.host import catalog
    from cfsp_framework.host.manager import load_plugins

    loaded = load_plugins(plugins)
    components, rows = catalog.component_rows(loaded, kind), catalog.plugin_rows(loaded)
    output.show({"components": components, "plugins": rows}, lambda: catalog.show_components(components, rows))


@plugins.command("show", short_help="Explain one component and its options.")
@click.argument("name")
@output_options(quiet=None)
def plugins_show(name: str, plugins: tuple[str, ...], output: Output) -> None:
    """Explain the component NAME: summary, options, the statistics it reads and their cost, where it is defined."""
    from cfsp_framework.host import catalog
    from cfsp_framework.host.manager import load_plugins

    details = catalog.component_details(load_plugins(plugins), name)
    output.show({"components": details}, lambda: catalog.show_details(details))


@plugins.command("check", short_help="Check that a plugin keeps the contracts of its components.")
@click.argument("target")
@output_options()
@click.pass_context
def plugins_check(ctx: click.Context, target: str, plugins: tuple[str, ...], output: Output) -> None:
    """Run the contracts of every component of TARGET, with its default options and each value of its switches.

    TARGET is a plugin (the name that -p no: takes), a component (NAME or NAME:option=value,...), a distribution, a
    module, or a file.py. The exit code is 1 if a check fails.
    """
    from cfsp_framework.runtime.progress import Progress
    from cfsp_framework.testing import check

    checked = check.find_target(target, plugins)
    with Progress(visible=output.visible and sys.stderr.isatty()).bar("check", total=len(checked.components)) as step:
        results = list(check.run_contracts(checked, step))
    failed = check.failed(results)
    report = {"target": target, "passed": not failed, "results": [result.as_json() for result in results]}
    output.show(report, lambda: check.show_results(checked, results))
    ctx.exit(int(failed))


@plugins.command("new", short_help="Write a package for a new plugin.")
@click.argument("name")
@click.option(
    "--kind",
    type=click.Choice(("criterion", "allocator", "collector", "compensator", "recovery")),
    required=True,
    help="What the plugin offers; a collector comes with a criterion that reads its statistic.",
)
@click.option("--out", type=OUT, metavar="FOLDER", help="Write it into this folder. [default: ./NAME]")
@output_options()
def plugins_new(name: str, kind: Kind, out: Path | None, plugins: tuple[str, ...], output: Output) -> None:
    """Write a package called NAME, say cfsp-peak: ready to install, test, change and publish.

    Its component has the name of the package without `cfsp-`.
    """
    from cfsp_framework.host import scaffold
    from cfsp_framework.host.manager import load_plugins

    names = scaffold.plugin_names(name, kind)
    scaffold.check_free(names, load_plugins(plugins))
    folder = out or Path(names.distribution)
    files = scaffold.write_plugin(names, folder)

    def show() -> None:
        click.echo(f"{folder}: {len(files)} files; the {names.what} is in {names.source}. Next:")
        for command in scaffold.next_commands(names, folder):
            click.echo(f"  {command}")

    output.show(scaffold.describe_package(names, folder, files), show)
