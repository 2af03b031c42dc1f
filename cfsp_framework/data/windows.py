"""Cut text into windows of tokens; draw calibration windows at seeded random places."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.records import CalibrationIdentity
from cfsp_framework.data.sources import Role, apportion, parse_mixture, read_documents, read_text
from cfsp_framework.errors import DataError
from cfsp_framework.runtime.hashing import hash_windows

PADDING = -100
"""Id of a position that holds no token; windows shorter than others end with it."""


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Tokenize all of ``text`` in one call with the tokenizer's default special tokens: ``(n,)`` int64."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def read_tokens(
    spec: str, role: Role, tokenizer: Any, seqlen: int, *, least: int, characters: int | None = None
) -> Tensor:
    """Tokenize the text of one part of a SPEC: ``(n,)`` int64.

    Raises:
        DataError: it cannot be read, or has fewer than ``least`` tokens.
    """
    ids = tokenize(read_text(spec, role, characters), tokenizer)
    if len(ids) < least:
        raise DataError(
            f"data {spec!r} has {len(ids)} tokens; one {role} window of {seqlen} needs more. "
            "Give more text or a smaller --seqlen."
        )
    return ids


def draw_windows(ids: Tensor, samples: int, seqlen: int, seed: int) -> Tensor:
    """Draw ``samples`` windows of ``seqlen`` from ``ids (n,)``: ``(samples, seqlen)``.

    Starts are drawn as GPTQ, Wanda and CFSP do: Python's ``randint(0, n - seqlen - 1)`` from one seed.
    """
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - seqlen - 1) for _ in range(samples)]
    return torch.stack([ids[start : start + seqlen] for start in starts])  # (samples, seqlen)


def draw_documents(documents: Sequence[str], tokenizer: Any, samples: int, seqlen: int, seed: int) -> Tensor:
    """Draw ``samples`` documents from one seed and return their first ``seqlen`` tokens: ``(samples, seqlen)``.

    Shorter ones end with ``PADDING``; documents of fewer than two tokens are skipped.

    Raises:
        DataError: there are too few.
    """
    windows: list[Tensor] = []
    for number in random.Random(seed).sample(range(len(documents)), len(documents)):
        ids = tokenize(documents[number], tokenizer)[:seqlen]
        if len(ids) > 1:
            windows.append(functional.pad(ids, (0, seqlen - len(ids)), value=PADDING))
        if len(windows) == samples:
            return torch.stack(windows)  # (samples, seqlen)
    raise DataError(f"it has {len(windows)} documents; {samples} windows of one each need more. Give fewer --samples.")


def calibration_windows(
    spec: str, tokenizer: Any, samples: int, seqlen: int, seed: int, *, pack: bool = True
) -> Tensor:
    """Draw the calibration windows of a data SPEC: ``(samples, seqlen)``; a mixture's parts come one after another.

    Without ``pack`` every window is one document, ending with ``PADDING`` where that is shorter.

    Raises:
        DataError: a part cannot be read, or is shorter than one window.
    """
    parts = parse_mixture(spec)
    windows: list[Tensor] = []
    for (name, _), count in zip(parts, apportion([weight for _, weight in parts], samples), strict=True):
        if not count:
            continue
        if pack:
            ids = read_tokens(name, "calibration", tokenizer, seqlen, least=seqlen + 1)
            windows.append(draw_windows(ids, count, seqlen, seed))
            continue
        try:
            windows.append(draw_documents(read_documents(name, "calibration"), tokenizer, count, seqlen, seed))
        except DataError as error:
            raise DataError(f"data {name!r}: {error}") from error
    return torch.cat(windows)  # (samples, seqlen)


def identify(spec: str, windows: Tensor, seed: int) -> CalibrationIdentity:
    """Return the record that identifies calibration windows ``(N, T)`` in a plan."""
    samples, seqlen = windows.shape
    return CalibrationIdentity(spec=spec, samples=samples, seqlen=seqlen, seed=seed, fingerprint=hash_windows(windows))
