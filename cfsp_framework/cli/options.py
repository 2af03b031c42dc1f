"""Options that several commands share; most are fields of ``RunConfig``, typed and explained by it."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click
from pydantic import ValidationError

from cfsp_framework.config import OPTIONS, PRESETS, Choice, RunConfig
from cfsp_framework.errors import PlanError

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan
    from cfsp_framework.runtime.progress import Progress

MODEL = ("trust_remote_code", "device", "device_map", "dtype", "stream", "spill")
COMPONENTS = ("criterion", "allocator", "compensator", "recovery")
AMOUNT = ("ratio", "budget", "round_to", "tensor_parallel", "rounds", "rebalance", "drop_attention")
RESUME = ("resume",)
RECOVERY = ("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience", "report_to", "keep_adapter")
CALIBRATION = ("calibration", "samples", "reuse_windows", "seqlen", "pack", "skip_bos", "batch_size", "seed")
EVALUATION = ("evaluate", "evaluate_windows")
PLANNING = (*AMOUNT, *COMPONENTS, *CALIBRATION, *RESUME, *MODEL)
FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
OUT = click.Path(path_type=Path)

SPEC_HELP = """A data SPEC is `demo`; a well-known name (`wikitext2`, `c4`, `ptb`, `fineweb-edu`); a .txt, .jsonl,
.parquet or .csv file or the folder of a data set, with :COLUMN where the column is not `text`;
hf:REPO[:CONFIG][:SPLIT][:COLUMN]; or, for calibration, a mixture A=0.7,B=0.3."""

_METAVARS = {
    **dict.fromkeys(("calibration", "recovery_data", "evaluate"), "SPEC"),
    **dict.fromkeys(("report_to", "device"), "NAME"),
    **dict.fromkeys(("spill", "resume"), "FOLDER"),
}
_TYPE_METAVARS: dict[Any, str] = {int: "N", float: "NUMBER", Choice: "NAME[:k=v,...]"}
_PLAN_FILE = "pruning_plan.json"  # as in `checkpoint.save`, which imports torch
Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


# --- options of RunConfig ---------------------------------------------------------------------------------------------


def config_options(*names: str) -> Decorator:
    """Return a decorator that adds one option per named field of ``RunConfig``; options not given are ``None`` or empty."""
    return bundle(*map(_config_option, names))


def bundle(*decorators: Decorator) -> Decorator:
    """Combine decorators into one; the first listed comes first in the help."""
    return lambda command: reduce(lambda inner, decorate: decorate(inner), reversed(decorators), command)


class _ComponentType(click.ParamType["Choice"]):
    """Parse ``NAME:option=value,...`` into a ``Choice``."""

    name = "component"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Choice:
        return value if isinstance(value, Choice) else Choice.model_validate(value)


def _config_option(name: str) -> Decorator:
    field, flag = OPTIONS[name].field, "--" + name.replace("_", "-")
    if field.annotation is bool:
        switch, default = (f"{flag}/--no-{flag[2:]}", f" [default: {flag[2:]}]") if field.default else (flag, "")
        return click.option(switch, default=None, is_flag=True, help=f"{field.description}{default}")
    multiple = get_origin(field.annotation) is tuple
    annotation = _first_type(get_args(field.annotation)[0] if multiple else field.annotation)
    default = " May be repeated." if multiple else "" if field.default is None else f" [default: {field.default}]"
    return click.option(
        flag,
        type=_click_type(annotation),
        multiple=multiple,
        metavar=_METAVARS.get(name) or _TYPE_METAVARS.get(annotation),
        callback=_validate,
        help=f"{field.description}{default}",
    )


def _first_type(annotation: Any) -> Any:
    """Return the type that a value on the command line has: of a union the first, or ``str`` for ``"auto" | int``."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    first = get_args(annotation)[0]
    return str if get_origin(first) is Literal else first


def _click_type(annotation: Any) -> Any:
    if annotation is Choice:
        return _ComponentType()
    return click.Choice(get_args(annotation)) if get_origin(annotation) is Literal else annotation


def _validate(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Refuse a value that RunConfig would refuse, naming the option."""
    if value is None or value == () or parameter.name is None:
        return value
    try:
        RunConfig.validate_option(parameter.name, value)
    except ValidationError as error:
        problem = error.errors()[0]["msg"]
        raise click.BadParameter(f"{problem[0].lower()}{problem[1:]}, not {value}.") from error
    return value


def given(options: dict[str, Any]) -> dict[str, object]:
    """Return the options that were given on the command line: neither ``None`` nor an empty list."""
    return {name: value for name, value in options.items() if value not in (None, ())}


# --- options of several commands --------------------------------------------------------------------------------------


def _check_repository(ctx: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    """Refuse an impossible repository before the run, not after it."""
    if value is not None:
        from cfsp_framework.export.hub import check_repository

        check_repository(value)
    return value


def _keep_traceback(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    ctx.meta["traceback"] = value


overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
preset_option = click.option(
    "--preset", metavar="NAME", help=f"A named set of components, to start from: {', '.join(PRESETS)}."
)
config_option = click.option(
    "--config", "config_file", type=FILE, help="A YAML file of these options; options on the command line override it."
)
push_option = click.option(
    "--push-to-hub",
    "repository",
    metavar="USER/NAME",
    callback=_check_repository,
    help="Publish the result on the Hub when the run has finished.",
)
run_options = bundle(config_option, overwrite_option, config_options("observer"))
"""Options of the commands that run the pipeline: --config, --overwrite, --observer."""

_plugin_option = click.option(
    "-p", "--plugin", "plugins", multiple=True, metavar="PLUGIN",
    help="Load a module or a file.py as a plugin; no:NAME disables an installed one. May be repeated.",
)  # fmt: skip
_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout and nothing else.")
_traceback_option = click.option(
    "--traceback", is_flag=True, expose_value=False, callback=_keep_traceback, help="Show where an error came from."
)


def task_options(metavar: str) -> Decorator:
    """Return a decorator that adds the options of lm-evaluation-harness; ``metavar`` is that of --tasks."""
    tasks = "Tasks of lm-evaluation-harness, such as arc_easy,piqa. Needs the extra `eval`. May be repeated."
    return bundle(
        click.option("--tasks", multiple=True, metavar=metavar, help=tasks),
        click.option("--task-data", type=FOLDER, help="Read tasks from DIR/TASK/SPLIT.jsonl. [default: the Hub]"),
        click.option("--limit", type=click.IntRange(1), metavar="N", help="First N documents of each task only."),
        click.option(
            "--fewshot", type=click.IntRange(0), metavar="N", help="Examples in a prompt. [default: the task's own]"
        ),
    )


@dataclass(frozen=True)
class Output:
    """How a command reports: with tables and progress bars, as one JSON object, or not at all."""

    quiet: bool
    as_json: bool

    @property
    def visible(self) -> bool:
        """Whether tables and bars are shown."""
        return is_first() and not (self.quiet or self.as_json)

    def progress(self) -> Progress:
        """Return a progress display that follows the command's options."""
        from cfsp_framework.runtime.progress import Progress

        return Progress(visible=self.visible)

    def show(self, result: object, show_tables: Callable[[], None]) -> None:
        """Print ``result``, JSON text or JSON values, or call ``show_tables``; in the first process only."""
        if self.as_json and is_first():
            text = result if isinstance(result, str) else json.dumps(result, indent=2)
            click.echo(text.removesuffix("\n"))
        elif self.visible:
            show_tables()


def output_options(*, plugins: bool = True, quiet: str | None = "No progress, no tables.") -> Decorator:
    """Return a decorator that adds -p, -q, --json and --traceback; the command gets ``output: Output``.

    ``plugins`` adds -p; ``quiet`` is the help of -q, and None omits -q.
    """

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(*arguments: Any, as_json: bool, quiet: bool = False, **options: Any) -> Any:
            return command(*arguments, output=Output(quiet, as_json), **options)

        return bundle(
            *([_plugin_option] if plugins else []),
            *([click.option("-q", "--quiet", is_flag=True, help=quiet)] if quiet else []),
            _json_option,
            _traceback_option,
        )(run)

    return decorate


# --- what commands share ----------------------------------------------------------------------------------------------


def is_first() -> bool:
    """Return whether this process writes and prints: torchrun numbers the processes from 0."""
    return os.environ.get("RANK", "0") == "0"


def read_plan(path: Path) -> PruningPlan:
    """Read a plan from its file, or from the folder of a pruned checkpoint.

    Raises:
        PlanError: the plan is missing or cannot be used.
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
        raise PlanError(f"{file} is not a pruning plan; `cfsp plan` writes one.")
    try:
        return PruningPlan.from_json(text)
    except PlanError as error:
        raise PlanError(f"{file}: {error}") from error


def publish(folder: Path, repository: str | None, output: Output) -> None:
    """Upload a finished checkpoint to the repository of --push-to-hub, if one was given."""
    if repository is None or not is_first():
        return
    from cfsp_framework.export.hub import push

    upload = push(folder, repository)
    if output.visible:
        click.echo(f"Uploaded: {upload.url}")
