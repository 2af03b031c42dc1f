"""Run the ``cfsp`` command. It imports click alone, so that ``cfsp --help`` is instant."""

from __future__ import annotations

import errno
import importlib
import signal
import threading
import traceback
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import click

from cfsp_framework.errors import LONGEST_MESSAGE, CfspError, PluginWarning, is_out_of_memory, one_line, printable

COMMANDS = {
    "prune": "Prune a model into a checkpoint folder.",
    "plan": "Decide what to prune and write the plan, without cutting.",
    "recover": "Train a pruned model and write the result.",
    "ablate": "Compare criteria, allocators and presets in one table.",
    "compare": "Show where two plans differ.",
    "evaluate": "Report a model's perplexity and its scores on tasks.",
    "benchmark": "Time models side by side and compare them with the ideal speed-up.",
    "export": "Write a pruned model for other programs: padded, GGUF or ONNX.",
    "push": "Publish a pruned checkpoint on the Hugging Face Hub.",
    "plugins": "List, explain and check what plugins offer, and create a plugin.",
    "demo": "Prune the embedded model and report the result.",
}


class Failure(click.ClickException):
    """Error shown to the user: one or two lines and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(printable(message, 4 * LONGEST_MESSAGE))
        self.exit_code = exit_code  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class _Commands(click.Group):
    """Import a command's module, ``cli/NAME.py``, only when the command or its help is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"cfsp_framework.cli.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminable(), _plain_warnings():
                return super().invoke(ctx)
        except (click.Abort, click.exceptions.Exit):
            raise
        except (Exception, KeyboardInterrupt) as error:
            failure = _failure(error)
            if failure is None:
                raise
            if ctx.meta.get("traceback"):
                traceback.print_exception(error)
            raise failure from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cfsp-framework", prog_name="cfsp")
def cli() -> None:
    """Prune the feed-forward width of decoder language models; every step is a plugin.

    `cfsp demo` is an example that takes under a minute. `cfsp COMMAND --help` explains a command.
    """


def _failure(error: BaseException) -> Failure | None:
    """Return the error to show in place of a traceback, or None for what click handles."""
    match error:
        case CfspError():
            return Failure(str(error), error.exit_code)
        case click.exceptions.NoArgsIsHelpError():
            return None
        case click.UsageError():
            hint = f"\nTry '{error.ctx.command_path} --help' for help." if error.ctx else ""
            return Failure(error.format_message() + hint, error.exit_code)
        case KeyboardInterrupt():
            place = "".join(f" {note}" for note in getattr(error, "__notes__", []))  # the component that was running
            return Failure(f"interrupted{place}; nothing was written.", 2)
        case OSError() if error.filename and error.errno != errno.EPIPE:
            return Failure(f"{error.filename}: {error.strerror}.", 2)
        case MemoryError() | RuntimeError() if is_out_of_memory(error):
            return Failure("out of memory; a smaller --batch-size or --seqlen needs less.", 1)
        case OSError() if error.errno == errno.EPIPE:
            return None
        case _:
            return Failure(f"{one_line(error)}.\nThis is a fault of cfsp; --traceback shows where it happened.", 1)


@contextmanager
def _terminable() -> Generator[None]:
    """Handle SIGTERM like Ctrl-C inside the block, so that partial output is removed; main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _plain_warnings() -> Generator[None]:
    """Print warnings about plugins as one line on stderr inside the block, without file and line of the host."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_plainly(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, PluginWarning):
                click.echo(f"Warning: {printable(str(message))}", err=True)
            else:
                show(message, category, *place)

        warnings.showwarning = cast("Any", show_plainly)
        yield


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the ``cfsp`` command."""
    cli(prog_name="cfsp")
