"""One cell: plan, cut, compensate, train and evaluate the model in memory, and give it back as it was."""

from __future__ import annotations

import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from cfsp_framework.ablation.grid import TRAINING
from cfsp_framework.ablation.measurements import Collection, want
from cfsp_framework.ablation.results import CellResult, CellSpec, Latency, Quality
from cfsp_framework.ablation.snapshot import ModelState, restored
from cfsp_framework.api.records import Perplexity, PruningPlan
from cfsp_framework.config import OPTIONS, RunConfig
from cfsp_framework.engine.cache import identity_of
from cfsp_framework.engine.replay import tokens_per_batch
from cfsp_framework.errors import ConfigError, one_line
from cfsp_framework.evaluation.perplexity import EvaluationSet
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import Selection, select
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.pipeline import schedule
from cfsp_framework.recovery.recover import train_model
from cfsp_framework.run.cache_keys import fingerprint_of, library_versions, numerics, versions
from cfsp_framework.run.context import RunContext, open_context, open_evaluation_sets, open_windows, sequence_length
from cfsp_framework.run.steps import cutting_phase, evaluate, make_plan, narrow
from cfsp_framework.runtime.distributed import SOLO
from cfsp_framework.runtime.hashing import hash_json
from cfsp_framework.runtime.progress import Progress

_LONG_TEXT = 1 << 16
_OF_TRAINING = (*TRAINING, "calibration", "seqlen")
LEAST_ROUNDS = 7
LATENCY_SECONDS = 1.0
"""Both models run in turn at least so often, and for at least so long."""


class Extras(BaseModel):
    """What is measured of every cell beside perplexity."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: tuple[str, ...] = ()
    """By the names of lm-evaluation-harness."""
    task_data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    """Of each task's documents."""
    fewshot: int | None = Field(default=None, ge=0)
    latency: bool = False

    @field_validator("tasks", mode="before")
    @classmethod
    def _between_commas(cls, value: object) -> object:
        texts: Sequence[object] = (
            (value,) if isinstance(value, str) else value if isinstance(value, list | tuple) else ()
        )
        return tuple(name.strip() for text in texts for name in str(text).split(",") if name.strip()) or value

    @classmethod
    def build(cls, options: Mapping[str, object]) -> Extras:
        """Validate options.

        Raises:
            ConfigError: one has an impossible value, or is about tasks where none are named.
        """
        try:
            extras = cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"{'.'.join(map(str, first['loc']))}: {first['msg']} (given: {first['input']!r})"
            ) from error
        if not extras.tasks and (extras.task_data or extras.limit or extras.fewshot is not None):
            raise ConfigError("--task-data, --limit and --fewshot are about --tasks; name some.")
        return extras


@dataclass(frozen=True)
class Job:
    """A cell that can be run anywhere the model can be opened."""

    key: str
    row: str
    config: RunConfig
    collection: str
    """The name of the collection it takes its measurements from."""
    command: str


@dataclass(frozen=True)
class CellOutput:
    """What running a cell gave; a cell that failed may have no plan."""

    result: CellResult
    plan: PruningPlan | None
    seconds: dict[str, float]
    """By phase."""


class CellRunner:
    """The model, opened once, and the data: runs one cell after another and leaves no trace of any."""

    def __init__(
        self, config: RunConfig, extras: Extras, progress: Progress | None = None, plugins: Plugins | None = None
    ) -> None:
        plugins = plugins or load_plugins(config.run.plugins)
        progress = progress or Progress()
        context = open_context(config, plugins, select(config, plugins), progress, SOLO)
        with progress.phase("calibrate"):
            # The same text is cut into windows for every seed and size, and may take long to tokenise.
            tokenizer = _Remembering(context.loaded.tokenizer)
            self._drawing = replace(context.loaded, tokenizer=tokenizer)
            sets = open_evaluation_sets(config, context.loaded)
        self.context = replace(context, evaluation_sets=sets)
        self.extras = extras
        self._windows: dict[tuple[int, int], Tensor] = {}

    def context_of(self, config: RunConfig) -> RunContext:
        """The bench of one cell, as a run of it alone has it."""
        selection = select(config, self.context.plugins)
        windows: Tensor | None = None
        if selection.measures:
            place = config.run.seed, config.calibration.samples
            if place not in self._windows:
                with self.context.progress.phase("calibrate"):
                    self._windows[place] = open_windows(config, self._drawing)  # (N, T)
            windows = self._windows[place]
        return replace(self.context, config=config, selection=selection, windows=windows)

    def run(self, job: Job, collection: Collection) -> CellOutput:
        """Run one cell; whatever goes wrong in it is its result."""
        start = time.perf_counter()
        context = replace(self.context_of(job.config), progress=Progress())
        try:
            made = run_cell(context, job, collection, self.extras)
        except Exception as error:  # noqa: BLE001  (a sweep of hours does not end for one cell)
            made = CellOutput(failed(context.selection, job, one_line(error)), None, context.progress.seconds)
        result = made.result.model_copy(update={"seconds": round(time.perf_counter() - start, 4)})
        return replace(made, result=result)


class _Remembering:
    """A tokenizer that knows the ids of the long texts it was given before."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        if len(text) < _LONG_TEXT:
            return self._tokenizer(text, **options)
        if text not in self._known:
            self._known[text] = self._tokenizer(text, **options)
        return self._known[text]


def run_cell(context: RunContext, job: Job, collection: Collection, extras: Extras) -> CellOutput:
    """A run as ``prune`` does it, without a checkpoint; the model is afterwards what it was."""
    decoder, selection = context.decoder, context.selection
    wanted = want(selection, context.plugins)
    if problem := collection.problem(wanted):
        return CellOutput(failed(selection, job, problem), None, {})
    measurements = collection.seen_by(wanted, selection)
    dense = ModelState.of(decoder)
    with restored(decoder, trained=trains(selection)):
        plan = make_plan(context, measurements)
        task = schedule(context, plan, measurements)
        with context.progress.phase(cutting_phase(context)):
            narrow(context, plan, measurements)
        if task:
            train_model(context, plan, task, Path())  # only an adapter that is kept would be written
        parameters = measure_size(decoder.model).parameters
        result = CellResult(
            key=job.key,
            spec=spec_of(job.row, job.config, selection),
            status="done",
            channel_ratio=plan.achieved_ratio,
            parameter_ratio=1 - parameters / context.parameters,
            parameters=parameters,
            widths=plan.widths,
            qualities=qualities(context.evaluation_sets, evaluate(context, decoder)),
            tasks=score_tasks(context, extras),
            latency=measure_latency(context, dense) if extras.latency else None,
            command=job.command,
        )
    return CellOutput(result, plan, context.progress.seconds)


def failed(selection: Selection, job: Job, error: str) -> CellResult:
    """A cell as the row of a table that says why there is nothing."""
    spec = spec_of(job.row, job.config, selection)
    return CellResult(key=job.key, spec=spec, status="failed", error=error, command=job.command)


def spec_of(row: str, config: RunConfig, selection: Selection) -> CellSpec:
    """What distinguishes a cell."""
    return CellSpec(
        row=row,
        ratio=config.budget.ratio,
        samples=config.calibration.samples,
        seed=config.run.seed,
        **selection.describe(),
    )


def qualities(data: Sequence[EvaluationSet], found: Sequence[Perplexity]) -> tuple[Quality, ...]:
    """What was found on every evaluation set."""
    return tuple(
        Quality(data=one.spec, windows=len(one.windows), seqlen=one.windows.shape[1], **told.model_dump())
        for one, told in zip(data, found, strict=True)
    )


def score_tasks(context: RunContext, extras: Extras) -> dict[str, dict[str, float]]:
    """The metrics of every task for the model as it is now."""
    if not extras.tasks:
        return {}
    from cfsp_framework.evaluation.tasks import run_tasks

    with context.progress.phase("tasks"):
        found = run_tasks(
            context.decoder.model,
            context.loaded.tokenizer,
            extras.tasks,
            task_data=extras.task_data,
            limit=extras.limit,
            fewshot=extras.fewshot,
            batch_size=context.config.calibration.batch_size,
        )
    return {task.task: {name: metric.value for name, metric in task.metrics.items()} for task in found.tasks}


@torch.no_grad()
def measure_latency(context: RunContext, dense: ModelState) -> Latency:
    """Forwards of the cell's model and the dense one in turn, over one batch; the medians.

    A machine that slows down slows both.
    """
    decoder, device = context.decoder, context.decoder.device
    cell = ModelState.of(decoder)
    seqlen = sequence_length(context.config, context.loaded)
    size = max(1, tokens_per_batch(device) // seqlen)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (size, seqlen), generator=draw).to(device)  # (B, T)
    own: list[float] = []
    before: list[float] = []
    with context.progress.phase("latency"):
        start = time.perf_counter()
        while len(own) <= LEAST_ROUNDS or time.perf_counter() - start < LATENCY_SECONDS:
            for state, seconds in ((cell, own), (dense, before)):
                state.put_back(decoder)
                seconds.append(_forward_seconds(decoder, ids))
        cell.put_back(decoder)
    # The first round warms up.
    medians = [1000 * statistics.median(seconds[1:]) for seconds in (own, before)]
    return Latency(tokens=ids.numel(), milliseconds=medians[0], dense_milliseconds=medians[1])


def _forward_seconds(decoder: Decoder, ids: Tensor) -> float:
    cuda = ids.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize(ids.device)
    start = time.perf_counter()
    decoder.model(ids, use_cache=False)
    if cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start


def dense_key(context: RunContext, extras: Extras) -> str:
    """A hash of all that decides what the dense model scores."""
    told = {
        "model": context.loaded.fingerprint,
        "versions": dict(library_versions()),
        "numerics": numerics(context)[1:],
    }
    return hash_json(told | _evaluation(context, extras))


def _evaluation(context: RunContext, extras: Extras) -> dict[str, object]:
    """What decides how a model is evaluated."""
    scored = [*extras.tasks, str(extras.task_data), extras.limit, extras.fewshot]
    return {
        "evaluation": [(one.spec, fingerprint_of(one.windows)) for one in context.evaluation_sets],
        "tasks": [*scored, version("lm_eval")] if extras.tasks else None,
    }


def cell_key(context: RunContext, extras: Extras) -> str:
    """A hash of all that decides a cell's result."""
    config, selection = context.config, context.selection
    chosen = (selection.criterion, selection.allocator, selection.compensator, selection.recovery)
    told = {
        "model": context.loaded.fingerprint,
        "windows": [fingerprint_of(context.windows_to_select), fingerprint_of(context.windows_to_compensate)],
        "components": [identity_of(one) for one in (*chosen, *selection.collectors, *selection.second_pass)],
        "budget": [config.budget.ratio, config.budget.unit, config.budget.round_to, config.budget.rebalance],
        "samples": config.calibration.samples,
        "recovery": [
            {name: OPTIONS[name].read(config) for name in _OF_TRAINING},
            version("peft"),
        ]
        if trains(selection)
        else None,
        "latency": extras.latency,
        "versions": versions(selection),
        "numerics": numerics(context),
    }
    return hash_json(told | _evaluation(context, extras))


def trains(selection: Selection) -> bool:
    """Whether anything may be trained after the cut."""
    return selection.recovery.component.name != "none"


def prune_command(config: RunConfig, out: str) -> str:
    """The ``cfsp prune`` that gives this cell alone, with every option that is not the default."""
    words = ["cfsp", "prune", config.model.source, out, "--ratio", repr(config.budget.ratio)]
    for name, option in OPTIONS.items():
        value = option.read(config)
        if name in ("model", "ratio") or value == option.field.default:
            continue
        flag = "-p" if name == "plugins" else "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for one in value if isinstance(value, tuple) else (value,):
                words += [flag, str(one)]
    return shlex.join(words)
