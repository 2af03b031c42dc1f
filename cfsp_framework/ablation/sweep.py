"""A sweep, top to bottom: choose the cells, open the model, measure what they need, run those not done yet, tell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from cfsp_framework.ablation.agreement import agreements, scored
from cfsp_framework.ablation.cells import (
    CellOutput,
    CellRunner,
    Extras,
    Job,
    cell_key,
    dense_key,
    prune_command,
    qualities,
    score_tasks,
)
from cfsp_framework.ablation.executors import Executor
from cfsp_framework.ablation.grid import Cell
from cfsp_framework.ablation.measurements import Collection, CollectionFolder, Part, want
from cfsp_framework.ablation.results import Agreement, CellResult, Quality, SweepResults
from cfsp_framework.ablation.store import COLLECTIONS, PLANS, Store, check_folder, open_store
from cfsp_framework.ablation.tables import write_tables
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import select
from cfsp_framework.run.cache_keys import library_versions
from cfsp_framework.run.checks import check_model, check_options
from cfsp_framework.run.context import sequence_length
from cfsp_framework.run.steps import evaluate
from cfsp_framework.runtime.atomic_files import write_text
from cfsp_framework.runtime.distributed import SOLO, join_ranks
from cfsp_framework.runtime.progress import Progress


@dataclass(frozen=True)
class Sweep:
    """What is asked for."""

    cells: tuple[Cell, ...]
    extras: Extras = field(default_factory=Extras)


class DenseModel(BaseModel):
    """What the model scores before anything is removed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    qualities: tuple[Quality, ...]
    tasks: dict[str, dict[str, float]]


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
    plugins = load_plugins(sweep.cells[0].config.run.plugins)
    check_sweep(sweep, executor, plugins)
    check_folder(out)
    runner = CellRunner(sweep.cells[0].config, sweep.extras, progress, plugins)
    jobs = make_jobs(sweep, runner, out)
    with open_store(out) as store:
        dense = evaluate_dense(runner, store)
        pending = [job for job in jobs if (known := store.get(job.key)) is None or known.status == "failed"]
        work = with_collections(pending, runner, out)
        with progress.bar("cells", total=len(pending)) as step:
            for made in executor.run(work, runner, out / COLLECTIONS):
                keep(made, store, out, progress)
                step()
        results = gather(jobs, runner, store, dense, out)
    with progress.phase("tell"):
        write_tables(results, out)
    return results


def check_sweep(sweep: Sweep, executor: Executor, plugins: Plugins) -> None:
    """Refuse, before the model is opened, whatever can be told by then.

    Raises:
        ConfigError: an option or a component's name is wrong, or this way of running cannot be.
        PluginError: a component's plugin is at fault.
    """
    if join_ranks(sweep.cells[0].config.model.device).world > 1:
        raise ConfigError("torchrun: a sweep's cells are shared out with --executor, in one process.")
    executor.check(sweep.extras)
    if sweep.extras.tasks:
        from cfsp_framework.evaluation.tasks import check_names

        check_names(sweep.extras.tasks, local=sweep.extras.task_data is not None)
    for cell in sweep.cells:
        check_options(cell.config, select(cell.config, plugins), SOLO)


def make_jobs(sweep: Sweep, runner: CellRunner, out: Path) -> tuple[Job, ...]:
    """The cells under their keys; of cells that are the same the first row has it."""
    check_model(sweep.cells[0].config, runner.context.decoder, planned=False)
    jobs: dict[str, Job] = {}
    for cell in sweep.cells:
        context = runner.context_of(cell.config)
        key = cell_key(context, sweep.extras)
        if key not in jobs:
            collection = CollectionFolder(out / COLLECTIONS, context, context.windows_to_select).key
            command = prune_command(cell.config, f"pruned-{key[:8]}")
            jobs[key] = Job(key, cell.row, cell.config, collection, command)
    return tuple(jobs.values())


def evaluate_dense(runner: CellRunner, store: Store) -> DenseModel:
    """What the dense model scores, measured once."""
    key = f"dense-{dense_key(runner.context, runner.extras)}"
    known = store.recall(key)
    if known is None:
        context = runner.context
        found = DenseModel(
            qualities=qualities(context.evaluation_sets, evaluate(context, context.decoder)),
            tasks=score_tasks(context, runner.extras),
        )
        known = found.model_dump(mode="json")
        store.note(key, known)
    return DenseModel.model_validate(known)


def with_collections(jobs: Sequence[Job], runner: CellRunner, out: Path) -> Iterator[tuple[Job, Collection]]:
    """Each job with what it needs measured, those of one collection together."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.collection, []).append(job)
    for group in groups.values():
        contexts = [runner.context_of(job.config) for job in group]
        wanted = [want(context.selection, context.plugins) for context in contexts]
        collection = CollectionFolder(out / COLLECTIONS, contexts[0], contexts[0].windows_to_select).open(wanted)
        yield from ((job, collection) for job in group)


def keep(made: CellOutput, store: Store, out: Path, progress: Progress) -> None:
    """Put a cell's plan and its result where they stay."""
    if made.plan is not None:
        (out / PLANS).mkdir(exist_ok=True)
        write_text(out / PLANS / f"{made.result.key}.json", made.plan.to_json())
    store.put(made.result)  # last: a cell that is there has its plan
    for phase, seconds in made.seconds.items():
        progress.seconds[phase] = progress.seconds.get(phase, 0.0) + seconds


def gather(jobs: Sequence[Job], runner: CellRunner, store: Store, dense: DenseModel, out: Path) -> SweepResults:
    """Everything that tables and pages tell: the cells that were asked for, in that order."""
    context, config = runner.context, runner.context.config
    cells = [(job, cell) for job in jobs if (cell := store.get(job.key)) is not None]
    places = context.decoder.places
    with context.progress.phase("compare"):
        compared = compare_criteria(jobs, runner, out)
    seconds = store.recall("seconds") or {}
    for phase, value in context.progress.seconds.items():
        seconds[phase] = round(seconds.get(phase, 0.0) + value, 3)
    store.note("seconds", seconds)
    return SweepResults(
        model=config.model.source,
        fingerprint=context.loaded.fingerprint,
        family=context.decoder.architecture.family,
        dtype=str(context.decoder.model.dtype).removeprefix("torch."),
        device=str(context.decoder.device),
        parameters=context.parameters,
        widths=tuple(width for _, _, width in places),
        places=tuple((block, path) for block, path, _ in places),
        budget=config.budget.unit,
        round_to=config.budget.round_to,
        calibration=config.calibration.data,
        seqlen=sequence_length(config, context.loaded),
        dense=dense.qualities,
        dense_tasks=dense.tasks,
        cells=tuple(told(cell, job) for job, cell in cells),
        agreements=compared,
        versions=dict(library_versions()),
        seconds=seconds,
    )


def told(cell: CellResult, job: Job) -> CellResult:
    """A stored cell as this sweep calls it."""
    spec = cell.spec.model_copy(update={"row": job.row})
    return cell.model_copy(update={"spec": spec, "command": job.command})


def compare_criteria(jobs: Sequence[Job], runner: CellRunner, out: Path) -> tuple[Agreement, ...]:
    """How alike the criteria of each seed rank, on its largest calibration set that scored them."""
    ratios = sorted({job.config.budget.ratio for job in jobs})
    parts: dict[str, list[Part]] = {}
    found: list[Agreement] = []
    for seed in sorted({job.config.run.seed for job in jobs}):
        there: dict[str, tuple[str, Sequence[FeedForwardMeasurement]]] = {}
        for job in sorted(
            (job for job in jobs if job.config.run.seed == seed), key=lambda job: -job.config.calibration.samples
        ):
            context = runner.context_of(job.config)
            name = context.selection.describe()["criterion"]
            if name in there:
                continue
            if job.collection not in parts:
                parts[job.collection] = CollectionFolder(out / COLLECTIONS, context, context.windows_to_select).read()
            [label] = want(context.selection, context.plugins).criteria
            part = next((part for part in parts[job.collection] if label in part.labels), None)
            if part is not None:
                there[name] = label, part.measurements
        found += agreements(seed, scored(there), ratios)
    return tuple(found)
