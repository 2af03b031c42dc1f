"""Training data: a text cut into consecutive windows, or instructions of which only the answers are learned."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cfsp_framework.data.sources import STREAM_CHARACTERS, WELL_KNOWN, apportion, parse_mixture, read_rows, read_text
from cfsp_framework.data.windows import read_tokens
from cfsp_framework.errors import DataError

IGNORED_LABEL = -100
"""The label of a token that does not count in the loss."""
TRAINING_HELD_OUT_EVERY = 20
"""Every twentieth sequence is held out where the held-out loss is measured."""
MOST_HELD_OUT = 64
_INSTRUCTIONS = "instructions:"
_CHARACTERS_PER_TOKEN = 6
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
INSTRUCTION_COLUMNS = (
    ("messages",),
    ("conversations",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output", "input"),
    ("instruction", "response", "context"),
    ("question", "answer"),
)
"""Columns of a conversation; or of a prompt, its answer, and text the prompt is about, which may be missing.

The first that a data set has are used."""


@dataclass(frozen=True)
class Example:
    """A training sequence: tokens ``(t,)`` int64, and labels ``(t,)``, ``IGNORED_LABEL`` where no loss counts."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TrainingData:
    """Sequences to train on, and sequences held out to measure the loss on."""

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


def check_training_data(spec: str) -> None:
    """Read the parts of a data SPEC that lie on this machine, without a tokenizer.

    Raises:
        DataError: a part cannot be read, or does not have the columns of instructions.
    """
    if spec.startswith(_INSTRUCTIONS):
        rows = spec.removeprefix(_INSTRUCTIONS)
        if not rows.startswith("hf:"):
            choose_columns(rows, read_rows(rows))
        return
    for name, _ in parse_mixture(spec):
        if name not in WELL_KNOWN and not name.startswith("hf:"):
            read_text(name, "training")


def load_training_data(spec: str, tokenizer: Any, seqlen: int, tokens: int, *, hold_out: bool) -> TrainingData:
    """Load the sequences of a data SPEC, none longer than ``seqlen``; of a large corpus enough for ``tokens``.

    Raises:
        DataError: the data cannot be read, has too little text, or does not have the columns of instructions.
    """
    if spec.startswith(_INSTRUCTIONS):
        examples = load_instructions(spec.removeprefix(_INSTRUCTIONS), tokenizer, seqlen)
    else:
        examples = [Example(window, window) for window in pack_windows(spec, tokenizer, seqlen, tokens)]
    if not hold_out:
        return TrainingData(spec, tuple(examples))
    numbers = range(TRAINING_HELD_OUT_EVERY - 1, len(examples), TRAINING_HELD_OUT_EVERY)[:MOST_HELD_OUT]
    if not numbers:
        raise DataError(
            f"data {spec!r} has {len(examples)} sequences; --recovery-check-every needs {TRAINING_HELD_OUT_EVERY}."
        )
    train = tuple(example for number, example in enumerate(examples) if number not in numbers)
    return TrainingData(spec, train, tuple(examples[number] for number in numbers))


def pack_windows(spec: str, tokenizer: Any, seqlen: int, tokens: int) -> Tensor:
    """Cut a text into consecutive windows ``(N, seqlen)``; the tail is dropped.

    The parts of a mixture have windows in proportion to their weights, as many as the shortest part allows without
    repeating one.

    Raises:
        DataError: a part cannot be read, or is shorter than one window.
    """
    parts = parse_mixture(spec)
    weights = [weight / sum(weight for _, weight in parts) for _, weight in parts]
    windows: list[Tensor] = []
    for (name, _), weight in zip(parts, weights, strict=True):
        characters = max(STREAM_CHARACTERS, math.ceil(tokens * weight * _CHARACTERS_PER_TOKEN))
        ids = read_tokens(name, "training", tokenizer, seqlen, least=seqlen, characters=characters)  # (n,)
        windows.append(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))  # (n, T)
    total = min(math.floor(len(part) / weight) for part, weight in zip(windows, weights, strict=True))
    counts = apportion(weights, total)
    return torch.cat([part[:count] for part, count in zip(windows, counts, strict=True)])  # (N, T)


def load_instructions(spec: str, tokenizer: Any, seqlen: int) -> list[Example]:
    """Load the rows of an instruction data set, cut at ``seqlen``; only their answers are learned.

    With a chat template every row becomes a conversation; without one, an ``instruction`` is formatted as in Alpaca.
    Rows without an answer within ``seqlen`` are left out.

    Raises:
        DataError: the data cannot be read, has none of ``INSTRUCTION_COLUMNS``, or no row with an answer.
    """
    rows = read_rows(spec)
    columns = choose_columns(spec, rows)
    examples: list[Example] = []
    for number, row in enumerate(rows):
        try:
            example = _tokenize_pieces(_split_row(row, columns, tokenizer), tokenizer, seqlen)
        except KeyError as error:
            raise DataError(f"data {spec!r}: row {number} is not an instruction: a turn has no {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            message = " ".join(str(error).split())
            raise DataError(f"data {spec!r}: row {number} is not an instruction: {message}.") from error
        if (example.labels[1:] != IGNORED_LABEL).any():
            examples.append(example)
    if not examples:
        raise DataError(f"data {spec!r}: no row has an answer within {seqlen} tokens.")
    return examples


def choose_columns(spec: str, rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the instruction columns that the rows have.

    Raises:
        DataError: they have none.
    """
    names = set(rows[0]) if rows else set[str]()
    for columns in INSTRUCTION_COLUMNS:
        if names >= set(columns[:2]):
            return columns
    listed = f"columns {', '.join(sorted(names))}" if names else "no rows"
    expected = ", ".join("+".join(columns[:2]) for columns in INSTRUCTION_COLUMNS)
    raise DataError(f"data {spec!r} holds no instructions: it has {listed}; expected one of {expected}.")


def collate(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack sequences into a batch ``(B, T)``; shorter ones end with padding without attention and without loss."""
    ids = [sequence["input_ids"] for sequence in sequences]
    labels = [sequence["labels"] for sequence in sequences]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED_LABEL),
    }
    if len({len(row) for row in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return batch


Piece = tuple[str, bool]
"""Some text, and whether it is learned."""


def _split_row(row: Mapping[str, Any], columns: Sequence[str], tokenizer: Any) -> list[Piece]:
    """Split a row into pieces of text."""
    prompt: Any = row[columns[0]]
    if len(columns) == 1:
        return _split_conversation(prompt, tokenizer)
    answer: Any = row[columns[1]]
    if isinstance(prompt, list) and isinstance(answer, list):
        return _split_conversation([*prompt, *answer], tokenizer)
    context = row.get(columns[2]) if len(columns) > 2 else None
    if tokenizer.chat_template:
        question = f"{prompt}\n\n{context}" if context else prompt
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return _split_conversation(turns, tokenizer)
    question = _require_text(prompt)
    if columns[0] == "instruction":  # as Stanford Alpaca, without its opening sentence
        middle = f"### Input:\n{context}\n\n" if context else ""
        question = f"### Instruction:\n{question}\n\n{middle}### Response:\n"
    return [(question, False), (_require_text(answer) + (tokenizer.eos_token or ""), True)]


def _split_conversation(turns: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """Split a conversation into pieces; the assistant's turns are learned.

    Only its last turn is learned where the chat template changes earlier turns when later ones are added.
    """
    messages = [_read_turn(turn) for turn in turns]
    if not tokenizer.chat_template:
        pieces: list[Piece] = []
        for message in messages:
            learned = message["role"] == "assistant"
            end = (tokenizer.eos_token or "") if learned else ""
            pieces += [(f"### {message['role'].capitalize()}:\n", False), (message["content"] + end, learned)]
            pieces.append(("\n\n", False))
        return pieces
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    templated = _apply_template(messages, answers, tokenizer) or _apply_template(messages, answers[-1:], tokenizer)
    if templated is None:
        raise ValueError("the tokenizer's chat template does not write a prompt as the beginning of the conversation")
    return templated


def _apply_template(
    messages: Sequence[Mapping[str, str]], learned: Sequence[int], tokenizer: Any
) -> list[Piece] | None:
    """Split a conversation up to its last learned turn; None where the template changes the text of earlier turns."""
    pieces, written = list[Piece](), ""
    for number in learned:
        prompt = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        answered = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (prompt.startswith(written) and answered.startswith(prompt)):
            return None
        pieces += [(prompt[len(written) :], False), (answered[len(prompt) :], True)]
        written = answered
    return pieces


def _tokenize_pieces(pieces: Sequence[Piece], tokenizer: Any, seqlen: int) -> Example:
    """Tokenize each piece by itself, so that no token lies in two, after the tokenizer's beginning-of-sequence token."""
    ids, labels = list[int](), list[int]()
    begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    if pieces and begins and not pieces[0][0].startswith(tokenizer.bos_token or "\0"):
        ids, labels = [tokenizer.bos_token_id], [IGNORED_LABEL]
    for text, learned in pieces:
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += tokens
        labels += tokens if learned else [IGNORED_LABEL] * len(tokens)
    return Example(torch.tensor(ids[:seqlen], dtype=torch.int64), torch.tensor(labels[:seqlen], dtype=torch.int64))


def _read_turn(turn: Mapping[str, str]) -> dict[str, str]:
    """Return a turn's role and content, which ShareGPT calls ``from`` and ``value``."""
    if "from" in turn:
        return {"role": _SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": _require_text(turn["value"])}
    return {"role": turn["role"], "content": _require_text(turn["content"])}


def _require_text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it holds {type(value).__name__} where text is expected")
    return value
