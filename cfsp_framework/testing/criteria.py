"""What every criterion promises."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Criterion
from cfsp_framework.api.data import BlockStatistics, FeedForward, Statistic
from cfsp_framework.testing.contract import (
    ComponentContract,
    ContractError,
    NotApplicable,
    call_component,
    close,
    for_each_case,
    other_device,
    unwritten,
    usage,
    watched,
)
from cfsp_framework.testing.guards import unchanged_process
from cfsp_framework.testing.samples import CASES, Case, Sample, make_sample

_TOLERANCE = 1e-3
"""Of the largest score: how far a criterion may be off by rounding."""


class CriterionContract(ComponentContract):
    """``component = TheCriterion()``."""

    component: ClassVar[Criterion | None] = None
    kind: ClassVar[str] = "criterion"

    def scores(self, component: Criterion, sample: Sample, on: object = "") -> Tensor:
        """The scores of a sample, checked as far as the host checks them."""
        return _checked(
            component, sample.feed_forward, self.measured(component, sample), on or sample.feed_forward.path
        )

    def test_one_finite_score_per_channel(self, component: Criterion) -> None:
        """``(F,)``, finite: with and without gate and biases, in bfloat16, for one channel, dead ones, no activity."""
        for_each_case(lambda case: (self.scores(component, make_sample(case), case), None)[1])

    def test_weights_and_statistics_are_left_alone(self, component: Criterion) -> None:
        """The tensors of a feed-forward are the model's own."""
        for case in CASES:
            sample = make_sample(case)
            statistics = self.measured(component, sample)
            values = {one.name: value for one, value in statistics.items()}
            with (
                unwritten("score()", sample.tensors(), "feed_forward"),
                unwritten("score()", values, "statistics"),
            ):
                _score(component, sample.feed_forward, statistics, case)

    def test_reads_what_it_requires_and_nothing_else(self, component: Criterion) -> None:
        """Every statistic costs a part of the pass over the data."""
        reads, required = set[Statistic](), frozenset[Statistic]()
        for case in CASES:
            statistics = watched(self.measured(component, make_sample(case)))
            statistics.reads.clear()  # making the copy read them all
            required = frozenset(component.required())
            _score(component, make_sample(case).feed_forward, statistics, case)
            reads |= statistics.reads
        usage(required, reads, "score()")

    def test_scores_are_the_same_every_time(self, component: Criterion) -> None:
        """Whatever ran before, and it changes nothing for what runs after it."""
        sample = make_sample()
        with unchanged_process("score()"):
            first = self.scores(component, sample)
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            with unchanged_process("score()"):
                second = self.scores(component, sample)
        if not torch.equal(first, second):
            raise ContractError(
                "score() gave two answers for the same weights and statistics. Keep no state on the component, and "
                "draw with generator=feed_forward.generator()."
            )

    def test_scores_follow_the_channels(self, component: Criterion) -> None:
        """Channels in another order have their scores in that order: a score belongs to its channel."""
        sample, other = make_sample(), make_sample(Case(form="plain", seed=7))
        scores = self.scores(component, sample)
        unlike = Sample(**{**vars(other), "feed_forward": _same_place(other.feed_forward, sample.feed_forward)})
        if torch.equal(scores, self.scores(component, unlike)):
            raise NotApplicable("its scores depend on neither weights nor statistics: a control")
        order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
        moved = self.scores(component, sample.permuted(order))
        if not close(moved, scores[order], _TOLERANCE):
            worst = int((moved - scores[order]).abs().argmax())
            raise ContractError(
                "score() depends on where a channel is, not only on its weights and statistics: channel "
                f"{int(order[worst])} scored {scores[order][worst].item():.4g}, and {moved[worst].item():.4g} once the "
                "channels were in another order. Reduce over the hidden units, and use no index of the channel."
            )

    def test_half_precision_loses_nothing(self, component: Criterion) -> None:
        """Weights in bfloat16 score as the same numbers in float32 do."""
        sample = make_sample(Case(dtype=torch.bfloat16, channels=64, hidden=48, tokens=16))
        statistics = self.measured(component, sample)
        half = _checked(component, sample.feed_forward, statistics, "a feed-forward in bfloat16")
        whole = _checked(component, sample.in_float32().feed_forward, statistics, "the same in float32")
        if not close(half, whole, _TOLERANCE):
            raise ContractError(
                "score() rounds in bfloat16: its scores are off by "
                f"{float((half - whole).abs().max() / whole.abs().max()):.1%} of the largest. "
                "Start with feed_forward.down.float(), and sum afterwards."
            )

    def test_works_wherever_the_model_is(self, component: Criterion) -> None:
        """Weights and statistics are where the block ran, a GPU say."""
        sample = make_sample()
        statistics = self.measured(component, sample)
        with torch.no_grad(), other_device("score()", sample, statistics) as (feed_forward, moved):
            component.score(feed_forward, moved)

    def test_works_on_whole_models(self, component: Criterion) -> None:
        """In a pass over tiny models of several families, experts among them; the batch size changes nothing."""
        from cfsp_framework.testing import models

        for name in models.TINY:
            models.scores(component, name, self.found_collectors(component), batch_size=4)
        one, four = (
            models.scores(component, "llama", self.found_collectors(component), batch_size=size) for size in (1, 4)
        )
        for left, right in zip(one, four, strict=True):
            if not close(left, right, _TOLERANCE):
                raise ContractError(
                    "score() gives other scores for another batch size, which only changes speed. If a statistic of "
                    "your own is behind it, its update() must not depend on how windows are put together."
                )


def _score(component: Criterion, feed_forward: FeedForward, statistics: BlockStatistics, on: object) -> Any:
    with torch.no_grad(), call_component("score()", on):
        return component.score(feed_forward, statistics)


def _checked(component: Criterion, feed_forward: FeedForward, statistics: BlockStatistics, on: object) -> Tensor:
    """Scores ``(F,)`` in float32."""
    scores = _score(component, feed_forward, statistics, on)
    if not isinstance(scores, Tensor):
        raise ContractError(f"score() returned a {type(scores).__name__}; return a tensor of shape (F,). Given: {on}.")
    if scores.shape != (feed_forward.width,):
        raise ContractError(
            f"score() returned the shape {tuple(scores.shape)} for {feed_forward.width} channels and "
            f"{feed_forward.hidden} hidden units; return (F,) = ({feed_forward.width},). down is (D, F), up and gate are "
            f"(F, D). Given: {on}."
        )
    if scores.dtype is torch.bool or scores.is_complex():
        raise ContractError(f"score() returned {scores.dtype}; return numbers that can be ranked, say .float().")
    bad = scores.isfinite().logical_not().nonzero().flatten().tolist()
    if bad:
        raise ContractError(
            f"score() returned {scores[bad[0]].item()} for channel {bad[0]}. Guard what may be zero or negative: divide "
            f"by x.clamp(min=...), take roots of x.clamp(min=0). Given: {on}."
        )
    return scores.detach().float().cpu()


def _same_place(feed_forward: FeedForward, like: FeedForward) -> FeedForward:
    from dataclasses import replace

    return replace(feed_forward, block=like.block, path=like.path, expert=like.expert, seed=like.seed)
