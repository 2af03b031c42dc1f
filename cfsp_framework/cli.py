"""The command line's front door. It imports click alone, so that ``cfsp --help`` answers at once."""

from __future__ import annotations

import importlib
import signal
from types import FrameType
from typing import Any

import click

from .errors import CfspError

COMMANDS = {
    "prune": "Prune a model into a checkpoint folder.",
    "plan": "Decide what to prune and write the plan, without cutting.",
    "evaluate": "Report a model's perplexity.",
    "plugins": "List and explain the components plugins offer.",
    "demo": "Prune the embedded model and show what happens.",
}


class Failure(click.ClickException):
    """An error on its way to the user: one or two lines and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class _Commands(click.Group):
    """Loads a command's module when it is run, or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module("cfsp_framework.commands"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().invoke(ctx)
        except CfspError as error:
            if ctx.meta.get("traceback"):
                raise
            raise Failure(str(error), error.exit_code) from error
        except KeyboardInterrupt as error:
            raise Failure("interrupted; nothing was written.", 2) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cfsp-framework", prog_name="cfsp")
def cli() -> None:
    """Prune the feed-forward width of decoder language models; every step is a plugin.

    `cfsp demo` shows it in under a minute. `cfsp COMMAND --help` explains a command.
    """


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """The ``cfsp`` command."""
    cli(prog_name="cfsp")
