"""The data that components receive and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:  # torch is imported by the commands that need it, not by `cfsp --help`
    import torch
    from torch import Tensor


class Site(Enum):
    """Place in a block where a collector measures.

    In a compensator's second pass on the pruned stream, the outputs of the two feed-forward sites are the target
    outputs (see ``Compensator.target_mix``) instead of the dense ones.
    """

    BLOCK = "block"
    """The whole block: inputs and outputs are residual streams, ``(T, D)``."""
    FEED_FORWARD = "feed_forward"
    """A feed-forward: inputs of its gate and up projections ``(T, D)``, outputs ``(T, D)``."""
    DOWN_PROJECTION = "down_projection"
    """A down projection: inputs are the channel activations ``(T, F)``, outputs ``(T, D)`` without the bias.

    An expert of a mixture gets the tokens routed to it: ``T`` then differs between windows and may be 0.
    """
    GRADIENT = "gradient"
    """A down projection: inputs are the channel activations ``(T, F)``, outputs the loss's gradients there ``(T, F)``."""


class Stream(Enum):
    """Model whose hidden states a compensator's statistics are measured on."""

    DENSE = "dense"
    """The dense model; statistics collected for the scores are reused if they were kept."""
    PRUNED = "pruned"
    """The model pruned so far: all blocks before the current one are cut and compensated."""


HELD_OUT_EVERY = 10
"""Every tenth calibration window is held out: compensators are fitted on the others and checked on these."""


class Windows(Enum):
    """Calibration windows that a collector gets."""

    ALL = "all"
    FITTED = "fitted"
    """The windows that are not held out."""
    HELD_OUT = "held_out"
    """Every tenth window, see ``HELD_OUT_EVERY``."""

    def include(self, number: int) -> bool:
        """Return whether window ``number``, counted from 0 over all processes, is among them."""
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self is Windows.ALL or held_out is (self is Windows.HELD_OUT)


@dataclass(frozen=True, order=True)
class Statistic:
    """Name of a measurement made in every block. Components require it, one collector provides it.

    Two statistics are equal if their names are equal.
    """

    name: str
    shape: str = field(default="(F,)", compare=False)
    """Shape in the letters F, D and n; the host checks it."""
    summary: str = field(default="", compare=False)
    """Formula or description, for documentation."""
    heavy: bool = field(default=False, compare=False)
    """Whether it is more than a vector per block, and therefore dropped when its block is finished."""
    unseen: float = field(default=0.0, compare=False)
    """Fills a vector, and the diagonal of a square matrix, of an expert that no token was routed to."""

    def relative(self) -> Statistic:
        """Return the statistic whose products weigh each token by 1 / the squared norm of its residual stream."""
        return replace(self, name=f"{self.name}_relative", summary=f"{self.summary}, each token over its squared norm")

    def held_out(self) -> Statistic:
        """Return the statistic that measures the same over held-out windows only."""
        return replace(self, name=f"{self.name}_held_out", summary=f"{self.summary}, held-out windows only", unseen=0.0)


class BlockStatistics(Mapping[Statistic, "Tensor"]):
    """Statistics of one feed-forward, float32, with the number of tokens they were measured on.

    ``held_out_tokens`` of the ``tokens`` lie in held-out windows. An expert that no token was routed to is ``unseen``: its
    statistics have the value ``Statistic.unseen``, as if from one token.
    """

    def __init__(self, values: Mapping[Statistic, Tensor], tokens: int, held_out_tokens: int = 0) -> None:
        self._values = dict(values)
        self.unseen = tokens == 0
        self.tokens = max(tokens, 1)
        self.held_out_tokens = held_out_tokens

    def __getitem__(self, statistic: Statistic) -> Tensor:
        try:
            return self._values[statistic]
        except KeyError:
            known = ", ".join(sorted(s.name for s in self._values)) or "none"
            raise KeyError(f"statistic {statistic.name!r} is read but not in `requires` (there: {known})") from None

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __or__(self, more: Mapping[Statistic, Tensor]) -> BlockStatistics:
        """Return these statistics and more."""
        return self._with({**self._values, **more})

    def only(self, statistics: frozenset[Statistic]) -> BlockStatistics:
        """Return only the given statistics."""
        return self._with({s: v for s, v in self._values.items() if s in statistics})

    def to(self, device: torch.device | str) -> BlockStatistics:
        """Return the statistics on ``device``."""
        return self._with({s: v.to(device) for s, v in self._values.items()})

    def light(self) -> BlockStatistics:
        """Return the statistics that may outlive the block, on the CPU."""
        return self._with({s: v.cpu() for s, v in self._values.items() if not s.heavy})

    def _with(self, values: Mapping[Statistic, Tensor]) -> BlockStatistics:
        return BlockStatistics(values, 0 if self.unseen else self.tokens, self.held_out_tokens)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward's weights in a single convention, independent of names, layout and fusion in its family.

    The tensors are views of the model's parameters, in the model's dtype; never write to them.
    """

    block: int
    """Index of the block."""
    path: str
    """Path inside the block, followed by the expert's number in a mixture of experts."""
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    activation: str
    """Name in Transformers' ``ACT2FN``; ``unknown`` if the family computes something else."""
    gate: Tensor | None = None  # (F, D)
    up_bias: Tensor | None = None  # (F,)
    gate_bias: Tensor | None = None  # (F,)
    down_bias: Tensor | None = None  # (D,)
    expert: int = 0
    """Number of the expert in a mixture."""
    seed: int = 0
    """Seed of the run."""

    @property
    def width(self) -> int:
        """``F``, the number of channels."""
        return self.down.shape[1]

    @property
    def hidden(self) -> int:
        """``D``, the width of the residual stream."""
        return self.down.shape[0]

    def generator(self) -> torch.Generator:
        """Return a CPU generator seeded by the run's seed, this block and this expert, for components that draw."""
        import torch

        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.block + (self.expert << 32))


@dataclass(frozen=True)
class BlockSummary:
    """Measurements that outlive a block. Allocators get these and the budget only.

    One summary covers all channels whose number is set by one value of the configuration: a block's feed-forward, or all
    experts of a mixture together (``F`` then counts the channels of all of them). A block with separate values, for
    example for routed and shared experts, has several summaries.
    """

    block: int
    """Index of the block."""
    path: str
    """Path of the first feed-forward inside the block."""
    width: int
    """``F``, the channels of all covered feed-forwards."""
    tokens: int
    """Calibration tokens measured."""
    statistics: Mapping[Statistic, float]
    """The block's scalar statistics, for example the distance between its input and output."""
    scores: Tensor  # (F,) float32, CPU: of the selected criterion
    curve: Tensor | None = None  # (F + 1,) float64, CPU: see Allocator.curve
    sensitivity: float | None = None
    """Nats a token that a unit of relative squared error in the block's output adds: see ``Allocator.sensitivity``."""
    members: Mapping[str, int] = field(default_factory=dict[str, int])
    """Path and width of every feed-forward of a mixture, in the order of ``scores``; empty for a single one."""


@dataclass(frozen=True)
class Budget:
    """Share of all feed-forward channels to remove."""

    ratio: float
    """In [0, 1), in channels also if the user asked for a share of all parameters."""
    round_to: int = 1
    """Widths are multiples of this, or the full width."""


@dataclass(frozen=True)
class FitnessOptions:
    """Settings of a searching allocator's fitness."""

    metric: Literal["kl", "nll", "acceptance"] = "kl"
    """Kullback-Leibler divergence of the dense model from the cut one in nats; cross-entropy in nats; or one minus the
    expected acceptance of the cut model's tokens in speculative decoding, the sum over tokens of ``min(p, q)``. Each is
    a mean over positions."""
    windows: int = 32
    """Held-out calibration windows to measure on, at most."""
    stride: int = 1
    """Every so many positions of a window count; the head, costly in small models, is computed for these only."""


@dataclass(frozen=True)
class Update:
    """Change of one feed-forward by a compensator; None leaves a tensor unchanged.

    A compensator whose change does not lower the held-out error returns both errors and no tensors.
    """

    down: Tensor | None = None  # (D, K)
    down_bias: Tensor | None = None  # (D,)
    up: Tensor | None = None  # (K, D)
    gate: Tensor | None = None  # (K, D)
    up_bias: Tensor | None = None  # (K,)
    gate_bias: Tensor | None = None  # (K,)
    error_plain: float | None = None
    """Squared error of the output on held-out tokens without the change, relative to the squared target."""
    error: float | None = None
    """The error with the change."""


@dataclass(frozen=True)
class TrainableBlock:
    """Trainable matrices of one block after the cut: shapes ``(out, in)`` by path inside the block.

    The matrices of experts in one parameter have the shape ``(experts, out, in)``, in any memory layout.
    """

    block: int
    """Index of the block."""
    feed_forward: Mapping[str, tuple[int, ...]]
    """Matrices of its feed-forwards."""
    attention: Mapping[str, tuple[int, ...]]
    """Matrices of its attention; empty if it was dropped."""


class Distillation(BaseModel):
    """Distil the dense model: add its Kullback-Leibler divergence from the trained model on every predicted token."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: float = Field(default=0.5, gt=0, le=1)
    """Share of the divergence in the loss; the rest is cross-entropy."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits; the divergence is multiplied by its square (arXiv 1503.02531)."""


class BlockRecovery(BaseModel):
    """Capacity of the training in one block."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    block: int = Field(ge=0)
    """Index of the block."""
    rank: int = Field(ge=0)
    """Rank of the adapters; 0 excludes the block."""
    alpha: float = Field(default=0.0, ge=0)
    """The adapters' product is multiplied by ``alpha / rank``."""


class RecoveryPlan(BaseModel):
    """Training after the cut, as plain JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["cfsp-recovery-plan"] = "cfsp-recovery-plan"
    version: Literal[1] = 1
    full: bool = False
    """Train the feed-forwards' own weights instead of adapters, in every block whose rank is not 0."""
    targets: tuple[str, ...] = ()
    """Paths inside a block of the matrices that get adapters; empty: all projections of its feed-forwards."""
    blocks: tuple[BlockRecovery, ...] = Field(min_length=1)
    """Blocks that are not listed are not trained."""
    steps: int = Field(default=200, ge=1)
    """Optimiser steps."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one step, over all processes."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """Highest learning rate of AdamW."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate's fall to 0; ``constant`` does not fall."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    distillation: Distillation | None = None
    """None trains on cross-entropy alone."""
    base: str | None = None
    """Fingerprint of the checkpoint that kept adapters belong to; the host writes it."""

    def to_json(self) -> str:
        """Return indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class FeedForwardLayout:
    """Attribute names of one feed-forward's projections inside a block."""

    path: str
    """Path of the module inside the block; empty if the block itself holds the projections."""
    up: str
    """Up projection, or gate and up in one."""
    down: str
    """Down projection."""
    gate: str | None = None
    """Gate projection; None without a gate, equal to ``up`` if one projection holds the rows [gate; up]."""
    additive: bool = True
    """Whether the output is added to the residual stream directly, neither normalised nor scaled."""
    experts: bool = False
    """Whether the module holds the experts of a mixture in parameters of three dimensions, whose layout it states."""
    width_key: str = "intermediate_size"
    """Key of the width in the configuration; feed-forwards of one block that share it keep equally many channels."""
    times: int = 1
    """The width is this multiple of the configuration's value."""

    @property
    def fused(self) -> bool:
        """Whether gate and up are one projection."""
        return self.gate == self.up


@dataclass(frozen=True)
class Architecture:
    """Places of a model family's blocks and feed-forwards, and the configuration keys of their widths."""

    family: str
    """The ``model_type`` of the text configuration."""
    base: str
    """Dotted path from the causal LM to the model without its head."""
    blocks: str
    """Dotted path from the causal LM to the list of decoder blocks."""
    feed_forwards: tuple[FeedForwardLayout, ...]
    """Every feed-forward that a block may have; a block has those whose modules exist in it."""
    attention: str | None = "self_attn"
    """Path of the attention inside a block; None if the family cannot run without it."""
