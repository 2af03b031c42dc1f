"""Score a model in memory on tasks of lm-evaluation-harness, with its prompts and metrics.

Data come from the Hub, or from local files: one folder per task, one file per split (``local_tasks``).
"""

from __future__ import annotations

import copy
import difflib
import io
import logging
import tempfile
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
import yaml
from transformers import PreTrainedModel

from cfsp_framework.config import FrozenRecord, RunConfig
from cfsp_framework.data.sources import silenced_datasets
from cfsp_framework.errors import CfspError, ConfigError, DataError, one_line
from cfsp_framework.modeling.loading import LoadedModel, load_model
from cfsp_framework.runtime.distributed import join_ranks
from cfsp_framework.runtime.progress import Progress

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""Zero-shot tasks that papers on pruning report, CFSP's included."""

_LOGITS_PER_BATCH = 1 << 26
"""Limit of a batch of 512 tokens, 256 MiB in float32."""
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_OTHER_NAMES = {"validation": ("dev", "valid"), "train": ("training",)}


class Metric(FrozenRecord):
    """Value of a metric and its standard error, if the harness computes one."""

    value: float
    stderr: float | None = None


class TaskResult(FrozenRecord):
    """Scores of a model on one task."""

    task: str
    version: str
    """Version of the harness's definition of the task."""
    fewshot: int
    samples: int
    """Documents that were scored."""
    metrics: dict[str, Metric]
    """By the harness's names; with a filter other than the default as ``metric,filter``."""
    note: str = ""
    """Difference of the prompt from the harness's, which only prepared local columns cause."""

    @property
    def acc(self) -> Metric | None:
        """Accuracy: share of documents whose right answer has the highest log-likelihood."""
        return self.metrics.get("acc")

    @property
    def acc_norm(self) -> Metric | None:
        """Accuracy with log-likelihoods divided by the answers' lengths in characters, if the task has it."""
        return self.metrics.get("acc_norm")


class TaskResults(FrozenRecord):
    """Scores on all tasks, and the settings needed to reproduce them."""

    harness: str
    """Version of lm-evaluation-harness."""
    tasks: tuple[TaskResult, ...]
    limit: int | None
    """Number of documents of each task; None: all."""
    seed: int
    batch_size: int
    bos: bool
    """Whether the tokenizer begins prompts with the beginning-of-sequence token."""
    chat_template: bool = False
    """Whether prompts use the tokenizer's chat template: always false."""

    @property
    def mean_acc(self) -> float | None:
        """Mean accuracy of the tasks that have one, each task counted once."""
        return _mean([task.acc for task in self.tasks])

    @property
    def mean_acc_norm(self) -> float | None:
        """Mean of ``acc_norm``, or of ``acc`` for a task without it."""
        return _mean([task.acc_norm or task.acc for task in self.tasks])


def _mean(metrics: Sequence[Metric | None]) -> float | None:
    values = [metric.value for metric in metrics if metric is not None]
    return sum(values) / len(values) if values else None


def run_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    bars: bool = False,
) -> TaskResults:
    """Score ``model`` on ``tasks``, by the harness's names, on the Hub's data or on the files in ``task_data``.

    ``fewshot`` None is the tasks' own number, mostly 0. With ``seed`` 0 all draws are those of the harness's own command
    line. ``bars`` shows the harness's progress on stderr. Neither model nor tokenizer is changed.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: a task's data cannot be read or fetched.
    """
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ConfigError("--tasks: name at least one task, such as arc_easy.")
    vocabulary: int = model.config.get_text_config().vocab_size
    size = batch_size or max(1, min(16, _LOGITS_PER_BATCH // (512 * vocabulary)))
    with _silenced_harness(bars), tempfile.TemporaryDirectory(prefix="cfsp-tasks-") as scratch:
        check_names(names, local=task_data is not None)
        local = local_tasks(names, task_data, Path(scratch), fewshot=fewshot) if task_data else ()
        loaded = _load([str(task.path) for task in local] or names, task_data)
        notes = {task.name: task.note for task in local}
        return _run(model, copy.deepcopy(tokenizer), loaded, notes, limit, fewshot, size, seed)


def score(
    config: RunConfig,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    progress: Progress | None = None,
) -> tuple[LoadedModel, TaskResults]:
    """Open ``config.model.source`` and score it; the names of tasks are checked before the model is read.

    Raises:
        ConfigError: as in ``run_tasks``, or the model is streamed or distributed.
        DataError: as in ``run_tasks``.
        ModelError: the model cannot be opened.
    """
    progress = progress or Progress()
    if config.model.stream:
        raise ConfigError("--stream and --tasks cannot be combined: tasks run the whole model.")
    ranks = join_ranks(config.model.device)
    if ranks.world > 1:
        raise ConfigError("--tasks runs in one process; start cfsp without torchrun.")
    with _silenced_harness(bars=False):
        check_names(tasks, local=task_data is not None)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
    with progress.phase("tasks"):
        results = run_tasks(
            loaded.model,
            loaded.tokenizer,
            tasks,
            task_data=task_data,
            limit=limit,
            fewshot=fewshot,
            batch_size=config.calibration.batch_size,
            seed=config.run.seed,
            bars=progress.visible,
        )
    return loaded, results


def check_names(names: Sequence[str], *, local: bool = False) -> None:
    """Refuse unknown tasks, groups and tags; with ``local`` data, groups and tags too.

    Raises:
        ConfigError: a name is unknown, or the harness is not installed.
    """
    manager = task_manager()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `lm-eval ls tasks` lists all."
            raise ConfigError(f"--tasks: lm-eval has no {name!r}.{hint}")
        if local and name not in manager.all_subtasks:
            raise ConfigError(f"--tasks: {name!r} is a group; with --task-data name its tasks one by one.")


@cache
def task_manager() -> Any:
    """Return the harness's index of its tasks, which takes seconds to read.

    Raises:
        ConfigError: the harness is not installed.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'cfsp-framework[eval]'.") from error
    return TaskManager()


# --- local files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness that reads local files: its YAML, and a note if its prompts differ from the harness's."""

    name: str
    path: Path
    note: str = ""


def local_tasks(
    names: Sequence[str], task_data: Path, folder: Path, *, fewshot: int | None = None
) -> tuple[LocalTask, ...]:
    """Write a YAML for each task into ``folder``: the harness's own, with its data read from ``task_data``.

    ``task_data/TASK/SPLIT.jsonl`` (or ``.json``, ``.parquet``, ``.csv``) holds a split by the task's name for it, with
    the columns of the task's data set on the Hub; ``dev`` and ``valid`` are accepted for ``validation``. Required are
    the split the task is evaluated on and, for few-shot prompts, the split of the examples. The YAMLs also serve
    ``lm_eval --include_path``.

    Raises:
        DataError: a split is missing or cannot be read.
    """
    if not task_data.is_dir():
        raise DataError(f"--task-data {task_data} is not a folder.")
    return tuple(_local_task(name, task_data / name, folder, fewshot) for name in names)


def _local_task(name: str, data: Path, folder: Path, fewshot: int | None) -> LocalTask:
    task = task_manager().task_index[name]
    config: Mapping[str, Any] = task.cfg or {}
    files = {path.stem: path.absolute() for path in sorted(data.glob("*")) if path.suffix in _LOADERS}
    splits = {key: _find_split(config[key], files) for key in _SPLITS if config.get(key)}
    evaluated = "test_split" if config.get("test_split") else "validation_split"
    required = [evaluated]
    if config.get("num_fewshot") != 0 and (fewshot or config.get("num_fewshot")):
        required.append(next(key for key in ("fewshot_split", *_SPLITS) if config.get(key)))
    for key in required:
        if splits.get(key) is None:
            raise DataError(f"task {name!r} needs {data / str(config.get(key))}.jsonl, or .json, .parquet, .csv.")
    paths = {config[key]: path for key, path in splits.items() if path is not None}
    loader, columns = _read_columns(name, paths, paths[config[evaluated]], folder)
    settings, note = _prepared_settings(name, columns)
    text = yaml.safe_dump(
        {
            "include": str(task.yaml_path),
            "task": name,
            "dataset_path": loader,
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in paths.items()},
                "cache_dir": str(folder / "cache"),
            },
            **{key: None for key, path in splits.items() if path is None},
            **settings,
        },
        sort_keys=False,
    )
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return LocalTask(name, folder / f"{name}.yaml", note)


def _find_split(split: str, files: Mapping[str, Path]) -> Path | None:
    return next((files[name] for name in (split, *_OTHER_NAMES.get(split, ())) if name in files), None)


def _read_columns(name: str, paths: Mapping[str, Path], evaluated: Path, folder: Path) -> tuple[str, frozenset[str]]:
    """Return the loader of a task's files, and the columns of the file it is evaluated on."""
    loaders = {_LOADERS[path.suffix] for path in paths.values()}
    if len(loaders) > 1:
        raise DataError(f"task {name!r}: the splits in {evaluated.parent} are of different formats; use one.")
    [loader] = loaders
    files, scratch = {"rows": str(evaluated)}, str(folder / "cache")
    try:
        rows = datasets.load_dataset(loader, data_files=files, split="rows", cache_dir=scratch)
    except Exception as error:  # any error of pyarrow and datasets
        raise DataError(f"{evaluated} cannot be read: {_shorten(error)}.") from error
    return loader, frozenset(rows.column_names)


_PREPARED: Mapping[str, tuple[str, frozenset[str], str, Mapping[str, Any]]] = {
    "hellaswag": (
        "ctx_a",
        frozenset({"query", "endings", "label"}),
        "query",
        {
            "process_docs": None,
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{label|int}}",
        },
    ),
    "social_iqa": (
        "context",
        frozenset({"question", "choices", "answerKey"}),
        "question",
        {
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices.text}}",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
        },
    ),
}
"""Data sets with copies whose context is prepared in one column: the column they lack, those they have, the column of the
context, and the task's settings to read them."""


def _prepared_settings(name: str, columns: frozenset[str]) -> tuple[Mapping[str, Any], str]:
    """Return the settings, and a note, for data whose contexts are prepared; empty for the Hub's columns."""
    if name in _PREPARED:
        lacking, required, context, settings = _PREPARED[name]
        if lacking not in columns and required <= columns:
            return settings, f"contexts as the column {context} has them"
    return {}, ""


# --- the harness ------------------------------------------------------------------------------------------------------


def _load(specs: Sequence[str], task_data: Path | None) -> Any:
    """Load tasks and their data; ``specs`` are names or paths of YAMLs."""
    try:
        return task_manager().load(list(specs))
    except CfspError:
        raise
    except Exception as error:  # any error of datasets, the Hub and a task's own code
        reason = _shorten(error)
        raise DataError(
            f"--task-data {task_data} does not fit the tasks: {reason}."
            if task_data
            else f"the data of the tasks cannot be fetched: {reason}. --task-data reads local files instead."
        ) from error


def _run(
    model: PreTrainedModel,
    tokenizer: Any,
    loaded: Any,
    notes: Mapping[str, str],
    limit: int | None,
    fewshot: int | None,
    batch_size: int,
    seed: int,
) -> TaskResults:
    import random

    import lm_eval
    import numpy
    from lm_eval.models.huggingface import HFLM

    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        if default != 0:  # 0 is a task's own choice, not a default
            task.set_config(key="num_fewshot", value=fewshot if fewshot is not None else default or 0)
        task.set_fewshot_seed(seed=seed + 1234)
    random.seed(seed)
    numpy.random.seed(seed + 1234)
    torch.manual_seed(seed + 1234)
    harness_model: Any = HFLM  # whose decorators hide its signature
    language_model = harness_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results: Any = lm_eval.evaluate(language_model, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    first: list[int] = tokenizer("a").input_ids[:1]
    return TaskResults(
        harness=version("lm-eval"),
        tasks=tuple(
            TaskResult(
                task=name,
                version=str(results["versions"][name]),
                fewshot=results["n-shot"][name],
                samples=results["n-samples"][name]["effective"],
                metrics=_metrics(results["results"][name]),
                note=notes.get(name, ""),
            )
            for name in loaded["tasks"]
        ),
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        bos=tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id],
    )


def _metrics(results: Mapping[str, Any]) -> dict[str, Metric]:
    """Return the numbers among the harness's results for a task, whose keys are ``metric,filter``."""
    metrics: dict[str, Metric] = {}
    for key, value in results.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{kind}")
        error = float(stderr) if isinstance(stderr, int | float) else None
        metrics[metric if kind == "none" else key] = Metric(value=float(value), stderr=error)
    return metrics


@contextmanager
def _silenced_harness(bars: bool) -> Generator[None]:
    """Hide the harness's output and logs inside the block, except its bars on stderr if ``bars``."""
    with ExitStack() as stack:
        stack.enter_context(silenced_datasets(logging.ERROR, "lm_eval", "transformers"))
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not bars:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def _shorten(error: Exception) -> str:
    return one_line(error)[:200].rstrip(".: ")
