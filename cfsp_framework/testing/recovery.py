"""What every recovery scheduler promises."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from cfsp_framework.api.components import RecoveryScheduler
from cfsp_framework.api.data import BlockSummary, RecoveryPlan, TrainableBlock
from cfsp_framework.api.records import BlockPlan, ModelIdentity, PruningPlan
from cfsp_framework.errors import CfspError
from cfsp_framework.testing.contract import ComponentContract, ContractError, NotApplicable, call_component
from cfsp_framework.testing.guards import unchanged_process

Shapes = dict[str, tuple[int, ...]]


class RecoverySchedulerContract(ComponentContract):
    """``component = TheScheduler()``."""

    component: ClassVar[RecoveryScheduler | None] = None
    kind: ClassVar[str] = "recovery"

    def schedule(self, component: RecoveryScheduler, case: Cut) -> RecoveryPlan | None:
        """The training after a cut; a refusal in words is none."""
        try:
            with call_component("schedule()", case):
                found: object = component.schedule(case.summaries, case.plan, case.blocks)
        except ContractError as error:
            if isinstance(error.__cause__, CfspError):
                return None
            raise
        if found is not None and not isinstance(found, RecoveryPlan):
            raise ContractError(f"schedule() returned a {type(found).__name__}; return a RecoveryPlan, or None.")
        return found

    def test_a_plan_that_fits_the_model(self, component: RecoveryScheduler) -> None:
        """Blocks that exist, each once, targets that exist, at least one block trained; or None."""
        for case in cuts():
            plan = self.schedule(component, case)
            if plan is None:
                continue
            numbers = [one.block for one in plan.blocks]
            if len({*numbers}) < len(numbers) or not {*numbers} <= {block.block for block in case.blocks}:
                raise ContractError(
                    f"schedule() names the blocks {numbers}; name each of 0 to {len(case.blocks) - 1} at most once."
                )
            if not any(one.rank for one in plan.blocks):
                raise ContractError("schedule() gives every block the rank 0; return None where nothing is trained.")
            known = {path for block in case.blocks for path in (*block.feed_forward, *block.attention)}
            unknown = [path for path in plan.targets if path not in known]
            if unknown:
                raise ContractError(
                    f"schedule() targets {unknown[0]!r}, which no block has; take paths from the blocks it is given: "
                    f"{', '.join(sorted(known))}. Families call them differently."
                )

    def test_ranks_are_within_the_matrices_and_the_budget(self, component: RecoveryScheduler) -> None:
        """No rank above what a matrix has; with an option ``rank``, no more parameters than that rank everywhere."""
        trained = False
        for case in cuts():
            plan = self.schedule(component, case)
            if plan is None or plan.full:
                continue
            trained = True
            parameters = budget = 0
            allowed: Any = getattr(component, "rank", None)
            for block in case.blocks:
                shapes = targeted(plan, block)
                rank = next((one.rank for one in plan.blocks if one.block == block.block), 0)
                largest = min((min(shape[-2:]) for shape in shapes.values()), default=0)
                if rank > largest:
                    raise ContractError(
                        f"schedule() gives block {block.block} the rank {rank}, but its smallest matrix has "
                        f"{largest}; cap the rank there: min(shape[-2:])."
                    )
                parameters += rank * sum(map(unit, shapes.values()))
                budget += (allowed or 0) * sum(map(unit, shapes.values()))
            if isinstance(allowed, int) and parameters > budget:
                raise ContractError(
                    f"schedule() trains {parameters} parameters, and rank={allowed} in every block would be {budget}; "
                    "an option called `rank` is the budget that makes schedulers comparable. Give others less, or call "
                    "the option something else."
                )
        if not trained:
            raise NotApplicable("it trains no adapters")

    def test_the_plan_is_json(self, component: RecoveryScheduler) -> None:
        """It is written beside the checkpoint and read again."""
        for case in cuts():
            plan = self.schedule(component, case)
            if plan is not None and _read_again(plan) != plan:
                raise ContractError(
                    "The RecoveryPlan changes in JSON; use plain ints, floats, strings and tuples in it."
                )

    def test_plans_without_measurements_or_importance(self, component: RecoveryScheduler) -> None:
        """`cfsp recover` has no summaries, and some allocators no importance."""
        for case in cuts():
            if not case.summaries or case.plan.blocks[0].importance is None:
                self.schedule(component, case)

    def test_plan_and_blocks_are_left_alone(self, component: RecoveryScheduler) -> None:
        """Others read them afterwards."""
        for case in cuts():
            before = copy.deepcopy((case.plan, case.blocks))
            self.schedule(component, case)
            if before != (case.plan, case.blocks):
                raise ContractError("schedule() changed the plan or the blocks it was given; copy what it changes.")

    def test_plans_are_the_same_every_time(self, component: RecoveryScheduler) -> None:
        """Whatever ran before, and it changes nothing for what runs after it."""
        case = cuts()[0]
        with unchanged_process("schedule()"):
            first = self.schedule(component, case)
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            with unchanged_process("schedule()"):
                second = self.schedule(component, case)
        if first != second:
            raise ContractError("schedule() gave two answers for the same cut; keep no state on the component.")

    def test_requires_nothing(self, component: RecoveryScheduler) -> None:
        """It sees summaries of what the others measured; nothing is measured for it."""
        if component.required():
            names = ", ".join(sorted(one.name for one in component.required()))
            raise ContractError(f"A recovery scheduler requires {names}, which nobody measures for it; leave it out.")


class Cut:
    """A model after the cut, as a scheduler sees it."""

    def __init__(
        self, what: str, blocks: Sequence[TrainableBlock], plan: PruningPlan, summaries: Sequence[BlockSummary]
    ) -> None:
        self.what = what
        self.blocks = tuple(blocks)
        self.plan = plan
        self.summaries = tuple(summaries)

    def __str__(self) -> str:
        return self.what


def cuts() -> list[Cut]:
    """Gated and plain feed-forwards, mixtures, other names; with and without measurements, importance, attention."""
    gated: Shapes = {"mlp.gate_proj": (0, 32), "mlp.up_proj": (0, 32), "mlp.down_proj": (32, 0)}
    plain: Shapes = {"ffn.w1": (0, 32), "ffn.w2": (32, 0)}
    experts: Shapes = {"moe.gate_up": (4, -2, 32), "moe.down": (4, 32, 0)}
    return [
        _cut("a gated model", gated, (40, 24, 48, 16), importance=True, measured=True),
        _cut("a gated model of one block", gated, (24,), importance=True, measured=True),
        _cut("a gated model, nothing measured", gated, (40, 24, 48, 16), importance=True, measured=False),
        _cut("a plain model without importance", plain, (40, 24), importance=False, measured=True),
        _cut("a mixture of experts without attention", experts, (32, 24), importance=True, measured=False),
        _cut("a model of which nothing was removed", gated, (64, 64), importance=False, measured=False),
    ]


def targeted(plan: RecoveryPlan, block: TrainableBlock) -> Shapes:
    """The matrices of a block that get adapters."""
    there = {**block.feed_forward, **block.attention}
    return {path: there[path] for path in plan.targets or block.feed_forward if path in there}


def unit(shape: tuple[int, ...]) -> int:
    """Parameters of an adapter of rank 1."""
    experts = shape[0] if len(shape) == 3 else 1
    return experts * sum(shape[-2:])


def _read_again(plan: RecoveryPlan) -> RecoveryPlan | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's, of what the comparison tells
        try:
            return RecoveryPlan.model_validate_json(plan.to_json())
        except ValueError:
            return None


def _cut(what: str, shapes: Shapes, kept: Sequence[int], *, importance: bool, measured: bool) -> Cut:
    """``shapes`` with 0 where the kept width goes, and -2 where twice of it."""
    width, path = 64, next(iter(shapes)).rpartition(".")[0]
    entries, blocks, summaries = list[BlockPlan](), list[TrainableBlock](), list[BlockSummary]()
    mixture = len(next(iter(shapes.values()))) == 3
    for block, count in enumerate(kept):
        of_block = {name: tuple({0: count, -2: 2 * count}.get(n, n) for n in shape) for name, shape in shapes.items()}
        attention = {} if mixture else {f"self_attn.{name}_proj": (32, 32) for name in "qkvo"}
        blocks.append(TrainableBlock(block, of_block, attention))
        scores = torch.rand(width, generator=torch.Generator().manual_seed(block))
        summaries.append(BlockSummary(block, path, width, tokens=128, statistics={}, scores=scores))
        for member in range(4 if mixture else 1):
            entries.append(
                BlockPlan(
                    block=block,
                    path=f"{path}.{member}" if mixture else path,
                    width=width,
                    importance=0.1 + 0.05 * block if importance else None,
                    kept=tuple(range(count)),
                )
            )
    plan = PruningPlan(
        model=ModelIdentity(source="none", family="none", fingerprint="", parameters=0),
        calibration=None,
        ratio=0.5,
        budget="channels",
        round_to=1,
        seed=0,
        components={},
        versions={},
        blocks=tuple(entries),
    )
    return Cut(what, blocks, plan, summaries if measured else ())
