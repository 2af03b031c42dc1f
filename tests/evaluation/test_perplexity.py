"""Perplexity as the field defines it, against a loop that only says so."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from cfsp_framework.errors import DataError, ModelError
from cfsp_framework.evaluation import perplexity as evaluation
from cfsp_framework.evaluation.perplexity import EvaluationSet, evaluation_set, perplexity
from cfsp_framework.runtime.progress import Progress

TEXT = "The quick brown fox jumps over the lazy dog. Größe: 3 m.\n" * 40
Open = Callable[..., tuple[Any, Any]]


@pytest.fixture
def opened(make_model: Callable[..., Path], open_tiny: Open) -> tuple[Any, Any]:
    """A tiny model and its tokenizer."""
    loaded, _ = open_tiny(make_model("llama"))
    return loaded.model, loaded.tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of a few thousand tokens."""
    path = tmp_path / "test.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def naive_nll(model: Any, ids: list[int], seqlen: int) -> float:
    """Window by window and token by token, in double precision: the mean over windows of their mean."""
    means = []
    with torch.no_grad():
        for start in range(0, len(ids) - seqlen + 1, seqlen):
            window = ids[start : start + seqlen]
            logits = model(torch.tensor([window])).logits[0].double()
            losses = [-functional.log_softmax(logits[t], -1)[window[t + 1]].item() for t in range(seqlen - 1)]
            means.append(sum(losses) / len(losses))
    return sum(means) / len(means)


@pytest.mark.parametrize("seqlen", [2, 33, 128])
def test_perplexity_is_what_a_naive_loop_finds(seqlen: int, opened: tuple[Any, Any], text: Path) -> None:
    model, tokenizer = opened
    ids = tokenizer(TEXT)["input_ids"][: 7 * seqlen + 1]
    data = EvaluationSet("test", torch.tensor(ids[: 7 * seqlen]).view(7, seqlen), 1.0)
    found = perplexity(model, data, Progress())
    expected = naive_nll(model, ids, seqlen)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)


def test_windows_follow_each_other_and_the_tail_is_dropped(opened: tuple[Any, Any], text: Path) -> None:
    _, tokenizer = opened
    ids = tokenizer(TEXT)["input_ids"]
    data = evaluation_set(str(text), tokenizer, 100)
    assert data.windows.shape == (len(ids) // 100, 100)
    assert data.windows.flatten().tolist() == ids[: len(ids) // 100 * 100]
    assert len(ids) % 100  # there was a tail to drop


def test_a_limit_takes_the_first_windows(opened: tuple[Any, Any], text: Path) -> None:
    _, tokenizer = opened
    every, first = (evaluation_set(str(text), tokenizer, 64, limit) for limit in (None, 3))
    assert first.windows.equal(every.windows[:3])
    assert evaluation_set(str(text), tokenizer, 64, 10_000).windows.equal(every.windows)


def test_bits_per_byte_count_the_bytes_of_the_text(opened: tuple[Any, Any], text: Path) -> None:
    model, tokenizer = opened
    data = evaluation_set(str(text), tokenizer, 64, 4)
    found = perplexity(model, data, Progress())
    tokens, size = len(tokenizer(TEXT)["input_ids"]), len(TEXT.encode())
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * tokens / size, rel=1e-9)


def test_batches_do_not_change_the_result(opened: tuple[Any, Any], text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened
    data = evaluation_set(str(text), tokenizer, 64)
    together = perplexity(model, data, Progress())
    monkeypatch.setattr(evaluation, "LOGITS_PER_BATCH", 1)
    assert perplexity(model, data, Progress()).nll == pytest.approx(together.nll, rel=1e-6)


def test_a_text_of_exactly_one_window_is_enough(opened: tuple[Any, Any], text: Path) -> None:
    _, tokenizer = opened
    count = len(tokenizer(TEXT)["input_ids"])
    assert evaluation_set(str(text), tokenizer, count).windows.shape == (1, count)
    with pytest.raises(DataError, match=rf"has {count} tokens; one evaluation window of {count + 1} needs more"):
        evaluation_set(str(text), tokenizer, count + 1)


def test_a_mixture_is_refused_but_one_part_is_none(opened: tuple[Any, Any], text: Path) -> None:
    _, tokenizer = opened
    with pytest.raises(DataError, match="a mixture is for calibration; evaluate on each of its parts"):
        evaluation_set(f"{text}=0.5,demo=0.5", tokenizer, 64)
    assert evaluation_set(f"{text}=1", tokenizer, 64).windows.equal(evaluation_set(str(text), tokenizer, 64).windows)


def test_a_model_that_overflows_is_an_error_not_a_number(opened: tuple[Any, Any], text: Path) -> None:
    model, tokenizer = opened
    data = evaluation_set(str(text), tokenizer, 64, 2)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match=r"the model's loss on .* is nan: its weights or its dtype overflow"):
        perplexity(model, data, Progress())
