"""``cfsp push``."""

from __future__ import annotations

from pathlib import Path

import click

from cfsp_framework.cli.options import json_option, quiet_option, traceback_option


@click.command
@click.argument("pruned", type=click.Path(path_type=Path, file_okay=False, exists=True))
@click.argument("repository", metavar="REPOSITORY")
@click.option("--private", is_flag=True, help="Make the repository private, where it is new.")
@click.option("--revision", metavar="BRANCH", help="Upload to this branch; made where there is none. [default: main]")
@click.option("--message", metavar="TEXT", help="The commit's message.")
@click.option("--dry-run", is_flag=True, help="Upload nothing: only check, and list the files. Needs no network.")
@quiet_option
@json_option
@traceback_option
def push(
    pruned: Path,
    repository: str,
    private: bool,
    revision: str | None,
    message: str | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Publish PRUNED, a checkpoint `cfsp prune` or `cfsp recover` wrote, as REPOSITORY (USER/NAME) on the Hub."""
    from cfsp_framework.cli.tables import show_upload
    from cfsp_framework.errors import ModelError
    from cfsp_framework.export import hub as publishing

    upload = publishing.push(pruned, repository, private=private, revision=revision, message=message, dry_run=dry_run)
    if as_json:
        click.echo(upload.model_dump_json(indent=2))
    elif not quiet:
        show_upload(upload)
    failed = [check.detail for check in upload.checks if check.outcome == "failed"]
    if failed:
        raise ModelError(f"{pruned} cannot be published: {failed[0]}")
