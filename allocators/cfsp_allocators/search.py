"""Search the widths on the model: evolve the best of other allocators' widths by the loss that they cause."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from cfsp_framework import BlockSummary, Budget, Fitness, FitnessOptions, SearchingAllocator

POOL = 48
"""Mutants drawn for each generation; the predicted best and some others are measured."""
FRACTION = 48
"""A single move takes this part of a block's channels, in multiples of the rounding."""
RIDGE = 1.0
"""Weight of the squared slopes, in squared moves, against the misfit of the linear prediction."""
Shares = tuple[float, ...]


class Search(SearchingAllocator):
    """Evolve widths by their loss on held-out windows, from the best start on: (1 + 4) evolution with a linear prediction.

    A mutant moves channels between one to four pairs of blocks. A ridge regression on everything measured predicts the
    loss; of each generation's 48 mutants the two that it predicts to be best and two others are measured. The same seed
    and number of evaluations give the same widths; with ``seconds`` they depend on the machine.
    """

    name: ClassVar[str] = "search"

    start: str = Field(
        default="uniform+cfsp", description="allocators to start from, between plus signs; the best seeds the evolution"
    )
    metric: Literal["kl", "nll", "acceptance"] = Field(
        default="kl",
        description="loss: divergence from the dense model, cross-entropy, or 1 - expected speculative acceptance",
    )
    evaluations: int = Field(default=200, ge=1, description="different widths to measure at most")
    seconds: float | None = Field(
        default=None, gt=0, description="stop after so long; the result is then not deterministic"
    )
    windows: int = Field(
        default=32,
        ge=1,
        description="held-out windows to measure on at most; widths fit a few thousand tokens too well",
    )
    stride: int = Field(default=1, ge=1, description="every so many positions of a window count")

    @field_validator("start")
    @classmethod
    def _name_some(cls, value: str) -> str:
        if not all(_names(value)):
            raise ValueError("name allocators between plus signs, such as uniform+cfsp")
        return value

    def fitness(self) -> FitnessOptions:
        return FitnessOptions(self.metric, self.windows, self.stride)

    def starts(self) -> list[str]:
        return _names(self.start)

    def search(self, summaries: Sequence[BlockSummary], budget: Budget, fitness: Fitness) -> Shares:
        if budget.ratio == 0:
            return (1.0,) * len(summaries)
        deadline = None if self.seconds is None else time.monotonic() + self.seconds
        evolution = _Evolution(summaries, budget, fitness)
        for generation in evolution.generations():
            left = self.evaluations - len(evolution.losses)
            evolution.measure(generation[:left])
            if left <= len(generation) or (deadline is not None and time.monotonic() > deadline):
                break
        return evolution.best


class _Evolution:
    """Everything measured so far, and the next candidates."""

    def __init__(self, summaries: Sequence[BlockSummary], budget: Budget, fitness: Fitness) -> None:
        self.losses: dict[Shares, float] = {}
        self._fitness = fitness
        self._draw = random.Random(fitness.seed)
        self._widths = [summary.width for summary in summaries]
        self._units = [min(summary.members.values(), default=summary.width) for summary in summaries]
        self._steps = [_step(width, budget.round_to) for width in self._units]
        self._least = [
            min(budget.round_to, unit) / unit for unit in self._units
        ]  # smallest share of each block that the rounding allows

    @property
    def best(self) -> Shares:
        """The shares of lowest loss; the first ones on a tie."""
        return min(self.losses, key=self.losses.__getitem__)

    def measure(self, candidates: Sequence[Shares]) -> None:
        """Measure candidates."""
        self.losses |= dict(zip(candidates, self._fitness(candidates), strict=True))

    def generations(self) -> Iterator[list[Shares]]:
        """Yield candidates to measure: the starts, the means of the best and each other, then generations of mutants."""
        starts = list(dict.fromkeys(self._rounded(shares) for shares in self._fitness.starts.values()))
        yield starts or [self._rounded([1.0] * len(self._units))]
        best = self.best
        means = (self._rounded([(a + b) / 2 for a, b in zip(best, other, strict=True)]) for other in starts)
        if candidates := [shares for shares in dict.fromkeys(means) if shares not in self.losses]:
            yield candidates
        while candidates := self._offspring():
            yield candidates

    def _offspring(self) -> list[Shares]:
        """Return the two mutants of lowest predicted loss and two others, none measured before."""
        pool = dict.fromkeys(self._mutant() for _ in range(POOL))
        mutants = [shares for shares in pool if shares not in self.losses]
        slopes = self._slopes()
        ordered = sorted(mutants, key=lambda shares: sum(s * x for s, x in zip(slopes, shares, strict=True)))
        first, rest = ordered[:2], ordered[2:]
        return first + self._draw.sample(rest, min(2, len(rest)))

    def _mutant(self) -> Shares:
        shares = list(self.best)
        for _ in range(self._draw.choice((1, 1, 2, 3, 4))):
            if len(shares) > 1:
                giver, taker = self._draw.sample(range(len(shares)), 2)
                self._move(shares, giver, taker, self._draw.choice((1, 1, 2, 4)))
        return self._rounded(shares)

    def _move(self, shares: list[float], giver: int, taker: int, times: int) -> None:
        """Move channels between two blocks, as far as both can."""
        channels = times * max(self._steps[b] * self._widths[b] // self._units[b] for b in (giver, taker))
        most = min(
            (shares[giver] - self._least[giver]) * self._widths[giver], (1 - shares[taker]) * self._widths[taker]
        )
        moved = min(channels, most)
        shares[giver] -= moved / self._widths[giver]
        shares[taker] += moved / self._widths[taker]

    def _slopes(self) -> list[float]:
        """Return the slope of the loss along each block's share, by ridge regression around the best."""
        best, lowest = self.best, self.losses[self.best]
        points = [shares for shares, loss in self.losses.items() if loss < float("inf")]
        scale = torch.tensor(
            [unit / step for unit, step in zip(self._units, self._steps, strict=True)]
        ).double()  # (L,)
        moves = (torch.tensor(points).double() - torch.tensor(best).double()) * scale  # (n, L)
        losses = torch.tensor([self.losses[shares] - lowest for shares in points]).double()  # (n,)
        weights = (1 + moves.square().sum(1)).reciprocal()[:, None]  # (n, 1): far points say less about slopes here
        gram = moves.T @ (weights * moves) + RIDGE * torch.eye(len(best)).double()  # (L, L)
        slopes = torch.linalg.solve(gram, moves.T @ (weights[:, 0] * losses)) * scale  # (L,)
        return [float(slope) for slope in slopes]

    def _rounded(self, shares: Sequence[float]) -> Shares:
        """Return the shares that a plan would keep."""
        clipped = [min(max(share, least), 1.0) for share, least in zip(shares, self._least, strict=True)]
        return tuple(width / unit for width, unit in zip(self._fitness.widths(clipped), self._units, strict=True))


def _names(start: str) -> list[str]:
    return [name.strip() for name in start.split("+")]


def _step(unit: int, round_to: int) -> int:
    """Return the channels of a single move: a part of the width, in multiples of the rounding."""
    return max(round_to, unit // FRACTION // round_to * round_to)
