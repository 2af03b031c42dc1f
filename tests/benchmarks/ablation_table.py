"""Print the tables of docs/ablations.md, a row per method and a column per ratio and text, from ``cfsp ablate --json``.

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
    heads = [
        f"{100 * ratio:g} %, {shorten_spec(evaluation.data)}"
        for evaluation in results.dense
        for ratio in grids[0].ratios
    ]
    print(f"{spread_note(results)}\n\n| method | {' | '.join(heads)} |\n|---|{'---:|' * len(heads)}")
    dense = [f"{each.measure.dense:.2f}" for each in grids for _ in each.ratios]
    print(f"| dense | {' | '.join(dense)} |")
    for label in grids[0].rows:
        entries = [entry for each in grids for entry in each.rows[label]]
        words = ["" if entry is None else f"**{entry.text(2)}**" if entry.best else entry.text(2) for entry in entries]
        print(f"| {label} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
