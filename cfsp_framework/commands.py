"""The commands. Their options are the fields of RunConfig; torch is imported inside them."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import ValidationError

from .config import PRESETS, RunConfig, layered
from .errors import InputError, PlanError

MODEL = ("trust_remote_code", "device", "device_map", "dtype", "stream", "spill")
COMPONENTS = ("criterion", "allocator", "compensator", "recovery")
AMOUNT = ("ratio", "budget", "round_to", "rebalance", "drop_attention")
RESUME = ("resume",)
RECOVERY = ("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience", "report_to", "keep_adapter")
CALIBRATION = ("calibration", "samples", "reuse_windows", "seqlen", "pack", "skip_bos", "batch_size", "seed")
EVALUATION = ("evaluate", "evaluate_windows")

_COMPONENT_HELP = {
    "criterion": "Fine importance: which channels stay.",
    "allocator": "Coarse importance: what each block keeps.",
    "compensator": "How the kept weights change.",
    "recovery": "What is trained afterwards.",
}
_METAVARS = {
    "calibration": "SPEC",
    "recovery_data": "SPEC",
    "evaluate": "SPEC",
    "report_to": "NAME",
    "device": "NAME",
    "spill": "FOLDER",
    "resume": "FOLDER",
}
_SPEC_HELP = """A data SPEC is `demo`; a well-known name (`wikitext2`, `c4`, `ptb`, `fineweb-edu`); a .txt, .jsonl,
.parquet or .csv file or the folder of a data set, with :COLUMN where the column is not `text`;
hf:REPO[:CONFIG][:SPLIT][:COLUMN]; or, for calibration, a mixture A=0.7,B=0.3."""
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
    if field.annotation is bool:
        both = f"{flag}/--no-{flag[2:]}" if field.default else flag
        default = f" [default: {flag[2:]}]" if field.default else ""
        return click.option(both, default=None, is_flag=True, help=f"{field.description}{default}")
    kind, multiple = _click_type(field.annotation)
    default = " May be repeated." if multiple else "" if field.default is None else f" [default: {field.default}]"
    return click.option(
        flag,
        type=kind,
        multiple=multiple,
        metavar=_METAVARS.get(name, "N" if kind is int else "NUMBER" if kind is float else None),
        callback=_validated,
        help=f"{field.description}{default}",
    )


def _click_type(annotation: Any) -> tuple[Any, bool]:
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation)), False
    if get_origin(annotation) is tuple:
        return get_args(annotation)[0], True
    if get_origin(annotation) in (Union, types.UnionType):
        first = get_args(annotation)[0]
        return str if get_origin(first) is Literal else first, False
    return annotation, False


def _validated(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse what RunConfig would refuse, by the name of the option."""
    if value is None or value == () or parameter.name is None:
        return value
    try:
        RunConfig.model_validate({"model": "demo", parameter.name: value})
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise click.BadParameter(f"{problem[0].lower()}{problem[1:]}, not {value}.") from error
    return value


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
preset_option = click.option(
    "--preset", metavar="NAME", help=f"A named set of components, to start from: {', '.join(PRESETS)}."
)
config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A YAML file of these options; those given here come after it.",
)


def _given(options: dict[str, Any]) -> dict[str, object]:
    """What was really given: neither absent options nor empty lists."""
    return {name: value for name, value in options.items() if value not in (None, ())}


@click.command(epilog=_SPEC_HELP)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *RECOVERY, *RESUME, *EVALUATION, *MODEL)
@preset_option
@config_option
@click.option(
    "--plan",
    "plan_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="Cut by this plan, whatever ratio, criterion and allocator say.",
)
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
    from .ranks import is_first

    config = layered(preset, config_file, _given(options))
    result = pipeline.prune(
        config,
        out,
        plan=_read_plan(plan_file) if plan_file else None,
        overwrite=overwrite,
        keep_statistics=keep_statistics,
        progress=Progress(visible=is_first() and not (quiet or as_json)),
    )
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)


@click.command(epilog=_SPEC_HELP)
@click.argument("model")
@click.argument("plan_file", type=click.Path(path_type=Path, dir_okay=False), required=False)
@config_options(*AMOUNT, *COMPONENTS, *CALIBRATION, *RESUME, *MODEL)
@preset_option
@config_option
@click.option("--overwrite", is_flag=True, help="Replace an existing plan.")
@click.option(
    "--estimate",
    is_flag=True,
    help="Only tell, from MODEL's config.json, what time and memory a run takes; no PLAN_FILE is needed.",
)
@plugin_option
@quiet_option
@json_option
@traceback_option
def plan(
    plan_file: Path | None,
    preset: str | None,
    config_file: Path | None,
    overwrite: bool,
    estimate: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Decide what to prune in MODEL and write it to PLAN_FILE; `cfsp prune --plan` cuts by it without data."""
    from . import console, pipeline
    from .files import check_parent, write_text
    from .progress import Progress
    from .ranks import is_first

    if estimate:
        _estimate(layered(preset, config_file, _given(options)), quiet=quiet, as_json=as_json)
        return
    if plan_file is None:
        raise click.MissingParameter(param_hint="'PLAN_FILE'", param_type="argument")
    check_parent(plan_file)
    if plan_file.exists() and not overwrite:
        raise InputError(f"{plan_file} exists; give another file or --overwrite.")
    config = layered(preset, config_file, _given(options))
    made = pipeline.plan_only(config, Progress(visible=is_first() and not (quiet or as_json)))
    if not is_first():
        return
    write_text(plan_file, made.to_json())
    if as_json:
        click.echo(made.to_json(), nl=False)
    elif not quiet:
        console.show_plan(made, plan_file)


@click.command(epilog=_SPEC_HELP)
@click.argument("pruned")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--recovery", metavar="NAME[:k=v,...]", help="What is trained. [default: ig-lora]")
@config_options(*RECOVERY, *RESUME, "seqlen", "batch_size", "seed", *EVALUATION, "trust_remote_code", "device")
@config_option
@click.option(
    "--adapter",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Train nothing: merge this adapter, kept by --keep-adapter, into PRUNED.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@plugin_option
@quiet_option
@json_option
@traceback_option
def recover(
    pruned: str,
    out: Path,
    config_file: Path | None,
    adapter: Path | None,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Train PRUNED, a checkpoint `cfsp prune` wrote, and write the result to the folder OUT.

    What --recovery leaves open is ig-lora: low-rank adapters, of higher rank in blocks of more importance.
    """
    from . import console, pipeline
    from .progress import Progress
    from .ranks import is_first

    config = layered(None, config_file, _given({**options, "model": pruned}), {"recovery": "ig-lora"})
    progress = Progress(visible=is_first() and not (quiet or as_json))
    result = pipeline.recover(config, out, adapter=adapter, overwrite=overwrite, progress=progress)
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)


@click.command(epilog=_SPEC_HELP)
@click.argument("model")
@click.option(
    "--data",
    "--evaluate",
    "evaluate",
    multiple=True,
    metavar="SPEC",
    help="Data SPEC to report perplexity on. May be repeated. [default: demo]",
)
@config_options("seqlen", "evaluate_windows", *MODEL)
@plugin_option
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@json_option
@traceback_option
def evaluate(evaluate: tuple[str, ...], quiet: bool, as_json: bool, **options: Any) -> None:
    """Report the perplexity of MODEL, dense or pruned, on each data SPEC."""
    from . import console, pipeline
    from .progress import Progress
    from .ranks import is_first

    config = RunConfig.build(evaluate=evaluate or ("demo",), **_given(options))
    measured = pipeline.evaluate_only(config, Progress(visible=is_first() and not (quiet or as_json)))
    if not is_first():
        return
    if as_json:
        rows = [
            {"data": data.spec, "seqlen": data.windows.shape[1], "windows": len(data.windows), **found.model_dump()}
            for data, found in measured
        ]
        click.echo(json.dumps({"model": config.model, "evaluations": rows}, indent=2))
    else:
        console.show_perplexities(config.model, measured)


@click.command()
@config_options("ratio")
@click.option("--out", type=click.Path(path_type=Path), help="Keep the pruned checkpoint in this folder.")
@click.option("--overwrite", is_flag=True, help="Replace an existing checkpoint folder.")
@quiet_option
@json_option
@traceback_option
def demo(out: Path | None, overwrite: bool, quiet: bool, as_json: bool, **options: Any) -> None:
    """Prune the small model inside this package and compare both on text it never saw."""
    import tempfile

    from . import console, pipeline
    from .progress import Progress
    from .ranks import is_first

    few = {"samples": 64, "seqlen": 256, "evaluate_windows": 100}
    config = RunConfig.build(model="demo", evaluate=("demo",), **few, **_given(options))
    with tempfile.TemporaryDirectory(prefix="cfsp-demo-") as scratch:
        result = pipeline.prune(
            config,
            out or Path(scratch, "pruned"),
            overwrite=overwrite,
            progress=Progress(visible=is_first() and not (quiet or as_json)),
        )
        samples = console.continuations(result.folder) if is_first() and not (quiet or as_json) else []
    if not is_first():
        return
    if as_json:
        click.echo(result.report.to_json(), nl=False)
    elif not quiet:
        console.show_report(result.report, out)
        console.show_continuations(samples)


@click.group()
def plugins() -> None:
    """List and explain the components plugins offer."""


@plugins.command("list", short_help="Every component with its plugin and statistics.")
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


@plugins.command("show", short_help="What one component does, and its options.")
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


def _estimate(config: RunConfig, *, quiet: bool, as_json: bool) -> None:
    from . import console
    from .estimate import estimate_run

    found = estimate_run(config)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    elif not quiet:
        console.show_estimate(found)


def _read_plan(path: Path) -> Any:
    from .planning import PruningPlan

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is no pruning plan; `cfsp plan` writes one.") from error
    if "cfsp-pruning-plan" not in text:
        raise PlanError(f"{path} is no pruning plan; `cfsp plan` writes one.")
    try:
        return PruningPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
