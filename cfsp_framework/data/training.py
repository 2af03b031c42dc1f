"""Read data to train on: text cut into windows without gaps, or instructions of which only the answers are learnt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cfsp_framework.data.sources import STREAM_CHARACTERS, apportion, parse_mixture, read_rows
from cfsp_framework.data.windows import read_tokens
from cfsp_framework.errors import DataError

NOT_LEARNT = -100
"""Label of a token that no loss counts."""
HOLD_OUT_EVERY = 20
"""Of every so many sequences one is held out, where training checks held-out data."""
MOST_HELD_OUT = 64
_INSTRUCTIONS = "instructions:"
_CHARACTERS_PER_TOKEN = 6
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Form:
    """The columns of one kind of instruction data."""

    prompt: str
    """Column of prompts, or of conversations where ``answer`` is None."""
    answer: str | None = None
    context: str | None = None
    """Column of texts that prompts refer to; the column, or a row's value, may be missing."""

    @property
    def required(self) -> tuple[str, ...]:
        """Columns that data of this form must have."""
        return (self.prompt,) if self.answer is None else (self.prompt, self.answer)


FORMS = (
    Form("messages"),
    Form("conversations"),
    Form("prompt", "completion"),
    Form("prompt", "response"),
    Form("instruction", "output", "input"),
    Form("instruction", "response", "context"),
    Form("question", "answer"),
)
"""Forms of instruction data; the first that a data set fits is taken."""


@dataclass(frozen=True)
class Example:
    """One training sequence: tokens ``(t,)`` int64, and the same as labels, ``NOT_LEARNT`` where no loss counts."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TrainingData:
    """The sequences to train on, and those held out to be checked meanwhile."""

    spec: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and labels."""
        digest = hashlib.sha256()
        for example in (*self.train, *self.held_out):
            digest.update(example.ids.numpy().tobytes())
            digest.update(example.labels.numpy().tobytes())
        return digest.hexdigest()


def training_data(spec: str, tokenizer: Any, seqlen: int, tokens: int, *, hold_out: bool) -> TrainingData:
    """Return the sequences of a data SPEC, none longer than ``seqlen``; of a large corpus enough for ``tokens``.

    Raises:
        DataError: the data cannot be read, has too little text, or not the columns of instructions.
    """
    if spec.startswith(_INSTRUCTIONS):
        examples = instructions(spec.removeprefix(_INSTRUCTIONS), tokenizer, seqlen)
    else:
        examples = [Example(window, window) for window in packed_windows(spec, tokenizer, seqlen, tokens)]
    if not hold_out:
        return TrainingData(spec, tuple(examples))
    numbers = range(HOLD_OUT_EVERY - 1, len(examples), HOLD_OUT_EVERY)[:MOST_HELD_OUT]
    if not numbers:
        raise DataError(f"data {spec!r} has {len(examples)} sequences; to hold some out takes {HOLD_OUT_EVERY}.")
    train = tuple(example for number, example in enumerate(examples) if number not in numbers)
    return TrainingData(spec, train, tuple(examples[number] for number in numbers))


def packed_windows(spec: str, tokenizer: Any, seqlen: int, tokens: int) -> Tensor:
    """Return a text's consecutive windows of ``seqlen``, ``(N, seqlen)``; the tail is dropped.

    Each part of a mixture gives as many windows as its weight says, and no window twice.

    Raises:
        DataError: a part cannot be read, or is shorter than one window.
    """
    parts = parse_mixture(spec)
    weights = [weight / sum(weight for _, weight in parts) for _, weight in parts]
    windows: list[Tensor] = []
    for (name, _), weight in zip(parts, weights, strict=True):
        characters = max(STREAM_CHARACTERS, math.ceil(tokens * weight * _CHARACTERS_PER_TOKEN))
        ids = read_tokens(name, "training", tokenizer, seqlen, least=seqlen, characters=characters)
        windows.append(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))  # (n, T)
    total = min(math.floor(len(part) / weight) for part, weight in zip(windows, weights, strict=True))
    counts = apportion(weights, total)
    return torch.cat([part[:count] for part, count in zip(windows, counts, strict=True)])  # (N, T)


def instructions(spec: str, tokenizer: Any, seqlen: int) -> list[Example]:
    """Return the rows of an instruction data set, cut at ``seqlen``, of which only the answers are learnt.

    With a chat template every row becomes a conversation. Without one, prompts of an ``instruction`` column are worded
    as Alpaca's. Rows without an answer within ``seqlen`` are left out.

    Raises:
        DataError: it cannot be read, has the columns of none of ``FORMS``, or no row with an answer.
    """
    rows = read_rows(spec)
    columns = set(rows[0]) if rows else set[str]()
    form = next((form for form in FORMS if columns >= set(form.required)), None)
    if form is None:
        held = f"columns {', '.join(sorted(columns))}" if columns else "no rows"
        expected = ", ".join("+".join(form.required) for form in FORMS)
        raise DataError(f"data {spec!r} holds no instructions: it has {held}; expected one of {expected}.")
    examples: list[Example] = []
    for number, row in enumerate(rows):
        try:
            example = _encode(_split_row(row, form, tokenizer), tokenizer, seqlen)
        except KeyError as error:
            raise DataError(f"data {spec!r}: row {number} is not an instruction: a turn has no {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(f"data {spec!r}: row {number} is not an instruction: {reason}.") from error
        if (example.labels[1:] != NOT_LEARNT).any():
            examples.append(example)
    if not examples:
        raise DataError(f"data {spec!r}: no row has an answer within {seqlen} tokens.")
    return examples


def collate(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Build a batch ``(B, T)``; shorter sequences end with padding that is masked and that no loss counts."""
    ids = [sequence["input_ids"] for sequence in sequences]
    labels = [sequence["labels"] for sequence in sequences]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),  # (B, T)
        "labels": pad_sequence(labels, batch_first=True, padding_value=NOT_LEARNT),  # (B, T)
    }
    if len({len(sequence) for sequence in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(sequence) for sequence in ids], batch_first=True)
    return batch


Piece = tuple[str, bool]
"""Some text, and whether it is learnt."""


def _split_row(row: Mapping[str, Any], form: Form, tokenizer: Any) -> list[Piece]:
    """Split a row into prompts and answers."""
    prompt: Any = row[form.prompt]
    if form.answer is None:
        return _split_conversation(prompt, tokenizer)
    answer: Any = row[form.answer]
    if isinstance(prompt, list) and isinstance(answer, list):
        return _split_conversation([*prompt, *answer], tokenizer)
    context = row.get(form.context) if form.context else None
    if tokenizer.chat_template:
        prompt = f"{prompt}\n\n{context}" if context else prompt
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return _split_conversation(turns, tokenizer)
    prompt = _check_text(prompt)
    if form.prompt == "instruction":  # Stanford Alpaca's prompt, without its opening sentence
        middle = f"### Input:\n{context}\n\n" if context else ""
        prompt = f"### Instruction:\n{prompt}\n\n{middle}### Response:\n"
    return [(prompt, False), (_check_text(answer) + (tokenizer.eos_token or ""), True)]


def _split_conversation(turns: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """Split a conversation so that the assistant's turns are learnt.

    Only the last one is, where the chat template changes what it wrote for earlier turns.
    """
    messages = [_read_turn(turn) for turn in turns]
    if not tokenizer.chat_template:
        pieces: list[Piece] = []
        for message in messages:
            learnt = message["role"] == "assistant"
            end = (tokenizer.eos_token or "") if learnt else ""
            pieces += [
                (f"### {message['role'].capitalize()}:\n", False),
                (f"{message['content']}{end}", learnt),
                ("\n\n", False),
            ]
        return pieces
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    templated = _apply_template(messages, answers, tokenizer) or _apply_template(messages, answers[-1:], tokenizer)
    if templated is None:
        raise ValueError("the tokenizer's chat template does not write a prompt as the beginning of the conversation")
    return templated


def _apply_template(
    messages: Sequence[Mapping[str, str]], answers: Sequence[int], tokenizer: Any
) -> list[Piece] | None:
    """Return the conversation up to its last answer; None if the template changes what it wrote for earlier turns."""
    pieces, written = list[Piece](), ""
    for number in answers:
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (prompt.startswith(written) and whole.startswith(prompt)):
            return None
        pieces += [(prompt[len(written) :], False), (whole[len(prompt) :], True)]
        written = whole
    return pieces


def _encode(pieces: Sequence[Piece], tokenizer: Any, seqlen: int) -> Example:
    """Tokenize piece by piece, so that no token lies in two; a beginning-of-sequence token comes first by default."""
    ids, labels = list[int](), list[int]()
    if pieces and not pieces[0][0].startswith(tokenizer.bos_token or "\0") and _adds_bos(tokenizer):
        ids, labels = [tokenizer.bos_token_id], [NOT_LEARNT]
    for text, learnt in pieces:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if learnt else [NOT_LEARNT] * len(tokens)
    return Example(torch.tensor(ids[:seqlen], dtype=torch.int64), torch.tensor(labels[:seqlen], dtype=torch.int64))


def _adds_bos(tokenizer: Any) -> bool:
    """Return whether this tokenizer puts a beginning-of-sequence token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _read_turn(turn: Mapping[str, str]) -> dict[str, str]:
    """Return a turn with ``role`` and ``content``, which ShareGPT calls ``from`` and ``value``."""
    if "from" in turn:
        return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": _check_text(turn["value"])}
    return {"role": turn["role"], "content": _check_text(turn["content"])}


def _check_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it holds {type(value).__name__} where text is expected")
    return value
