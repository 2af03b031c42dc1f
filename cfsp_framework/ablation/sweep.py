"""A sweep, top to bottom: choose the cells, open the model, measure what they need, run those not done yet, tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from cfsp_framework import report
from cfsp_framework.api import Component
from cfsp_framework.bench import check_rounding, check_selection, sequence_length
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import ConfigError
from cfsp_framework.files import write_text
from cfsp_framework.keys import library_versions
from cfsp_framework.pipeline import evaluate
from cfsp_framework.plugins import Plugins, load_plugins
from cfsp_framework.progress import Progress
from cfsp_framework.ranks import SOLO, join_ranks
from cfsp_framework.selection import Selection, select

from .agreement import agreements
from .cells import Extras, Job, Made, Workshop, cell_key, dense_key, prune_command, qualities, score_tasks, spec_of
from .collections import Collection, CollectionFolder, want
from .executors import Executor
from .grid import Cell
from .results import CellResult, Quality, SweepResults
from .store import COLLECTIONS, PLANS, Store, check_folder, open_store
from .tables import write_tables


@dataclass(frozen=True)
class Sweep:
    """What is asked for."""

    cells: tuple[Cell, ...]
    extras: Extras = Extras()


def ablate(
    sweep: Sweep, out: Path, *, executor: Executor | None = None, progress: Progress | None = None
) -> SweepResults:
    """Run every cell of a sweep that ``out`` does not hold yet, and write its tables.

    A cell that fails is a row with its error. What is measured, every result and every plan stay in ``out``: a sweep
    that was killed goes on, and a wider one adds what is new.

    Raises:
        ConfigError, ModelError, DataError, OutputError, PluginError: nothing could be run.
    """
    executor, progress = executor or Executor(), progress or Progress()
    plugins = load_plugins(sweep.cells[0].config.plugins)
    check_sweep(sweep, executor, plugins)
    check_folder(out)
    workshop = Workshop(sweep.cells[0].config, sweep.extras, progress, plugins)
    jobs = make_jobs(sweep, workshop, out)
    with open_store(out) as store:
        dense = evaluate_dense(workshop, store)
        pending = [job for job in jobs if (known := store.get(job.key)) is None or known.status == "failed"]
        work = with_collections(pending, workshop, out)
        with progress.bar("cells", total=len(pending)) as step:
            for made in executor.run(work, workshop, out / COLLECTIONS):
                keep(made, store, out, progress)
                step()
        results = gather(jobs, workshop, store, dense, out)
    with progress.phase("tell"):
        write_tables(results, out)
    return results
