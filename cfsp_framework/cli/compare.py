"""``cfsp compare``."""

from __future__ import annotations

from pathlib import Path

import click

from cfsp_framework.cli.options import json_option, quiet_option, read_plan, traceback_option


@click.command()
@click.argument("plan_a", type=click.Path(path_type=Path, exists=True))
@click.argument("plan_b", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--experts", is_flag=True, help="Compare every expert of a mixture by itself, not all of a block together."
)
@click.option("--exit-code", is_flag=True, help="Exit with 1 where the plans do not make the same cut.")
@quiet_option
@json_option
@traceback_option
@click.pass_context
def compare(
    ctx: click.Context,
    plan_a: Path,
    plan_b: Path,
    experts: bool,
    exit_code: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Tell where PLAN_A and PLAN_B differ: which channels each keeps, block by block, and what led to it.

    A plan is a file `cfsp plan` wrote, or the folder of a pruned checkpoint.
    """
    from cfsp_framework.cli.tables import show_comparison
    from cfsp_framework.pruning.plan_diff import compare as compare_plans

    plans = read_plan(plan_a), read_plan(plan_b)
    found = compare_plans(*plans, (str(plan_a), str(plan_b)), experts=experts)
    if as_json:
        click.echo(found.to_json(), nl=False)
    elif not quiet:
        show_comparison(found)
    if exit_code and not found.same_cut:
        ctx.exit(1)
