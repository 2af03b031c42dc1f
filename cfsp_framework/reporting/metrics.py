"""What a run tells: ``report.json``, the model card, and the statistics where they were asked for."""

from __future__ import annotations

import resource
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from cfsp_framework.api.components import Update
from cfsp_framework.evaluation.perplexity import Perplexity
from cfsp_framework.pruning.planning import BlockPlan, PruningPlan, bank_path

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from cfsp_framework.engine.collect import FeedForwardMeasurement


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
    dense: Perplexity | None
    """None where the dense model was not at hand: ``cfsp recover`` knows what pruning measured."""
    pruned: Perplexity
    recovered: Perplexity | None = None
    """After the training, where there was one."""
    excess_nll: float | None
    """The loss pruning added, ``ln(pruned perplexity / dense perplexity)``, in nats per token."""
    recovered_excess_nll: float | None = None
    """What is left of it after the training."""

    @property
    def last(self) -> Perplexity:
        """Of what was written."""
        return self.recovered or self.pruned

    @property
    def change(self) -> float:
        """From the first perplexity that is known to the last, in nats per token."""
        return self.last.nll - (self.dense or self.pruned).nll


class LossPoint(_Frozen):
    """What one place of the loss curve says; ``loss`` is the mean since the place before."""

    step: int
    loss: float | None = None
    held_out: float | None = None
    """Mean cross-entropy of the held-out sequences, nats per token."""


class RecoveryReport(_Frozen):
    """What was trained after the cut."""

    data: str
    sequences: int
    seqlen: int
    parameters: int
    """Trained ones."""
    ranks: tuple[int, ...]
    """Of each block's adapters; empty where all weights of the feed-forwards were trained."""
    steps: int
    """Taken, which an early stop makes fewer than planned."""
    tokens: int
    """Of all steps together."""
    adapter: bool
    """Whether the result is an adapter beside the pruned weights."""
    curve: tuple[LossPoint, ...]


def describe_training(found: RecoveryReport) -> str:
    """What was trained, in one sentence without its full stop: ``Trained 61,440 parameters for 200 steps ...``."""
    losses = [point.loss for point in found.curve if point.loss is not None]
    fell = f"; loss {losses[0]:.4f} to {losses[-1]:.4f}" if losses else ""
    kept = ", kept as an adapter," if found.adapter else ""
    return (
        f"Trained {found.parameters:,} parameters{kept} for {found.steps} steps, {found.tokens:,} tokens of "
        f"{found.data}{fell}"
    )


class BlockReport(_Frozen):
    """The width of a block's feed-forward, or of each expert of a mixture."""

    block: int
    path: str
    experts: int
    """Feed-forwards of this width: the experts of a mixture, or one."""
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
    processes: int
    streamed: bool
    """Whether blocks were read one at a time."""
    calibration: str | None
    samples: int
    seqlen: int
    seed: int
    components: dict[str, str]
    ratio_requested: float
    budget: str
    round_to: int
    tensor_parallel: int = 1
    """How many processes can share every feed-forward alike."""
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
    recovery: RecoveryReport | None = None
    """None where nothing was trained."""
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...]
    reload_difference: float
    """Largest difference of a logit between the model in memory and the checkpoint opened again."""
    seconds: dict[str, float]
    component_seconds: dict[str, float] = Field(default_factory=dict)
    """In the code of each component, the longest first."""
    peak_memory_bytes: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def measure_size(model: PreTrainedModel) -> Size:
    """Parameters (tied ones once), their bytes, and FLOPs per token."""
    parameters = list(model.parameters())
    products = sum(_products(module, model) for module in model.modules())
    return Size(
        parameters=sum(parameter.numel() for parameter in parameters),
        bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        flops_per_token=2 * products,
    )


def _products(module: nn.Module, model: PreTrainedModel) -> int:
    """Multiplications a token needs in a module's own matrices, an expert's for its share of the tokens."""
    if isinstance(module, nn.Linear | Conv1D):
        weight: torch.Tensor = module.weight
        return weight.numel()
    own = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    values = model.config.get_text_config().to_dict()
    chosen = values.get("num_experts_per_tok") or values.get("top_k") or 1
    return sum(int(parameter.numel() * min(1.0, chosen / len(parameter))) for parameter in own)


def is_mixed(blocks: Sequence[BlockReport]) -> bool:
    """Whether there is more to say of a width than its block: experts, or several feed-forwards."""
    return any(one.experts > 1 for one in blocks) or len({one.block for one in blocks}) < len(blocks)


def place(block: BlockReport) -> str:
    """Which feed-forward of its block this is: ``mlp.experts x 8``."""
    return f"{block.path} x {block.experts}" if block.experts > 1 else block.path


def block_reports(
    plan: PruningPlan, updates: Mapping[tuple[int, str], Update] | None = None
) -> tuple[BlockReport, ...]:
    """The plan's widths without the indices, and what compensation was worth; experts of a mixture together."""
    updates = updates or {}
    together: dict[tuple[int, str], list[BlockPlan]] = {}
    for entry in plan.blocks:
        together.setdefault((entry.block, bank_path(entry.path)), []).append(entry)
    return tuple(
        BlockReport(
            block=block,
            path=path,
            experts=len(entries),
            importance=entries[0].importance,
            width_before=entries[0].width,
            width_after=len(entries[0].kept),
            error_plain=_mean([u.error_plain for e in entries if (u := updates.get((e.block, e.path)))]),
            error=_mean([u.error for e in entries if (u := updates.get((e.block, e.path)))]),
        )
        for (block, path), entries in together.items()
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None


def peak_memory() -> int:
    """The most memory this process held, and with a GPU the most tensors took there."""
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return host + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)


def save_statistics(path: Path, measurements: Sequence[FeedForwardMeasurement], metadata: Mapping[str, str]) -> None:
    """Light statistics and scores, named ``blocks.INDEX.NAME``, or ``blocks.INDEX.PATH.NAME`` in blocks with several."""
    several = {block for block, count in Counter(one.block for one in measurements).items() if count > 1}
    tensors: dict[str, torch.Tensor] = {}
    for one in measurements:
        place = f"blocks.{one.block}.{one.path}" if one.block in several else f"blocks.{one.block}"
        # Cloned: experts share their block's own, and safetensors refuses to write what is shared.
        tensors |= {f"{place}.{s.name}": value.clone() for s, value in one.statistics.items()}
        tensors |= {f"{place}.scores.{label}": value.contiguous() for label, value in one.scores.items()}
    save_file(tensors, path, dict(metadata))
