"""Records that a run writes: the pruning plan and the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cfsp_framework.config import FrozenRecord, RunConfig
from cfsp_framework.errors import PlanError


class ModelIdentity(FrozenRecord):
    """Model of a plan; ``fingerprint`` is a hash of its configuration and weights."""

    source: str
    """Hub name or folder of the model."""
    family: str
    """Model type of its configuration, such as ``llama``."""
    fingerprint: str
    """Hash of its configuration and weights."""
    parameters: int = Field(ge=0)
    """Parameters of the dense model."""


class CalibrationIdentity(FrozenRecord):
    """Calibration windows of a plan; ``fingerprint`` is a hash of their tokens."""

    spec: str
    """Data SPEC of the calibration text."""
    samples: int = Field(ge=0)
    """Number of windows."""
    seqlen: int = Field(ge=0)
    """Tokens of a window."""
    seed: int
    """Seed of the run."""
    fingerprint: str
    """Hash of the tokens."""


class BlockPlan(FrozenRecord):
    """Channels that one feed-forward keeps; every expert of a mixture has an entry."""

    block: int = Field(ge=0)
    """Index of the block, from 0."""
    path: str
    """Path of the feed-forward inside the block."""
    width: int = Field(gt=0)
    """Channels before the cut."""
    importance: float | None = None
    """The allocator's coarse importance; None if it has none."""
    kept: tuple[int, ...]
    """Indices of the kept channels, ascending."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        place = f"block {self.block}, {self.path}"
        if not self.kept:
            raise ValueError(f"{place}: keeps no channel")
        if any(b <= a for a, b in zip(self.kept, self.kept[1:], strict=False)):
            raise ValueError(f"{place}: kept channels are not ascending and distinct")
        if self.kept[0] < 0 or self.kept[-1] >= self.width:
            outside = self.kept[0] if self.kept[0] < 0 else self.kept[-1]
            raise ValueError(f"{place}: keeps channel {outside}, outside 0..{self.width - 1}")
        return self


def feed_forward_path(path: str) -> str:
    """Return a feed-forward's path without the number of an expert."""
    module, _, last = path.rpartition(".")
    return module if last.isdigit() else path


class SearchRecord(FrozenRecord):
    """Result and cost of a searching allocator's measurements on the model."""

    metric: Literal["kl", "nll", "acceptance"]
    """Lower is better; ``acceptance`` is one minus the expected acceptance."""
    windows: int = Field(ge=1)
    """Held-out calibration windows."""
    positions: int = Field(ge=1)
    """Positions of all windows that count."""
    starts: dict[str, float]
    """Fitness of the other allocators' widths, by name."""
    fitness: float
    """Fitness of the plan's widths."""
    evaluations: int = Field(ge=0)
    """Different widths that were asked for."""
    block_forwards: int = Field(ge=0)
    """Passes of all windows through one block, in this run; a forward of the model makes one for every block."""


class PruningPlan(FrozenRecord):
    """Everything a cut needs and everything that led to it, as plain JSON without tensors."""

    format: Literal["cfsp-pruning-plan"] = "cfsp-pruning-plan"
    version: Literal[1] = 1
    model: ModelIdentity
    calibration: CalibrationIdentity | None
    """None if nothing had to be measured."""
    ratio: float = Field(ge=0, lt=1)
    budget: Literal["channels", "parameters"]
    round_to: int = Field(ge=1)
    tensor_parallel: int = Field(default=1, ge=1)
    """Number of processes that every feed-forward can be divided among equally."""
    seed: int
    components: dict[str, str]
    """The selected component of each kind, with every option it ran with."""
    versions: dict[str, str]
    dropped_attention: tuple[int, ...] = ()
    """Blocks whose attention is removed, ascending."""
    rounds: int = Field(default=1, ge=1)
    """Steps in which the channels were selected, each on the model as the one before left it."""
    search: SearchRecord | None = None
    """None unless the allocator searched."""
    blocks: tuple[BlockPlan, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_block_once(self) -> Self:
        seen: set[tuple[int, str]] = set()
        for block in self.blocks:
            if (block.block, block.path) in seen:
                raise ValueError(f"block {block.block}, {block.path}: listed twice")
            seen.add((block.block, block.path))
        return self

    @model_validator(mode="after")
    def _attention_can_go(self) -> Self:
        dropped, last = self.dropped_attention, self.last_block
        if list(dropped) != sorted({*dropped}) or any(not 0 < block <= last for block in dropped):
            raise ValueError(f"dropped_attention {list(dropped)}: not ascending blocks between 1 and {last}")
        return self

    def by_block(self) -> dict[int, list[BlockPlan]]:
        """Return the entries of every block, in order."""
        entries: dict[int, list[BlockPlan]] = {}
        for entry in self.blocks:
            entries.setdefault(entry.block, []).append(entry)
        return entries

    @property
    def last_block(self) -> int:
        """The last block with an entry."""
        return max(entry.block for entry in self.blocks)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each entry after the cut."""
        return tuple(len(block.kept) for block in self.blocks)

    @property
    def achieved_ratio(self) -> float:
        """Share of feed-forward channels that is removed after rounding."""
        return 1 - sum(self.widths) / sum(block.width for block in self.blocks)

    def to_json(self) -> str:
        """Return JSON with one line per block, so that ``diff`` can compare two plans."""
        head = self.model_dump(mode="json", exclude={"blocks"})
        blocks = ",\n    ".join(json.dumps(block.model_dump(mode="json")) for block in self.blocks)
        return json.dumps(head, indent=2)[:-2] + f',\n  "blocks": [\n    {blocks}\n  ]\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read a plan.

        Raises:
            PlanError: the text is not a plan, or an impossible one; the message names the field.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "as a whole"
            more = f" ({error.error_count()} problems in all)" if error.error_count() > 1 else ""
            raise PlanError(
                f"the plan cannot be used: {where}: {first['msg'].removeprefix('Value error, ')}{more}"
            ) from error


class Perplexity(BaseModel):
    """Perplexity of a model on a text; ``nll`` is in nats per token, a mean over windows of their means."""

    model_config = ConfigDict(frozen=True)

    perplexity: float
    """Exponential of ``nll``."""
    nll: float
    """Mean negative log-likelihood, nats per token."""
    bits_per_byte: float
    """Negative log-likelihood, bits per byte of the text."""


class Size(FrozenRecord):
    """Size of a model. ``flops_per_token`` counts two for each weight of a matrix product, without attention scores."""

    parameters: int
    """Number of parameters."""
    bytes: int
    """Bytes of the weights."""
    flops_per_token: int
    """Floating-point operations of a forward pass, per token."""


class Evaluation(FrozenRecord):
    """Perplexity on one data SPEC, before and after pruning."""

    data: str
    """Data SPEC of the text."""
    seqlen: int
    """Tokens of a window."""
    windows: int
    """Number of windows."""
    dense: Perplexity | None
    """None if the dense model was not evaluated; ``cfsp recover`` takes it from the report of ``cfsp prune``."""
    pruned: Perplexity
    """Perplexity after pruning, before any training."""
    recovered: Perplexity | None = None
    """After the training, if there was one."""
    excess_nll: float | None
    """Loss added by pruning, ``ln(pruned perplexity / dense perplexity)``, in nats per token."""
    recovered_excess_nll: float | None = None
    """The excess after the training."""

    @property
    def last(self) -> Perplexity:
        """Perplexity of the written checkpoint."""
        return self.recovered or self.pruned

    @property
    def change(self) -> float:
        """Difference between the first and the last known perplexity, in nats per token."""
        return self.last.nll - (self.dense or self.pruned).nll


class LossPoint(FrozenRecord):
    """A point of the loss curve; ``loss`` is the mean since the previous point."""

    step: int
    """Optimizer steps taken so far."""
    loss: float | None = None
    """Mean training loss since the previous point."""
    held_out: float | None = None
    """Mean cross-entropy of the held-out sequences, nats per token."""


class RecoveryReport(FrozenRecord):
    """Training after the cut."""

    data: str
    """Data SPEC of the training text."""
    sequences: int
    """Number of training sequences."""
    seqlen: int
    """Tokens of a sequence."""
    parameters: int
    """Trained parameters."""
    ranks: tuple[int, ...]
    """Rank of each block's adapters; empty if all weights of the feed-forwards were trained."""
    steps: int
    """Steps taken; fewer than planned after an early stop."""
    tokens: int
    """Tokens of all steps together."""
    adapter: bool
    """Whether the result is an adapter beside the pruned weights."""
    curve: tuple[LossPoint, ...]
    """Loss curve of the training."""


class BlockReport(FrozenRecord):
    """Width of a block's feed-forward, or of each expert of a mixture."""

    block: int
    """Index of the block, from 0."""
    path: str
    """Path of the feed-forward inside the block."""
    experts: int
    """Feed-forwards of this width: the experts of a mixture, or one."""
    importance: float | None
    """The allocator's coarse importance; None if it has none."""
    width_before: int
    """Channels before the cut."""
    width_after: int
    """Channels after the cut."""
    error_plain: float | None = None
    """Relative squared error of the output on held-out tokens by the cut alone, if it was measured."""
    error: float | None = None
    """The error with the compensator's change."""


class Report(FrozenRecord):
    """Results of a run, beside the plan."""

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
    """Number of processes that every feed-forward can be divided among equally."""
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
    """None if nothing was trained."""
    blocks: tuple[BlockReport, ...]
    notes: tuple[str, ...]
    reload_difference: float
    """Largest difference of a logit between the model in memory and the checkpoint opened again."""
    seconds: dict[str, float]
    component_seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds in the code of each component, the longest first."""
    peak_memory_bytes: int
    versions: dict[str, str]

    def to_json(self) -> str:
        """Return indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class RunResult:
    """A finished run: its options, plan, report and checkpoint folder."""

    config: RunConfig
    """Options of the run."""
    plan: PruningPlan
    """The finished plan."""
    report: Report
    """Results of the run."""
    folder: Path
    """The checkpoint folder."""
