"""Schedule the training after the cut: adapters with ranks by coarse importance or equal ranks, all weights, nothing."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import ClassVar, Literal

from pydantic import Field

from cfsp_framework import (
    BlockRecovery,
    BlockSummary,
    Distillation,
    PruningPlan,
    RecoveryPlan,
    RecoveryScheduler,
    TrainableBlock,
)
from cfsp_framework.errors import ConfigError

_EXACT = 1e-9
"""Below this a share of a rank is rounding."""
_NOTHING = 1e-12
"""Replaces a weight of 0, relative to the largest weight."""


class NoRecovery(RecoveryScheduler):
    """Train nothing."""

    name: ClassVar[str] = "none"

    def schedule(
        self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]
    ) -> RecoveryPlan | None:
        return None


class Training(RecoveryScheduler):
    """Options of every training."""

    times_full: ClassVar[float] = 1.0
    """Default learning rate, as a multiple of the one for all weights."""

    learning_rate: float | None = Field(
        default=None, gt=0, description="highest learning rate of AdamW; null: by the hidden size, docs/recovery.md"
    )
    warmup: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises from 0"
    )
    decay: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="how the learning rate falls to 0 after the warmup; constant: it does not"
    )
    batch_tokens: int = Field(default=8192, ge=1, description="tokens of one step, over all processes")
    distillation: float = Field(
        default=0.0, ge=0, le=1, description="share of the loss that is the divergence from the dense model"
    )
    temperature: float = Field(default=1.0, gt=0, description="softmax temperature of the divergence")
    gradient_checkpointing: bool = Field(default=False, description="less memory, a third more time")

    def plan_for(
        self,
        trained: Sequence[BlockRecovery],
        blocks: Sequence[TrainableBlock],
        targets: Sequence[str] = (),
        *,
        full: bool = False,
    ) -> RecoveryPlan:
        """Return the plan that trains some of the blocks with this component's options."""
        hidden = next(iter(blocks[0].feed_forward.values()))[-1]  # the up or gate projection's inputs
        teacher = Distillation(weight=self.distillation, temperature=self.temperature) if self.distillation else None
        return RecoveryPlan(
            full=full,
            targets=tuple(targets),
            blocks=tuple(trained),
            batch_tokens=self.batch_tokens,
            learning_rate=self.learning_rate or self.times_full * usual_learning_rate(hidden),
            warmup=self.warmup,
            decay=self.decay,
            gradient_checkpointing=self.gradient_checkpointing,
            distillation=teacher,
        )


class Full(Training):
    """Train all weights of the feed-forwards only."""

    name: ClassVar[str] = "full"
    trains_all_weights: ClassVar[bool] = True

    def schedule(
        self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]
    ) -> RecoveryPlan | None:
        return self.plan_for([BlockRecovery(block=block.block, rank=1) for block in blocks], blocks, full=True)


class LowRank(Training):
    """Train low-rank adapters of the feed-forwards (LoRA, arXiv 2106.09685), with ranks by a weight for every block.

    All schedulers of this kind train the same number of parameters, that of rank ``rank`` in every block.
    """

    times_full: ClassVar[float] = 10.0

    rank: int = Field(default=8, ge=1, description="the rank in every block that would train as many parameters")
    scale: float = Field(default=2.0, gt=0, description="alpha over rank, in every block")
    attention: bool = Field(default=False, description="adapt the attention's projections too")

    @abstractmethod
    def weights(self, plan: PruningPlan, blocks: Sequence[TrainableBlock]) -> list[float]:
        """Return non-negative numbers that the blocks' ranks are proportional to."""

    def bounds(self) -> tuple[int, int | None]:
        """Return the least and the largest rank of a block; None if only its matrices limit it."""
        return 1, None

    def schedule(
        self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]
    ) -> RecoveryPlan | None:
        shapes = [list(self._matrices(block).values()) for block in blocks]
        costs = [sum(map(unit_of_rank, of_block)) for of_block in shapes]
        least, largest = self.bounds()
        caps = [min(*(min(shape[-2:]) for shape in of_block), largest or math.inf) for of_block in shapes]
        ranks = spread_ranks(self.weights(plan, blocks), costs, caps, self.rank, least)
        trained = [
            BlockRecovery(block=block.block, rank=rank, alpha=self.scale * rank)
            for block, rank in zip(blocks, ranks, strict=True)
        ]
        targets = dict.fromkeys(path for block in blocks for path in self._matrices(block))
        return self.plan_for(trained, blocks, list(targets))

    def _matrices(self, block: TrainableBlock) -> dict[str, tuple[int, ...]]:
        return {**block.feed_forward, **(block.attention if self.attention else {})}


class UniformLora(LowRank):
    """Adapters of the same rank in every block: the baseline of `ig-lora`."""

    name: ClassVar[str] = "uniform-lora"

    def weights(self, plan: PruningPlan, blocks: Sequence[TrainableBlock]) -> list[float]:
        return [1.0] * len(blocks)


class IgLora(LowRank):
    """Importance-guided adapters: ranks proportional to the blocks' importance, or to their removed share.

    CFSP's paper (arXiv 2409.13199) allocates recovery by coarse importance and publishes neither a formula nor code, so
    this is this project's reading. The importance is the allocator's, or the kept share if it has none. The two
    directions are nearly opposite, since important blocks lose less.
    """

    name: ClassVar[str] = "ig-lora"

    direction: Literal["importance", "removed"] = Field(
        default="importance", description="more rank where the coarse importance is high, or where more was removed"
    )
    min_rank: int = Field(default=1, ge=0, description="least rank of a block; 0 lets blocks go untrained")
    max_rank: int | None = Field(default=None, ge=1, description="largest rank of a block")

    def weights(self, plan: PruningPlan, blocks: Sequence[TrainableBlock]) -> list[float]:
        entries = [[entry for entry in plan.blocks if entry.block == block.block] for block in blocks]
        kept = [sum(len(entry.kept) for entry in block) / sum(entry.width for entry in block) for block in entries]
        if self.direction == "removed":
            return [1 - share for share in kept]
        importance = [[entry.importance for entry in block if entry.importance is not None] for block in entries]
        return [max(0.0, fmean(values)) for values in importance] if all(importance) else kept

    def bounds(self) -> tuple[int, int | None]:
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise ConfigError(f"min_rank {self.min_rank} is above max_rank {self.max_rank}.")
        return self.min_rank, self.max_rank


def usual_learning_rate(hidden: int) -> float:
    """Return a learning rate for all weights of a Llama of hidden size ``hidden``; adapters take ten times as much.

    Source: the fit of Schulman and others, "LoRA Without Regret" (Thinking Machines, 2025), as Tinker's documentation gives it.
    """
    return float(5e-5 * (2000 / hidden) ** 0.781)


def unit_of_rank(shape: tuple[int, ...]) -> int:
    """Count the parameters of one unit of rank on matrices ``(out, in)``, or on each of ``(experts, out, in)``."""
    return math.prod(shape[:-2]) * sum(shape[-2:])


def spread_ranks(
    weights: Sequence[float], costs: Sequence[int], caps: Sequence[float], rank: int, least: int = 1
) -> list[int]:
    """Spread ranks in proportion to ``weights``, between ``least`` and ``caps``, at the cost of ``rank`` everywhere.

    A unit of rank costs ``costs[i]`` parameters in block i. Ranks are rounded by largest remainders: all are rounded
    down, and the remaining parameters buy one unit after another where rounding removed most, until one exceeds them.
    So the total never exceeds the budget, falls short of it by less than one unit of rank, and meets it if all costs
    are equal; a block of more weight never gets less, up to its cap. Weights of 0 only get what caps leave over.

    Raises:
        ConfigError: the budget is too small for ``least``, or too large for ``caps``.
    """
    budget = rank * sum(costs)
    if rank < least:
        raise ConfigError(
            f"rank {rank} is too small a budget: min_rank {least} in every block costs more; lower it, or raise rank."
        )
    room = sum(cost * cap for cost, cap in zip(costs, caps, strict=True))
    if budget > room:
        raise ConfigError(
            f"rank {rank} is too large a budget: the matrices, or max_rank, allow {room / sum(costs):.4g} on average; "
            "lower it."
        )
    exact = _water_level(weights, costs, caps, least, budget)
    ranks = [math.floor(value + _EXACT) for value in exact]
    left = budget - sum(cost * value for cost, value in zip(costs, ranks, strict=True))
    for i in sorted(range(len(ranks)), key=lambda i: (ranks[i] - exact[i], -weights[i], i)):
        if costs[i] > left or ranks[i] >= caps[i]:
            break
        ranks[i] += 1
        left -= costs[i]
    return ranks


def _water_level(
    weights: Sequence[float], costs: Sequence[int], caps: Sequence[float], least: int, budget: int
) -> list[float]:
    """Return ``clamp(level * weight, least, cap)`` at the level whose ranks cost the budget, by bisection."""
    largest = max(weights)
    weights = [max(weight / largest, _NOTHING) if largest else 1.0 for weight in weights]

    def at(level: float) -> list[float]:
        return [min(max(level * weight, least), cap) for weight, cap in zip(weights, caps, strict=True)]

    def cost(level: float) -> float:
        return sum(cost * value for cost, value in zip(costs, at(level), strict=True))

    low, high = 0.0, max(caps) / min(weights)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) < budget else (low, middle)
    return at(high)
