"""Run cells in this process, in several processes of this machine, or as Ray's tasks on a cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from cfsp_framework.ablation.cells import CellOutput, CellRunner, Extras, Job
from cfsp_framework.ablation.measurements import Collection, CollectionFolder, Part
from cfsp_framework.config import RunConfig
from cfsp_framework.errors import CfspError, ConfigError, one_line

Kind = Literal["serial", "process", "ray"]
Work = Iterable[tuple[Job, Collection]]
T = TypeVar("T")
P = TypeVar("P")

_AHEAD = 2
"""Cells submitted per worker, so that none waits for its next one."""


@dataclass(frozen=True)
class Executor:
    """How cells are run: by which kind of worker, how many at a time, and on which cluster."""

    kind: Kind = "serial"
    jobs: int = 1
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""

    def check(self, extras: Extras) -> None:
        """Check the options against each other.

        Raises:
            ConfigError: they cannot be combined, or Ray is not installed.
        """
        if self.kind == "serial" and self.jobs > 1:
            raise ConfigError("-j: the serial executor runs one cell at a time; add --executor process or ray.")
        if self.kind != "ray" and self.address:
            raise ConfigError("--ray-address: add --executor ray.")
        if extras.latency and self.kind != "serial":
            raise ConfigError("--latency: cells that run at the same time slow each other; leave --executor out.")
        if self.kind == "ray":
            _import_ray()

    def run(self, work: Work, runner: CellRunner, collections: Path) -> Iterator[CellOutput]:
        """Run every cell and yield its output, in the order of completion."""
        if self.kind == "serial":
            yield from (runner.run(job, collection) for job, collection in work)
            return
        everything = list(work)  # measures now, with all cores
        if self.kind == "process":
            yield from _run_processes(everything, self, runner, collections)
        else:
            yield from _run_ray(everything, self, runner)


@dataclass(frozen=True)
class _Setting:
    """Everything that a worker needs to open its runner."""

    config: RunConfig
    extras: Extras
    threads: int

    def open(self) -> CellRunner:
        torch.set_num_threads(self.threads)
        return CellRunner(self.config, self.extras)


def _run_processes(work: Work, executor: Executor, runner: CellRunner, collections: Path) -> Iterator[CellOutput]:
    """Run cells in processes that open the model themselves and read the measurements from the folder."""
    threads = max(1, torch.get_num_threads() // executor.jobs)
    setting = _Setting(runner.context.config, runner.extras, threads)
    context = get_context("spawn")
    places: Queue[str | None] = context.Queue()
    for number in range(executor.jobs):
        places.put(_gpu(number) if runner.context.decoder.device.type == "cuda" else None)
    pool = ProcessPoolExecutor(executor.jobs, context, _begin, (places,))
    try:
        yield from _drain(
            work,
            lambda item: pool.submit(_run_in_process, setting, item[0], collections, item[1].failures),
            _wait_for_processes,
            Future[CellOutput].result,
            executor.jobs * _AHEAD,
        )
    except BrokenProcessPool:
        raise CfspError(
            "a worker process was killed, perhaps for its memory; try fewer with -j. "
            "Finished cells are kept: the same command goes on."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _wait_for_processes(pending: set[Future[CellOutput]]) -> tuple[set[Future[CellOutput]], set[Future[CellOutput]]]:
    finished, left = wait(pending, return_when=FIRST_COMPLETED)
    return finished, left


def _gpu(number: int) -> str:
    """Return the GPU of a worker; workers are spread evenly over the visible ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    return names[number % len(names)]


_runners: dict[str, CellRunner] = {}
_parts: dict[str, list[Part]] = {}
"""A worker's runner, and the measurements of its present collection."""


def _begin(places: Queue[str | None]) -> None:
    """Initialise a worker process; its first cell opens the model, so that an error there is reported."""
    place = places.get()
    if place is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process does: a killed parent cannot stop its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _open_runner(setting: _Setting) -> CellRunner:
    """Return this process's runner; it stays open for the next cell."""
    name = repr(setting)
    if name not in _runners:
        _runners.clear()
        _runners[name] = setting.open()
    return _runners[name]


def _run_in_process(setting: _Setting, job: Job, collections: Path, failures: Mapping[str, str]) -> CellOutput:
    runner = _open_runner(setting)
    if job.collection not in _parts:
        _parts.clear()
        context = runner.context_of(job.config)
        _parts[job.collection] = CollectionFolder(collections, context, context.windows_to_select).read()
    return runner.run(job, Collection(tuple(_parts[job.collection]), failures))


def _run_ray(work: Work, executor: Executor, runner: CellRunner) -> Iterator[CellOutput]:
    """Run cells as Ray's tasks: measurements lie in its object store, and its workers open the model."""
    ray = _import_ray()
    local = executor.address is None and "RAY_ADDRESS" not in os.environ
    starts_ray = not ray.is_initialized()
    if starts_ray:
        options = {"num_cpus": executor.jobs, "include_dashboard": False} if local else {}
        try:
            ray.init(address=executor.address, log_to_driver=False, logging_level="error", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"--ray-address {executor.address}: {one_line(error)}") from error
    try:
        cores = torch.get_num_threads() if local else int(ray.cluster_resources().get("CPU", 1))
        threads = max(1, cores // executor.jobs)
        setting = ray.put(_Setting(runner.context.config, runner.extras, threads))
        stored: dict[str, Any] = {}
        task = ray.remote(_run_on_ray).options(
            num_cpus=1 if local else threads, num_gpus=1 if runner.context.decoder.device.type == "cuda" else 0
        )

        def submit(item: tuple[Job, Collection]) -> Any:
            job, collection = item
            if job.collection not in stored:
                stored[job.collection] = ray.put(collection)
            return task.remote(setting, job, stored[job.collection])

        try:
            yield from _drain(
                work, submit, lambda pending: map(set, ray.wait(list(pending))), ray.get, executor.jobs * _AHEAD
            )
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, CfspError) else error) from None
        except ray.exceptions.RayError as error:
            raise CfspError(
                f"Ray lost a worker: {one_line(error)[:200]} Finished cells are kept: the same command goes on."
            ) from error
    finally:
        if starts_ray:
            ray.shutdown()


def _run_on_ray(setting: _Setting, job: Job, collection: Collection) -> CellOutput:
    return _open_runner(setting).run(job, collection)


def _drain(
    work: Iterable[T],
    submit: Callable[[T], P],
    wait_for_some: Callable[[set[P]], Iterable[set[P]]],
    result: Callable[[P], CellOutput],
    most: int,
) -> Iterator[CellOutput]:
    """Keep at most ``most`` items submitted, and yield results as they arrive."""
    left, pending = iter(work), set[P]()
    while True:
        for item in left:
            pending.add(submit(item))
            if len(pending) >= most:
                break
        if not pending:
            return
        finished, pending = wait_for_some(pending)
        yield from map(result, finished)


def _import_ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError("--executor ray: Ray is missing; pip install 'cfsp-framework[distributed]'.") from None
    return ray
