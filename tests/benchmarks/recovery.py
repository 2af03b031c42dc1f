"""What recovery is worth: perplexity pruned and recovered, at equal trained parameters, steps and tokens.

    python tests/benchmarks/recovery.py run results.jsonl --model demo --ratio 0.5 --seed 0 --seed 1      # resumable
    python tests/benchmarks/recovery.py table results.jsonl                                               # Markdown

A model is pruned once for each preset, ratio and seed, and every scheduler starts from that checkpoint. The seed draws
the calibration windows, the adapters and the order of the training data.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from cfsp_framework import RunConfig, pipeline
from cfsp_framework.config import layered

SCHEDULERS = ("uniform-lora", "ig-lora:direction=importance", "ig-lora:direction=removed")
WORTH_A_SHARE = 0.02
"""Nats per token that pruning has to add for the share that is left to mean something."""
Cell = dict[str, Any]


def run(options: argparse.Namespace, results: Path) -> None:
    """Every cell that ``results`` does not hold yet, a line of JSON each."""
    done = {key(cell) for cell in read(results)}
    for seed, ratio, preset in itertools.product(options.seed, options.ratio, options.preset):
        where = options.model, preset, ratio, seed
        wanted = [one for one in options.scheduler if (*where, one, settings(options)) not in done]
        for cell in run_pruned(options, preset, ratio, seed, wanted) if wanted else ():
            print(json.dumps(cell), flush=True)
            with results.open("a") as file:
                file.write(json.dumps(cell) + "\n")


def run_pruned(
    options: argparse.Namespace, preset: str, ratio: float, seed: int, schedulers: Sequence[str]
) -> Iterator[Cell]:
    """The cells of one pruned checkpoint."""
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
            told = pipeline.recover(config, Path(scratch, "recovered"), overwrite=True).report
            assert told.recovery is not None
            cell: Cell = {
                "model": options.model,
                "preset": preset,
                "ratio": ratio,
                "scheduler": scheduler,
                "seed": seed,
            }
            cell |= {"settings": settings(options), "seconds": round(time.perf_counter() - start, 1)}
            cell |= told.recovery.model_dump(include={"parameters", "ranks", "steps", "tokens"})
            for found in told.evaluations:
                assert found.dense is not None
                assert found.recovered is not None
                values = {"dense": found.dense, "pruned": found.pruned, "recovered": found.recovered}
                label = Path(found.data).stem
                cell |= {f"{name}:{label}": one.perplexity for name, one in values.items()}
                cell |= {f"excess:{label}": found.excess_nll, f"left:{label}": found.recovered_excess_nll}
            yield cell


def with_options(scheduler: str, options: str) -> str:
    """``NAME:option=value`` with more options."""
    return scheduler if not options else f"{scheduler}{',' if ':' in scheduler else ':'}{options}"


def table(cells: list[Cell]) -> str:
    """Per model: excess NLL pruned and recovered, mean over seeds and half their spread."""
    lines: list[str] = []
    for model, how in dict.fromkeys((cell["model"], cell["settings"]) for cell in cells):
        mine = [cell for cell in cells if (cell["model"], cell["settings"]) == (model, how)]
        labels = [name.removeprefix("left:") for name in mine[0] if name.startswith("left:")]
        lines += [f"**{Path(model).name}** ({how})", ""]
        head = "| removed | pruned by | scheduler | seeds | trained parameters | "
        lines.append(head + " | ".join(columns(labels)) + " |")
        lines.append("|---:|---|---|---:|---:|" + "---:|" * (3 * len(labels)))
        lines += [row(own, labels) for own in alike(mine)]
        lines.append("")
    return "\n".join(lines)


def alike(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """The cells that differ in nothing but the seed."""
    kinds = [(cell["ratio"], preset_of(cell), cell["scheduler"]) for cell in cells]
    for kind in sorted(dict.fromkeys(kinds), key=lambda kind: kind[0]):
        yield [cell for cell, own in zip(cells, kinds, strict=True) if own == kind]


def row(cells: Sequence[Cell], labels: Sequence[str]) -> str:
    """One line of the table; a share of what pruning hardly added is not told."""
    first = cells[0]
    shown = []
    for label in labels:
        added, left = [cell[f"excess:{label}"] for cell in cells], [cell[f"left:{label}"] for cell in cells]
        shares = [after / before for before, after in zip(added, left, strict=True) if before > WORTH_A_SHARE]
        shown += [describe(added), describe(left), describe(shares, 2) if len(shares) == len(added) else ""]
    parameters = f"{statistics.fmean(cell['parameters'] for cell in cells):,.0f}"
    where = f"{first['ratio']:.0%}", f"`{preset_of(first)}`", f"`{first['scheduler']}`", str(len(cells)), parameters
    return f"| {' | '.join([*where, *shown])} |"


def columns(labels: Iterable[str]) -> list[str]:
    """Three for each evaluation text."""
    return [f"{label}, {kind}" for label in labels for kind in ("pruned", "recovered", "share left")]


def describe(values: Sequence[float], digits: int = 4) -> str:
    """Mean, and half the spread over seeds."""
    spread = f" ±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def settings(options: argparse.Namespace) -> str:
    """What all cells to be compared have in common."""
    return f"{options.steps} steps, {options.options or 'default options'}, on {Path(options.data or options.calibration).stem}"


def key(cell: Cell) -> tuple[Any, ...]:
    """What makes a cell that cell."""
    return cell["model"], preset_of(cell), cell["ratio"], cell["seed"], cell["scheduler"], cell["settings"]


def preset_of(cell: Cell) -> str:
    """What the model was pruned with; the first results do not say."""
    return str(cell.get("preset", "cfsp"))


def read(results: Path) -> list[Cell]:
    """The finished cells."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("results", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--ratio", type=float, action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--preset", action="append", help="may be given again; default: cfsp")
    parser.add_argument("--scheduler", action="append", help="may be given again; default: the three of this project")
    parser.add_argument("--options", default="", help="options of every scheduler: rank=8,learning_rate=0.001")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--data", help="what is trained on; default: what is calibrated on")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--round-to", type=int, default=32)
    parser.add_argument("--evaluate", action="append")
    parser.add_argument("--evaluate-windows", type=int, default=100)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    options.ratio = options.ratio or [0.5]
    options.seed = options.seed or [0]
    options.preset = options.preset or ["cfsp"]
    options.scheduler = options.scheduler or list(SCHEDULERS)
    options.evaluate = options.evaluate or ["demo"]
    if options.action == "run":
        run(options, options.results)
    else:
        print(table(read(options.results)))


if __name__ == "__main__":
    main()
