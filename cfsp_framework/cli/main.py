"""The command line's front door. It imports click alone, so that ``cfsp --help`` answers at once."""

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
from typing import Any, TextIO

import click

from cfsp_framework.errors import CfspError, PluginWarning, is_out_of_memory

COMMANDS = {
    "prune": "Prune a model into a checkpoint folder.",
    "plan": "Decide what to prune and write the plan, without cutting.",
    "recover": "Train a pruned model, and write the result.",
    "ablate": "Compare criteria, allocators and presets in one table.",
    "compare": "Tell where two plans differ.",
    "evaluate": "Report a model's perplexity and its scores on tasks.",
    "benchmark": "Time models side by side, and say how much of the ideal is reached.",
    "export": "Write a pruned model for other programs: padded, GGUF or ONNX.",
    "push": "Publish a pruned checkpoint on the Hugging Face Hub.",
    "plugins": "List, explain and check what plugins offer; begin a plugin.",
    "demo": "Prune the embedded model and show what happens.",
}


class Failure(click.ClickException):
    """An error on its way to the user: one or two lines and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class _Commands(click.Group):
    """Loads a command's module, ``cli/NAME.py``, when it is run, or asked for its own help."""

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
        except (CfspError, click.UsageError, KeyboardInterrupt, MemoryError, OSError, RuntimeError) as error:
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

    `cfsp demo` shows it in under a minute. `cfsp COMMAND --help` explains a command.
    """


def _failure(error: BaseException) -> Failure | None:
    """What the user is told, in one or two lines; None for a bug, which keeps its traceback."""
    match error:
        case CfspError():
            return Failure(str(error), error.exit_code)
        case click.exceptions.NoArgsIsHelpError():
            return None
        case click.UsageError():
            hint = f"\nTry '{error.ctx.command_path} --help' for help." if error.ctx else ""
            return Failure(error.format_message() + hint, error.exit_code)
        case KeyboardInterrupt():
            where = "".join(f" {note}" for note in getattr(error, "__notes__", []))  # whose code was running
            return Failure(f"interrupted{where}; nothing was written.", 2)
        case OSError() if error.filename and error.errno != errno.EPIPE:
            return Failure(f"{error.filename}: {error.strerror}.", 2)
        case MemoryError() | RuntimeError() if is_out_of_memory(error):
            return Failure("out of memory; a smaller --batch-size or --seqlen needs less.", 1)
        case _:
            return None


@contextmanager
def _terminable() -> Generator[None]:
    """While open, SIGTERM is Ctrl-C: what was begun is cleaned up. Only a main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _plain_warnings() -> Generator[None]:
    """While open, warnings about plugins are one line on stderr, without the place in our code that gave them."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def plainly(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, PluginWarning):
                click.echo(f"Warning: {message}", err=True)
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = plainly
        yield


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The ``cfsp`` command."""
    cli(prog_name="cfsp")
