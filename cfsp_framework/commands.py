"""The commands. Their options are the fields of RunConfig; torch is imported inside them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click

from .config import PRESETS, RunConfig, layered
from .errors import InputError

MODEL = ("trust_remote_code", "device", "dtype")
COMPONENTS = ("criterion", "allocator", "compensator", "recovery")
AMOUNT = ("ratio", "budget", "round_to", "rebalance")
CALIBRATION = ("calibration", "samples", "seqlen", "batch_size", "seed")
EVALUATION = ("evaluate", "evaluate_windows")

_COMPONENT_HELP = {
    "criterion": "Fine importance: which channels stay.",
    "allocator": "Coarse importance: what each block keeps.",
    "compensator": "How the kept weights change.",
    "recovery": "What is trained afterwards.",
}
Command = Callable[..., Any]


def config_options(*names: str) -> Callable[[Command], Command]:
    """One option per field of RunConfig, typed and explained by it; absent ones are not passed on."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _option(name)(command)
        return command

    return decorate


def _option(name: str) -> Callable[[Command], Command]:
    field, flag = RunConfig.model_fields[name], "--" + name.replace("_", "-")
    if name in COMPONENTS:
        help_text = f"{_COMPONENT_HELP[name]} [default: {field.default}]"
        return click.option(flag, metavar="NAME[:k=v,...]", help=help_text)
    default = "" if field.default in (None, (), False) else f" [default: {field.default}]"
    if field.annotation is bool:
        both = f"{flag}/--no-{flag[2:]}" if field.default else flag
        return click.option(both, default=None, is_flag=True, help=f"{field.description}{default}")
    kind, multiple = _click_type(field.annotation)
    return click.option(flag, type=kind, multiple=multiple, help=f"{field.description}{default}")


def _click_type(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation)), False
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)[0], False
    return annotation, False


def _keep_traceback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["traceback"] = value


plugin_option = click.option(
    "-p", "--plugin", "plugins", multiple=True, metavar="PLUGIN",
    help="Load a module or a file.py as a plugin; no:NAME leaves an installed one out.",
)  # fmt: skip
traceback_option = click.option(
    "--traceback", is_flag=True, expose_value=False, callback=_keep_traceback, help="Show where an error came from."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress, no tables.")
preset_option = click.option("--preset", metavar="NAME", help=f"A named set of components: {', '.join(PRESETS)}.")
config_option = click.option(
    "--config", "config_file", type=click.Path(path_type=Path, dir_okay=False), help="A YAML file of these options."
)


def _given(options: dict[str, Any]) -> dict[str, object]:
    """What was really given: neither absent options nor empty lists."""
    return {name: value for name, value in options.items() if value not in (None, ())}


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *EVALUATION, *MODEL)
@preset_option
@config_option
@click.option("--plan", "plan_file", type=click.Path(path_type=Path, dir_okay=False), help="Cut by this plan.")
@click.option("--keep-statistics", is_flag=True, help="Keep the statistics as statistics.safetensors.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@plugin_option
@quiet_option
@json_option
@traceback_option
def prune(
    out: Path,
    preset: str | None,
    config_file: Path | None,
    plan_file: Path | None,
    keep_statistics: bool,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Prune MODEL (a folder, a Hub id or `demo`) into the checkpoint folder OUT.

    What --preset, --config and the options leave open is CFSP on half of the feed-forward channels.
    """
    from . import console, pipeline
    from .progress import Progress

    config = layered(preset, config_file, _given(options))
    result = pipeline.prune(
        config,
        out,
        plan=_read_plan(plan_file) if plan_file else None,
        overwrite=overwrite,
        keep_statistics=keep_statistics,
        progress=Progress(visible=not (quiet or as_json)),
    )
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)


@click.command()
@click.argument("model")
@click.argument("plan_file", type=click.Path(path_type=Path, dir_okay=False))
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *MODEL)
@preset_option
@config_option
@click.option("--overwrite", is_flag=True, help="Replace an existing plan.")
@plugin_option
@quiet_option
@json_option
@traceback_option
def plan(
    plan_file: Path,
    preset: str | None,
    config_file: Path | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Decide what to prune in MODEL and write it to PLAN_FILE; `cfsp prune --plan` cuts by it without data."""
    from . import console, pipeline
    from .files import write_text
    from .progress import Progress

    if plan_file.exists() and not overwrite:
        raise InputError(f"{plan_file} exists; give another file or --overwrite.")
    config = layered(preset, config_file, _given(options))
    made = pipeline.plan_only(config, Progress(visible=not (quiet or as_json)))
    write_text(plan_file, made.to_json())
    if as_json:
        click.echo(made.to_json(), nl=False)
    elif not quiet:
        console.show_plan(made, plan_file)


@click.command()
@click.argument("model")
@click.option("--data", "--evaluate", "evaluate", multiple=True, metavar="SPEC", help="Data SPEC [default: demo].")
@config_options("seqlen", "evaluate_windows", *MODEL)
@plugin_option
@quiet_option
@json_option
@traceback_option
def evaluate(evaluate: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Report the perplexity of MODEL, dense or pruned, on each data SPEC."""
    from . import console, pipeline
    from .progress import Progress

    config = RunConfig.build(evaluate=evaluate or ("demo",), **_given(options))
    measured = pipeline.evaluate_only(config, Progress(visible=not (quiet or as_json)))
    if as_json:
        rows = [
            {"data": data.spec, "seqlen": data.windows.shape[1], "windows": len(data.windows), **found.model_dump()}
            for data, found in measured
        ]
        click.echo(json.dumps({"model": config.model, "evaluations": rows}, indent=2))
    else:
        console.show_perplexities(config.model, measured)


@click.command()
@click.option(
    "--ratio", type=float, default=0.5, show_default=True, help="Share of the feed-forward channels to remove."
)
@click.option("--out", type=click.Path(path_type=Path), help="Keep the pruned checkpoint in this folder.")
@quiet_option
@json_option
@traceback_option
def demo(ratio: float, out: Path | None, quiet: bool, as_json: bool) -> None:
    """Prune the small model inside this package and compare both on text it never saw."""
    import tempfile

    from . import console, pipeline
    from .progress import Progress

    config = RunConfig.build(model="demo", ratio=ratio, samples=64, seqlen=256, evaluate=("demo",))
    with tempfile.TemporaryDirectory(prefix="cfsp-demo-") as scratch:
        result = pipeline.prune(
            config, out or Path(scratch, "pruned"), progress=Progress(visible=not (quiet or as_json))
        )
        samples = console.continuations(result.folder) if not (quiet or as_json) else []
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)
        console.show_continuations(samples)


@click.group()
def plugins() -> None:
    """List and explain the components plugins offer."""


@plugins.command("list")
@plugin_option
@json_option
@traceback_option
def plugins_list(plugins: tuple[str, ...], as_json: bool) -> None:
    """Every component: name, kind, plugin (what -p no: takes), distribution, required statistics, summary."""
    from . import console
    from .plugins import load_plugins

    rows = console.component_rows(load_plugins(plugins))
    if as_json:
        click.echo(json.dumps({"components": rows}, indent=2))
    else:
        console.show_components(rows)


@plugins.command("show")
@click.argument("name")
@plugin_option
@json_option
@traceback_option
def plugins_show(name: str, plugins: tuple[str, ...], as_json: bool) -> None:
    """The component called NAME: its options with types and defaults, its statistics, where it is defined."""
    from . import console
    from .plugins import load_plugins

    found = console.component_details(load_plugins(plugins), name)
    if as_json:
        click.echo(json.dumps({"components": found}, indent=2))
    else:
        console.show_details(found)


def _read_plan(path: Path) -> Any:
    from .planning import PruningPlan

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return PruningPlan.from_json(text)
