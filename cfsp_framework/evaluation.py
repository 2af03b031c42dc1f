"""Perplexity by the field's protocol: the whole text tokenised once, non-overlapping windows, the tail dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from .calibration import tokenize
from .data import mixture, read_text
from .errors import DataError, ModelError
from .progress import Progress

_LOGITS_PER_BATCH = 1 << 23
"""Bounds the float32 logits of a batch to 32 MiB."""


@dataclass(frozen=True)
class EvaluationSet:
    """Windows to evaluate on, ``(N, T)``, and the bytes of text behind each token."""

    spec: str
    windows: Tensor
    bytes_per_token: float


class Perplexity(BaseModel):
    """How well a model predicts a text; ``nll`` is nats per token, the mean over windows of their mean."""

    model_config = ConfigDict(frozen=True)

    perplexity: float
    nll: float
    bits_per_byte: float


def evaluation_set(spec: str, tokenizer: Any, seqlen: int, limit: int | None = None) -> EvaluationSet:
    """The first ``limit`` windows of a data SPEC's evaluation text, or all of them.

    Raises:
        DataError: the text cannot be read or is shorter than one window.
    """
    (name, _), *others = mixture(spec)
    if others:
        raise DataError(f"data {spec!r}: a mixture is for calibration; evaluate on each of its parts.")
    text = read_text(name, "evaluation")
    ids = tokenize(text, tokenizer)
    if len(ids) < seqlen:
        raise DataError(
            f"data {spec!r} has {len(ids)} tokens; one evaluation window of {seqlen} needs more. "
            "Give more text or a smaller --seqlen."
        )
    windows = ids[: len(ids) // seqlen * seqlen].view(-1, seqlen)[:limit]  # (N, T)
    return EvaluationSet(spec, windows, len(text.encode()) / len(ids))


@torch.no_grad()
def perplexity(model: PreTrainedModel, data: EvaluationSet, progress: Progress) -> Perplexity:
    """``exp`` of the mean over windows of the mean cross-entropy of their T - 1 predictions, logits in float32."""
    seqlen = data.windows.shape[1]
    vocabulary = model.config.get_text_config().vocab_size
    batches = data.windows.split(max(1, _LOGITS_PER_BATCH // (seqlen * vocabulary)))
    losses: list[Tensor] = []
    with progress.bar(f"perplexity on {data.spec}", total=len(batches)) as step:
        for batch in batches:
            ids = batch.to(model.device)  # (B, T)
            logits = model(ids, use_cache=False).logits[:, :-1].float()  # (B, T - 1, V)
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            losses.append(loss.view(len(ids), -1).mean(1).double().cpu())  # (B,)
            step()
    nll = torch.cat(losses).mean().item()
    if not math.isfinite(nll):
        raise ModelError(f"the model's loss on {data.spec!r} is {nll}: its weights or its dtype overflow.")
    return Perplexity(
        perplexity=math.exp(min(nll, 700)), nll=nll, bits_per_byte=nll / math.log(2) / data.bytes_per_token
    )
