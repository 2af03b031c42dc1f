"""Run the quality ladder: the gain of each step beyond released CFSP, at exactly equal parameter counts.

    python tests/benchmarks/ladder.py run tests/benchmarks/ladder.yaml results.jsonl      # resumable: finished cells are skipped
    python tests/benchmarks/ladder.py table results.jsonl                # Markdown on stdout
    python tests/benchmarks/ladder.py plot results.jsonl picture.svg

One collection per model and seed serves every row. Seconds are those of a row's own plan and compensation; the
collection's are listed apart. Memory is the peak while the row ran over what the process held before.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from cfsp_framework.api.components import Criterion
from cfsp_framework.config import RunConfig
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.evaluation.perplexity import perplexity
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.selection import Selection, select
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.run import steps
from cfsp_framework.run.context import RunContext, set_up
from cfsp_framework.run.steps import CRITERION
from cfsp_framework.runtime.progress import Progress
from common import append_cell, format_spread, read_cells, reset_peak, status_bytes

Row = Mapping[str, str]
Cell = dict[str, Any]


def run(ladder: Mapping[str, Any], results: Path) -> None:
    """Run every cell of the ladder that ``results`` does not hold yet, seed by seed, a line of JSON each."""
    done = {key(cell) for cell in read(results)}
    for seed in ladder["seeds"]:
        for name, options in ladder["models"].items():
            missing = [
                (row, ratio)
                for ratio in ladder["ratios"]
                for row in ladder["rows"]
                if (name, row, ratio, seed) not in done
            ]
            if missing:
                for cell in run_model(name, seed, options, ladder["rows"], missing):
                    append_cell(results, cell)


def run_model(
    name: str, seed: int, options: Mapping[str, Any], rows: Mapping[str, Row], cells: list[tuple[str, float]]
) -> Iterator[Cell]:
    """Yield the cells of one model and seed, from one collection."""
    context = set_up(RunConfig.build(seed=seed, **options), Progress())
    selections = {row: select(RunConfig.build(model=name, **rows[row]), context.plugins) for row, _ in cells}
    start = time.perf_counter()
    measurements = collect_all(context, selections)
    collected = time.perf_counter() - start
    dense = [perplexity(context.decoder.model, data, Progress()) for data in context.evaluation_sets]
    for row, ratio in cells:
        base = {"model": name, "row": row, "ratio": ratio, "seed": seed, "collect_seconds": round(collected, 2)}
        cell = run_cell(context, selections[row], only(measurements, row), ratio)
        pruned = cell.pop("perplexities")
        for data, before, after in zip(context.evaluation_sets, dense, pruned, strict=True):
            label = Path(data.spec).stem
            cell |= {f"dense:{label}": before.perplexity, f"pruned:{label}": after.perplexity}
            cell |= {f"excess:{label}": after.nll - before.nll}
        yield {**base, **cell}


def collect_all(context: RunContext, selections: Mapping[str, Selection]) -> tuple[FeedForwardMeasurement, ...]:
    """Collect the statistics of all rows in one pass, and score every criterion."""
    collectors = {c.component.name: c for selection in selections.values() for c in selection.collectors}
    criteria: dict[str, ConfiguredComponent[Criterion]] = {
        row: selection.criterion for row, selection in selections.items()
    }
    return collect(
        context.decoder,
        context.windows,
        criteria,
        list(collectors.values()),
        curves={row: (row, "compensated") for row in selections},
        seed=context.config.run.seed,
        progress=Progress(),
    )


def only(measurements: Iterable[FeedForwardMeasurement], row: str) -> list[FeedForwardMeasurement]:
    """Return the measurements as in a run of one criterion."""
    return [
        replace(m, scores={CRITERION: m.scores[row]}, curves={CRITERION: m.curves[row]} if m.curves else {})
        for m in measurements
    ]


def run_cell(
    context: RunContext, selection: Selection, measurements: list[FeedForwardMeasurement], ratio: float
) -> Cell:
    """Plan, cut and evaluate a copy of the model."""
    decoder = Decoder(copy.deepcopy(context.decoder.model), context.decoder.architecture)
    config = context.config.replace(ratio=ratio)
    context = replace(context, config=config, selection=selection, decoder=decoder, progress=Progress())
    reset_peak()
    held = status_bytes("VmRSS")
    start = time.perf_counter()
    plan = steps.make_plan(context, measurements)
    updates = steps.cut(context, plan, measurements, folder=Path()).updates  # nothing is written
    seconds = time.perf_counter() - start
    peak = status_bytes("VmHWM") - held
    refused = [block for (block, _), update in updates.items() if update.error is not None and update.down is None]
    return {
        "widths": plan.widths,
        "channels": sum(plan.widths),
        "parameters": measure_size(decoder.model).parameters,
        "seconds": round(seconds, 2),
        "peak_bytes": peak,
        "refused_blocks": refused,
        "perplexities": [perplexity(decoder.model, data, Progress()) for data in context.evaluation_sets],
    }


def table(cells: list[Cell]) -> str:
    """Format, per model and evaluation text, the excess NLL of every row and ratio: mean and spread over seeds."""
    blocks: list[str] = []
    for name in unique(cell["model"] for cell in cells):
        of_model = [cell for cell in cells if cell["model"] == name]
        for label in [k.removeprefix("excess:") for k in of_model[0] if k.startswith("excess:")]:
            blocks.append(f"**{name}, evaluated on {label}** (dense perplexity {of_model[0][f'dense:{label}']:.3f})\n")
            blocks.append(format_rows(of_model, f"excess:{label}") + "\n")
    return "\n".join(blocks)


def format_rows(cells: list[Cell], column: str) -> str:
    """Format a table of rows by ratios."""
    ratios = sorted({cell["ratio"] for cell in cells})
    by = group(cells)
    rows = unique(cell["row"] for cell in cells)
    lines = ["| row | " + " | ".join(f"{ratio:.0%}" for ratio in ratios) + " | seconds | peak MB |"]
    lines.append("|---|" + "---:|" * (len(ratios) + 2))
    for row in rows:
        shown = []
        for ratio in ratios:
            values = [cell[column] for cell in by[row, ratio]]
            first = [cell[column] for cell in by[rows[0], ratio]]
            shown.append(describe(values, first))
        of_row = [cell for cell in cells if cell["row"] == row]
        seconds = statistics.median(cell["seconds"] for cell in of_row)
        memory = statistics.median(cell["peak_bytes"] for cell in of_row) / 1e6
        lines.append(f"| {row} | " + " | ".join(shown) + f" | {seconds:.1f} | {memory:.0f} |")
    return "\n".join(lines)


def describe(values: list[float], first: list[float]) -> str:
    """Format mean and spread over seeds, and the ratio to the mean of the first row."""
    if not values or not first:
        return ""
    start = statistics.fmean(first)
    if start < 0.01:  # a ratio to almost nothing is meaningless
        return format_spread(values, 4)
    return f"{format_spread(values, 3)} ({statistics.fmean(values) / start:.2f}x)"


def plot(cells: list[Cell], picture: Path) -> None:
    """Plot excess NLL against ratio, a panel per model, a line per row."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    colours = pyplot.get_cmap("tab20")(range(20))
    models = unique(cell["model"] for cell in cells)
    figure, panels = pyplot.subplots(1, len(models), figsize=(5 * len(models), 4.2), squeeze=False)
    for panel, name in zip(panels[0], models, strict=True):
        of_model = [cell for cell in cells if cell["model"] == name]
        column = next(k for k in of_model[0] if k.startswith("excess:"))
        by = group(of_model)
        for number, row in enumerate(unique(cell["row"] for cell in of_model)):
            ratios = sorted(ratio for name, ratio in by if name == row)
            means = [statistics.fmean(cell[column] for cell in by[row, ratio]) for ratio in ratios]
            panel.plot(ratios, means, color=colours[number % 20], marker="os^v"[number % 4], markersize=5, label=row)
        panel.set(
            title=f"{name}, on {column.removeprefix('excess:')}", xlabel="feed-forward channels removed", yscale="log"
        )
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("excess NLL, nats per token")
    panels[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(picture, bbox_inches="tight")


def group(cells: Iterable[Cell]) -> dict[tuple[str, float], list[Cell]]:
    """Group cells by row and ratio."""
    groups: dict[tuple[str, float], list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell["row"], cell["ratio"]].append(cell)
    return groups


def unique(values: Iterable[str]) -> list[str]:
    """Return distinct values in order of appearance."""
    return list(dict.fromkeys(values))


def key(cell: Mapping[str, Any]) -> tuple[str, str, float, int]:
    """Return the identity of a cell."""
    return cell["model"], cell["row"], cell["ratio"], cell["seed"]


def read(results: Path) -> list[Cell]:
    """Read the finished cells, whose excess NLL must be finite."""
    cells: list[Cell] = read_cells(results)
    assert all(math.isfinite(value) for cell in cells for k, value in cell.items() if k.startswith("excess:"))
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table", "plot"])
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--model", help="run this model of the ladder alone")
    options = parser.parse_args()
    if options.action == "run":
        ladder = yaml.safe_load(os.path.expandvars(options.paths[0].read_text()))
        if options.model:
            ladder["models"] = {options.model: ladder["models"][options.model]}
        torch.manual_seed(0)
        run(ladder, options.paths[1])
    elif options.action == "table":
        print(table(read(options.paths[0])))
    else:
        plot(read(options.paths[0]), options.paths[1])


if __name__ == "__main__":
    main()
