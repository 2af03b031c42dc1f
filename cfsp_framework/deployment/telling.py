"""What the commands of this part print for people."""

from __future__ import annotations

from rich.console import Console

from cfsp_framework.runtime.atomic_files import human_bytes

from cfsp_framework.export.export import Exported, spread


def show_export(made: Exported) -> None:
    """A few lines on what was written."""
    console = Console(highlight=False, markup=False)
    before, after = spread(made.widths), spread(made.written_widths)
    widths = f"widths {before}" if before == after else f"widths {before} became {after}"
    named = f" (architecture {made.architecture})" if made.architecture else ""
    console.print(f"Written to {made.path}: {made.format}{named}, {widths}, {human_bytes(made.bytes)}.", soft_wrap=True)
    if made.difference is not None:
        found = "bit-equal to the pruned model's" if made.difference == 0 else f"off by {made.difference:.2g} at most"
        console.print(f"Opened again: logits are {found}.")
    for note in made.notes:
        console.print(f"Note: {note}.", soft_wrap=True)
