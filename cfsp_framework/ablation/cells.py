"""Run one cell: plan, cut, compensate, train and evaluate the model in memory, then restore it."""

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
from pydantic import Field, ValidationError, field_validator
from torch import Tensor

from cfsp_framework.ablation.grid import TRAINING
from cfsp_framework.ablation.measurements import Collection, request_measurements
from cfsp_framework.ablation.results import CellResult, CellSpec, Latency, Quality
from cfsp_framework.api.records import Perplexity, PruningPlan
from cfsp_framework.config import OPTIONS, FrozenRecord, RunConfig
from cfsp_framework.engine.cache import identity_of
from cfsp_framework.engine.replay import tokens_per_batch
from cfsp_framework.errors import ConfigError, one_line
from cfsp_framework.evaluation.perplexity import EvaluationSet
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import Selection, select
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.snapshot import ModelState, restored
from cfsp_framework.pipeline import schedule
from cfsp_framework.recovery.recover import train_model
from cfsp_framework.run.cache_keys import fingerprint_of, library_versions, numerics, versions
from cfsp_framework.run.context import RunContext, open_context, open_evaluation_sets, open_windows, sequence_length
from cfsp_framework.run.rounds import plan_rounds
from cfsp_framework.run.steps import cutting_phase, evaluate, narrow
from cfsp_framework.runtime.distributed import SOLO
from cfsp_framework.runtime.hashing import hash_json
from cfsp_framework.runtime.progress import Progress

_LONG_TEXT = 1 << 16
_TRAINING_OPTIONS = (*TRAINING, "calibration", "seqlen")
LEAST_ROUNDS = 7
LATENCY_SECONDS = 1.0
"""Both models run in turn for at least so many rounds and so many seconds."""


class Extras(FrozenRecord):
    """Measurements of every cell beside perplexity."""

    tasks: tuple[str, ...] = ()
    """Names of lm-evaluation-harness."""
    task_data: Path | None = None
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task to score."""
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
            ConfigError: an option has an impossible value, or concerns tasks and none is named.
        """
        try:
            extras = cls.model_validate(dict(options))
        except ValidationError as error:
            first = error.errors()[0]
            raise ConfigError(
                f"{'.'.join(map(str, first['loc']))}: {first['msg']} (given: {first['input']!r})"
            ) from error
        if not extras.tasks and (extras.task_data or extras.limit or extras.fewshot is not None):
            raise ConfigError("--task-data, --limit and --fewshot need --tasks; name at least one.")
        return extras


@dataclass(frozen=True)
class Job:
    """A cell with everything that a worker needs to run it."""

    key: str
    row: str
    config: RunConfig
    collection: str
    """Name of the collection with its measurements."""
    command: str


@dataclass(frozen=True)
class CellOutput:
    """Result of a cell, and its plan unless it failed."""

    result: CellResult
    plan: PruningPlan | None
    seconds: dict[str, float]
    """Seconds by phase."""


class CellRunner:
    """Run cells one after another on a model that is opened once and restored after each."""

    def __init__(
        self, config: RunConfig, extras: Extras, progress: Progress | None = None, plugins: Plugins | None = None
    ) -> None:
        plugins = plugins or load_plugins(config.run.plugins)
        progress = progress or Progress()
        context = open_context(config, plugins, select(config, plugins), progress, SOLO)
        with progress.phase("calibrate"):
            # Every seed and size cuts the same text into windows, and tokenising it may take long.
            tokenizer = _CachingTokenizer(context.loaded.tokenizer)
            self._source = replace(context.loaded, tokenizer=tokenizer)
            sets = open_evaluation_sets(config, context.loaded)
        self.context = replace(context, evaluation_sets=sets)
        self.extras = extras
        self._windows: dict[tuple[int, int], Tensor] = {}

    def context_of(self, config: RunConfig) -> RunContext:
        """Return the context of one cell, the same as in a run of this cell alone."""
        selection = select(config, self.context.plugins)
        windows: Tensor | None = None
        if selection.measures:
            key = config.run.seed, config.calibration.samples
            if key not in self._windows:
                with self.context.progress.phase("calibrate"):
                    self._windows[key] = open_windows(config, self._source)  # (N, T)
            windows = self._windows[key]
        return replace(self.context, config=config, selection=selection, windows=windows)

    def run(self, job: Job, collection: Collection) -> CellOutput:
        """Run one cell; an error becomes its result."""
        start = time.perf_counter()
        context = replace(self.context_of(job.config), progress=Progress())
        try:
            output = run_cell(context, job, collection, self.extras)
        except Exception as error:  # noqa: BLE001  (one cell's error does not end the sweep)
            output = CellOutput(failed_cell(context.selection, job, one_line(error)), None, context.progress.seconds)
        result = output.result.model_copy(update={"seconds": round(time.perf_counter() - start, 4)})
        return replace(output, result=result)


class _CachingTokenizer:
    """A tokenizer that caches the ids of long texts."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, Any] = {}

    def __call__(self, text: str, **options: Any) -> Any:
        if len(text) < _LONG_TEXT:
            return self._tokenizer(text, **options)
        if text not in self._cache:
            self._cache[text] = self._tokenizer(text, **options)
        return self._cache[text]


def run_cell(context: RunContext, job: Job, collection: Collection, extras: Extras) -> CellOutput:
    """Run a cell like ``cfsp prune``, without a checkpoint, and restore the model."""
    decoder, selection = context.decoder, context.selection
    request = request_measurements(selection, context.plugins)
    if problem := collection.problem(request):
        return CellOutput(failed_cell(selection, job, problem), None, {})
    measurements = collection.select(request, selection)
    dense = ModelState.capture(decoder)
    with restored(decoder, trained=trains(selection)):
        last = plan_rounds(context, measurements)
        plan = last.plan
        task = schedule(context, last.step, last.measurements)
        with context.progress.phase(cutting_phase(context)):
            narrow(last.context, last.step, last.measurements)
        if task:
            train_model(context, plan, task, Path())  # only an adapter that is kept would be written
        parameters = measure_size(decoder.model).parameters
        result = CellResult(
            key=job.key,
            spec=make_spec(job.row, job.config, selection),
            status="done",
            channel_ratio=plan.achieved_ratio,
            parameter_ratio=1 - parameters / context.parameters,
            parameters=parameters,
            widths=plan.widths,
            qualities=to_qualities(context.evaluation_sets, evaluate(context, decoder)),
            tasks=score_tasks(context, extras),
            latency=measure_latency(context, dense) if extras.latency else None,
            command=job.command,
        )
    return CellOutput(result, plan, context.progress.seconds)


def failed_cell(selection: Selection, job: Job, error: str) -> CellResult:
    """Return the result of a cell that failed."""
    spec = make_spec(job.row, job.config, selection)
    return CellResult(key=job.key, spec=spec, status="failed", error=error, command=job.command)


def make_spec(row: str, config: RunConfig, selection: Selection) -> CellSpec:
    """Return everything that distinguishes a cell from the others."""
    return CellSpec(
        row=row,
        ratio=config.budget.ratio,
        samples=config.calibration.samples,
        seed=config.run.seed,
        **selection.describe(),
    )


def to_qualities(data: Sequence[EvaluationSet], perplexities: Sequence[Perplexity]) -> tuple[Quality, ...]:
    """Return the perplexity on every evaluation set as a record."""
    return tuple(
        Quality(data=texts.spec, windows=len(texts.windows), seqlen=texts.windows.shape[1], **measured.model_dump())
        for texts, measured in zip(data, perplexities, strict=True)
    )


def score_tasks(context: RunContext, extras: Extras) -> dict[str, dict[str, float]]:
    """Score the model in its present state on every task, and return the metrics."""
    if not extras.tasks:
        return {}
    from cfsp_framework.evaluation.tasks import run_tasks

    with context.progress.phase("tasks"):
        report = run_tasks(
            context.decoder.model,
            context.loaded.tokenizer,
            extras.tasks,
            task_data=extras.task_data,
            limit=extras.limit,
            fewshot=extras.fewshot,
            batch_size=context.config.calibration.batch_size,
        )
    return {task.task: {name: metric.value for name, metric in task.metrics.items()} for task in report.tasks}


@torch.no_grad()
def measure_latency(context: RunContext, dense: ModelState) -> Latency:
    """Time forwards of the cell's model and the dense one in turn over one batch, and return the medians.

    A machine that slows down slows both.
    """
    decoder, device = context.decoder, context.decoder.device
    cell = ModelState.capture(decoder)
    seqlen = sequence_length(context.config, context.loaded)
    size = max(1, tokens_per_batch(device) // seqlen)
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.vocab_size, (size, seqlen), generator=draw).to(device)  # (B, T)
    pruned_seconds: list[float] = []
    dense_seconds: list[float] = []
    with context.progress.phase("latency"):
        start = time.perf_counter()
        while len(pruned_seconds) <= LEAST_ROUNDS or time.perf_counter() - start < LATENCY_SECONDS:
            for state, seconds in ((cell, pruned_seconds), (dense, dense_seconds)):
                state.restore(decoder)
                seconds.append(_forward_seconds(decoder, ids))
        cell.restore(decoder)
    # The first round warms up.
    pruned_ms, dense_ms = (1000 * statistics.median(seconds[1:]) for seconds in (pruned_seconds, dense_seconds))
    return Latency(tokens=ids.numel(), milliseconds=pruned_ms, dense_milliseconds=dense_ms)


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
    """Hash everything that decides the dense model's scores."""
    key = {
        "model": context.loaded.fingerprint,
        "versions": dict(library_versions()),
        "numerics": numerics(context)[1:],
    }
    return hash_json(key | _evaluation(context, extras))


def _evaluation(context: RunContext, extras: Extras) -> dict[str, object]:
    """Return everything that decides how a model is evaluated."""
    scoring = [*extras.tasks, str(extras.task_data), extras.limit, extras.fewshot]
    return {
        "evaluation": [(texts.spec, fingerprint_of(texts.windows)) for texts in context.evaluation_sets],
        "tasks": [*scoring, version("lm_eval")] if extras.tasks else None,
    }


def cell_key(context: RunContext, extras: Extras) -> str:
    """Hash everything that decides a cell's result."""
    config, selection = context.config, context.selection
    chosen = (selection.criterion, selection.allocator, selection.compensator, selection.recovery)
    key = {
        "model": context.loaded.fingerprint,
        "windows": [fingerprint_of(context.windows_to_select), fingerprint_of(context.windows_to_compensate)],
        "components": [
            identity_of(component)
            for component in (*chosen, *selection.starts, *selection.collectors, *selection.second_pass)
        ],
        "budget": [config.budget.ratio, config.budget.unit, config.budget.round_to, config.budget.rebalance],
        **({"rounds": config.budget.rounds} if config.budget.rounds > 1 else {}),
        "samples": config.calibration.samples,
        "recovery": [
            {name: OPTIONS[name].read(config) for name in _TRAINING_OPTIONS},
            version("peft"),
        ]
        if trains(selection)
        else None,
        "latency": extras.latency,
        "versions": versions(selection),
        "numerics": numerics(context),
    }
    return hash_json(key | _evaluation(context, extras))


def trains(selection: Selection) -> bool:
    """Return whether the recovery trains the model after the cut."""
    return selection.recovery.component.name != "none"


def prune_command(config: RunConfig, out: str) -> str:
    """Return the ``cfsp prune`` command of one cell, with every option that is not the default."""
    words = ["cfsp", "prune", config.model.source, out, "--ratio", repr(config.budget.ratio)]
    for name, option in OPTIONS.items():
        value = option.read(config)
        if name in ("model", "ratio") or value == option.field.default:
            continue
        flag = "-p" if name == "plugins" else "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            for item in value if isinstance(value, tuple) else (value,):
                words += [flag, str(item)]
    return shlex.join(words)
