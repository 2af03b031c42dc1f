"""Perplexity by the field's protocol: the whole text tokenised once, non-overlapping windows, the tail dropped."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from cfsp_framework.api.records import Perplexity
from cfsp_framework.data.sources import parse_mixture, read_text
from cfsp_framework.data.windows import tokenize
from cfsp_framework.engine.replay import ForwardOptions, embed, finish, pass_block
from cfsp_framework.errors import DataError, ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.progress import Progress

_LOGITS_PER_BATCH = 1 << 23
"""Bounds the float32 logits of a batch to 32 MiB."""


@dataclass(frozen=True)
class EvaluationSet:
    """Windows to evaluate on, ``(N, T)``, and the bytes of text behind each token."""

    spec: str
    windows: Tensor
    bytes_per_token: float


def evaluation_set(spec: str, tokenizer: Any, seqlen: int, limit: int | None = None) -> EvaluationSet:
    """The first ``limit`` windows of a data SPEC's evaluation text, or all of them.

    Raises:
        DataError: the text cannot be read or is shorter than one window.
    """
    (name, _), *others = parse_mixture(spec)
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
def perplexity(
    model: PreTrainedModel | Decoder,
    data: EvaluationSet,
    progress: Progress,
    forward_options: ForwardOptions | None = None,
) -> Perplexity:
    """``exp`` of the mean over windows of the mean cross-entropy of their T - 1 predictions, logits in float32.

    A ``Decoder`` is run with one block resident at a time. Several processes share the windows.
    """
    forward_options = forward_options or ForwardOptions()
    mine = data.windows[forward_options.ranks.rank :: forward_options.ranks.world]  # (n, T)
    losses = torch.empty(len(data.windows), dtype=torch.float64)  # (N,)
    if isinstance(model, Decoder):
        own = _losses_by_blocks(model, mine, progress, forward_options, data.spec)
    else:
        own = _losses(model, mine, progress, data.spec)
    gathered = forward_options.ranks.gather(own)
    start = 0
    for rank in range(forward_options.ranks.world):
        places = range(rank, len(losses), forward_options.ranks.world)
        losses[rank :: forward_options.ranks.world] = gathered[start : start + len(places)]
        start += len(places)
    nll = losses.mean().item()
    if not math.isfinite(nll):
        raise ModelError(f"the model's loss on {data.spec!r} is {nll}: its weights or its dtype overflow.")
    return Perplexity(
        perplexity=math.exp(min(nll, 700)), nll=nll, bits_per_byte=nll / math.log(2) / data.bytes_per_token
    )


def _losses(model: PreTrainedModel, windows: Tensor, progress: Progress, name: str) -> Tensor:
    """Mean cross-entropy of every window ``(N, T)``: ``(N,)`` float64, CPU."""
    losses: list[Tensor] = [torch.empty(0, dtype=torch.float64)]
    batches = windows.split(_windows_per_batch(model, windows.shape[1])) if len(windows) else ()
    with progress.bar(f"perplexity on {name}", total=len(batches)) as step:
        for ids in batches:
            losses.append(_cross_entropy(model(ids.to(model.device), use_cache=False).logits, ids))
            step()
    return torch.cat(losses)


def _losses_by_blocks(
    decoder: Decoder, windows: Tensor, progress: Progress, forward_options: ForwardOptions, name: str
) -> Tensor:
    """The same with all windows passing one block after another, ``(N,)``."""
    if not len(windows):
        return torch.empty(0, dtype=torch.float64)
    size = _windows_per_batch(decoder.model, windows.shape[1])
    batches = embed(decoder, windows, ForwardOptions(batch_size=size, spill=forward_options.spill))
    with progress.bar(f"perplexity on {name}", total=len(batches) * len(decoder.blocks)) as step:
        for index in range(len(decoder.blocks)):
            with decoder.loaded(index):
                pass_block(decoder, index, batches, step)
    pairs = zip(batches, windows.split(size), strict=True)
    return torch.cat([_cross_entropy(finish(decoder, ids, batch.hidden), ids) for batch, ids in pairs])


def _windows_per_batch(model: PreTrainedModel, seqlen: int) -> int:
    vocabulary: int = model.config.get_text_config().vocab_size
    return max(1, _LOGITS_PER_BATCH // (seqlen * vocabulary))


def _cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """Of ``logits (B, T, V)`` against the next of ``ids (B, T)``, the mean of each window: ``(B,)`` float64, CPU."""
    predicted, ids = logits[:, :-1].float(), ids.to(logits.device)  # (B, T - 1, V)
    loss = functional.cross_entropy(predicted.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1).mean(1).double().cpu()
