"""Tasks: the harness's own numbers, on local files, from a model in memory."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.errors import ConfigError, DataError
from cfsp_framework.modeling.loading import LoadedModel
from helpers.pruned_checkpoints import write_pruned
from helpers.runs import invoke

pytest.importorskip("lm_eval")
from cfsp_framework.evaluation import tasks
from cfsp_framework.evaluation.tasks import Metric, TaskResult, TaskResults, local_tasks, run_tasks

MakeModel = Callable[..., Path]
OpenTiny = Callable[..., Any]

# Warnings from the harness's own files.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:lm_eval.*")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(count: int) -> list[dict[str, Any]]:
    """Rows as the ARC sets have them."""
    words = ["the lazy dog", "a quick brown fox jumps", "hello", "this is a test of the world"]
    return [
        {
            "id": str(number),
            "question": f"What is number {number}, {words[number % 4]}?",
            "choices": {"text": words[number % 3 :] + words[: number % 3], "label": list("ABCD")},
            "answerKey": "ABCD"[number % 4],
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the test split of one task, the renamed validation split of another, and a third in parquet."""
    folder = tmp_path_factory.mktemp("tasks")
    write_rows(folder / "arc_easy" / "test.jsonl", questions(7))
    write_rows(folder / "arc_easy" / "train.jsonl", questions(5))
    write_rows(folder / "arc_challenge" / "test.jsonl", questions(3))
    sentence = {"sentence": "The fox saw the dog because _ was lazy.", "option1": "the fox", "option2": "the dog"}
    write_rows(folder / "winogrande" / "dev.jsonl", [{**sentence, "answer": "2"}, {**sentence, "answer": "1"}] * 2)
    return folder


@pytest.fixture(scope="module")
def loaded(make_model: MakeModel, open_tiny: OpenTiny) -> LoadedModel:
    found: LoadedModel = open_tiny(make_model("llama", max_position_embeddings=256))[0]
    return found


@pytest.fixture(scope="module")
def narrow(
    make_model: MakeModel, open_tiny: OpenTiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LoadedModel, Path]:
    """A model whose blocks differ in width, and the checkpoint of it."""
    dense = make_model("llama", max_position_embeddings=256)
    folder = write_pruned(dense, tmp_path_factory.mktemp("narrow") / "checkpoint", (24, 40, 64))
    return open_tiny(folder)[0], folder


@pytest.fixture(scope="module")
def scored(loaded: LoadedModel, data: Path) -> TaskResults:
    return run_tasks(loaded.model, loaded.tokenizer, ["arc_easy", "winogrande"], task_data=data)


def likelihood(loaded: LoadedModel, prompt: str, answer: str) -> float:
    """Log-probability of ``answer`` after ``prompt``, the sum over its tokens."""
    whole = loaded.tokenizer(prompt + answer, return_tensors="pt").input_ids  # (1, T)
    start = loaded.tokenizer(prompt, return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        logits = loaded.model(whole).logits.log_softmax(-1)  # (1, T, V)
    found: float = logits[0, start - 1 : -1].gather(-1, whole[0, start:, None]).sum().item()
    return found


def test_accuracies_are_what_likelihoods_make_them(loaded: LoadedModel, scored: TaskResults) -> None:
    plain = normed = 0
    for row in questions(7):
        prompt = f"Question: {row['question']}\nAnswer:"
        found = [likelihood(loaded, prompt, f" {text}") for text in row["choices"]["text"]]
        by_length = [value / len(text) for value, text in zip(found, row["choices"]["text"], strict=True)]
        right = row["choices"]["label"].index(row["answerKey"])
        plain += found.index(max(found)) == right
        normed += by_length.index(max(by_length)) == right
    arc = scored.tasks[0]
    assert arc.acc is not None
    assert arc.acc_norm is not None
    assert (arc.acc.value, arc.acc_norm.value) == pytest.approx((plain / 7, normed / 7))


def test_results_record_the_settings_that_reproduce_them(scored: TaskResults) -> None:
    arc, winogrande = scored.tasks
    assert (arc.task, arc.fewshot, arc.samples, arc.version, arc.note) == ("arc_easy", 0, 7, "1.0", "")
    assert (winogrande.task, winogrande.samples, winogrande.acc_norm) == ("winogrande", 4, None)
    assert arc.acc is not None
    assert arc.acc.stderr is not None
    assert 0 < arc.acc.stderr < 1
    assert scored.harness.count(".") == 2
    assert not scored.bos
    assert not scored.chat_template


def test_neither_model_nor_tokenizer_is_changed(loaded: LoadedModel, data: Path) -> None:
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.pad_token = None
    run_tasks(loaded.model, tokenizer, ["winogrande"], task_data=data, limit=1)
    assert tokenizer.pad_token is None
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_limit_and_fewshot_are_the_tasks_own(loaded: LoadedModel, data: Path) -> None:
    model, tokenizer = loaded.model, loaded.tokenizer
    found = run_tasks(model, tokenizer, ["arc_easy"], task_data=data, limit=2, fewshot=1, batch_size=2)
    [arc] = found.tasks
    assert (arc.samples, arc.fewshot, found.limit, found.batch_size) == (2, 1, 2, 2)
    assert run_tasks(model, tokenizer, ["arc_easy"], task_data=data, limit=2, fewshot=1, batch_size=2) == found


def test_the_harness_itself_says_the_same_of_the_checkpoint(
    narrow: tuple[LoadedModel, Path], data: Path, tmp_path: Path
) -> None:
    loaded, checkpoint = narrow
    names = ["arc_easy", "winogrande"]
    results = run_tasks(loaded.model, loaded.tokenizer, names, task_data=data, batch_size=4)
    (tmp_path / "yaml").mkdir()
    local_tasks(names, data, tmp_path / "yaml")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True,dtype=float32"]
    command += [
        "--tasks",
        ",".join(names),
        "--include_path",
        str(tmp_path / "yaml"),
        "--output_path",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [written] = (tmp_path / "out").rglob("results*.json")
    theirs = json.loads(written.read_text())["results"]
    for task in results.tasks:
        for name, metric in task.metrics.items():
            assert theirs[task.task][f"{name},none"] == pytest.approx(metric.value, abs=1e-9), (task.task, name)
            assert theirs[task.task][f"{name}_stderr,none"] == pytest.approx(metric.stderr, abs=1e-9)


def test_ready_made_columns_give_the_harness_its_prompts(tmp_path: Path) -> None:
    """Both layouts of one row: the harness's own, put together by its code, and the one that is put together already."""
    own = {
        "ind": 0, "activity_label": "Cooking", "ctx_a": "A man stirs a pot.", "ctx_b": "he", "split": "val",
        "endings": ["tastes it.", "leaves [title] now."], "label": "1", "source_id": "a", "split_type": "zeroshot",
    }  # fmt: skip
    ready = {"query": "Cooking: A man stirs a pot. He", "endings": ["tastes it.", "leaves. now."], "label": 1}
    prompts = []
    for number, row in enumerate([own, ready]):
        data, folder = tmp_path / str(number), tmp_path / f"yaml{number}"
        folder.mkdir()
        write_rows(data / "hellaswag" / "validation.jsonl", [row])
        [written] = local_tasks(["hellaswag"], data, folder)
        assert bool(written.note) == (number == 1)
        [task] = tasks.task_manager().load([str(written.path)])["tasks"].values()
        [doc] = task.eval_docs
        prompts.append((task.doc_to_text(doc), task.doc_to_choice(doc), int(task.doc_to_target(doc))))
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    ("names", "fewshot", "message"),
    [
        (["arc_easi"], None, "lm-eval has no 'arc_easi'. Did you mean 'arc_easy'?"),
        (["ai2_arc"], None, "'ai2_arc' is a group"),
        (["piqa"], None, "task 'piqa' needs"),
        (["arc_challenge"], 2, "train.jsonl"),
        ([], None, "at least one task"),
    ],
)
def test_impossible_tasks_are_refused(
    names: list[str], fewshot: int | None, message: str, loaded: LoadedModel, data: Path
) -> None:
    with pytest.raises((ConfigError, DataError)) as caught:
        run_tasks(loaded.model, loaded.tokenizer, names, task_data=data, fewshot=fewshot)
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300


def test_files_that_do_not_fit_are_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    write_rows(tmp_path / "arc_easy" / "test.jsonl", [{"question": "What?", "answer": "This."}])
    with pytest.raises(DataError, match="does not fit the tasks"):
        run_tasks(loaded.model, loaded.tokenizer, ["arc_easy"], task_data=tmp_path)
    (tmp_path / "arc_easy" / "test.jsonl").write_text("{no json")
    with pytest.raises(DataError, match="cannot be read"):
        run_tasks(loaded.model, loaded.tokenizer, ["arc_easy"], task_data=tmp_path)


def test_without_a_network_the_hub_is_named(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="--task-data reads local files"):
        run_tasks(loaded.model, loaded.tokenizer, ["arc_easy"], limit=1)


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    tasks.task_manager.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"pip install 'cfsp-framework\[eval\]'"):
            tasks.check_names(["arc_easy"])
    finally:
        tasks.task_manager.cache_clear()


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1) | st.none()), min_size=1, max_size=5))
def test_means_count_every_task_once(values: list[tuple[float, float | None]]) -> None:
    def result(acc: float, norm: float | None) -> TaskResult:
        metrics = {"acc": Metric(value=acc)} | ({} if norm is None else {"acc_norm": Metric(value=norm)})
        return TaskResult(task="t", version="1", fewshot=0, samples=1, metrics=metrics)

    found = TaskResults(
        harness="0", tasks=tuple(result(*pair) for pair in values), limit=None, seed=0, batch_size=1, bos=False
    )
    assert found.mean_acc == pytest.approx(sum(acc for acc, _ in values) / len(values))
    assert found.mean_acc_norm == pytest.approx(
        sum(acc if norm is None else norm for acc, norm in values) / len(values)
    )


# --- the command ------------------------------------------------------------------------------------------------------


def test_evaluate_prints_scores_versions_and_perplexity(narrow: tuple[LoadedModel, Path], data: Path) -> None:
    arguments = narrow[1], "--tasks", "arc_easy", "--tasks", "winogrande", "--task-data", data, "--limit", 2
    result = invoke("evaluate", *arguments, "--data", "demo", "--seqlen", 64, "--evaluate-windows", 1)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for words in ("arc_easy", "winogrande", "acc_norm", "mean", "lm-eval 0.", "first 2 documents", "bits/byte"):
        assert words in result.stdout, words
    report = json.loads(invoke("evaluate", *arguments, "--json").stdout)
    assert report["evaluations"] == []
    found = TaskResults.model_validate(report["tasks"])
    assert [task.task for task in found.tasks] == ["arc_easy", "winogrande"]
    assert found.tasks[0].acc is not None
    assert f"{found.tasks[0].acc.value:.4f}" in result.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit", "2"], "need --tasks"),
        (["--tasks", "arc_easy", "--stream"], "--stream and --tasks cannot be combined"),
        (["--tasks", "arc_easi"], "Did you mean 'arc_easy'?"),
    ],
)
def test_evaluate_refuses(words: list[str], message: str) -> None:
    result = invoke("evaluate", "demo", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
