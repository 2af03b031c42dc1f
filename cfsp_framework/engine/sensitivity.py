"""Measure what an error in each block's output does to the model's predictions, by cutting each block alone."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.measure import token_weights
from cfsp_framework.engine.replay import Batch, ForwardOptions, embed, finish, run_block
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.distributed import SOLO
from cfsp_framework.runtime.progress import Progress

PROBE_TOKENS = 1024
"""Calibration tokens that run through every cut copy, in at least two windows."""


class _Copies:
    """The hidden states of the probe windows behind each block that was cut alone, for one order of channels."""

    def __init__(self, order: Sequence[Sequence[Tensor]]) -> None:
        self.order = order  # scores (F,) of each feed-forward of each block
        self.hidden: list[list[Tensor]] = []  # of each cut block, of each batch: (B, T, D)
        self.errors: list[float] = []
        """Sum over tokens of each cut block's relative squared error."""


@torch.no_grad()
def measure_sensitivities(
    decoder: Decoder,
    windows: Tensor,
    orders: Mapping[str, Sequence[Sequence[Tensor]]],
    forward_options: ForwardOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, list[float | None]]:
    """Return the sensitivity of each block under each label: nats a token for a unit of relative squared error.

    ``orders`` holds the scores ``(F,)`` of each feed-forward of each block. A copy of the hidden states of a few of the
    ``windows (N, T)`` passes each block without the lower-scored half of its channels, and all later blocks as they are;
    the Kullback-Leibler divergence of its predictions from the dense ones is divided by the error in the cut block's
    output. That ratio hardly depends on how much is cut. None for a block whose cut changes nothing. One block is loaded
    at a time, once.
    """
    options = replace(forward_options or ForwardOptions(), spill=None, ranks=SOLO)  # all processes measure the same
    progress = progress or Progress()
    windows = windows[: max(2, -(-PROBE_TOKENS // windows.shape[1]))]
    batches = embed(decoder, windows, options)
    copies = {label: _Copies(order) for label, order in orders.items()}
    with progress.bar("sensitivity", total=len(decoder.blocks)) as step:
        for index in range(len(decoder.blocks)):
            with decoder.loaded(index):
                for probe in copies.values():
                    _pass_copies(decoder, index, batches, probe)
                    _cut_copy(decoder, index, batches, probe)
                for batch in batches:
                    batch.hidden.copy_(run_block(decoder, index, batch))
            step()
    divergences = _divergences(decoder, windows, batches, copies)
    return {
        label: [
            divergence / error if error > 0 else None
            for divergence, error in zip(divergences[label], probe.errors, strict=True)
        ]
        for label, probe in copies.items()
    }


def _pass_copies(decoder: Decoder, index: int, batches: Sequence[Batch], probe: _Copies) -> None:
    """Advance the copies of earlier cuts through block ``index``."""
    for hidden in probe.hidden:
        for number, batch in enumerate(batches):
            hidden[number] = run_block(decoder, index, replace(batch, hidden=hidden[number]))


def _cut_copy(decoder: Decoder, index: int, batches: Sequence[Batch], probe: _Copies) -> None:
    """Pass block ``index`` once as it is and once cut, and keep the hidden states behind the cut one and its error."""
    with _without_lower_half(decoder, index, probe.order[index]):
        cut = [run_block(decoder, index, batch).clone() for batch in batches]
    error = 0.0
    for batch, hidden in zip(batches, cut, strict=True):
        output = run_block(decoder, index, batch)  # (B, T, D)
        change = _first_stream(hidden - output).flatten(0, 1).float().square().sum(-1)  # (B * T,)
        relative = change * token_weights(output)  # (B * T,)
        counted = slice(None) if batch.counted is None else batch.counted.flatten().to(relative.device)
        error += relative[counted].sum(dtype=torch.float64).item()
    probe.hidden.append(cut)
    probe.errors.append(error)


@contextmanager
def _without_lower_half(decoder: Decoder, index: int, scores: Sequence[Tensor]) -> Generator[None]:
    """Set the down weights of each feed-forward's lower-scored half to zero while the context is open."""
    removed: list[tuple[Tensor, Tensor, Tensor]] = []
    for feed_forward, score in zip(decoder.feed_forwards(index), scores, strict=True):
        order = score.neg().argsort(stable=True)  # (F,), highest first
        channels = order[len(order) - len(order) // 2 :].to(feed_forward.down.device)
        removed.append((feed_forward.down, channels, feed_forward.down[:, channels]))
    try:
        for down, channels, _ in removed:
            down[:, channels] = 0
        yield
    finally:
        for down, channels, weights in removed:
            down[:, channels] = weights


def _divergences(
    decoder: Decoder, windows: Tensor, batches: Sequence[Batch], copies: Mapping[str, _Copies]
) -> dict[str, list[float]]:
    """Return the sum over tokens of each copy's divergence from the dense predictions."""
    sums = {label: [0.0] * len(probe.hidden) for label, probe in copies.items()}
    start = 0
    for number, batch in enumerate(batches):
        for row in range(len(batch.numbers)):
            ids = windows[start : start + 1]  # (1, T)
            start += 1
            counted = (ids[0] != PADDING).to(decoder.device)  # (T,)
            if batch.counted is not None:
                counted &= batch.counted[row].to(decoder.device)
            dense = _log_probabilities(decoder, ids, batch.hidden, row, counted)  # (n, V)
            for label, probe in copies.items():
                for block, hidden in enumerate(probe.hidden):
                    cut = _log_probabilities(decoder, ids, hidden[number], row, counted)  # (n, V)
                    divergence = functional.kl_div(cut, dense, reduction="sum", log_target=True)
                    sums[label][block] += max(divergence.item(), 0.0)
    return sums


def _log_probabilities(decoder: Decoder, ids: Tensor, hidden: Tensor, row: int, counted: Tensor) -> Tensor:
    """Return the log-probabilities ``(n, V)`` float32 of one window's counted tokens."""
    window = hidden[:, row : row + 1] if hidden.ndim == 4 else hidden[row : row + 1]  # (1, T, D)
    logits = finish(decoder, ids.clamp(min=0), window)[0, counted]  # (n, V)
    return logits.float().log_softmax(-1)


def _first_stream(hidden: Tensor) -> Tensor:
    return hidden[0] if hidden.ndim == 4 else hidden
