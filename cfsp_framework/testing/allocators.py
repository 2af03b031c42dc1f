"""The contract of allocators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from cfsp_framework.api.components import Allocator, SearchingAllocator
from cfsp_framework.api.data import BlockSummary, Budget, Statistic
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.selection import get_curve_kind
from cfsp_framework.pruning.planning import allocate, get_importance, round_shares, round_widths, total_to_keep
from cfsp_framework.testing.contract import ComponentContract, checked_by_host, configure, explore, run_twice
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.guards import RecordedScalars, check_reads, read_only

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.8)


@dataclass(frozen=True)
class Blocks:
    """Settings of a list of block summaries."""

    widths: tuple[int, ...] = (64, 64, 64, 64)
    alike: bool = False
    """Whether all blocks have equal measurements."""
    silent: bool = False
    """Whether all scores are zero."""
    seed: int = 0


CASES = (
    Blocks(),
    Blocks(seed=1, widths=(64,) * 12),
    Blocks(widths=(64,)),
    Blocks(alike=True),
    Blocks(silent=True),
    Blocks(widths=(32, 96, 64, 128)),
)


class ConvexFitness:
    """The ``Fitness`` of a model that does not exist: every block's loss is the square of what it removes, weighted.

    Block ``i`` weighs ``1 + i``. Every start keeps the same share of all blocks.
    """

    seed = 0

    def __init__(self, starts: Sequence[str], summaries: Sequence[BlockSummary], budget: Budget) -> None:
        self.starts = {name: [1 - budget.ratio] * len(summaries) for name in starts}
        self._summaries, self._budget = summaries, budget

    def widths(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Return the widths that the host rounds shares to, without the exact total where a budget cannot be met."""
        try:
            return round_shares(shares, self._summaries, self._budget)
        except ConfigError:
            return round_shares(shares, self._summaries, self._budget, rebalance=False)

    def __call__(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        """Return each candidate's loss."""
        return [self._loss(self.widths(shares)) for shares in candidates]

    def _loss(self, widths: Sequence[int]) -> float:
        pairs = zip(self._summaries, widths, strict=True)
        return sum((1 + summary.block) * (1 - width / summary.width) ** 2 for summary, width in pairs)


def _allocate(
    component: Allocator | ConfiguredComponent[Allocator], summaries: Sequence[BlockSummary], budget: Budget
) -> list[float]:
    """Return the host's checked shares; a searching allocator tries widths on a ``ConvexFitness``."""
    configured = configure(component)
    if not isinstance(configured.component, SearchingAllocator):
        return allocate(configured, summaries, budget)
    with configured.call_component("starts()"):
        starts = configured.component.starts()
    return allocate(configured, summaries, budget, ConvexFitness(starts, summaries, budget))


class AllocatorContract(ComponentContract):
    """Set ``component = TheAllocator()``; ``tolerance`` bounds the difference of the mean share from ``1 - ratio``."""

    component: ClassVar[Allocator | None] = None
    kind: ClassVar[str] = "allocator"
    tolerance: ClassVar[float] = 0.02

    def shares(
        self,
        component: Allocator | ConfiguredComponent[Allocator],
        summaries: Sequence[BlockSummary],
        budget: Budget,
        given: object = None,
    ) -> list[float]:
        """Return the share of channels that each block keeps, checked by the host."""
        with checked_by_host(f"{given or f'{len(summaries)} blocks'}, {budget}"):
            return _allocate(component, summaries, budget)

    def summaries(self, component: Allocator, case: Blocks) -> list[BlockSummary]:
        """Make summaries with the statistics that the allocator requires, and the curve that it asks for."""
        draw = torch.Generator().manual_seed(case.seed)
        with checked_by_host():
            required, curve = sorted(configure(component).required()), get_curve_kind(configure(component))
        summaries: list[BlockSummary] = []
        for block, width in enumerate(case.widths):
            if case.alike:
                draw.manual_seed(case.seed)
            scores = torch.randn(width, generator=draw).exp() * (not case.silent)  # (F,)
            steps = torch.rand(width, generator=draw).double().sort().values  # (F,)
            steps *= 0.5 + torch.rand((), generator=draw).item()
            summaries.append(
                BlockSummary(
                    block=block,
                    path="mlp",
                    width=width,
                    tokens=1024,
                    statistics={statistic: 0.05 + torch.rand((), generator=draw).item() / 2 for statistic in required},
                    scores=scores.float(),
                    curve=torch.cat([steps.new_zeros(1), steps.cumsum(0)]) if curve else None,  # (F + 1,)
                )
            )
        return summaries

    def test_one_share_in_range_per_block(self, component: Allocator) -> None:
        """One share in (0, 1] for each block: one block, many, alike, of different widths, at any ratio."""

        def check(case: Blocks, ratio: float, round_to: int = 1) -> None:
            self.shares(component, self.summaries(component, case), Budget(ratio, round_to), case)

        for case in CASES:
            for ratio in RATIOS:
                check(case, ratio)
        check(Blocks(), 0.5, 8)

        def draw_blocks(st: Any) -> Any:
            widths = st.lists(st.sampled_from([16, 64, 96]), min_size=1, max_size=8).map(tuple)
            return st.tuples(st.builds(Blocks, widths=widths, seed=st.integers(0, 1000)), st.floats(0, 0.9))

        explore(lambda drawn: check(*drawn), draw_blocks)

    def test_the_budget_is_met(self, component: Allocator) -> None:
        """Blocks of equal width keep ``1 - ratio`` on average, so that the host has little to change for the exact total."""
        for case in (Blocks(), Blocks(seed=1), Blocks(seed=2, widths=(64,) * 12), Blocks(alike=True)):
            for ratio in (0.1, 0.3, 0.5, 0.7):
                shares = self.shares(component, self.summaries(component, case), Budget(ratio))
                mean = sum(shares) / len(shares)
                if abs(mean - (1 - ratio)) > self.tolerance:
                    raise ContractError(
                        f"allocate() keeps {mean:.3f} on average at a ratio of {ratio}; a share is the part that is "
                        f"kept, and the mean should be {1 - ratio:.3f}. The host moves blocks one by one to the exact "
                        "total, which would undo the allocation. Scale the shares to that mean."
                    )
                budget, widths = Budget(ratio), [64] * len(shares)
                assert sum(round_widths(shares, widths, budget)) == total_to_keep(widths, budget)

    def test_nothing_goes_at_a_ratio_of_zero(self, component: Allocator) -> None:
        """All shares are 1."""
        for case in CASES:
            shares = self.shares(component, self.summaries(component, case), Budget(0.0))
            if min(shares) < 1 - 1e-6:
                raise ContractError(
                    f"allocate() keeps {min(shares):.4g} of a block at a ratio of 0, which removes nothing."
                )

    def test_a_higher_ratio_keeps_less(self, component: Allocator) -> None:
        """The total that is kept falls as the ratio rises."""
        for case in CASES:
            summaries = self.summaries(component, case)
            kept = [
                sum(s * w for s, w in zip(self.shares(component, summaries, Budget(ratio)), case.widths, strict=True))
                for ratio in RATIOS
            ]
            if any(higher > lower + 1e-6 for lower, higher in pairwise(kept)):
                raise ContractError(
                    f"allocate() keeps {', '.join(f'{k:.1f}' for k in kept)} channels at the ratios "
                    f"{', '.join(map(str, RATIOS))}; budget.ratio is the share removed, not the share kept."
                )

    def test_summaries_are_left_alone(self, component: Allocator) -> None:
        """Every ratio of an ablation reads the same summaries."""
        summaries = self.summaries(component, Blocks())
        tensors = {f"summaries[{i}].scores": summary.scores for i, summary in enumerate(summaries)}
        tensors |= {f"summaries[{i}].curve": s.curve for i, s in enumerate(summaries) if s.curve is not None}
        with read_only("allocate() or importance()", tensors), checked_by_host():
            _allocate(component, summaries, Budget(0.5))
            get_importance(configure(component), summaries)

    def test_reads_what_it_requires_and_nothing_else(self, component: Allocator) -> None:
        """Measuring a statistic takes time in the pass over the data, and a curve needs the Gram matrix."""
        reads, required = set[Statistic](), frozenset(component.required())
        for case in CASES:
            summaries = [
                replace(summary, statistics=RecordedScalars(summary.statistics, reads))
                for summary in self.summaries(component, case)
            ]
            for ratio in RATIOS:
                try:
                    with checked_by_host(case):
                        _allocate(component, summaries, Budget(ratio))
                        get_importance(configure(component), summaries)
                except ContractError:
                    if not reads <= required:
                        break  # a KeyError, which the next line explains
                    raise
        check_reads(required, reads, "allocate() or importance()")

    def test_shares_are_the_same_every_time(self, component: Allocator) -> None:
        """Shares depend on nothing that ran before, and change no global setting."""
        summaries = self.summaries(component, Blocks())
        first, second = run_twice(component, lambda c: self.shares(c, summaries, Budget(0.5)))
        if first != second:
            raise ContractError(
                "allocate() returned different shares for the same summaries; keep no state on the component."
            )

    def test_importance_is_one_finite_number_per_block(self, component: Allocator) -> None:
        """Reports show it, and recovery may depend on it; None if the allocator has none."""
        for case in CASES:
            with checked_by_host(case):
                importance = get_importance(configure(component), self.summaries(component, case))
            if None in importance:
                raise NotApplicable("it has no importance")
