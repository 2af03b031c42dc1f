"""What recovery trains on: a text cut into windows without gaps, or instructions whose prompts are not learnt."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from cfsp_framework.data.sources import STREAM_CHARACTERS, mixture, read_rows, read_text, shares
from cfsp_framework.data.windows import tokenize
from cfsp_framework.errors import DataError

NOT_LEARNT = -100
"""The label of a token that no loss counts."""
HELD_OUT_EVERY = 20
"""Every so many-th sequence is held out where training looks at held-out data."""
MOST_HELD_OUT = 64
_INSTRUCTIONS = "instructions:"
_CHARACTERS_PER_TOKEN = 6
_SAYS = {"human": "user", "gpt": "assistant"}
"""Roles by the names ShareGPT has for them."""


@dataclass(frozen=True)
class Form:
    """The columns of one kind of instruction data."""

    asked: str
    """A prompt, or a conversation where there is no ``answered``."""
    answered: str | None = None
    more: str | None = None
    """What the prompt is about; the column, or a row's value, may be missing."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Those without which it is another form."""
        return (self.asked,) if self.answered is None else (self.asked, self.answered)


FORMS = (
    Form("messages"),
    Form("conversations"),
    Form("prompt", "completion"),
    Form("prompt", "response"),
    Form("instruction", "output", "input"),
    Form("instruction", "response", "context"),
    Form("question", "answer"),
)
"""Of several that a data set has, the first is taken."""


@dataclass(frozen=True)
class Example:
    """One training sequence: tokens ``(t,)`` int64, and the same as labels, ``NOT_LEARNT`` where no loss counts."""

    ids: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TrainingData:
    """The sequences to train on, and those held out to look at meanwhile."""

    spec: str
    train: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all tokens and labels."""
        found = hashlib.sha256()
        for one in (*self.train, *self.held_out):
            found.update(one.ids.numpy().tobytes())
            found.update(one.labels.numpy().tobytes())
        return found.hexdigest()


def training_data(spec: str, tokenizer: Any, seqlen: int, tokens: int, *, hold_out: bool) -> TrainingData:
    """The sequences of a data SPEC, none longer than ``seqlen``; of a large corpus enough for ``tokens``.

    Raises:
        DataError: the data cannot be read, has too little text, or not the columns of instructions.
    """
    if spec.startswith(_INSTRUCTIONS):
        found = instructions(spec.removeprefix(_INSTRUCTIONS), tokenizer, seqlen)
    else:
        found = [Example(window, window) for window in packed_windows(spec, tokenizer, seqlen, tokens)]
    if not hold_out:
        return TrainingData(spec, tuple(found))
    held_out = found[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY][:MOST_HELD_OUT]
    if not held_out:
        raise DataError(f"data {spec!r} has {len(found)} sequences; to hold some out takes {HELD_OUT_EVERY}.")
    numbers = {id(one) for one in held_out}
    return TrainingData(spec, tuple(one for one in found if id(one) not in numbers), tuple(held_out))


def packed_windows(spec: str, tokenizer: Any, seqlen: int, tokens: int) -> Tensor:
    """A text's consecutive windows of ``seqlen``, ``(N, seqlen)``; the tail is dropped.

    A mixture's parts have as many windows as their weights say, so that none comes twice.

    Raises:
        DataError: a part cannot be read, or is shorter than one window.
    """
    parts = mixture(spec)
    weights = [weight / sum(weight for _, weight in parts) for _, weight in parts]
    found: list[Tensor] = []
    for (name, _), weight in zip(parts, weights, strict=True):
        length = max(STREAM_CHARACTERS, math.ceil(tokens * weight * _CHARACTERS_PER_TOKEN))
        ids = tokenize(read_text(name, "training", length), tokenizer)
        if len(ids) < seqlen:
            raise DataError(
                f"data {name!r} has {len(ids)} tokens; one training window of {seqlen} needs more. "
                "Give more text or a smaller --seqlen."
            )
        found.append(ids[: len(ids) // seqlen * seqlen].view(-1, seqlen))  # (n, T)
    total = min(math.floor(len(windows) / weight) for windows, weight in zip(found, weights, strict=True))
    counts = shares(weights, total)
    return torch.cat([windows[:count] for windows, count in zip(found, counts, strict=True)])


def instructions(spec: str, tokenizer: Any, seqlen: int) -> list[Example]:
    """The rows of an instruction data set, cut at ``seqlen``, of which only the answers are learnt.

    With a chat template every row becomes a conversation; without one, the prompts of an ``instruction`` are worded as
    Alpaca's. Rows without an answer within ``seqlen`` are left out.

    Raises:
        DataError: it cannot be read, has the columns of none of ``FORMS``, or no row with an answer.
    """
    rows = read_rows(spec)
    columns = set(rows[0]) if rows else set[str]()
    form = next((form for form in FORMS if columns >= set(form.columns)), None)
    if form is None:
        wanted = ", ".join("+".join(form.columns) for form in FORMS)
        raise DataError(f"data {spec!r} holds no instructions: it has {_listed(columns)}; expected one of {wanted}.")
    found: list[Example] = []
    for number, row in enumerate(rows):
        try:
            one = _sequence(_pieces(row, form, tokenizer), tokenizer, seqlen)
        except KeyError as error:
            raise DataError(f"data {spec!r}: row {number} is no instruction: a turn has no {error}.") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"data {spec!r}: row {number} is no instruction: {' '.join(str(error).split())}."
            ) from error
        if (one.labels[1:] != NOT_LEARNT).any():
            found.append(one)
    if not found:
        raise DataError(f"data {spec!r}: no row has an answer within {seqlen} tokens.")
    return found


def collate(sequences: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch ``(B, T)``; shorter sequences end with padding that nothing attends to and no loss counts."""
    ids = [one["input_ids"] for one in sequences]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence([one["labels"] for one in sequences], batch_first=True, padding_value=NOT_LEARNT),
    }
    if len({len(one) for one in ids}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(one) for one in ids], batch_first=True)
    return batch


Piece = tuple[str, bool]
"""Some text, and whether it is learnt."""


def _pieces(row: Mapping[str, Any], form: Form, tokenizer: Any) -> list[Piece]:
    """A row as text, piece by piece."""
    prompt: Any = row[form.asked]
    if form.answered is None:
        return _conversation(prompt, tokenizer)
    answer: Any = row[form.answered]
    if isinstance(prompt, list) and isinstance(answer, list):
        return _conversation([*prompt, *answer], tokenizer)
    more = row.get(form.more) if form.more else None
    if tokenizer.chat_template:
        asked = f"{prompt}\n\n{more}" if more else prompt
        return _conversation([_message("user", asked), _message("assistant", answer)], tokenizer)
    asked = _worded(_text(prompt), more) if form.asked == "instruction" else _text(prompt)
    return [(asked, False), (_text(answer) + (tokenizer.eos_token or ""), True)]


def _worded(instruction: str, more: str | None) -> str:
    """The prompt of Stanford Alpaca, without its opening sentence."""
    middle = f"### Input:\n{more}\n\n" if more else ""
    return f"### Instruction:\n{instruction}\n\n{middle}### Response:\n"


def _conversation(turns: Sequence[Mapping[str, str]], tokenizer: Any) -> list[Piece]:
    """The assistant's turns are learnt; of all of them, where the template only adds to what it wrote before."""
    messages = [_turn(one) for one in turns]
    if not tokenizer.chat_template:
        ends = {"assistant": tokenizer.eos_token or ""}
        return [
            piece
            for one in messages
            for piece in (
                (f"### {one['role'].capitalize()}:\n", False),
                (f"{one['content']}{ends.get(one['role'], '')}", one["role"] == "assistant"),
                ("\n\n", False),
            )
        ]
    learnt = [number for number, one in enumerate(messages) if one["role"] == "assistant"]
    pieces = _turns(messages, learnt, tokenizer) or _turns(messages, learnt[-1:], tokenizer)
    if pieces is None:
        raise ValueError("the tokenizer's chat template does not write a prompt as the beginning of the conversation")
    return pieces


def _turns(messages: Sequence[Mapping[str, str]], learnt: Sequence[int], tokenizer: Any) -> list[Piece] | None:
    """The conversation up to its last learnt turn; None where the template does not only add to what it wrote."""
    pieces, written = list[Piece](), ""
    for number in learnt:
        before = tokenizer.apply_chat_template(messages[:number], tokenize=False, add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: number + 1], tokenize=False)
        if not (before.startswith(written) and after.startswith(before)):
            return None
        pieces += [(before[len(written) :], False), (after[len(before) :], True)]
        written = after
    return pieces


def _sequence(pieces: Sequence[Piece], tokenizer: Any, seqlen: int) -> Example:
    """Tokens piece by piece, so that no token lies in two; the first piece has the default special tokens before it."""
    ids, labels = list[int](), list[int]()
    beginning = tokenizer.bos_token or ""
    if pieces and not pieces[0][0].startswith(beginning or "\0") and _begins(tokenizer):
        ids, labels = [tokenizer.bos_token_id], [NOT_LEARNT]
    for text, learnt in pieces:
        found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += found
        labels += found if learnt else [NOT_LEARNT] * len(found)
    return Example(torch.tensor(ids[:seqlen], dtype=torch.int64), torch.tensor(labels[:seqlen], dtype=torch.int64))


def _begins(tokenizer: Any) -> bool:
    """Whether this tokenizer writes a beginning-of-sequence token of its own accord."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _turn(one: Mapping[str, str]) -> dict[str, str]:
    """A turn with ``role`` and ``content``, which ShareGPT calls ``from`` and ``value``."""
    if "from" in one:
        return _message(_SAYS.get(one["from"], one["from"]), one["value"])
    return _message(one["role"], one["content"])


def _message(role: str, content: object) -> dict[str, str]:
    return {"role": role, "content": _text(content)}


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"it holds {type(value).__name__} where text is expected")
    return value


def _listed(names: set[str]) -> str:
    return f"columns {', '.join(sorted(names))}" if names else "no rows"
