"""Training data: windows without gaps, held-out sequences, and instructions of which only the answers are learned."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from cfsp_framework.data.training import (
    IGNORED_LABEL,
    check_training_data,
    load_instructions,
    load_training_data,
    pack_windows,
)
from cfsp_framework.errors import DataError
from helpers import families

CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS: dict[str, dict[str, Any]] = {
    "prompt": {"prompt": "the quick ", "completion": "brown fox"},
    "response": {"prompt": "the quick ", "response": "brown fox"},
    "question": {"question": "the quick ", "answer": "brown fox"},
    "alpaca": {"instruction": "say it", "input": "quick", "output": "brown fox"},
    "dolly": {"instruction": "say it", "context": "quick", "response": "brown fox", "category": "x"},
    "turns": {
        "prompt": [{"role": "user", "content": "the quick"}],
        "completion": [{"role": "assistant", "content": "brown fox"}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": "hello"},
            {"from": "human", "value": "the quick"},
            {"from": "gpt", "value": "brown fox"},
        ]
    },
    "messages": {
        "messages": [
            {"role": "user", "content": "hello"},
            {"role": "assistant", "content": "world"},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "brown fox"},
        ]
    },
}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("template", [None, CHAT_TEMPLATE])
@pytest.mark.parametrize("form", ROWS)
def test_only_answers_are_learned(
    form: str, template: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = families.tokenizer()
    monkeypatch.setattr(tokenizer, "chat_template", template)
    examples = load_instructions(write_rows(tmp_path / "rows.jsonl", [ROWS[form]] * 3), tokenizer, 512)
    assert len(examples) == 3
    ids, labels = examples[0].ids, examples[0].labels
    learned = labels != IGNORED_LABEL
    assert ids[learned].tolist() == labels[learned].tolist()
    end = "</s>" if template else (tokenizer.eos_token or "")
    answers = f"world{end}brown fox{end}" if form == "messages" else f"brown fox{end}"
    assert tokenizer.decode(ids[learned], skip_special_tokens=False) == answers
    text = tokenizer.decode(ids, skip_special_tokens=False)
    assert "brown fox" in text
    assert ("hello" if form == "messages" else "quick") in text


def test_instructions_are_cut_and_rows_without_an_answer_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "x" * 200, "completion": "y"}, {"prompt": "x", "completion": "y" * 200}]
    [example] = load_instructions(write_rows(tmp_path / "rows.jsonl", rows), families.tokenizer(), 20)
    assert len(example.ids) == 20
    with pytest.raises(DataError, match="no row has an answer within 20 tokens"):
        load_instructions(write_rows(tmp_path / "long.jsonl", rows[:1]), families.tokenizer(), 20)


def test_windows_have_no_gaps_and_mix_by_weight(tmp_path: Path) -> None:
    tokenizer = families.tokenizer()
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a" * 1000)
    second.write_text("b" * 1000)
    windows = pack_windows(str(first), tokenizer, 10, 100)
    ids = tokenizer("a" * 1000)["input_ids"]
    assert windows.flatten().tolist() == ids[: len(ids) // 10 * 10]
    mixed = pack_windows(f"{first}=0.75,{second}=0.25", tokenizer, 10, 100)
    letters = [tokenizer.decode(window)[-1] for window in mixed]
    assert abs(letters.count("a") - 3 * letters.count("b")) <= 3


def test_held_out_sequences_are_not_trained_on(calibration_text: Path) -> None:
    windows = pack_windows(str(calibration_text), families.tokenizer(), 32, 0).tolist()
    data = load_training_data(str(calibration_text), families.tokenizer(), 32, 0, hold_out=True)
    assert [example.ids.tolist() for example in data.held_out] == windows[19::20][:64]
    rest = [window for number, window in enumerate(windows) if number % 20 != 19 or number >= 1280]
    assert [example.ids.tolist() for example in data.train] == rest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], "no instructions.* columns text.* messages, "),
        ([{"prompt": 1, "completion": "x"}], "row 0 .* int where text"),
        ([{"messages": [{"role": "user"}]}], "row 0 .* no 'content'"),
        ([], "holds no rows"),
    ],
)
def test_rows_that_are_not_instructions_are_refused(rows: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        load_instructions(write_rows(tmp_path / "rows.jsonl", rows), families.tokenizer(), 32)


@pytest.mark.parametrize("spec", ["nowhere.txt", "demo=0.5,nowhere.txt=0.5", "instructions:nowhere.jsonl"])
def test_data_on_this_machine_is_checked_without_a_tokenizer(spec: str) -> None:
    with pytest.raises(DataError, match=r"nowhere.*no such file"):
        check_training_data(spec)
    for remote in ("c4", "hf:owner/data", "c4=0.5,hf:owner/data=0.5", "instructions:hf:owner/data"):
        check_training_data(remote)  # reads nothing from the Hub
