"""The contract of recovery schedulers."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from cfsp_framework.api.components import RecoveryScheduler
from cfsp_framework.api.data import BlockSummary, RecoveryPlan, TrainableBlock
from cfsp_framework.api.records import BlockPlan, ModelIdentity, PruningPlan
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.selection import schedule_recovery
from cfsp_framework.testing.contract import ComponentContract, checked_by_host, configure, run_twice
from cfsp_framework.testing.errors import ContractError, NotApplicable

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Pruned:
    """A pruned model as a scheduler sees it."""

    label: str
    blocks: tuple[TrainableBlock, ...]
    plan: PruningPlan
    summaries: tuple[BlockSummary, ...]

    def __str__(self) -> str:
        return self.label


class RecoverySchedulerContract(ComponentContract):
    """Set ``component = TheScheduler()``."""

    component: ClassVar[RecoveryScheduler | None] = None
    kind: ClassVar[str] = "recovery"

    def schedule(
        self, component: RecoveryScheduler | ConfiguredComponent[RecoveryScheduler], case: Pruned
    ) -> RecoveryPlan | None:
        """Return the scheduler's plan, checked by the host; None if it refuses with an error of this package."""
        try:
            with checked_by_host(case, may_refuse=True):
                return schedule_recovery(configure(component), case.summaries, case.plan, case.blocks)
        except NotApplicable:
            return None

    def test_a_plan_that_fits_the_model(self, component: RecoveryScheduler) -> None:
        """Blocks that exist, each once, targets that exist, at least one block trained; or None."""
        for case in pruned_models():
            self.schedule(component, case)

    def test_ranks_are_within_the_matrices_and_the_budget(self, component: RecoveryScheduler) -> None:
        """No rank above what a matrix has; with an option ``rank``, no more parameters than that rank everywhere."""
        trained = False
        limit: object = getattr(component, "rank", None)
        for case in pruned_models():
            plan = self.schedule(component, case)
            if plan is None or plan.full:
                continue
            trained = True
            ranks = {block.block: block.rank for block in plan.blocks}
            parameters = parameters_per_rank = 0
            for block in case.blocks:
                shapes, rank = target_shapes(plan, block), ranks.get(block.block, 0)
                largest = min((min(shape[-2:]) for shape in shapes.values()), default=0)
                if rank > largest:
                    raise ContractError(
                        f"schedule() gives block {block.block} the rank {rank}, but its smallest matrix has "
                        f"{largest}; cap the rank there: min(shape[-2:])."
                    )
                adapter = sum(map(adapter_parameters, shapes.values()))
                parameters += rank * adapter
                parameters_per_rank += adapter
            if isinstance(limit, int) and parameters > limit * parameters_per_rank:
                raise ContractError(
                    f"schedule() trains {parameters} parameters, and rank={limit} in every block would be "
                    f"{limit * parameters_per_rank}; an option called `rank` is the budget that makes schedulers "
                    "comparable. Give some blocks less, or give the option another name."
                )
        if not trained:
            raise NotApplicable("it trains no adapters")

    def test_the_plan_is_json(self, component: RecoveryScheduler) -> None:
        """It is written beside the checkpoint and read again."""
        for case in pruned_models():
            plan = self.schedule(component, case)
            if plan is not None and _reread(plan) != plan:
                raise ContractError(
                    "The RecoveryPlan changes in JSON; use plain ints, floats, strings and tuples in it."
                )

    def test_plans_without_measurements_or_importance(self, component: RecoveryScheduler) -> None:
        """`cfsp recover` has no summaries, and some allocators have no importance."""
        for case in pruned_models():
            if not case.summaries or case.plan.blocks[0].importance is None:
                self.schedule(component, case)

    def test_plan_and_blocks_are_left_alone(self, component: RecoveryScheduler) -> None:
        """The host reads them afterwards."""
        for case in pruned_models():
            original = copy.deepcopy((case.plan, case.blocks))
            self.schedule(component, case)
            if original != (case.plan, case.blocks):
                raise ContractError("schedule() changed the plan or the blocks it was given; work on copies.")

    def test_plans_are_the_same_every_time(self, component: RecoveryScheduler) -> None:
        """Plans depend on nothing that ran before, and change no global setting."""
        first, second = run_twice(component, lambda c: self.schedule(c, pruned_models()[0]))
        if first != second:
            raise ContractError(
                "schedule() returned different plans for the same model; keep no state on the component."
            )

    def test_requires_nothing(self, component: RecoveryScheduler) -> None:
        """It sees summaries of what other components measured; nothing is measured for it."""
        if required := component.required():
            names = ", ".join(sorted(statistic.name for statistic in required))
            raise ContractError(f"A recovery scheduler requires {names}, which is not measured for it; remove it.")


def pruned_models() -> list[Pruned]:
    """Make gated, plain and mixture models, with and without measurements, importance and attention."""
    gated: Shapes = {"mlp.gate_proj": (0, 32), "mlp.up_proj": (0, 32), "mlp.down_proj": (32, 0)}
    plain: Shapes = {"ffn.w1": (0, 32), "ffn.w2": (32, 0)}
    experts: Shapes = {"moe.gate_up": (4, -2, 32), "moe.down": (4, 32, 0)}
    return [
        _make_pruned("a gated model", gated, (40, 24, 48, 16), importance=True, measured=True),
        _make_pruned("a gated model of one block", gated, (24,), importance=True, measured=True),
        _make_pruned("a gated model, nothing measured", gated, (40, 24, 48, 16), importance=True, measured=False),
        _make_pruned("a plain model without importance", plain, (40, 24), importance=False, measured=True),
        _make_pruned("a mixture of experts without attention", experts, (32, 24), importance=True, measured=False),
        _make_pruned("a model without removed channels", gated, (64, 64), importance=False, measured=False),
    ]


def target_shapes(plan: RecoveryPlan, block: TrainableBlock) -> Shapes:
    """Return the shapes of a block's matrices that get adapters."""
    shapes = {**block.feed_forward, **block.attention}
    return {path: shapes[path] for path in plan.targets or block.feed_forward if path in shapes}


def adapter_parameters(shape: tuple[int, ...]) -> int:
    """Return the number of parameters of an adapter of rank 1."""
    experts = shape[0] if len(shape) == 3 else 1
    return experts * sum(shape[-2:])


def _reread(plan: RecoveryPlan) -> RecoveryPlan | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's; the comparison of both plans says the same
        try:
            return RecoveryPlan.model_validate_json(plan.to_json())
        except ValueError:
            return None


def _make_pruned(label: str, shapes: Shapes, kept: Sequence[int], *, importance: bool, measured: bool) -> Pruned:
    """Make a model whose matrices have the kept width where ``shapes`` has 0, and twice of it where it has -2."""
    width, path = 64, next(iter(shapes)).rpartition(".")[0]
    entries, blocks, summaries = list[BlockPlan](), list[TrainableBlock](), list[BlockSummary]()
    mixture = len(next(iter(shapes.values()))) == 3
    for block, count in enumerate(kept):
        matrices = {name: tuple({0: count, -2: 2 * count}.get(n, n) for n in shape) for name, shape in shapes.items()}
        attention = {} if mixture else {f"self_attn.{name}_proj": (32, 32) for name in "qkvo"}
        blocks.append(TrainableBlock(block, matrices, attention))
        scores = torch.rand(width, generator=torch.Generator().manual_seed(block))  # (F,)
        summaries.append(BlockSummary(block, path, width, tokens=128, statistics={}, scores=scores))
        entries += [
            BlockPlan(
                block=block,
                path=f"{path}.{expert}" if mixture else path,
                width=width,
                importance=0.1 + 0.05 * block if importance else None,
                kept=tuple(range(count)),
            )
            for expert in range(4 if mixture else 1)
        ]
    return Pruned(label, tuple(blocks), build_plan(entries), tuple(summaries) if measured else ())


def build_plan(blocks: Iterable[BlockPlan], **changes: object) -> PruningPlan:
    """Make a pruning plan of these blocks for a tiny Llama; ``changes`` replace other fields."""
    values: dict[str, object] = {
        "model": ModelIdentity(source="tiny", family="llama", fingerprint="", parameters=0),
        "calibration": None,
        "ratio": 0.5,
        "budget": "channels",
        "round_to": 1,
        "seed": 0,
        "components": {},
        "versions": {},
        "blocks": tuple(blocks),
    }
    return PruningPlan.model_validate(values | changes)
