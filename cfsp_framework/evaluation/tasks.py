"""Downstream tasks through lm-evaluation-harness: a model in memory, the harness's own prompts and metrics.

The data come from the Hub, or from local files: one folder a task, one file a split (``local_tasks``).
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
from cfsp_framework.errors import CfspError, ConfigError, DataError
from cfsp_framework.modeling.loading import LoadedModel, load_model
from cfsp_framework.runtime.distributed import join_ranks
from cfsp_framework.runtime.progress import Progress

SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
"""What papers on pruning report zero-shot, CFSP's among them."""

_LOGITS_PER_BATCH = 1 << 26
"""Bounds the float32 logits of a batch of 512 tokens to 256 MiB."""
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
_ALSO_CALLED = {"validation": ("dev", "valid"), "train": ("training",)}


class Metric(FrozenRecord):
    """One number of a task and its standard error, where the harness knows one."""

    value: float
    stderr: float | None = None


class TaskResult(FrozenRecord):
    """What a model scores on one task."""

    task: str
    version: str
    """Of the harness's definition of the task."""
    fewshot: int
    samples: int
    """Documents the numbers are means of."""
    metrics: dict[str, Metric]
    """By the harness's names; of a filter other than its default as ``metric,filter``."""
    note: str = ""
    """In what the prompt is not the harness's, which only ready-made local columns cause."""

    @property
    def acc(self) -> Metric | None:
        """Accuracy: the answer of highest log-likelihood is right."""
        return self.metrics.get("acc")

    @property
    def acc_norm(self) -> Metric | None:
        """Accuracy with log-likelihoods divided by the answers' lengths in characters, where the task has it."""
        return self.metrics.get("acc_norm")


class TaskResults(FrozenRecord):
    """Scores, and what else has to be said for somebody to get the same ones."""

    harness: str
    """Version of lm-evaluation-harness."""
    tasks: tuple[TaskResult, ...]
    limit: int | None
    """Only the first so many documents of each task; None: all."""
    seed: int
    batch_size: int
    bos: bool
    """Whether prompts begin with the beginning-of-sequence token, which the tokenizer decides."""
    chat_template: bool = False
    """Whether prompts are wrapped into the tokenizer's chat template: they are not."""

    @property
    def mean_acc(self) -> float | None:
        """Mean of the accuracies of all tasks that have one, each task counted once."""
        return _mean([one.acc for one in self.tasks])

    @property
    def mean_acc_norm(self) -> float | None:
        """The same with ``acc_norm`` where a task has it and ``acc`` where not."""
        return _mean([one.acc_norm or one.acc for one in self.tasks])


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

    ``fewshot`` None leaves it to the tasks, which mostly say 0. With ``seed`` 0 all draws are those of the harness's own
    command line. ``bars`` shows the harness's progress on stderr. Neither model nor tokenizer is changed.

    Raises:
        ConfigError: the harness is not installed, or does not know a task.
        DataError: a task's data cannot be read or fetched.
    """
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ConfigError("--tasks: name at least one task, such as arc_easy.")
    size = batch_size or _batch_size(model)
    with ExitStack() as stack:
        stack.enter_context(_harness_kept_quiet(bars))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cfsp-tasks-")))
        check_names(names, local=task_data is not None)
        if task_data is None:
            specs, notes = names, dict[str, str]()
        else:
            written = local_tasks(names, task_data, folder, fewshot=fewshot)
            specs, notes = [str(one.path) for one in written], {one.name: one.note for one in written}
        return _run(model, copy.deepcopy(tokenizer), _load(specs, task_data), notes, limit, fewshot, size, seed)


def score(
    config: RunConfig,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    fewshot: int | None = None,
    progress: Progress | None = None,
) -> tuple[LoadedModel, TaskResults]:
    """Open ``config.model.source`` and score it; what is wrong with the tasks shows before the model is read.

    Raises:
        ConfigError: as of ``run_tasks``, or the model is to be streamed or shared out.
        DataError: as of ``run_tasks``.
        ModelError: the model cannot be opened.
    """
    progress = progress or Progress()
    if config.model.stream:
        raise ConfigError("--stream: the tasks run the whole model; leave one of both out.")
    ranks = join_ranks(config.model.device)
    if ranks.world > 1:
        raise ConfigError("--tasks: the harness's requests are not shared out; run one process.")
    with _harness_kept_quiet(bars=False):
        check_names(tasks, local=task_data is not None)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
    with progress.phase("tasks"):
        found = run_tasks(
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
    return loaded, found


def check_names(names: Sequence[str], *, local: bool = False) -> None:
    """Refuse what the harness has no task, group or tag of that name for; on local data only tasks will do.

    Raises:
        ConfigError: one is unknown, or the harness is not installed.
    """
    manager = _manager()
    for name in names:
        if name not in manager.all_tasks:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else " `lm-eval ls tasks` lists all."
            raise ConfigError(f"--tasks: lm-eval has no {name!r}.{hint}")
        if local and name not in manager.all_subtasks:
            raise ConfigError(f"--tasks: {name!r} is a group; with --task-data name its tasks one by one.")


@dataclass(frozen=True)
class LocalTask:
    """A task of the harness that reads local files: its YAML, and in what it is not the harness's own."""

    name: str
    path: Path
    note: str = ""


def local_tasks(
    names: Sequence[str], task_data: Path, folder: Path, *, fewshot: int | None = None
) -> tuple[LocalTask, ...]:
    """Write a YAML for each task into ``folder``: the harness's own, with its data read from ``task_data``.

    ``task_data/TASK/SPLIT.jsonl`` (or ``.json``, ``.parquet``, ``.csv``) holds the split the task calls so, with the
    columns of the task's data set on the Hub. ``dev`` and ``valid`` will do for ``validation``. The split the task is
    evaluated on has to be there, and for few-shot prompts the one it takes its examples from. The YAMLs also serve
    ``lm_eval --include_path``.

    Raises:
        DataError: a split is not there or cannot be read.
    """
    if not task_data.is_dir():
        raise DataError(f"--task-data {task_data}: there is no such folder.")
    return tuple(_local_task(name, task_data / name, folder, fewshot) for name in names)


def _local_task(name: str, data: Path, folder: Path, fewshot: int | None) -> LocalTask:
    entry = _manager().task_index[name]
    config: Mapping[str, Any] = entry.cfg or {}
    files = {path.stem: path.absolute() for path in sorted(data.glob("*")) if path.suffix in _LOADERS}
    found = {key: _file_of(config[key], files) for key in _SPLITS if config.get(key)}
    evaluated = "test_split" if config.get("test_split") else "validation_split"
    wanted = [evaluated]
    if config.get("num_fewshot") != 0 and (fewshot or config.get("num_fewshot")):
        wanted.append(next(key for key in ("fewshot_split", *_SPLITS) if config.get(key)))
    for key in wanted:
        if found.get(key) is None:
            raise DataError(f"task {name!r} needs {data / str(config.get(key))}.jsonl, or .json, .parquet, .csv.")
    used = {config[key]: path for key, path in found.items() if path is not None}
    loader, columns = _columns(name, used, used[config[evaluated]], folder)
    settings, note = _ready_made(name, columns)
    text = yaml.safe_dump(
        {
            "include": str(entry.yaml_path),
            "task": name,
            "dataset_path": loader,
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(path) for split, path in used.items()},
                "cache_dir": str(folder / "cache"),
            },
            **{key: None for key, path in found.items() if path is None},
            **settings,
        },
        sort_keys=False,
    )
    path = folder / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return LocalTask(name, path, note)


def _file_of(split: str, files: Mapping[str, Path]) -> Path | None:
    return next((files[name] for name in (split, *_ALSO_CALLED.get(split, ())) if name in files), None)


def _columns(name: str, used: Mapping[str, Path], evaluated: Path, folder: Path) -> tuple[str, frozenset[str]]:
    """The loader of a task's files and the columns of the split it is evaluated on."""
    loaders = {_LOADERS[path.suffix] for path in used.values()}
    if len(loaders) > 1:
        raise DataError(f"task {name!r}: the splits in {evaluated.parent} are of different formats; use one.")
    [loader] = loaders
    try:
        rows = datasets.load_dataset(
            loader, data_files={"rows": str(evaluated)}, split="rows", cache_dir=str(folder / "cache")
        )
    except Exception as error:  # whatever pyarrow and datasets raise
        raise DataError(f"{evaluated} cannot be read: {_one_line(error)}") from error
    return loader, frozenset(rows.column_names)


@dataclass(frozen=True)
class _ReadyMade:
    """Columns some copies of a data set have in place of the Hub's, and how the task reads them."""

    columns: frozenset[str]
    missing: str
    settings: Mapping[str, Any]


_READY_MADE = {
    "hellaswag": _ReadyMade(
        columns=frozenset({"query", "endings", "label"}),
        missing="ctx_a",
        settings={
            "process_docs": None,
            "doc_to_text": "{{query}}",
            "doc_to_choice": "{{endings}}",
            "doc_to_target": "{{label|int}}",
        },
    ),
    "social_iqa": _ReadyMade(
        columns=frozenset({"question", "choices", "answerKey"}),
        missing="context",
        settings={
            "doc_to_text": "Q: {{question}}\nA:",
            "doc_to_choice": "{{choices.text}}",
            "doc_to_target": "{{choices.label.index(answerKey)}}",
        },
    ),
}


def _ready_made(name: str, columns: frozenset[str]) -> tuple[Mapping[str, Any], str]:
    """What to change where the context of every question is there already put together."""
    known = _READY_MADE.get(name)
    if known is None or known.missing in columns or not known.columns <= columns:
        return {}, ""
    return known.settings, f"contexts as the column {'query' if 'query' in columns else 'question'} has them"


def _load(specs: Sequence[str], task_data: Path | None) -> Any:
    """The harness's tasks with their data; ``specs`` are names or paths of YAMLs."""
    try:
        return _manager().load(list(specs))
    except CfspError:
        raise
    except Exception as error:  # whatever datasets, the Hub and a task's own code raise
        if task_data is None:
            raise DataError(
                f"the data of the tasks cannot be fetched: {_one_line(error)}. --task-data reads local files instead."
            ) from error
        raise DataError(f"--task-data {task_data} does not fit the tasks: {_one_line(error)}.") from error


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
        own = task.get_config("num_fewshot")
        if own != 0:  # a task that says 0 means it
            task.set_config(key="num_fewshot", value=fewshot if fewshot is not None else own or 0)
        task.set_fewshot_seed(seed=seed + 1234)
    random.seed(seed)
    numpy.random.seed(seed + 1234)
    torch.manual_seed(seed + 1234)
    harness_model: Any = HFLM  # whose decorators hide its signature
    language_model = harness_model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found: Any = lm_eval.evaluate(language_model, loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    return TaskResults(
        harness=version("lm-eval"),
        tasks=tuple(
            TaskResult(
                task=name,
                version=str(found["versions"][name]),
                fewshot=found["n-shot"][name],
                samples=found["n-samples"][name]["effective"],
                metrics=_metrics(found["results"][name]),
                note=notes.get(name, ""),
            )
            for name in loaded["tasks"]
        ),
        limit=limit,
        seed=seed,
        batch_size=batch_size,
        bos=_adds_bos(tokenizer),
    )


def _metrics(told: Mapping[str, Any]) -> dict[str, Metric]:
    """The numbers among what the harness tells of a task, which are called ``metric,filter``."""
    metrics: dict[str, Metric] = {}
    for key, value in told.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = told.get(f"{metric}_stderr,{kind}")
        metrics[metric if kind == "none" else key] = Metric(
            value=float(value), stderr=float(stderr) if isinstance(stderr, int | float) else None
        )
    return metrics


def _adds_bos(tokenizer: Any) -> bool:
    first: list[int] = tokenizer("a").input_ids[:1]
    return tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]


def _batch_size(model: PreTrainedModel) -> int:
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, min(16, _LOGITS_PER_BATCH // (512 * vocabulary)))


@cache
def _manager() -> Any:
    """The harness's index of its tasks, which takes seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'cfsp-framework[eval]'.") from error
    return TaskManager()


@contextmanager
def _harness_kept_quiet(bars: bool) -> Generator[None]:
    """While open only the harness's bars, where wanted, reach the terminal; what goes wrong comes as an exception."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels, shown = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    with ExitStack() as stack:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        stack.enter_context(redirect_stdout(io.StringIO()))
        if not bars:
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            if shown:
                datasets.enable_progress_bars()


def _mean(found: Sequence[Metric | None]) -> float | None:
    values = [one.value for one in found if one is not None]
    return sum(values) / len(values) if values else None


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words}"[:200].rstrip(".: ")
