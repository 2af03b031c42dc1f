"""Measure the model cut to any widths, without copying it: what searching allocators minimise.

Blocks are cut one at a time while a candidate runs, and restored by reference behind it. The hidden states of the best
candidate so far are kept, so that another one runs from the first block on in which it differs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.data import BlockSummary, FitnessOptions
from cfsp_framework.data.windows import PADDING
from cfsp_framework.engine.replay import Batch, ForwardOptions, embed, finish, run_block
from cfsp_framework.errors import DataError, OutputError
from cfsp_framework.evaluation.perplexity import LOGITS_PER_BATCH
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.snapshot import ModelState
from cfsp_framework.pruning.planning import select_channels
from cfsp_framework.pruning.surgery import cut_block

Widths = tuple[int, ...]
"""One width per block summary, as the configuration sets it: for a mixture, that of one expert."""
HIDDEN_BYTES = 1 << 30
"""Limit of the hidden states that are kept of one candidate, of two at a time; beyond it only some blocks' are."""


class FitnessCache:
    """Keep what was measured in a file, one line a candidate, so that a killed search goes on."""

    def __init__(self, folder: Path, key: str) -> None:
        self._path = folder / f"fitness-{key[:32]}.jsonl"

    def load(self) -> dict[Widths, float]:
        """Return the fitness of every candidate that was measured; a line cut short by a kill is ignored."""
        values: dict[Widths, float] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else ():
            try:
                record = json.loads(line)
                values[tuple(record["widths"])] = float(record["fitness"])
            except (ValueError, KeyError, TypeError):
                continue
        return values

    def store(self, widths: Widths, value: float) -> None:
        """Append one candidate.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._cut_short() + json.dumps({"widths": widths, "fitness": value}) + "\n")
        except OSError as error:
            raise OutputError(f"{self._path} cannot be written: {error.strerror}.") from error

    def _cut_short(self) -> bool:
        """Return whether the last line lacks its end."""
        if not self._path.stat().st_size:
            return False
        with self._path.open("rb") as file:
            file.seek(-1, 2)
            return file.read(1) != b"\n"


class ModelFitness:
    """The ``Fitness`` of a model in memory on ``windows (N, T)``, shared by all processes.

    The first process asks; the others ``serve`` until it is done.
    """

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        summaries: Sequence[BlockSummary],
        options: FitnessOptions,
        *,
        starts: Mapping[str, Sequence[float]],
        round_shares: Callable[[Sequence[float]], Widths],
        forward_options: ForwardOptions,
        seed: int,
        cache: FitnessCache | None = None,
    ) -> None:
        self.starts, self.seed = starts, seed
        self.metric: Literal["kl", "nll", "acceptance"] = options.metric
        self.windows = len(windows)
        self.block_forwards = 0
        self._decoder, self._summaries, self._round = decoder, summaries, round_shares
        self._ranks, self._cache = forward_options.ranks, cache
        self._known = cache.load() if cache else {}
        self._asked: dict[Widths, float] = {}
        self._windows = windows[list(self._ranks.share(len(windows)))]  # (n, T)
        self._positions = torch.arange(0, windows.shape[1] - 1, options.stride)  # (P,)
        counts = _counted(windows, self._positions).sum(1)  # (N,)
        self.positions = int(counts.sum())
        if not self.positions:
            raise DataError("no held-out calibration window has two tokens in a row; give more --samples.")
        self._model: _CutModel | None = None

    @property
    def evaluations(self) -> int:
        """Different widths that were asked for."""
        return len(self._asked)

    def widths(self, shares: Sequence[float]) -> Widths:
        """Return the widths that shares are rounded to."""
        return self._round(shares)

    def __call__(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        """Return the loss at each candidate's widths, measured unless it is known."""
        rounded = [self._round(shares) for shares in candidates]
        missing = [widths for widths in dict.fromkeys(rounded) if widths not in self._known]
        if missing:
            self._measure_all(self._ranks.agree(missing))
        self._asked |= {widths: self._known[widths] for widths in rounded}
        return [self._known[widths] for widths in rounded]

    def serve(self) -> None:
        """Measure this process's windows of every candidate that the first process asks for, until it is done."""
        while candidates := self._ranks.agree(list[Widths]()):
            self._measure_all(candidates)

    def close(self) -> None:
        """Let the other processes end ``serve``; called by the first one."""
        self._ranks.agree(list[Widths]())

    def _measure_all(self, candidates: Sequence[Widths]) -> None:
        for widths in candidates:
            losses = self._ranks.gather(self._open().losses(widths))  # (N,) float64
            total = losses.sum().item() / self.positions
            self._known[widths] = total if math.isfinite(total) else math.inf
            self._open().offer(self._known[widths])
            self.block_forwards = self._open().block_forwards
            if self._cache and self._ranks.first:
                self._cache.store(widths, self._known[widths])

    def _open(self) -> _CutModel:
        """Run the dense model at the first need: a search that was finished before needs no forward."""
        if self._model is None:
            options = ForwardOptions(spill=None)  # the windows are this process's already
            self._model = _CutModel(
                self._decoder, self._windows, self._positions, self._summaries, self.metric, options
            )
        return self._model


class _CutModel:
    """Run the model at any widths on this process's windows."""

    def __init__(
        self,
        decoder: Decoder,
        windows: Tensor,
        positions: Tensor,
        summaries: Sequence[BlockSummary],
        metric: str,
        forward_options: ForwardOptions,
    ) -> None:
        self.block_forwards = 0
        self._decoder, self._summaries, self._metric = decoder, summaries, metric
        self._positions = positions
        self._batches = embed(decoder, windows, forward_options)
        self._ids = windows.split([len(batch.numbers) for batch in self._batches])
        hidden = [batch.hidden for batch in self._batches]
        size = sum(states.numel() * states.element_size() for states in hidden)
        self._every = max(1, math.ceil(len(decoder.blocks) * size / HIDDEN_BYTES))
        full = tuple(min(summary.members.values(), default=summary.width) for summary in summaries)
        self._full = full
        self._kept = full, {0: hidden}
        self._last = self._kept
        self._lowest = math.inf
        self._dense = [self._at_positions(states) for states in self._run(full)]
        self._kept = self._last

    def losses(self, widths: Widths) -> Tensor:
        """Return the sum of the metric over each window's positions, ``(n,)`` float64, CPU."""
        parts = zip(self._ids, self._dense, map(self._at_positions, self._run(widths)), strict=True)
        return torch.cat([self._batch_losses(*part) for part in parts])  # (n,)

    def offer(self, fitness: float) -> None:
        """Keep the hidden states of the last widths if their fitness is the lowest so far."""
        if fitness < self._lowest:
            self._lowest, self._kept = fitness, self._last

    def _run(self, widths: Widths) -> list[Tensor]:
        """Return every batch's hidden states ``(B, T, D)`` after the last block.

        Only the blocks from the first one on whose widths differ from the kept ones are run.
        """
        kept_widths, kept_states = self._kept
        places = zip(self._summaries, widths, kept_widths, strict=True)
        last = len(self._decoder.blocks) - 1
        differing = next((summary.block for summary, width, kept in places if width != kept), last)
        states = {index: hidden for index, hidden in kept_states.items() if index <= differing}
        start = max(states)
        hidden = states[start]
        for index in range(start, last + 1):
            if index % self._every == 0:
                states[index] = hidden
            hidden = self._run_block(index, widths, hidden)
            self.block_forwards += 1
        self._last = widths, states
        return hidden

    def _run_block(self, index: int, widths: Widths, hidden: Sequence[Tensor]) -> list[Tensor]:
        members = [
            (summary, width, full)
            for summary, width, full in zip(self._summaries, widths, self._full, strict=True)
            if summary.block == index
        ]
        batches = [replace(batch, hidden=states) for batch, states in zip(self._batches, hidden, strict=True)]
        if all(width == full for _, width, full in members):
            return self._forward(index, batches)
        kept = [torch.tensor(channels) for summary, width, _ in members for channels in select_channels(summary, width)]
        state = ModelState.capture(self._decoder, index)
        try:
            cut_block(self._decoder, index, kept)
            return self._forward(index, batches)
        finally:
            state.restore(self._decoder)

    def _forward(self, index: int, batches: Sequence[Batch]) -> list[Tensor]:
        return [run_block(self._decoder, index, batch) for batch in batches]

    def _at_positions(self, hidden: Tensor) -> Tensor:
        """Return the hidden states ``(B, P, D)`` of the positions that count."""
        return hidden.index_select(-2, self._positions.to(hidden.device))

    def _batch_losses(self, ids: Tensor, dense: Tensor, hidden: Tensor) -> Tensor:
        """Return the losses ``(B,)`` of windows ``ids (B, T)`` from hidden states ``(B, P, D)`` of both models."""
        counted = _counted(ids, self._positions)  # (B, P)
        targets = ids[:, self._positions + 1].clamp(min=0)  # (B, P)
        inputs = ids[:, self._positions].clamp(min=0)  # (B, P): only their number matters
        rows = max(1, LOGITS_PER_BATCH // (len(self._positions) * self._decoder.config.vocab_size))
        losses: list[Tensor] = []
        for start in range(0, len(ids), rows):
            part = slice(start, start + rows)
            cut = self._log_probabilities(inputs[part], hidden[..., part, :, :])  # (b, P, V)
            if self._metric == "nll":
                target = targets[part].to(cut.device)[..., None]  # (b, P, 1)
                loss = -cut.gather(-1, target)[..., 0]  # (b, P)
            else:
                full = self._log_probabilities(inputs[part], dense[..., part, :, :])  # (b, P, V)
                loss = _divergence(full, cut) if self._metric == "kl" else 1 - torch.minimum(full, cut).exp().sum(-1)
            losses.append(loss.cpu().double().masked_fill(~counted[part], 0.0).sum(1))
        return torch.cat(losses)  # (B,)

    def _log_probabilities(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """Return the model's log-probabilities ``(B, P, V)`` float32 after hidden states ``(B, P, D)``."""
        return functional.log_softmax(finish(self._decoder, ids, hidden).float(), dim=-1)


def _divergence(full: Tensor, cut: Tensor) -> Tensor:
    """Return the Kullback-Leibler divergence at every position, ``(B, P)``, of log-probabilities ``(B, P, V)``."""
    return functional.kl_div(cut, full, log_target=True, reduction="none").sum(-1)


def _counted(ids: Tensor, positions: Tensor) -> Tensor:
    """Mark the positions ``(P,)`` of windows ``(N, T)`` that have a token and a next one, ``(N, P)``."""
    return (ids[:, positions] != PADDING) & (ids[:, positions + 1] != PADDING)
