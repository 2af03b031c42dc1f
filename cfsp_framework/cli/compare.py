"""``cfsp compare``."""

from __future__ import annotations

from pathlib import Path

import click

from cfsp_framework.cli.options import Output, output_options, read_plan


@click.command()
@click.argument("plan_a", type=click.Path(path_type=Path, exists=True))
@click.argument("plan_b", type=click.Path(path_type=Path, exists=True))
@click.option("--experts", is_flag=True, help="Compare each expert of a mixture, not all of a block together.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if the plans do not make the same cut.")
@output_options(plugins=False)
@click.pass_context
def compare(ctx: click.Context, plan_a: Path, plan_b: Path, experts: bool, exit_code: bool, output: Output) -> None:
    """Show where PLAN_A and PLAN_B differ: the channels kept, block by block, and the settings that led to it.

    A plan is a file written by `cfsp plan`, or the folder of a pruned checkpoint.
    """
    from cfsp_framework.cli.tables import show_comparison
    from cfsp_framework.pruning.plan_diff import compare as compare_plans

    plans = read_plan(plan_a), read_plan(plan_b)
    comparison = compare_plans(*plans, (str(plan_a), str(plan_b)), experts=experts)
    output.show(comparison.to_json(), lambda: show_comparison(comparison))
    if exit_code and not comparison.same_cut:
        ctx.exit(1)
