"""The tables of docs/ablations.md: a row a method, a column for each ratio and text, from what ``cfsp ablate --json`` printed.

cfsp ablate MODEL OUT --config docs/ablations.yaml --calibration TEXT --evaluate TEXT --round-to N --json > sweep.json
python tests/benchmarks/ablation_table.py sweep.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from cfsp_framework.ablation.results import SweepResults
from cfsp_framework.ablation.tables import grid, measures, spread_note
from cfsp_framework.data.sources import shorten_spec


def main() -> None:
    results = SweepResults.model_validate_json(Path(sys.argv[1]).read_text(encoding="utf-8"))
    grids = [grid(results, measure) for measure in measures(results)]
    heads = [f"{100 * ratio:g} %, {shorten_spec(one.data)}" for one in results.dense for ratio in grids[0].ratios]
    print(f"{spread_note(results)}\n\n| method | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    dense = [f"{made.measure.dense:.2f}" for made in grids for _ in made.ratios]
    print(f"| dense | {' | '.join(dense)} |")
    for label in grids[0].rows:
        entries = [entry for made in grids for entry in made.rows[label]]
        words = ["" if one is None else f"**{one.text(2)}**" if one.best else one.text(2) for one in entries]
        print(f"| {label} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
