"""Every built-in component keeps its contract, and every check fails on a defect planted for it."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from cfsp_framework import (
    Allocator,
    BlockRecovery,
    BlockStatistics,
    BlockSummary,
    Budget,
    Collector,
    Compensator,
    Component,
    Criterion,
    Event,
    FeedForward,
    Observer,
    PruningPlan,
    RecoveryPlan,
    RecoveryScheduler,
    RunFailed,
    Site,
    Statistic,
    TrainableBlock,
    Update,
)
from cfsp_framework.statistics import (
    ANGULAR_DISTANCE,
    COSINE_DISTANCE,
    DOWN_INPUT_MEAN,
    DOWN_INPUT_SQUARES,
    MSE_DISTANCE,
)
from cfsp_framework.testing import CONTRACTS, ComponentContract, ContractError, NotApplicable, only
from cfsp_framework.testing.check import find_target
from cfsp_framework.testing.contract import describe, variants
from helpers.runs import invoke

QUICK: dict[str, dict[str, Any]] = {"local-reconstruction": {"steps": 20}}
"""Options that only make a component faster."""


def built_in() -> list[Any]:
    """Every component, with its default options and every value of its switches."""
    found = []
    for registry in only().registries:
        for name, cls in registry.items():
            made = [cls.model_validate(QUICK[name])] if name in QUICK else list(variants(cls))
            found += [pytest.param(one, id=f"{registry.kind}-{describe(one)}") for one in made]
    return found


CHECKS = [(kind, name) for kind, contract in CONTRACTS.items() for name in contract.checks()]


@pytest.mark.parametrize("component", built_in())
def test_every_built_in_component_keeps_its_contract(component: Any) -> None:
    contract = CONTRACTS[component.kind]()
    for name in contract.checks():
        try:
            getattr(contract, name)(component)
        except NotApplicable:
            continue
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


# --- what each check finds -------------------------------------------------------------------------------------------

ODD = Statistic("odd", summary="planted by this test")
CALLS = count(1)


def planted(base: type[Component], method: str, change: Callable[..., Any] | None = None, **attributes: Any) -> Any:
    """Derive a component with a defect: its method returns ``change(method of base, *arguments)``."""
    namespace = {"__doc__": "Planted.", "__module__": __name__, **attributes}
    if change is not None:
        original = getattr(base, method)
        namespace[method] = lambda self, *arguments: change(partial(original, self), *arguments)
    return type(f"Planted{next(CALLS)}", (base,), namespace)


class Good(Criterion):
    """Keep all promises of a criterion."""

    name: ClassVar[str] = "good"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_SQUARES})

    power: float = Field(default=1.0, description="of the norm")

    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Any:
        norm = (statistics[DOWN_INPUT_SQUARES] / statistics.tokens).sqrt()  # (F,)
        return feed_forward.down.float().abs().sum(0) * norm


class UndescribedOption(Good):
    """Have an option without a description."""

    power: float = 1.0


class ListOption(Good):
    """Have an option that cannot be typed."""

    powers: tuple[int, ...] = Field(default=(1, 2), description="some")


def criterion(change: Callable[..., Any] | None = None, **attributes: Any) -> Any:
    return planted(Good, "score", change, **attributes)


def do_first(action: Callable[[FeedForward, BlockStatistics], object]) -> Any:
    """Derive a criterion that does something before it scores."""
    return criterion(lambda score, f, s: (action(f, s), score(f, s))[1])


def fail_at_third_expert(method: Callable[..., Any], feed_forward: FeedForward, *arguments: Any) -> Any:
    if feed_forward.expert == 2:  # samples have two experts at most
        raise RuntimeError("a third expert")
    return method(feed_forward, *arguments)


def add_squares(inputs: Tensor) -> Tensor:
    return inputs.double().square().sum(0)  # (F,)


class _Sum:
    """Sum a term of each window, the squares of its inputs by default."""

    def __init__(
        self, term: Callable[[Tensor], Tensor] = add_squares, finish: Callable[[Tensor], Tensor] = torch.clone
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.term, self.finish = term, finish

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        term = self.term(inputs)
        self.sums["squares"] = self.sums["squares"] + term if self.sums else term

    def value(self, tokens: int) -> Any:
        return self.finish(self.sums["squares"].float())


class GoodCollector(Collector):
    """Keep all promises of a collector."""

    name: ClassVar[str] = "good-collector"
    provides: ClassVar[Statistic] = ODD
    site: ClassVar[Site] = Site.DOWN_PROJECTION

    def start(self) -> Any:
        return _Sum()


def collector(accumulator: Callable[[], Any], **attributes: Any) -> Any:
    return planted(GoodCollector, "start", lambda start: accumulator(), **attributes)


def summing(*functions: Callable[[Tensor], Tensor], **attributes: Any) -> Any:
    """Derive a collector that sums another term, or changes its sum."""
    return collector(lambda: _Sum(*functions), **attributes)


class _Beside(_Sum):
    """Keep a sum outside of ``sums``."""

    more: Any = 0

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        super().update(inputs, outputs)
        self.more = self.more + add_squares(inputs)

    def value(self, tokens: int) -> Any:
        return self.more.float()


class _NeedsTokens(_Sum):
    """Skip windows without tokens."""

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        if len(inputs):
            super().update(inputs, outputs)


class _Keeps(_Sum):
    """Keep the inputs until the end."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs.append(inputs)

    def value(self, tokens: int) -> Any:
        return add_squares(torch.cat(self.inputs)).float()


SHARED = _Sum()


class GoodAllocator(Allocator):
    """Keep all promises of an allocator."""

    name: ClassVar[str] = "good-allocator"
    requires: ClassVar[frozenset[Statistic]] = frozenset({ANGULAR_DISTANCE})

    def importance(self, summaries: Sequence[BlockSummary]) -> Any:
        return [summary.statistics[ANGULAR_DISTANCE] for summary in summaries]

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Any:
        return [1 - budget.ratio for _ in summaries]


def allocator(share: Callable[[BlockSummary, float], float], **attributes: Any) -> Any:
    """Derive an allocator with the share of each block from its summary and the ratio."""
    return planted(
        GoodAllocator, "allocate", lambda _, s, budget: [share(one, budget.ratio) for one in s], **attributes
    )


class GoodCompensator(Compensator):
    """Keep all promises of a compensator: the mean output of the removed channels becomes a bias."""

    name: ClassVar[str] = "good-compensator"
    requires: ClassVar[frozenset[Statistic]] = frozenset({DOWN_INPUT_MEAN})

    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Any:
        removed = torch.ones(feed_forward.width, device=kept.device)  # (F,)
        removed[kept] = 0
        lost = feed_forward.down.float() @ (statistics[DOWN_INPUT_MEAN] * removed)  # (D,)
        return Update(down_bias=lost if feed_forward.down_bias is None else feed_forward.down_bias.float() + lost)


def compensator(change: Callable[..., Any] | None = None, **attributes: Any) -> Any:
    return planted(GoodCompensator, "compensate", change, **attributes)


def compensator_adding(changes: Callable[[FeedForward, Tensor, Any], dict[str, Any]]) -> Any:
    """Derive a compensator that changes more in its update, unless all channels are kept."""

    def change(compensate: Callable[..., Update], feed_forward: FeedForward, kept: Tensor, statistics: Any) -> Update:
        update = compensate(feed_forward, kept, statistics)
        return update if len(kept) == feed_forward.width else replace(update, **changes(feed_forward, kept, update))

    return compensator(change)


def compensate_on_the_cpu(_: object, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
    removed = torch.ones(feed_forward.width)
    removed[kept.tolist()] = 0
    return Update(down_bias=feed_forward.down.float() @ (statistics[DOWN_INPUT_MEAN] * removed))


class GoodScheduler(RecoveryScheduler):
    """Keep all promises of a recovery scheduler."""

    name: ClassVar[str] = "good-scheduler"

    rank: int = Field(default=2, ge=1, description="in every block")

    def schedule(self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]) -> Any:
        return RecoveryPlan(blocks=tuple(BlockRecovery(block=one.block, rank=self.rank, alpha=4) for one in blocks))


def scheduler(change: Callable[[Any, Any, Any], Any], **attributes: Any) -> Any:
    """Derive a scheduler from a function of summaries, plan and blocks."""
    return planted(GoodScheduler, "schedule", lambda _, *arguments: change(*arguments), **attributes)


def ranks(*given: int, **options: Any) -> RecoveryPlan:
    blocks = tuple(BlockRecovery(block=block, rank=rank) for block, rank in enumerate(given))
    return RecoveryPlan(blocks=blocks).model_copy(update=options)


class GoodObserver(Observer):
    """Record all events."""

    name: ClassVar[str] = "good-observer"

    def start(self) -> Callable[[Event], None]:
        heard: list[Event] = []
        return heard.append


def observer(start: Callable[[], Any]) -> Any:
    return planted(GoodObserver, "start", lambda _: start())


def start_once() -> Callable[[Event], None]:
    Path("started").mkdir()  # fails the second time
    return lambda event: None


DEFECTS: list[tuple[Any, str, str]] = [
    (criterion(name="good:er"), "name_and_options_are_described", "name = 'good:er' cannot be typed"),
    (criterion(__doc__=None), "name_and_options_are_described", "has no docstring"),
    (UndescribedOption, "name_and_options_are_described", "option 'power' has no description"),
    (ListOption, "options_are_json_and_can_be_typed", "cannot be typed"),
    (
        criterion(lambda score, f, s: score(f, s)[:1].expand(f.hidden)),
        "one_finite_score_per_channel",
        "shape (8,), not (12,)",
    ),
    (criterion(lambda score, f, s: score(f, s).tolist()), "one_finite_score_per_channel", "is a list, not a tensor"),
    (
        criterion(lambda score, f, s: score(f, s) / s[DOWN_INPUT_SQUARES]),
        "one_finite_score_per_channel",
        "not finite: nan at [0]",
    ),
    (
        criterion(lambda score, f, s: score(f, s) * f.gate.float().abs().sum(1)),
        "one_finite_score_per_channel",
        "Given: Case(form='plain', channels=12",
    ),
    (do_first(lambda f, s: f.down.abs_()), "weights_and_statistics_are_left_alone", "wrote to `down` in score()"),
    (
        do_first(lambda f, s: f.up.data.abs_()),
        "weights_and_statistics_are_left_alone",
        "wrote to feed_forward.up; work on a copy",
    ),
    (
        do_first(lambda f, s: s[DOWN_INPUT_SQUARES].add_(1)),
        "weights_and_statistics_are_left_alone",
        "wrote to `down_input_squares` in score()",
    ),
    (
        criterion(requires=frozenset({DOWN_INPUT_SQUARES, DOWN_INPUT_MEAN})),
        "reads_what_it_requires_and_nothing_else",
        "never reads down_input_mean",
    ),
    (
        do_first(lambda f, s: s.get(DOWN_INPUT_MEAN)),
        "reads_what_it_requires_and_nothing_else",
        "reads down_input_mean, which `required()` does not name",
    ),
    (
        criterion(lambda score, f, s: score(f, s) + torch.rand(f.width) * 1e-3),
        "scores_are_the_same_every_time",
        "torch's global random numbers",
    ),
    (do_first(lambda f, s: random.random()), "scores_are_the_same_every_time", "Python's global random numbers"),
    (
        criterion(lambda score, f, s: score(f, s) * next(CALLS)),
        "scores_are_the_same_every_time",
        "different scores for the same weights and statistics",
    ),
    (
        do_first(lambda f, s: torch.set_default_dtype(torch.float64)),
        "scores_are_the_same_every_time",
        "changed the default dtype",
    ),
    (
        criterion(lambda score, f, s: score(f, s) + torch.arange(f.width)),
        "scores_follow_the_channels",
        "position of a channel",
    ),
    (
        criterion(lambda score, f, s: f.down.abs().sum(0).float() * s[DOWN_INPUT_SQUARES]),
        "half_precision_loses_nothing",
        "rounds in bfloat16",
    ),
    (
        criterion(lambda score, f, s: score(f, s) * torch.ones(f.width)),
        "works_wherever_the_model_is",
        "Make tensors where the inputs are",
    ),
    (
        criterion(fail_at_third_expert),
        "works_on_whole_models",
        "RuntimeError: a third expert. Given: a tiny mixtral model",
    ),
    (
        summing(add_squares, lambda total: total[None]),
        "the_value_is_as_the_statistic_says",
        "has shape (1, 12), not (12,); odd has the shape",
    ),
    (
        summing(lambda x: x.double().mT @ x.double(), provides=Statistic("matrix", "(F, F)")),
        "the_value_is_as_the_statistic_says",
        "Statistic('matrix', ..., heavy=True)",
    ),
    (collector(_Beside), "sums_of_shared_windows_add_up", "or set ordered = True"),
    (
        summing(lambda x: x.double().sum(0).square()),
        "the_split_into_windows_changes_nothing",
        "depends on how tokens are split into windows",
    ),
    (collector(_NeedsTokens), "windows_without_tokens", "value() at block 1, mlp: KeyError: 'squares'"),
    (collector(_Keeps), "inputs_are_left_alone_and_not_kept", "keeps a view"),
    (summing(lambda x: add_squares(x.abs_())), "inputs_are_left_alone_and_not_kept", "wrote to `inputs` in update()"),
    (collector(lambda: SHARED), "every_start_is_fresh_and_gives_the_same", "share state"),
    (summing(lambda x: x.square().sum(0)), "half_precision_is_added_up_in_full", "`sums['squares']` is torch.bfloat16"),
    (
        summing(add_squares, lambda total: total * torch.arange(1, len(total) + 1)),
        "the_value_follows_the_channels",
        "position of a channel",
    ),
    (
        summing(add_squares, lambda total: total * torch.ones(len(total))),
        "works_wherever_the_model_is",
        "does not work where the model is on a GPU",
    ),
    (
        summing(lambda x: add_squares(x.view(-1, 12)) if x.numel() else add_squares(x)),
        "works_on_whole_models",
        "has shape (12,), not (24,)",
    ),
    (
        planted(GoodAllocator, "allocate", lambda _, s, b: [1 - b.ratio]),
        "one_share_in_range_per_block",
        "returned 1 shares for 4 blocks",
    ),
    (allocator(lambda s, ratio: -0.5), "one_share_in_range_per_block", "share -0.5 for block 0"),
    (allocator(lambda s, ratio: 1 - ratio / 2), "the_budget_is_met", "keeps 0.950 on average"),
    (
        allocator(lambda s, ratio: min(0.98, 1 - ratio)),
        "nothing_goes_at_a_ratio_of_zero",
        "keeps 0.98 of a block at a ratio of 0",
    ),
    (
        allocator(lambda s, ratio: 0.2 if ratio == 0.25 else 1 - ratio),
        "a_higher_ratio_keeps_less",
        "the share removed, not the share kept",
    ),
    (
        allocator(lambda s, ratio: 1 - ratio + 0 * s.scores.mul_(2)[0].item()),
        "summaries_are_left_alone",
        "wrote to `block 0 mlp scores` in allocate()",
    ),
    (
        allocator(lambda s, ratio: 1 - ratio, requires=frozenset({ANGULAR_DISTANCE, COSINE_DISTANCE})),
        "reads_what_it_requires_and_nothing_else",
        "never reads cosine_distance",
    ),
    (
        allocator(lambda s, ratio: 1 - ratio + 0 * s.statistics.get(MSE_DISTANCE, 1)),
        "reads_what_it_requires_and_nothing_else",
        "reads mse_distance, which `required()` does not name",
    ),
    (
        allocator(lambda s, ratio: 1 - ratio + 0 * s.statistics[MSE_DISTANCE]),
        "reads_what_it_requires_and_nothing_else",
        "reads mse_distance, which `required()` does not name",
    ),
    (
        allocator(lambda s, ratio: 1 - ratio - 1e-9 * next(CALLS) * (ratio > 0)),
        "shares_are_the_same_every_time",
        "different shares for the same summaries",
    ),
    (
        planted(GoodAllocator, "importance", lambda importance, s: importance(s)[:1]),
        "importance_is_one_finite_number_per_block",
        "returned 1 importances for 4 blocks",
    ),
    (
        compensator_adding(lambda f, kept, update: {"down": f.down.clone()}),
        "an_update_of_the_right_shapes",
        "`down` at block 1 has shape (8, 12), not (8, 1)",
    ),
    (
        compensator_adding(lambda f, kept, update: {"gate": f.up[kept]}),
        "an_update_of_the_right_shapes",
        "`gate` at block 1 is for a gate",
    ),
    (
        compensator(lambda compensate, f, kept, s: (compensate(f, kept, s), kept.add_(1))[0]),
        "weights_and_statistics_are_left_alone",
        "wrote to `kept` in compensate()",
    ),
    (
        compensator(lambda _, f, kept, s: Update(down_bias=10 + f.down.float() @ s[DOWN_INPUT_MEAN])),
        "keeping_everything_changes_nothing",
        "although all channels are kept",
    ),
    (
        compensator_adding(
            lambda f, kept, update: {"down_bias": 100 + update.down_bias, "error_plain": 0.5, "error": 0.1}
        ),
        "errors_reported_are_true_and_no_worse",
        "makes the output on held-out tokens worse",
    ),
    (
        compensator_adding(lambda f, kept, update: {"error": 0.1}),
        "errors_reported_are_true_and_no_worse",
        "one error without the other",
    ),
    (
        compensator(requires=frozenset({DOWN_INPUT_MEAN, DOWN_INPUT_SQUARES})),
        "reads_what_it_requires_and_nothing_else",
        "never reads down_input_squares",
    ),
    (
        compensator_adding(lambda f, kept, update: {"down_bias": update.down_bias + torch.rand(f.hidden) * 1e-4}),
        "updates_are_the_same_every_time",
        "torch's global random numbers",
    ),
    (
        compensator_adding(lambda f, kept, update: {"down": f.down.float()[:, kept] * kept}),
        "updates_follow_the_channels",
        "position of a channel",
    ),
    (compensator(stream=lambda self: "dense"), "stream_and_target_are_possible", "not Stream.DENSE or Stream.PRUNED"),
    (compensator(compensate_on_the_cpu), "works_wherever_the_model_is", "does not work where the model is on a GPU"),
    (
        compensator(fail_at_third_expert),
        "works_on_whole_models",
        "RuntimeError: a third expert. Given: a tiny mixtral model",
    ),
    (scheduler(lambda s, p, b: ranks(*[1] * 9)), "a_plan_that_fits_the_model", "name each of 0 to 3 at most once"),
    (scheduler(lambda s, p, b: ranks(0)), "a_plan_that_fits_the_model", "return None if nothing is to be trained"),
    (
        scheduler(lambda s, p, b: ranks(1, targets=("mlp.down_proj",))),
        "a_plan_that_fits_the_model",
        "targets 'mlp.down_proj', which no block has",
    ),
    (
        scheduler(lambda s, p, b: ranks(3)),
        "ranks_are_within_the_matrices_and_the_budget",
        "rank=2 in every block would be",
    ),
    (
        scheduler(lambda s, p, b: ranks(30, 30)),
        "ranks_are_within_the_matrices_and_the_budget",
        "its smallest matrix has 24",
    ),
    (
        scheduler(lambda s, p, b: ranks(1, targets=[])),
        "the_plan_is_json",
        "The RecoveryPlan changes in JSON",
    ),
    (
        scheduler(lambda s, p, b: ranks(1) if s[0].width else None),
        "plans_without_measurements_or_importance",
        "IndexError: tuple index out of range. Given: a gated model, nothing measured",
    ),
    (
        scheduler(lambda s, p, b: (b[0].attention.clear(), ranks(1))[1]),
        "plan_and_blocks_are_left_alone",
        "changed the plan or the blocks",
    ),
    (
        scheduler(lambda s, p, b: ranks(1, steps=next(CALLS))),
        "plans_are_the_same_every_time",
        "different plans for the same model",
    ),
    (
        scheduler(lambda s, p, b: ranks(1), requires=frozenset({ANGULAR_DISTANCE})),
        "requires_nothing",
        "angular_distance",
    ),
    (
        observer(lambda: lambda event: isinstance(event, RunFailed) and vars(event)["plan"]),
        "every_event_is_heard",
        "failed in RunFailed: KeyError",
    ),
    (observer(lambda: None), "every_event_is_heard", "returned a NoneType, which cannot be called"),
    (observer(start_once), "every_start_is_fresh", "FileExistsError"),
]
"""A component with a defect, the check that finds it, and words of its message."""


@pytest.mark.parametrize("cls", [Good, GoodCollector, GoodAllocator, GoodCompensator, GoodScheduler, GoodObserver])
def test_what_the_defects_are_planted_in_is_sound(cls: type[Component]) -> None:
    contract = CONTRACTS[cls.kind]()
    assert {name: message for name in contract.checks() if (message := finding(contract, name, cls()))} == {}


@pytest.mark.parametrize(("cls", "check", "message"), DEFECTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_planted_defect_is_found_and_named(cls: type[Component], check: str, message: str) -> None:
    found = finding(CONTRACTS[cls.kind](), f"test_{check}", cls())
    assert message in (found or "nothing found")


def test_every_check_has_a_defect_it_finds() -> None:
    planted = {(cls.kind, f"test_{check}") for cls, check, _ in DEFECTS}
    common = {name for name in CONTRACTS["criterion"].checks() if name in CONTRACTS["recovery"].checks()}
    missing = {(kind, name) for kind, name in CHECKS if name not in common} - planted
    assert missing == set()
    assert common <= {name for _, name in planted}


def finding(contract: ComponentContract, check: str, component: Component) -> str | None:
    """What a check says of a component, or None."""
    try:
        getattr(contract, check)(component)
    except NotApplicable:
        return None
    except ContractError as error:
        return str(error)
    return None


# --- how contracts are used ------------------------------------------------------------------------------------------


def test_a_contract_without_a_component_says_what_it_needs() -> None:
    with pytest.raises(ContractError, match=r"needs `component = TheClass\(\)`, an instance of a criterion"):
        CONTRACTS["criterion"].instances()
    wrong: Any = type("Wrong", (CONTRACTS["criterion"],), {"component": GoodCollector()})
    with pytest.raises(ContractError, match="got GoodCollector"):
        wrong.instances()
    several: Any = type("Several", (CONTRACTS["criterion"],), {"components": (Good(), Good(power=2))})
    assert [describe(one) for one in several.instances()] == ["good", "good:power=2.0"]


def test_a_statistic_nobody_measures_is_said_to_be_missing() -> None:
    stray = type("Stray", (Good,), {"__doc__": "Planted.", "requires": frozenset({Statistic("stray")})})
    message = finding(CONTRACTS["criterion"](), "test_one_finite_score_per_channel", stray())
    assert message is not None
    assert "No collector provides the statistic 'stray'" in message
    assert "collectors = (TheCollector,)" in message


def test_the_contracts_need_neither_pytest_nor_hypothesis() -> None:
    script = (
        "import sys\n"
        "sys.modules['pytest'] = sys.modules['hypothesis'] = None\n"
        "from cfsp_criteria import WandaSp\n"
        "from cfsp_plugins.collectors import DownInputMean\n"
        "from cfsp_framework.testing import CONTRACTS\n"
        "for component in (WandaSp(), DownInputMean()):\n"
        "    for name in CONTRACTS[component.kind].checks():\n"
        "        getattr(CONTRACTS[component.kind](), name)(component)\n"
        "print('done')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr[-2000:]


OWN_TESTS = """
from cfsp_criteria import Flap, Random
from cfsp_framework.testing import Case, CriterionContract

pytest_plugins = ["cfsp_framework.testing"]


class TestFlap(CriterionContract):
    components = (Flap(), Flap(released=True))


class TestRandom(CriterionContract):
    component = Random()


def test_fixtures(host, make_sample, tiny_decoder, tiny_checkpoint, calibration_windows):
    assert "flap" in host().criteria
    assert make_sample(Case(form="plain")).feed_forward.gate is None
    assert len(tiny_decoder("gpt2").blocks) == 2
    assert (tiny_checkpoint() / "tokenizer.json").is_file()
    assert calibration_windows.shape == (12, 16)
"""


def test_pytest_runs_subclasses_and_fixtures(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text(OWN_TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-W", "error", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    checks = len(CONTRACTS["criterion"].checks())
    assert f"{3 * checks} passed, 1 skipped" in done.stdout, done.stdout[-3000:]
    assert "its scores depend on neither weights nor statistics: a control" in done.stdout


# --- cfsp plugins check ----------------------------------------------------------------------------------------------


CHECK = ("plugins", "check")
FIXTURES = Path(__file__).parents[1] / "fixtures"
BROKEN = '''
import torch
from cfsp_framework import Criterion, hookimpl


class Needy(Criterion):
    """Needs an option."""

    name = "needy"
    power: float

    def score(self, feed_forward, statistics):
        return feed_forward.down.float().norm(dim=0) ** self.power


class Writer(Criterion):
    """Writes."""

    name = "writer"

    def score(self, feed_forward, statistics):
        return feed_forward.down.abs_().float().sum(0)


@hookimpl
def cfsp_criteria():
    return [Needy, Writer]
'''


def test_a_file_is_checked_and_its_results_are_printed_as_a_table() -> None:
    result = invoke(*CHECK, FIXTURES / "down_norm.py")
    assert result.exit_code == 0, result.output
    assert re.search(r"│ scores follow the channels +│ pass +│", result.stdout)
    assert "1 component: 10 checks passed, 0 failed, 0 do not apply." in result.stdout
    assert max(map(len, result.stdout.splitlines()[1:])) <= 80


def test_a_defect_is_named_below_the_table_and_the_exit_code_is_1(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text(BROKEN)
    result = invoke(*CHECK, file)
    assert result.exit_code == 1
    assert re.search("FAIL criterion writer: .*weights and statistics are left alone", result.stdout)
    assert "wrote to `down` in score()" in result.stdout
    assert "Not checked: criterion 'needy' has options without a default (power); check it as needy:power=VALUE." in (
        result.stdout
    )
    report = json.loads(invoke(*CHECK, file, "--json").stdout)
    assert report["passed"] is False
    assert {"writer", "needy"} == {one["name"] for one in report["results"]}
    assert invoke(*CHECK, file, "-q").stdout == ""
    result = invoke(*CHECK, "needy:power=2", "-p", file)
    assert "The option 'power' has no description" in result.stdout
    assert "9 checks passed, 1 failed" in result.stdout


@pytest.mark.parametrize(
    ("target", "components"),
    [
        ("wanda-sp", {"wanda-sp"}),
        ("flap:released=true", {"flap:released=true"}),
        ("none", {"none"}),
        ("cfsp-allocators", None),
        ("cfsp_allocators", None),
    ],
)
def test_what_a_target_may_be(target: str, components: set[str] | None) -> None:
    found = find_target(target)
    if components is not None:
        assert {describe(one) for one in found.components} == components
    else:
        assert {one.kind for one in found.components} == {"allocator"}
        assert "cfsp:distance=mse" in {describe(one) for one in found.components}


def test_a_distribution_is_all_of_its_plugins_and_a_module_need_not_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_target("CFSP_Framework")
    assert {one.kind for one in found.components} == set(CONTRACTS)
    (tmp_path / "example_checked.py").write_text((FIXTURES / "down_norm.py").read_text())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [one.name for one in find_target("example_checked").components] == ["down-norm"]
    sys.modules.pop("example_checked")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["wanda-sq"], 2, "Did you mean 'wanda-sp'?"),
        (["flap:relased=true"], 2, "unknown option 'relased'"),
        (["nowhere.py"], 2, "nowhere.py"),
        (["example_not_there.x"], 2, "is not a plugin, component"),
        (["json"], 3, "implements no hook"),
    ],
)
def test_a_target_that_cannot_be_checked(words: list[str], code: int, message: str) -> None:
    result = invoke(*CHECK, *words)
    assert result.exit_code == code, result.output
    assert message in result.stderr
