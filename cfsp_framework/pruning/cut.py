"""Cut a model by a plan, block by block."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cfsp_framework.api.data import Update
from cfsp_framework.api.events import BlockFinished
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.engine.replay import ForwardOptions, embed, finish, pass_block
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.streaming import ShardWriter
from cfsp_framework.pruning.compensation import Compensation
from cfsp_framework.pruning.surgery import (
    align_biases,
    apply_updates,
    check_fits,
    cut_block,
    describe_widths,
    projections_without_bias,
)
from cfsp_framework.runtime.progress import Progress


class StreamedOutput:
    """Write each finished block of a streamed model to its shard, and carry a sample of tokens through the blocks."""

    def __init__(self, decoder: Decoder, folder: Path, sample: Tensor, *, write: bool) -> None:
        self.writer = ShardWriter(decoder.model, decoder.architecture.blocks, folder)
        self._decoder = decoder
        self._sample = sample  # (1, T)
        self._batches = embed(decoder, sample, ForwardOptions(batch_size=1))
        self._write = write

    def write_block(self, index: int) -> None:
        """Advance the sample through block ``index`` and, in the process that writes, write the block."""
        pass_block(self._decoder, index, self._batches)
        if self._write:
            self.writer.write_block(index)

    def logits(self) -> Tensor:
        """Return the logits ``(1, T, V)`` of the sample after the last block."""
        return finish(self._decoder, self._sample, self._batches[0].hidden)


def cut_model(
    decoder: Decoder,
    plan: PruningPlan,
    compensation: Compensation | None = None,
    output: StreamedOutput | None = None,
    *,
    progress: Progress | None = None,
    phase: str = "cut",
) -> dict[tuple[int, str], Update]:
    """Cut every block to its kept channels and compensate it; a streamed block is written before the next is read.

    Returns the change of each feed-forward that lost channels, by block and path.

    Raises:
        PlanError: the plan is for a model of other shapes; nothing is changed.
    """
    compensation, progress = compensation or Compensation(), progress or Progress()
    check_fits(decoder, plan)
    without_bias = projections_without_bias(decoder)
    last = len(decoder.blocks) - 1
    updates: dict[tuple[int, str], Update] = {}
    with progress.bar(phase, total=last + 1) as step:
        for index, entries in plan.by_block().items():
            narrower = any(len(entry.kept) < entry.width for entry in entries)
            kept = [torch.tensor(entry.kept) for entry in entries]  # (K,) each
            with decoder.loaded(index):
                if narrower:
                    changes = compensation.compensate(index, kept)
                    cut_block(decoder, index, kept)
                    apply_updates(decoder, index, changes)
                    updates |= {
                        (index, entry.path): change
                        for entry, change in zip(entries, changes, strict=True)
                        if len(entry.kept) < entry.width
                    }
                if index < last:
                    compensation.advance(index)
                if output is not None:
                    output.write_block(index)
            step()
            progress.notify(BlockFinished(phase, index, last + 1))
    align_biases(decoder, without_bias)
    describe_widths(decoder)
    return updates
