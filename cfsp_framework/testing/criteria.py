"""The contract of criteria."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Criterion
from cfsp_framework.api.data import BlockStatistics, FeedForward, Statistic
from cfsp_framework.engine.collect import score
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.testing import models
from cfsp_framework.testing.contract import (
    ComponentContract,
    checked_by_host,
    close,
    configure,
    for_each_case,
    other_device,
    permutation,
    run_twice,
)
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.guards import check_reads, read_only, record_reads
from cfsp_framework.testing.samples import CASES, Case, Sample, make_sample, weights_of

_TOLERANCE = 1e-3
"""Share of the largest score that rounding may change."""


class CriterionContract(ComponentContract):
    """Set ``component = TheCriterion()``."""

    component: ClassVar[Criterion | None] = None
    kind: ClassVar[str] = "criterion"

    def scores(self, component: Criterion, sample: Sample, given: object = None) -> Tensor:
        """Return the scores ``(F,)`` of a sample, checked by the host."""
        return _score(component, sample.feed_forward, self.measure(component, sample), given)

    def test_one_finite_score_per_channel(self, component: Criterion) -> None:
        """``(F,)``, finite: with and without gate and biases, in bfloat16, for one channel, dead ones, no activity."""
        for_each_case(lambda case: self.scores(component, make_sample(case), case))

    def test_weights_and_statistics_are_left_alone(self, component: Criterion) -> None:
        """The tensors of a feed-forward are the model's own."""
        for case in CASES:
            sample = make_sample(case)
            statistics = self.measure(component, sample)
            with read_only("score()", shown_tensors(sample.feed_forward, statistics)):
                _score(component, sample.feed_forward, statistics, case)

    def test_reads_what_it_requires_and_nothing_else(self, component: Criterion) -> None:
        """Measuring a statistic takes time and memory in the pass over the data."""
        reads = set[Statistic]()
        recorder = record_reads(component, "score", reads)
        for case in CASES:
            sample = make_sample(case)
            _score(recorder, sample.feed_forward, self.measure(component, sample), case)
        check_reads(frozenset(component.required()), reads, "score()")

    def test_scores_are_the_same_every_time(self, component: Criterion) -> None:
        """Scores depend on nothing that ran before, and change no global setting."""
        sample = make_sample()
        statistics = self.measure(component, sample)
        first, second = run_twice(component, lambda c: _score(c, sample.feed_forward, statistics))
        if not torch.equal(first, second):
            raise ContractError(
                "score() returned different scores for the same weights and statistics. Keep no state on the component, "
                "and draw with generator=feed_forward.generator()."
            )

    def test_scores_follow_the_channels(self, component: Criterion) -> None:
        """Channels in another order have their scores in that order: a score belongs to its channel."""
        sample, other = make_sample(), make_sample(Case(form="plain", seed=7))
        scores = self.scores(component, sample)
        place = {name: getattr(sample.feed_forward, name) for name in ("block", "path", "expert", "seed")}
        if torch.equal(
            scores, self.scores(component, replace(other, feed_forward=replace(other.feed_forward, **place)))
        ):
            raise NotApplicable("its scores depend on neither weights nor statistics: a control")
        order = permutation(len(scores))
        moved = self.scores(component, sample.permuted(order))
        if not close(moved, scores[order], _TOLERANCE):
            worst = int((moved - scores[order]).abs().argmax())
            raise ContractError(
                "score() depends on the position of a channel, not only on its weights and statistics: channel "
                f"{int(order[worst])} scored {scores[order][worst].item():.4g}, and {moved[worst].item():.4g} with the "
                "channels in another order. Reduce over the hidden units, and use no index of the channel."
            )

    def test_half_precision_loses_nothing(self, component: Criterion) -> None:
        """Weights in bfloat16 score as the same numbers in float32 do."""
        sample = make_sample(Case(dtype=torch.bfloat16, channels=64, hidden=48, tokens=16))
        statistics = self.measure(component, sample)
        half = _score(component, sample.feed_forward, statistics, "a feed-forward in bfloat16")
        full = _score(component, sample.in_float32().feed_forward, statistics, "the same weights in float32")
        if not close(half, full, _TOLERANCE):
            raise ContractError(
                "score() rounds in bfloat16: its scores are off by "
                f"{float((half - full).abs().max() / full.abs().max()):.1%} of the largest. "
                "Start with feed_forward.down.float(), and sum afterwards."
            )

    def test_works_wherever_the_model_is(self, component: Criterion) -> None:
        """Weights and statistics are on the device that ran the block, for example a GPU."""
        sample = make_sample()
        statistics = self.measure(component, sample)
        with other_device():
            _score(component, sample.moved("cuda").feed_forward, statistics.to("cuda"))

    def test_works_on_whole_models(self, component: Criterion) -> None:
        """In a pass over tiny models of several families, one with experts; the batch size changes nothing."""
        collectors = self.find_collectors(component)
        for name in models.TINY:
            models.score_model(component, name, collectors, batch_size=4)
        single, batched = (models.score_model(component, "llama", collectors, batch_size=size) for size in (1, 4))
        if not all(close(left, right, _TOLERANCE) for left, right in zip(single, batched, strict=True)):
            raise ContractError(
                "score() returns other scores for another batch size, which should only change speed. If it reads a "
                "statistic of yours, its update() must not depend on how windows are batched."
            )


def _score(
    component: Criterion | ConfiguredComponent[Criterion],
    feed_forward: FeedForward,
    statistics: BlockStatistics,
    given: object = None,
) -> Tensor:
    with checked_by_host(given):
        return score(configure(component), feed_forward, statistics)


def shown_tensors(feed_forward: FeedForward, statistics: BlockStatistics) -> dict[str, Tensor]:
    """Return the tensors that a component sees, under the names that it uses for them."""
    weights = {f"feed_forward.{name}": tensor for name, tensor in weights_of(feed_forward).items()}
    return weights | {f"statistics.{statistic.name}": tensor for statistic, tensor in statistics.items()}
