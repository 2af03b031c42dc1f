"""The searching allocator on losses with a known best, and in a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cfsp_allocators import Search
from cfsp_framework import BlockSummary, Budget, PruningPlan, SearchingAllocator
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.pruning.planning import allocate, round_shares, total_to_keep
from cfsp_framework.testing import AllocatorContract
from helpers.runs import invoke
from helpers.types import MakeModel

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=25)


class TestContract(AllocatorContract):
    components = (Search(evaluations=12), Search(start="uniform", evaluations=1))


class KnownBest:
    """A fitness whose loss is the weighted square of what every block removes."""

    def __init__(
        self, weights: Sequence[float], budget: Budget, starts: Mapping[str, Sequence[float]], seed: int = 0
    ) -> None:
        self.starts, self.seed = starts, seed
        self.summaries = [BlockSummary(b, "mlp", 64, 1, {}, torch.rand(64)) for b in range(len(weights))]
        self.budget, self.asked = budget, list[tuple[int, ...]]()
        self._weights = weights

    def widths(self, shares: Sequence[float]) -> tuple[int, ...]:
        return round_shares(shares, self.summaries, self.budget)

    def __call__(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        rounded = [self.widths(shares) for shares in candidates]
        self.asked += rounded
        return [self.loss(widths) for widths in rounded]

    def loss(self, widths: Sequence[int]) -> float:
        return sum(w * (1 - width / 64) ** 2 for w, width in zip(self._weights, widths, strict=True))

    def run(self, search: Search) -> tuple[int, ...]:
        """Return the widths that the host would plan."""
        chosen = ConfiguredComponent(search, Origin("cfsp-allocators"))
        return self.widths(allocate(chosen, self.summaries, self.budget, self))


UNIFORM = {"uniform": [0.5] * 6}


def test_it_comes_near_the_best_allocation() -> None:
    weights = [8.0, 4.0, 2.0, 1.0, 1.0, 0.5]
    fitness = KnownBest(weights, Budget(0.5, 4), UNIFORM)
    # The least of sum w r^2 at a fixed sum of r removes in proportion to 1 / w, and no block more than all but a step.
    best = fitness.loss((58, 52, 40, 18, 18, 6))
    start = fitness.loss((32,) * 6)
    assert fitness.loss(fitness.run(Search(start="uniform", evaluations=150))) < best + 0.1 * (start - best)


@untimed
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=8),
    st.sampled_from([0.1, 0.3, 0.5, 0.8]),
    st.sampled_from([1, 4, 8]),
    st.integers(1, 40),
)
def test_never_worse_than_its_starts_within_its_budget_and_exact(
    weights: list[float], ratio: float, step: int, evaluations: int
) -> None:
    budget, blocks = Budget(ratio, step), len(weights)
    starts = {"uniform": [1 - ratio] * blocks, "tilted": [min(1.0, (1 - ratio) * (1 + b / 20)) for b in range(blocks)]}
    fitness = KnownBest(weights, budget, starts)
    widths = fitness.run(Search(evaluations=evaluations))
    asked = fitness.asked[: max(evaluations, 1)]
    assert len(asked) == len(set(asked)) == len(fitness.asked) <= evaluations
    assert fitness.loss(widths) == min(map(fitness.loss, asked))
    assert sum(widths) == total_to_keep([64] * blocks, budget)
    if evaluations > 1:
        assert fitness.loss(widths) <= min(fitness.loss(fitness.widths(shares)) for shares in starts.values())


def test_the_seed_decides_and_more_evaluations_go_on() -> None:
    weights = [8.0, 4.0, 2.0, 1.0, 1.0, 0.5]

    def asked(evaluations: int, seed: int = 0) -> list[tuple[int, ...]]:
        fitness = KnownBest(weights, Budget(0.5, 4), UNIFORM, seed)
        fitness.run(Search(start="uniform", evaluations=evaluations))
        return fitness.asked

    assert asked(20) == asked(40)[:20]
    assert asked(20) != asked(20, seed=1)


def test_time_ends_it_after_the_generation_that_runs() -> None:
    fitness = KnownBest([1.0, 2.0], Budget(0.5), {"uniform": [0.5, 0.5]})
    fitness.run(Search(start="uniform", evaluations=1000, seconds=1e-9))
    assert len(fitness.asked) == 1


@pytest.mark.parametrize("start", ["", "uniform+", "+"])
def test_starts_have_names(start: str) -> None:
    with pytest.raises(ValidationError, match=r"uniform\+cfsp"):
        Search(start=start)


# --- in a run --------------------------------------------------------------------------------------------------------

OPTIONS = ("--ratio", "0.5", "--samples", "20", "--seqlen", "24", "--round-to", "8", "--criterion", "magnitude")
SEARCH = ("--allocator", "search:evaluations=8,stride=1")


def test_plan_prune_and_a_resumed_run_agree(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    model, common = make_model("llama"), (*OPTIONS, "--calibration", calibration_text, *SEARCH)
    invoke("plan", model, tmp_path / "plan.json", *common)
    invoke("prune", model, tmp_path / "out", *common, "--resume", tmp_path / "kept")
    invoke("plan", model, tmp_path / "again.json", *common, "--resume", tmp_path / "kept")
    plan, pruned, again = (
        PruningPlan.model_validate_json((tmp_path / name).read_text())
        for name in ("plan.json", "out/pruning_plan.json", "again.json")
    )
    assert plan.blocks == pruned.blocks == again.blocks
    assert plan.search == pruned.search
    assert plan.search is not None
    assert again.search is not None
    assert plan.search.fitness <= min(plan.search.starts.values())
    assert (plan.search.evaluations, plan.search.windows) == (8, 2)
    assert plan.search.block_forwards > 0 == again.search.block_forwards
    assert "search:" in plan.components["allocator"]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("held-out windows" in note for note in report["notes"])


def test_streaming_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    result = invoke("prune", make_model("llama"), tmp_path / "out", *OPTIONS, *SEARCH, "--stream")
    assert result.exit_code == 2
    assert "--stream" in result.stderr
    assert "--plan" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("start", ["search", "none-such", "uniform+search"])
def test_starts_that_cannot_be_are_refused(start: str, make_model: MakeModel, tmp_path: Path) -> None:
    words = (*OPTIONS, "--allocator", f"search:start={start}")
    result = invoke("plan", make_model("llama"), tmp_path / "plan.json", *words)
    assert result.exit_code == 2
    assert start.removeprefix("uniform+") in result.stderr


def test_an_allocator_of_another_plugin_can_search(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    plugin = tmp_path / "halving.py"
    plugin.write_text(
        "from cfsp_framework import FitnessOptions, SearchingAllocator, hookimpl\n"
        "class Pick(SearchingAllocator):\n"
        '    "Take the better of two allocators."\n'
        "    name = 'pick'\n"
        "    def fitness(self):\n"
        "        return FitnessOptions('nll', windows=1)\n"
        "    def starts(self):\n"
        "        return ['uniform', 'error-curve']\n"
        "    def search(self, summaries, budget, fitness):\n"
        "        starts = list(fitness.starts.values())\n"
        "        return min(zip(fitness(starts), starts))[1]\n"
        "@hookimpl\n"
        "def cfsp_allocators():\n"
        "    return [Pick]\n"
    )
    words = (*OPTIONS, "--calibration", calibration_text, "-p", plugin, "--allocator", "pick")
    invoke("plan", make_model("llama"), tmp_path / "plan.json", *words)
    plan = PruningPlan.model_validate_json((tmp_path / "plan.json").read_text())
    assert plan.search is not None
    assert plan.search.metric == "nll"
    assert plan.search.fitness == min(plan.search.starts.values())
    assert {*plan.search.starts} == {"uniform", "error-curve"}


def test_it_refuses_to_allocate_without_a_model() -> None:
    assert issubclass(Search, SearchingAllocator)
    with pytest.raises(TypeError, match="search"):
        Search().allocate([], Budget(0.5))
