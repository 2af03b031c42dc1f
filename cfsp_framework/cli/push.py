"""``cfsp push``."""

from __future__ import annotations

from pathlib import Path

import click

from cfsp_framework.cli.options import FOLDER, Output, output_options


@click.command
@click.argument("pruned", type=FOLDER)
@click.argument("repository", metavar="REPOSITORY")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--revision", metavar="BRANCH", help="Upload to this branch, created if missing. [default: main]")
@click.option("--message", metavar="TEXT", help="The commit's message.")
@click.option("--dry-run", is_flag=True, help="Upload nothing: only check, and list the files. Needs no network.")
@output_options(plugins=False)
def push(
    pruned: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    output: Output,
) -> None:
    """Publish PRUNED, a checkpoint of `cfsp prune` or `cfsp recover`, as REPOSITORY (USER/NAME) on the Hub."""
    from cfsp_framework.cli.tables import show_upload
    from cfsp_framework.errors import ModelError
    from cfsp_framework.export import hub

    upload = hub.push(pruned, repository, private=private, revision=revision, message=message, dry_run=dry_run)
    output.show(upload.model_dump_json(indent=2), lambda: show_upload(upload))
    if failed := [check.detail for check in upload.checks if check.outcome == "failed"]:
        raise ModelError(f"{pruned} cannot be published: {failed[0]}")
