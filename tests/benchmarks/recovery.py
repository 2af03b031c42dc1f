"""Measure recovery: perplexity pruned and recovered, at equal trained parameters, steps and tokens.

    python tests/benchmarks/recovery.py run results.jsonl --model demo --ratio 0.5 --seed 0 --seed 1      # resumable
    python tests/benchmarks/recovery.py table results.jsonl                                               # Markdown

A model is pruned once for each preset, ratio and seed, and every scheduler starts from that checkpoint. The seed draws
the calibration windows, the adapters and the order of the training data.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cfsp_framework import RunConfig, pipeline
from cfsp_framework.config import layered
from common import add_options, append_cell, format_spread, read_cells

SCHEDULERS = ("uniform-lora", "ig-lora:direction=importance", "ig-lora:direction=removed")
WORTH_A_SHARE = 0.02
"""Nats per token that pruning has to add for the remaining share to be shown."""
Cell = dict[str, Any]


def run(options: argparse.Namespace, results: Path) -> None:
    """Run every cell that ``results`` does not hold yet, a line of JSON each."""
    done = {key(cell) for cell in read_cells(results)}
    for seed, ratio, preset in itertools.product(options.seed, options.ratio, options.preset):
        place = options.model, preset, ratio, seed
        schedulers = [name for name in options.scheduler if (*place, name, settings(options)) not in done]
        for cell in run_pruned(options, preset, ratio, seed, schedulers) if schedulers else ():
            append_cell(results, cell)


def run_pruned(
    options: argparse.Namespace, preset: str, ratio: float, seed: int, schedulers: Sequence[str]
) -> Iterator[Cell]:
    """Yield the cells of one pruned checkpoint."""
    common = {
        "seed": seed,
        "seqlen": options.seqlen,
        "evaluate": tuple(options.evaluate),
        "evaluate_windows": options.evaluate_windows,
        "device": options.device,
    }
    with tempfile.TemporaryDirectory() as scratch:
        pruned = Path(scratch, "pruned")
        given = {
            "model": options.model,
            "ratio": ratio,
            "round_to": options.round_to,
            "samples": options.samples,
            "calibration": options.calibration,
        }
        config = layered(preset, None, common | given)
        pipeline.prune(config, pruned)
        for scheduler in schedulers:
            chosen = with_options(scheduler, options.options)
            config = RunConfig.build(
                model=str(pruned),
                recovery=chosen,
                recovery_data=options.data or options.calibration,
                recovery_steps=options.steps,
                **common,
            )
            start = time.perf_counter()
            report = pipeline.recover(config, Path(scratch, "recovered"), overwrite=True).report
            assert report.recovery is not None
            cell: Cell = {
                "model": options.model,
                "preset": preset,
                "ratio": ratio,
                "scheduler": scheduler,
                "seed": seed,
            }
            cell |= {"settings": settings(options), "seconds": round(time.perf_counter() - start, 1)}
            cell |= report.recovery.model_dump(include={"parameters", "ranks", "steps", "tokens"})
            for evaluation in report.evaluations:
                assert evaluation.dense is not None
                assert evaluation.recovered is not None
                values = {"dense": evaluation.dense, "pruned": evaluation.pruned, "recovered": evaluation.recovered}
                label = Path(evaluation.data).stem
                cell |= {f"{name}:{label}": value.perplexity for name, value in values.items()}
                cell |= {f"excess:{label}": evaluation.excess_nll, f"left:{label}": evaluation.recovered_excess_nll}
            yield cell


def with_options(scheduler: str, options: str) -> str:
    """Append options to ``NAME:option=value``."""
    return scheduler if not options else f"{scheduler}{',' if ':' in scheduler else ':'}{options}"


def table(cells: list[Cell]) -> str:
    """Format, per model, the excess NLL pruned and recovered, mean over seeds and half their range."""
    lines: list[str] = []
    for model, how in dict.fromkeys((cell["model"], cell["settings"]) for cell in cells):
        of_model = [cell for cell in cells if (cell["model"], cell["settings"]) == (model, how)]
        labels = [name.removeprefix("left:") for name in of_model[0] if name.startswith("left:")]
        lines += [f"**{Path(model).name}** ({how})", ""]
        head = "| removed | pruned by | scheduler | seeds | trained parameters | "
        lines.append(head + " | ".join(columns(labels)) + " |")
        lines.append("|---:|---|---|---:|---:|" + "---:|" * (3 * len(labels)))
        lines += [row(group, labels) for group in group_seeds(of_model)]
        lines.append("")
    return "\n".join(lines)


def group_seeds(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Yield groups of cells that differ in the seed only."""
    kinds = [(cell["ratio"], preset_of(cell), cell["scheduler"]) for cell in cells]
    for kind in sorted(dict.fromkeys(kinds), key=lambda kind: kind[0]):
        yield [cell for cell, other in zip(cells, kinds, strict=True) if other == kind]


def row(cells: Sequence[Cell], labels: Sequence[str]) -> str:
    """Format one line of the table, without shares if pruning added almost nothing."""
    first = cells[0]
    shown = []
    for label in labels:
        added, left = [cell[f"excess:{label}"] for cell in cells], [cell[f"left:{label}"] for cell in cells]
        shares = [after / before for before, after in zip(added, left, strict=True) if before > WORTH_A_SHARE]
        shown += [
            format_spread(added, 4),
            format_spread(left, 4),
            format_spread(shares, 2) if len(shares) == len(added) else "",
        ]
    parameters = f"{statistics.fmean(cell['parameters'] for cell in cells):,.0f}"
    place = f"{first['ratio']:.0%}", f"`{preset_of(first)}`", f"`{first['scheduler']}`", str(len(cells)), parameters
    return f"| {' | '.join([*place, *shown])} |"


def columns(labels: Iterable[str]) -> list[str]:
    """Return three headings for each evaluation text."""
    return [f"{label}, {kind}" for label in labels for kind in ("pruned", "recovered", "share left")]


def settings(options: argparse.Namespace) -> str:
    """Describe the settings that cells must share to be compared."""
    return f"{options.steps} steps, {options.options or 'default options'}, on {Path(options.data or options.calibration).stem}"


def key(cell: Cell) -> tuple[Any, ...]:
    """Return the identity of a cell."""
    return cell["model"], preset_of(cell), cell["ratio"], cell["seed"], cell["scheduler"], cell["settings"]


def preset_of(cell: Cell) -> str:
    """Return the preset of a cell; older results have none."""
    return str(cell.get("preset", "cfsp"))


def main() -> None:
    lists = {"ratio": [0.5], "seed": [0], "preset": ["cfsp"], "scheduler": list(SCHEDULERS), "evaluate": ["demo"]}
    numbers = {"steps": 200, "samples": 64, "seqlen": 256, "round_to": 32, "evaluate_windows": 100}
    texts = {"model": "demo", "options": "", "calibration": "demo", "data": None, "device": "auto"}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("results", type=Path)
    add_options(parser, **lists, **numbers, **texts)
    options = parser.parse_args()
    if options.action == "run":
        run(options, options.results)
    else:
        print(table(read_cells(options.results)))


if __name__ == "__main__":
    main()
