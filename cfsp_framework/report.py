"""What a run tells: ``report.json``, the model card, and the statistics where they were asked for."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import nn

from .api import Update
from .evaluation import Perplexity
from .planning import PruningPlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .collect import BlockMeasurement


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Size(_Frozen):
    """How large a model is. ``flops_per_token`` counts two per weight of every matrix product, attention scores aside."""

    parameters: int
    bytes: int
    flops_per_token: int


class Evaluation(_Frozen):
    """Perplexity on one data SPEC before and after."""

    data: str
    seqlen: int
    windows: int
    dense: Perplexity
    pruned: Perplexity
    excess_nll: float
    """The loss pruning added, ``ln(pruned perplexity / dense perplexity)``, in nats per token."""


class BlockReport(_Frozen):
    """One block's widths."""

    block: int
    importance: float | None
    width_before: int
    width_after: int
    error_plain: float | None = None
    """Relative squared error of the feed-forward's output on held-out tokens by the cut alone, where one was measured."""
    error: float | None = None
    """The same with the compensator's change."""


class Report(_Frozen):
    """Everything a run found out, beside the plan."""

    format: Literal["cfsp-report"] = "cfsp-report"
    version: Literal[1] = 1
    model: str
    fingerprint: str
    family: str
    dtype: str
    device: str
    calibration: str | None
    samples: int
    seqlen: int
    seed: int
    components: dict[str, str]
    ratio_requested: float
    budget: str
    round_to: int
    channels_before: int
    channels_after: int
    channel_ratio: float
    """Share of the feed-forward channels removed."""
    block_parameter_ratio: float
    """Share of the blocks' parameters removed."""
    parameter_ratio: float
    """Share of all parameters removed."""
    dense: Size
    pruned: Size
    evaluations: tuple[Evaluation, ...]
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...]
    reload_difference: float
    """Largest difference of a logit between the model in memory and the checkpoint opened again."""
    seconds: dict[str, float]
    peak_memory_bytes: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def measure_size(model: PreTrainedModel) -> Size:
    """Parameters (tied ones once), their bytes, and FLOPs per token."""
    parameters = list(model.parameters())
    products = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        flops_per_token=2 * products,
    )


def block_reports(plan: PruningPlan, updates: Mapping[int, Update] | None = None) -> tuple[BlockReport, ...]:
    """The plan's blocks without their indices, and what their compensation was worth."""
    updates = updates or {}
    return tuple(
        BlockReport(
            block=index,
            importance=block.importance,
            width_before=block.width,
            width_after=len(block.kept),
            error_plain=updates[index].error_plain if index in updates else None,
            error=updates[index].error if index in updates else None,
        )
        for index, block in enumerate(plan.blocks)
    )


def peak_memory() -> int:
    """The most memory this process held, and with a GPU the most tensors took there."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def save_statistics(path: Path, measurements: Sequence[BlockMeasurement], metadata: Mapping[str, str]) -> None:
    """Every block's light statistics and scores, named ``blocks.INDEX.NAME``."""
    tensors: dict[str, torch.Tensor] = {}
    for index, measured in enumerate(measurements):
        tensors |= {f"blocks.{index}.{s.name}": value.contiguous() for s, value in measured.statistics.items()}
        tensors |= {f"blocks.{index}.scores.{label}": value.contiguous() for label, value in measured.scores.items()}
    save_file(tensors, path, dict(metadata))
