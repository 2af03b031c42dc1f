"""What the commands' options have in common: most are the fields of RunConfig, typed and explained by them."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from pydantic import ValidationError

from cfsp_framework.config import OPTIONS, PRESETS, Choice, RunConfig
from cfsp_framework.errors import PlanError

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan

MODEL = ("trust_remote_code", "device", "device_map", "dtype", "stream", "spill")
COMPONENTS = ("criterion", "allocator", "compensator", "recovery")
AMOUNT = ("ratio", "budget", "round_to", "tensor_parallel", "rebalance", "drop_attention")
RESUME = ("resume",)
RECOVERY = ("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience", "report_to", "keep_adapter")
CALIBRATION = ("calibration", "samples", "reuse_windows", "seqlen", "pack", "skip_bos", "batch_size", "seed")
EVALUATION = ("evaluate", "evaluate_windows")

_METAVARS = {
    "calibration": "SPEC",
    "recovery_data": "SPEC",
    "evaluate": "SPEC",
    "report_to": "NAME",
    "device": "NAME",
    "spill": "FOLDER",
    "resume": "FOLDER",
}
SPEC_HELP = """A data SPEC is `demo`; a well-known name (`wikitext2`, `c4`, `ptb`, `fineweb-edu`); a .txt, .jsonl,
.parquet or .csv file or the folder of a data set, with :COLUMN where the column is not `text`;
hf:REPO[:CONFIG][:SPLIT][:COLUMN]; or, for calibration, a mixture A=0.7,B=0.3."""
Command = Callable[..., Any]
_PLAN_FILE = "pruning_plan.json"  # as in `checkpoint`, which imports torch


def config_options(*names: str) -> Callable[[Command], Command]:
    """One option per field of RunConfig, typed and explained by it; absent ones are not passed on."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            command = _option(name)(command)
        return command

    return decorate


class _ComponentType(click.ParamType["Choice"]):
    """Parse ``NAME:option=value,...`` into a ``Choice``."""

    name = "component"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Choice:
        return value if isinstance(value, Choice) else Choice.model_validate(value)


def _option(name: str) -> Callable[[Command], Command]:
    field, flag = OPTIONS[name].field, "--" + name.replace("_", "-")
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
        metavar=_metavar(name, kind),
        callback=_validated,
        help=f"{field.description}{default}",
    )


def _metavar(name: str, kind: object) -> str | None:
    if isinstance(kind, _ComponentType):
        return "NAME[:k=v,...]"
    return _METAVARS.get(name, "N" if kind is int else "NUMBER" if kind is float else None)


def _click_type(annotation: Any) -> tuple[Any, bool]:
    """Return the click type of a field, and whether the option may be repeated."""
    if annotation is Choice:
        return _ComponentType(), False
    if get_origin(annotation) is Literal:
        return click.Choice(get_args(annotation)), False
    if get_origin(annotation) is tuple:
        return _click_type(get_args(annotation)[0])[0], True
    if get_origin(annotation) in (Union, types.UnionType):
        first = get_args(annotation)[0]
        return str if get_origin(first) is Literal else first, False
    return annotation, False


def _validated(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse what RunConfig would refuse, by the name of the option."""
    if value is None or value == () or parameter.name is None:
        return value
    try:
        RunConfig.validate_option(parameter.name, value)
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
push_option = click.option(
    "--push-to-hub", "repository", metavar="USER/NAME", help="Publish the result on the Hub when all is done."
)
preset_option = click.option(
    "--preset", metavar="NAME", help=f"A named set of components, to start from: {', '.join(PRESETS)}."
)
config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="A YAML file of these options; those given here come after it.",
)

observer_option = config_options("observer")


def given(options: dict[str, Any]) -> dict[str, object]:
    """What was really given: neither absent options nor empty lists."""
    return {name: value for name, value in options.items() if value not in (None, ())}


def read_plan(path: Path) -> PruningPlan:
    """The plan in a file, or that of a pruned checkpoint's folder.

    Raises:
        PlanError: there is none, or it cannot be used.
    """
    from cfsp_framework.api.records import PruningPlan

    file = path / _PLAN_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise PlanError(f"{path} has no {_PLAN_FILE}; give a plan, or the folder of a pruned checkpoint.")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        text = ""
    if "cfsp-pruning-plan" not in text:
        raise PlanError(f"{file} is no pruning plan; `cfsp plan` writes one.")
    try:
        return PruningPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error


def publish(folder: Path, repository: str | None, *, visible: bool) -> None:
    """What --push-to-hub asks for, once all is done; a result that cannot be uploaded stays where it is."""
    if repository is None:
        return
    from cfsp_framework.export.hub import push

    upload = push(folder, repository)
    if visible:
        click.echo(f"Uploaded: {upload.url}")


def check_repository(repository: str | None) -> None:
    """Refuse at once what the Hub would refuse hours later."""
    if repository is None:
        return
    from cfsp_framework.export import hub as publishing

    publishing.check_repository(repository)
