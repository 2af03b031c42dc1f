"""What ``cfsp compare`` prints for people."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cfsp_framework.pruning.plan_diff import BlockComparison, Comparison, Difference, Overlap

_LONG = 16
"""Letters from which on a hash is cut; what is left tells two apart."""
_COLUMNS: tuple[tuple[str, Callable[[Overlap], str]], ...] = (
    ("width", lambda one: str(one.width)),
    ("A", lambda one: str(one.first)),
    ("B", lambda one: str(one.second)),
    ("both", lambda one: str(one.both)),
    ("only A", lambda one: str(one.only_first)),
    ("only B", lambda one: str(one.only_second)),
    ("overlap", lambda one: f"{one.jaccard:.3f}"),
)


def show_comparison(found: Comparison) -> None:
    """The blocks with a total, what else differs, and what it means. Without boxes, so that ten columns fit."""
    console = Console(highlight=False, markup=False)
    console.print(f"A: {found.first}\nB: {found.second}", soft_wrap=True)
    console.print(_block_table(found))
    if found.differences:
        console.print(_difference_table(found.differences))
    for note in found.notes:
        console.print(f"Note: {note}.")
    console.print(_verdict(found))


def _block_table(found: Comparison) -> Table:
    mixed = len({one.block for one in found.blocks}) < len(found.blocks) or any(b.experts > 1 for b in found.blocks)
    ranked = any(one.importance_first is not None or one.importance_second is not None for one in found.blocks)
    table = Table(title="Channels kept", title_justify="left", show_footer=True, box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("block", "all", justify="right", no_wrap=True)
    if mixed:
        table.add_column("feed-forward", overflow="fold")
    for heading, tell in _COLUMNS:
        table.add_column(heading, tell(found.total), justify="right", no_wrap=True)
    if ranked:
        for heading in ("imp. A", "imp. B"):
            table.add_column(heading, justify="right", no_wrap=True)
    for one in found.blocks:
        place = [f"{one.path} x {one.experts}" if one.experts > 1 else one.path] if mixed else []
        table.add_row(
            str(one.block), *place, *(tell(one) for _, tell in _COLUMNS), *(_importance(one) if ranked else [])
        )
    return table


def _importance(one: BlockComparison) -> list[str]:
    return ["" if value is None else f"{value:.3g}" for value in (one.importance_first, one.importance_second)]


def _difference_table(differences: tuple[Difference, ...]) -> Table:
    table = Table(title="What else differs", title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in ("A", "B"):
        table.add_column(heading, overflow="fold")
    for one in differences:
        cut = one.name.endswith("fingerprint")
        table.add_row(one.name, *((value or "")[: _LONG if cut else None] for value in (one.first, one.second)))
    return table


def _verdict(found: Comparison) -> str:
    if found.same_cut:
        return "Both plans make the same cut."
    changed = sum(one.only_first + one.only_second > 0 for one in found.blocks)
    total = found.total
    return (
        f"The plans differ in {changed} of {len(found.blocks)} feed-forwards; of the channels either keeps, both keep "
        f"{total.jaccard:.1%}, where chance would give {total.chance:.1%}."
    )
