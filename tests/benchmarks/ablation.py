"""Measure the costs of a sweep: plans over one collection, cells over one evaluation, cutting over masking.

    python tests/benchmarks/ablation.py MODEL CALIBRATION TEXT [--samples 64] [--seqlen 512] [--windows 30] [--round-to 32]
                                        [--criteria NAMES] [--allocators NAMES] [--ratios NUMBERS] [--cells 8] [--rounds 3]

All in one process, in turn, so that a drifting machine drifts for all; ratios are medians of the rounds' ratios. Seconds
are the processor's, which other programs on a shared machine take nothing from.

* ``collection_default``: seconds of the collection of a plain CFSP run. ``collection_union``: of all the grid's criteria.
* ``plans``: seconds of all plans of the grid, from the union's measurements.
* ``cell``: seconds of plan, cut, evaluation and restoring, the mean over some cells. ``forward``: of the dense model's
  evaluation. ``marguments``: of an evaluation where the same channels are zeroed instead of cut.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfsp_framework.ablation.cells import CellRunner, Extras, Job
from cfsp_framework.ablation.grid import expand
from cfsp_framework.ablation.measurements import Collection, CollectionFolder, request_measurements
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.run.steps import evaluate, make_plan
from common import make_parser

CRITERIA = "cfsp,cfsp:variant=act,wanda-sp,wanda-l2,flap,variance-weighted,magnitude,random"
ALLOCATORS = "cfsp,uniform,owl,global-zscore"


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def open_collections(runner: CellRunner, jobs: Sequence[Job]) -> dict[str, Collection]:
    """Measure the statistics of the jobs in an empty folder."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.collection, []).append(job)
    collections: dict[str, Collection] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, group in groups.items():
            contexts = [runner.context_of(job.config) for job in group]
            folder = CollectionFolder(Path(scratch), contexts[0], contexts[0].windows_to_select)
            collections[name] = folder.open(
                [request_measurements(context.selection, context.plugins) for context in contexts]
            )
    return collections


def make_plans(runner: CellRunner, jobs: Sequence[Job], collections: dict[str, Collection]) -> list[PruningPlan]:
    plans: list[PruningPlan] = []
    for job in jobs:
        context = runner.context_of(job.config)
        measured = collections[job.collection].select(
            request_measurements(context.selection, context.plugins), context.selection
        )
        plans.append(make_plan(context, measured))
    return plans


@contextmanager
def marguments(decoder: Decoder, plan: PruningPlan) -> Generator[None]:
    """Zero the channels that the plan removes inside the block; dense feed-forwards only."""
    hooks = []
    for entry in plan.blocks:
        keep = torch.zeros(entry.width)  # (F,)
        keep[list(entry.kept)] = 1
        [module] = decoder.feed_forward_modules(entry.block)
        down: Any = module
        hooks.append(down.down.register_forward_pre_hook(_mask(keep.to(decoder.model.dtype))))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _mask(keep: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    return lambda module, inputs: (inputs[0] * keep,)


def main() -> None:
    defaults: dict[str, Any] = {"samples": 64, "seqlen": 512, "windows": 30, "round_to": 32, "dtype": "float32"}
    defaults |= {"criteria": CRITERIA, "allocators": ALLOCATORS, "ratios": "0.3,0.5,0.8", "cells": 8, "rounds": 3}
    arguments = make_parser(__doc__, "model", "calibration", "text", **defaults).parse_args()
    options = {
        **{name: getattr(arguments, name) for name in ("calibration", "samples", "seqlen", "round_to", "dtype")},
        "evaluate": [arguments.text],
        "evaluate_windows": arguments.windows,
    }
    default = expand(arguments.model, options)
    cells = expand(
        arguments.model,
        {**options, "criterion": arguments.criteria, "allocator": arguments.allocators, "ratio": arguments.ratios},
    )
    runner = CellRunner(default[0].config, Extras())

    def job(config: Any, row: str) -> Job:
        context = runner.context_of(config)
        return Job("", row, config, CollectionFolder(Path(), context, context.windows_to_select).key, "")

    plain, grid = [[job(cell.config, cell.row) for cell in some] for some in (default, cells)]
    some = grid[:: max(1, len(grid) // arguments.cells)]
    rounds: dict[str, list[float]] = {}
    for number in range(arguments.rounds + 1):
        seconds: dict[str, float] = {}
        seconds["collection_default"], _ = timed(lambda: open_collections(runner, plain))
        seconds["collection_union"], collections = timed(lambda: open_collections(runner, grid))
        seconds["plans"], plans = timed(partial(make_plans, runner, grid, collections))
        cell_seconds, forward, mask = list[float](), list[float](), list[float]()
        for cell_job in some:
            cell_seconds.append(timed(partial(runner.run, cell_job, collections[cell_job.collection]))[0])
            forward.append(timed(lambda: evaluate(runner.context, runner.context.decoder))[0])
            with marguments(runner.context.decoder, plans[grid.index(cell_job)]):
                mask.append(timed(lambda: evaluate(runner.context, runner.context.decoder))[0])
        seconds |= {
            "cell": statistics.mean(cell_seconds),
            "forward": statistics.mean(forward),
            "marguments": statistics.mean(mask),
        }
        for name, value in seconds.items() if number else ():  # the first round warms up
            rounds.setdefault(name, []).append(value)
    print(json.dumps({"threads": torch.get_num_threads(), "cells": len(grid), **summarise(rounds)}, indent=2))


def summarise(rounds: dict[str, list[float]]) -> dict[str, float]:
    """Return the medians of the seconds and of the ratios."""

    def ratio(over: Callable[[int], float], under: str) -> float:
        return round(statistics.median(over(i) / rounds[under][i] for i in range(len(rounds[under]))), 3)

    both = {name: (lambda i, name=name: rounds[name][i]) for name in rounds}
    return {
        **{name: round(statistics.median(seconds), 3) for name, seconds in rounds.items()},
        "union_and_plans_over_default_collection": ratio(
            lambda i: rounds["collection_union"][i] + rounds["plans"][i], "collection_default"
        ),
        "union_and_plans_over_union_collection": ratio(
            lambda i: rounds["collection_union"][i] + rounds["plans"][i], "collection_union"
        ),
        "cell_over_forward": ratio(both["cell"], "forward"),
        "marguments_over_forward": ratio(both["marguments"], "forward"),
    }


if __name__ == "__main__":
    main()
