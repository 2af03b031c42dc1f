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
    """Where in a block a collector listens.

    In a compensator's second pass on the pruned stream, the outputs of the two feed-forward sites are what the
    feed-forward should give there (see ``Compensator.target_mix``), not what the dense one gives.
    """

    BLOCK = "block"
    """The whole block: inputs and outputs are residual streams, ``(T, D)``."""
    FEED_FORWARD = "feed_forward"
    """A feed-forward: inputs are what its gate and up projections see, ``(T, D)``, outputs ``(T, D)``."""
    DOWN_PROJECTION = "down_projection"
    """A feed-forward's down projection: inputs are channel activations ``(T, F)``, outputs ``(T, D)`` without its bias.

    An expert of a mixture sees the tokens routed to it: ``T`` then differs between windows and may be 0.
    """
    GRADIENT = "gradient"
    """The channel activations ``(T, F)`` again, with the loss's gradients with respect to them as outputs, ``(T, F)``."""


class Stream(Enum):
    """Which model's hidden states a compensator's statistics come from."""

    DENSE = "dense"
    """The dense model's. What was collected for the scores serves again where it was kept."""
    PRUNED = "pruned"
    """Those that reach the block once all blocks before it are cut and compensated."""


HELD_OUT_EVERY = 10
"""Every tenth calibration window is held out: compensators are fitted on the others and judged on these."""


class Windows(Enum):
    """Which calibration windows a collector is shown."""

    ALL = "all"
    FITTED = "fitted"
    """Those that are not held out."""
    HELD_OUT = "held_out"
    """Every tenth: see ``HELD_OUT_EVERY``."""

    def include(self, number: int) -> bool:
        """Whether window ``number``, counted from 0 over all processes, is among them."""
        held_out = number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        return self is Windows.ALL or held_out is (self is Windows.HELD_OUT)


@dataclass(frozen=True, order=True)
class Statistic:
    """The name of something measured in every block. Components require it, one collector provides it.

    Two statistics are equal when their names are. ``shape`` and ``summary`` are documentation; a ``heavy`` statistic
    (more than a vector per block) is dropped when its block is done.
    """

    name: str
    shape: str = field(default="(F,)", compare=False)
    summary: str = field(default="", compare=False)
    heavy: bool = field(default=False, compare=False)
    unseen: float = field(default=0.0, compare=False)
    """Fills a vector, and the diagonal of a square matrix, of an expert that no token was routed to."""

    def held_out(self) -> Statistic:
        """Return the statistic that measures the same over held-out windows only."""
        return replace(self, name=f"{self.name}_held_out", summary=f"{self.summary}, held-out windows only", unseen=0.0)


class BlockStatistics(Mapping[Statistic, "Tensor"]):
    """The statistics of one feed-forward, float32, and how many tokens they were measured on.

    ``held_out_tokens`` of the ``tokens`` lie in held-out windows. An expert no token was routed to is ``unseen``: its
    statistics are what ``Statistic.unseen`` says, as if from one token.
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
        """These measurements and some more."""
        return self._with({**self._values, **more})

    def only(self, statistics: frozenset[Statistic]) -> BlockStatistics:
        """The same measurements, restricted to what a component declared."""
        return self._with({s: v for s, v in self._values.items() if s in statistics})

    def to(self, device: torch.device | str) -> BlockStatistics:
        """The same measurements on ``device``."""
        return self._with({s: v.to(device) for s, v in self._values.items()})

    def light(self) -> BlockStatistics:
        """What may outlive the block, on the CPU."""
        return self._with({s: v.cpu() for s, v in self._values.items() if not s.heavy})

    def _with(self, values: Mapping[Statistic, Tensor]) -> BlockStatistics:
        return BlockStatistics(values, 0 if self.unseen else self.tokens, self.held_out_tokens)


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward's weights in a single convention, whatever its family calls, transposes or fuses.

    The tensors are views of the model's own parameters, in the model's dtype: read them, never write to them.
    """

    block: int
    path: str
    """Inside the block, with the expert's number after it in a mixture of experts."""
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)
    activation: str
    """A name of Transformers' ``ACT2FN``; ``unknown`` where the family computes something else."""
    gate: Tensor | None = None  # (F, D)
    up_bias: Tensor | None = None  # (F,)
    gate_bias: Tensor | None = None  # (F,)
    down_bias: Tensor | None = None  # (D,)
    expert: int = 0
    """Which expert of a mixture this is."""
    seed: int = 0

    @property
    def width(self) -> int:
        """``F``, the number of channels."""
        return self.down.shape[1]

    @property
    def hidden(self) -> int:
        """``D``, the width of the residual stream."""
        return self.down.shape[0]

    def generator(self) -> torch.Generator:
        """A CPU generator seeded by the run's seed, this block and this expert, for components that draw."""
        import torch

        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.block + (self.expert << 32))


@dataclass(frozen=True)
class BlockSummary:
    """What survives a block once its heavy statistics are gone. Allocators see these and the budget, nothing else.

    One stands for all channels whose number one value of the configuration sets: a block's feed-forward, or all experts
    of a mixture together (``F`` then counts the channels of all of them). A block with separate settings, say for
    routed and shared experts, has several.
    """

    block: int
    path: str
    width: int
    tokens: int
    statistics: Mapping[Statistic, float]
    """The block's scalar statistics, among them the distances between its input and output."""
    scores: Tensor  # (F,) float32, CPU: the chosen criterion's
    curve: Tensor | None = None  # (F + 1,) float64, CPU: see Allocator.curve
    members: Mapping[str, int] = field(default_factory=dict[str, int])
    """Path and width of every feed-forward of a mixture, in the order of ``scores``; empty for a single one."""


@dataclass(frozen=True)
class Budget:
    """How much is kept of all feed-forward channels together.

    ``ratio`` is the share of channels removed, in [0, 1), also when the user asked for a share of all parameters.
    """

    ratio: float
    round_to: int = 1


@dataclass(frozen=True)
class Update:
    """What a compensator changes in one feed-forward once its channels are chosen; None leaves a tensor as it is.

    ``error_plain`` and ``error`` are the relative squared errors of the feed-forward's output on held-out tokens
    without and with the change; a compensator whose change does not help gives both and no tensors.
    """

    down: Tensor | None = None  # (D, K)
    down_bias: Tensor | None = None  # (D,)
    up: Tensor | None = None  # (K, D)
    gate: Tensor | None = None  # (K, D)
    up_bias: Tensor | None = None  # (K,)
    gate_bias: Tensor | None = None  # (K,)
    error_plain: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class TrainableBlock:
    """What can be trained in one block, as it is after the cut: shapes ``(out, in)`` by path inside the block.

    The matrices of experts in one parameter have the shape ``(experts, out, in)``, however they lie in it.
    """

    block: int
    feed_forward: Mapping[str, tuple[int, ...]]
    """Every matrix of its feed-forwards."""
    attention: Mapping[str, tuple[int, ...]]
    """Every matrix of its attention; empty where that was dropped."""


class Distillation(BaseModel):
    """The dense model as a teacher: its Kullback-Leibler divergence from the model, on every predicted token."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    weight: float = Field(default=0.5, gt=0, le=1)
    """The divergence's share of the loss; the cross-entropy has the rest."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides both models' logits; the divergence is multiplied by its square (arXiv 1503.02531)."""


class BlockRecovery(BaseModel):
    """How much is trained in one block."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    block: int = Field(ge=0)
    rank: int = Field(ge=0)
    """Of the adapters; 0 leaves the block out."""
    alpha: float = Field(default=0.0, ge=0)
    """What the adapters add is multiplied by ``alpha / rank``."""


class RecoveryPlan(BaseModel):
    """What is trained after the cut and how, as plain JSON."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal["cfsp-recovery-plan"] = "cfsp-recovery-plan"
    version: Literal[1] = 1
    full: bool = False
    """Train the feed-forwards' own weights instead of adapters, in every block whose rank is not 0."""
    targets: tuple[str, ...] = ()
    """Paths inside a block of the matrices that get adapters; empty: all projections of its feed-forwards."""
    blocks: tuple[BlockRecovery, ...] = Field(min_length=1)
    """A block that is not named is left out."""
    steps: int = Field(default=200, ge=1)
    """Of the optimiser."""
    batch_tokens: int = Field(default=8192, ge=1)
    """Tokens of one step, over all processes."""
    learning_rate: float = Field(default=3e-4, gt=0)
    """The highest, of AdamW."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """The share of the steps in which the learning rate rises from 0."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 afterwards, if it does."""
    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, a third more time."""
    distillation: Distillation | None = None
    base: str | None = None
    """The fingerprint of the checkpoint that kept adapters are for; the host writes it."""

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class FeedForwardLayout:
    """Where one feed-forward keeps its projections inside a block, as attribute names.

    ``path`` is empty where the block itself holds them. ``gate`` is None for a feed-forward without a gate, and equal
    to ``up`` where one projection holds both, its rows in the order [gate; up]. ``additive`` says that the
    feed-forward's output joins the residual stream as it is, neither normalised nor scaled.

    With ``experts`` the module at ``path`` holds the experts of a mixture in parameters of three dimensions, called
    ``up`` (or gate and up in one) and ``down``; how they lie in them the module says itself.
    """

    path: str
    up: str
    down: str
    gate: str | None = None
    additive: bool = True
    experts: bool = False
    width_key: str = "intermediate_size"
    """The configuration's name for the width; feed-forwards of one block that share it keep equally many channels."""
    times: int = 1
    """The width is this many times the configuration's value."""

    @property
    def fused(self) -> bool:
        """Whether gate and up are one projection."""
        return self.gate == self.up


@dataclass(frozen=True)
class Architecture:
    """Where a model family keeps its blocks and feed-forwards, and which config keys hold their widths."""

    family: str
    base: str
    """Dotted path from the causal LM to the model without its head."""
    blocks: str
    """Dotted path from the causal LM to the list of decoder blocks."""
    feed_forwards: tuple[FeedForwardLayout, ...]
    """Every feed-forward a block may have; a block has those whose modules it has."""
    attention: str | None = "self_attn"
    """Path of the attention inside a block; None where the family cannot do without it."""
