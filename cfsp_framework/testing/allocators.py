"""What every allocator promises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from cfsp_framework.api.components import Allocator
from cfsp_framework.api.data import BlockSummary, Budget, Statistic
from cfsp_framework.pruning.planning import round_widths, total_to_keep
from cfsp_framework.testing.contract import (
    ComponentContract,
    ContractError,
    NotApplicable,
    call_component,
    explore,
    unwritten,
    usage,
)
from cfsp_framework.testing.guards import WatchedScalars, unchanged_process

RATIOS = (0.0, 0.1, 0.25, 0.5, 0.8)


@dataclass(frozen=True)
class Blocks:
    """What a list of summaries is made of."""

    widths: tuple[int, ...] = (64, 64, 64, 64)
    alike: bool = False
    """Whether all blocks measured the same."""
    silent: bool = False
    """Whether all scores are zero."""
    seed: int = 0

    def __str__(self) -> str:
        return f"{len(self.widths)} blocks of {self.widths} channels" + " that are all alike" * self.alike


CASES = (
    Blocks(),
    Blocks(seed=1, widths=(64,) * 12),
    Blocks(widths=(64,)),
    Blocks(alike=True),
    Blocks(silent=True),
    Blocks(widths=(32, 96, 64, 128)),
)


class AllocatorContract(ComponentContract):
    """``component = TheAllocator()``; ``tolerance`` is how far the mean share may be from ``1 - ratio``."""

    component: ClassVar[Allocator | None] = None
    kind: ClassVar[str] = "allocator"
    tolerance: ClassVar[float] = 0.02

    def shares(self, component: Allocator, summaries: Sequence[BlockSummary], budget: Budget) -> list[float]:
        """The allocator's shares, checked as far as the host checks them."""
        on = f"{len(summaries)} blocks, {budget}"
        with call_component("allocate()", on):
            found: Any = component.allocate(summaries, budget)
            shares = [float(share) for share in found]
        if len(shares) != len(summaries):
            raise ContractError(f"allocate() returned {len(shares)} shares for {on}; return one for each, in order.")
        for number, share in enumerate(shares):
            if not (math.isfinite(share) and 0 < share <= 1 + 1e-9):
                raise ContractError(
                    f"allocate() returned the share {share} for block {number} of {on}; a share is what the block keeps, "
                    "in (0, 1]. Shrink the spread around the mean until all are inside."
                )
        return shares

    def summaries(self, component: Allocator, case: Blocks) -> list[BlockSummary]:
        """Summaries with what the allocator requires, and the curve it asks for."""
        return summaries(component, case)

    def test_one_share_in_range_per_block(self, component: Allocator) -> None:
        """One for each block, in (0, 1]: for one block, for many, alike, of different widths, at any ratio."""

        def check(case: Blocks, ratio: float, round_to: int = 1) -> None:
            self.shares(component, self.summaries(component, case), Budget(ratio, round_to))

        for case in CASES:
            for ratio in RATIOS:
                check(case, ratio)
        check(Blocks(), 0.5, 8)
        try:
            import hypothesis  # noqa: F401
        except ImportError:
            return

        def drawn(st: Any) -> Any:
            widths = st.lists(st.sampled_from([16, 64, 96]), min_size=1, max_size=8).map(tuple)
            return st.tuples(st.builds(Blocks, widths=widths, seed=st.integers(0, 1000)), st.floats(0, 0.9))

        explore(lambda both: check(*both), drawn)

    def test_the_budget_is_met(self, component: Allocator) -> None:
        """Blocks of one width keep ``1 - ratio`` on average, near enough for the host to restore the exact total."""
        for case in (Blocks(), Blocks(seed=1), Blocks(seed=2, widths=(64,) * 12), Blocks(alike=True)):
            for ratio in (0.1, 0.3, 0.5, 0.7):
                shares = self.shares(component, self.summaries(component, case), Budget(ratio))
                mean = sum(shares) / len(shares)
                if abs(mean - (1 - ratio)) > self.tolerance:
                    raise ContractError(
                        f"allocate() keeps {mean:.3f} on average at a ratio of {ratio}; shares are what is kept, and their "
                        f"mean is to be {1 - ratio:.3f}. The host moves blocks one by one to the exact total, which would "
                        "undo the allocation. Scale the shares to that mean."
                    )
                budget, widths = Budget(ratio), [64] * len(shares)
                assert sum(round_widths(shares, widths, budget)) == total_to_keep(widths, budget)

    def test_nothing_goes_at_a_ratio_of_zero(self, component: Allocator) -> None:
        """All shares are 1."""
        for case in CASES:
            shares = self.shares(component, self.summaries(component, case), Budget(0.0))
            if min(shares) < 1 - 1e-6:
                raise ContractError(
                    f"allocate() keeps {min(shares):.4g} of a block at a ratio of 0; nothing is to be removed there."
                )

    def test_a_higher_ratio_keeps_less(self, component: Allocator) -> None:
        """The total that is kept falls as the ratio rises."""
        for case in CASES:
            found = self.summaries(component, case)
            kept = [
                sum(s * w for s, w in zip(self.shares(component, found, Budget(ratio)), case.widths, strict=True))
                for ratio in RATIOS
            ]
            if any(after > before + 1e-6 for before, after in pairwise(kept)):
                raise ContractError(
                    f"allocate() keeps {', '.join(f'{k:.1f}' for k in kept)} channels at the ratios "
                    f"{', '.join(map(str, RATIOS))}; budget.ratio is the share removed, not the share kept."
                )

    def test_summaries_are_left_alone(self, component: Allocator) -> None:
        """The same summaries serve every ratio of an ablation."""
        found = self.summaries(component, Blocks())
        tensors = {f"[{i}].scores": one.scores for i, one in enumerate(found)}
        tensors |= {f"[{i}].curve": one.curve for i, one in enumerate(found) if one.curve is not None}
        with unwritten("allocate()", tensors, "summaries"):
            self.shares(component, found, Budget(0.5))
            with call_component("importance()", "summaries"):
                component.importance(found)

    def test_reads_what_it_requires_and_nothing_else(self, component: Allocator) -> None:
        """Every statistic costs a part of the pass over the data, and a curve needs the Gram matrix."""
        reads = set[Statistic]()
        for case in CASES:
            found = [
                replace(one, statistics=WatchedScalars(one.statistics, reads))
                for one in self.summaries(component, case)
            ]
            for ratio in RATIOS:
                with call_component("allocate()", case):
                    try:
                        component.allocate(found, Budget(ratio))
                        component.importance(found)
                    except KeyError:
                        usage(frozenset(component.required()), reads, "allocate()")
                        raise
        usage(frozenset(component.required()), reads, "allocate() or importance()")

    def test_shares_are_the_same_every_time(self, component: Allocator) -> None:
        """Whatever ran before, and it changes nothing for what runs after it."""
        found = self.summaries(component, Blocks())
        with unchanged_process("allocate()"):
            first = self.shares(component, found, Budget(0.5))
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            with unchanged_process("allocate()"):
                second = self.shares(component, found, Budget(0.5))
        if first != second:
            raise ContractError("allocate() gave two answers for the same summaries; keep no state on the component.")

    def test_importance_is_one_finite_number_per_block(self, component: Allocator) -> None:
        """Reports show it, and recovery may go by it; None where there is none."""
        for case in CASES:
            found = self.summaries(component, case)
            with call_component("importance()", case):
                importance: Any = component.importance(found)
            if importance is None:
                raise NotApplicable("it has no importance")
            if len(importance) != len(found) or not all(math.isfinite(float(value)) for value in importance):
                raise ContractError(
                    f"importance() returned {importance} for {case}; return one finite number for each, or None."
                )


def summaries(component: Allocator, case: Blocks) -> list[BlockSummary]:
    """Blocks as the host summarises them: scores, required scalars, and the curve if it is asked for."""
    draw = torch.Generator().manual_seed(case.seed)
    with call_component("required()", "nothing"):
        required = sorted(component.required())
    with call_component("curve()", "nothing"):
        curve: object = component.curve()
    if curve not in (None, "plain", "compensated"):
        raise ContractError(f"curve() returned {curve!r}; return 'plain', 'compensated' or None.")
    found: list[BlockSummary] = []
    for block, width in enumerate(case.widths):
        if case.alike:
            draw.manual_seed(case.seed)
        scores = torch.randn(width, generator=draw).exp() * (not case.silent)  # (F,)
        steps = torch.rand(width, generator=draw).double().sort().values * (0.5 + torch.rand((), generator=draw).item())
        found.append(
            BlockSummary(
                block=block,
                path="mlp",
                width=width,
                tokens=1024,
                statistics={one: 0.05 + torch.rand((), generator=draw).item() / 2 for one in required},
                scores=scores.float(),
                curve=torch.cat([steps.new_zeros(1), steps.cumsum(0)]) if curve else None,
            )
        )
    return found
