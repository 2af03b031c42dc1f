"""A sweep, top to bottom: check the cells, open the model, measure, run the cells that are not done, write tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cfsp_framework.ablation.agreement import collect_scores, measure_agreements
from cfsp_framework.ablation.cells import (
    CellOutput,
    CellRunner,
    Extras,
    Job,
    cell_key,
    dense_key,
    prune_command,
    score_tasks,
    to_qualities,
)
from cfsp_framework.ablation.executors import Executor
from cfsp_framework.ablation.grid import Cell
from cfsp_framework.ablation.measurements import Collection, CollectionFolder, Part, request_measurements
from cfsp_framework.ablation.results import Agreement, CellResult, Quality, SweepResults
from cfsp_framework.ablation.store import COLLECTIONS, PLANS, Store, check_folder, open_store
from cfsp_framework.ablation.tables import write_tables
from cfsp_framework.config import FrozenRecord
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
    """Cells to run, and extra measurements."""

    cells: tuple[Cell, ...]
    extras: Extras = field(default_factory=Extras)


class DenseModel(FrozenRecord):
    """Scores of the dense model."""

    qualities: tuple[Quality, ...]
    tasks: dict[str, dict[str, float]]


def ablate(
    sweep: Sweep, out: Path, *, executor: Executor | None = None, progress: Progress | None = None
) -> SweepResults:
    """Run every cell of a sweep that ``out`` lacks, and write its tables.

    A cell that fails is a row with its error. Measurements, results and plans stay in ``out``: a killed sweep goes on
    from there, and a wider one adds the new cells.

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
        if len(pending) < len(jobs):
            progress.note(
                f"{out} has {len(jobs) - len(pending)} of {len(jobs)} cells already; {len(pending)} are left."
            )
        work = with_collections(pending, runner, out)
        with progress.bar("cells", total=len(pending)) as step:
            for output in executor.run(work, runner, out / COLLECTIONS):
                store_output(output, store, out, progress)
                step()
        results = gather(jobs, runner, store, dense, out)
    with progress.phase("tell"):
        write_tables(results, out)
    return results


def check_sweep(sweep: Sweep, executor: Executor, plugins: Plugins) -> None:
    """Check everything that needs no model.

    Raises:
        ConfigError: an option or a component's name is wrong, or options cannot be combined.
        PluginError: a component's plugin is at fault.
    """
    if join_ranks(sweep.cells[0].config.model.device).world > 1:
        raise ConfigError("torchrun: a sweep runs in one process; distribute its cells with --executor.")
    executor.check(sweep.extras)
    if sweep.extras.tasks:
        from cfsp_framework.evaluation.tasks import check_names

        check_names(sweep.extras.tasks, local=sweep.extras.task_data is not None)
    for cell in sweep.cells:
        check_options(cell.config, select(cell.config, plugins), SOLO)


def make_jobs(sweep: Sweep, runner: CellRunner, out: Path) -> tuple[Job, ...]:
    """Return a job for each distinct cell; the first of several rows with the same cell has it."""
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
    """Return the dense model's scores, measured once per store."""
    key = f"dense-{dense_key(runner.context, runner.extras)}"
    known = store.read_note(key)
    if known is None:
        context = runner.context
        dense = DenseModel(
            qualities=to_qualities(context.evaluation_sets, evaluate(context, context.decoder)),
            tasks=score_tasks(context, runner.extras),
        )
        known = dense.model_dump(mode="json")
        store.write_note(key, known)
    return DenseModel.model_validate(known)


def with_collections(jobs: Sequence[Job], runner: CellRunner, out: Path) -> Iterator[tuple[Job, Collection]]:
    """Yield each job with its measurements, jobs of one collection together."""
    groups: dict[str, list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.collection, []).append(job)
    for group in groups.values():
        contexts = [runner.context_of(job.config) for job in group]
        requests = [request_measurements(context.selection, context.plugins) for context in contexts]
        collection = CollectionFolder(out / COLLECTIONS, contexts[0], contexts[0].windows_to_select).open(requests)
        yield from ((job, collection) for job in group)


def store_output(output: CellOutput, store: Store, out: Path, progress: Progress) -> None:
    """Write a cell's plan, then its result."""
    if output.plan is not None:
        (out / PLANS).mkdir(exist_ok=True)
        write_text(out / PLANS / f"{output.result.key}.json", output.plan.to_json())
    store.put(output.result)  # last: every finished cell has its plan
    for phase, seconds in output.seconds.items():
        progress.seconds[phase] = progress.seconds.get(phase, 0.0) + seconds


def gather(jobs: Sequence[Job], runner: CellRunner, store: Store, dense: DenseModel, out: Path) -> SweepResults:
    """Return the results of all cells of the sweep, in its order."""
    context, config = runner.context, runner.context.config
    cells = [(job, cell) for job in jobs if (cell := store.get(job.key)) is not None]
    places = context.decoder.places
    with context.progress.phase("compare"):
        agreements = compare_criteria(jobs, runner, out)
    seconds = store.read_note("seconds") or {}
    for phase, value in context.progress.seconds.items():
        seconds[phase] = round(seconds.get(phase, 0.0) + value, 3)
    store.write_note("seconds", seconds)
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
        cells=tuple(relabel(cell, job) for job, cell in cells),
        agreements=agreements,
        versions=dict(library_versions()),
        seconds=seconds,
    )


def relabel(cell: CellResult, job: Job) -> CellResult:
    """Return a stored cell with this sweep's row name and command."""
    spec = cell.spec.model_copy(update={"row": job.row})
    return cell.model_copy(update={"spec": spec, "command": job.command})


def compare_criteria(jobs: Sequence[Job], runner: CellRunner, out: Path) -> tuple[Agreement, ...]:
    """Measure the agreement of each seed's criteria, on its largest calibration set that scored them."""
    ratios = sorted({job.config.budget.ratio for job in jobs})
    parts: dict[str, list[Part]] = {}
    agreements: list[Agreement] = []
    for seed in sorted({job.config.run.seed for job in jobs}):
        measured: dict[str, tuple[str, Sequence[FeedForwardMeasurement]]] = {}
        for job in sorted(
            (job for job in jobs if job.config.run.seed == seed), key=lambda job: -job.config.calibration.samples
        ):
            context = runner.context_of(job.config)
            name = context.selection.describe()["criterion"]
            if name in measured:
                continue
            if job.collection not in parts:
                parts[job.collection] = CollectionFolder(out / COLLECTIONS, context, context.windows_to_select).read()
            [label] = request_measurements(context.selection, context.plugins).criteria
            part = next((part for part in parts[job.collection] if label in part.labels), None)
            if part is not None:
                measured[name] = label, part.measurements
        agreements += measure_agreements(seed, collect_scores(measured), ratios)
    return tuple(agreements)
