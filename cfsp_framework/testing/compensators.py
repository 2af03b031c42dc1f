"""The contract of compensators."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Compensator
from cfsp_framework.api.data import BlockStatistics, FeedForward, Statistic, Update
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.selection import get_stream, get_target_mix
from cfsp_framework.pruning.compensation import compensate
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
from cfsp_framework.testing.criteria import shown_tensors
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.guards import check_reads, read_only, record_reads
from cfsp_framework.testing.samples import FORMS, Case, Sample, compute_output, make_sample, weights_of

_ERROR_SLACK = 1e-3
"""Share of plain pruning's error by which a measured error may exceed it through rounding."""
CASES: tuple[Case, ...] = (
    *(Case(form=form, seed=seed) for seed, form in enumerate(FORMS)),
    Case(dtype=torch.bfloat16),
    Case(form="plain", dtype=torch.bfloat16),
    Case(windows=5),
    Case(dead=3),
    Case(silent=True),
    Case(hidden=1, channels=7),
)


class CompensatorContract(ComponentContract):
    """Set ``component = TheCompensator()``."""

    component: ClassVar[Compensator | None] = None
    kind: ClassVar[str] = "compensator"

    def update(self, component: Compensator, sample: Sample, kept: Tensor, given: object = None) -> Update:
        """Return the update of a sample that keeps the channels ``kept (K,)``, checked by the host."""
        return _compensate(component, sample.feed_forward, kept, self.measure(component, sample), given)

    def test_an_update_of_the_right_shapes(self, component: Compensator) -> None:
        """Tensors of the kept channels, finite: with and without gate and biases, in bfloat16, dead or silent."""

        def check(case: Case) -> None:
            if case.tokens and case.channels > 1:
                for count in {1, case.channels - 1}:
                    self.update(component, make_sample(case), choose_kept(case.channels, count), case)

        for_each_case(check, CASES)

    def test_weights_and_statistics_are_left_alone(self, component: Compensator) -> None:
        """The tensors of a feed-forward are the model's own."""
        for case in CASES:
            sample, kept = make_sample(case), choose_kept(case.channels)
            statistics = self.measure(component, sample)
            with read_only("compensate()", {**shown_tensors(sample.feed_forward, statistics), "kept": kept}):
                _compensate(component, sample.feed_forward, kept, statistics, case)

    def test_keeping_everything_changes_nothing(self, component: Compensator) -> None:
        """Without removed channels, which the host never asks about, there is nothing to compensate."""
        sample = make_sample()
        kept, statistics = torch.arange(sample.feed_forward.width), self.measure(component, sample)  # (F,)
        with (
            torch.no_grad(),
            checked_by_host("all channels are kept", may_refuse=True),
            configure(component).call_component("compensate()"),
        ):
            update = component.compensate(sample.feed_forward, kept, statistics)
        pruned = _apply(sample.feed_forward, kept, update)
        if not close(
            compute_output(pruned, sample.held_out), compute_output(sample.feed_forward, sample.held_out), 1e-2
        ):
            raise ContractError(
                "compensate() changes the feed-forward's output although all channels are kept; compute what it adds "
                "from the removed channels alone."
            )

    def test_errors_reported_are_true_and_no_worse(self, component: Compensator) -> None:
        """Where errors are reported, a change that is returned lowers the error on held-out tokens."""
        reported = False
        for case in (Case(), Case(form="plain", seed=3), Case(form="conv1d", windows=40, seed=4)):
            sample, kept = make_sample(case), choose_kept(case.channels, case.channels * 3 // 4)
            update = self.update(component, sample, kept)
            if (update.error is None) != (update.error_plain is None):
                raise ContractError("compensate() reports one error without the other; give both, or none.")
            if update.error is None or update.error_plain is None:
                continue
            reported = True
            if min(update.error, update.error_plain) < 0:
                raise ContractError(f"compensate() reports a negative error, {min(update.error, update.error_plain)}.")
            if not _tensors(update):
                continue
            target = compute_output(sample.feed_forward, sample.held_out)  # (n, D)
            measured, plain = (
                float(
                    (compute_output(_apply(sample.feed_forward, kept, change), sample.held_out) - target).square().sum()
                )
                for change in (update, Update())
            )
            if update.error > update.error_plain or measured > plain * (1 + _ERROR_SLACK):
                raise ContractError(
                    f"compensate() returned a change that makes the output on held-out tokens worse: squared error "
                    f"{measured:.4g}, and {plain:.4g} without it (reported: {update.error:.4g} and "
                    f"{update.error_plain:.4g}). Judge on the held-out statistics; if the change does not help, return "
                    "both errors without tensors."
                )
        if not reported:
            raise NotApplicable("it reports no errors")

    def test_reads_what_it_requires_and_nothing_else(self, component: Compensator) -> None:
        """Measuring a statistic takes time in a pass over the data, and some are as large as a weight matrix."""
        reads = set[Statistic]()
        recorder = record_reads(component, "compensate", reads)
        for case in (Case(), Case(form="plain"), Case(windows=5)):
            sample = make_sample(case)
            statistics = self.measure(component, sample)
            _compensate(recorder, sample.feed_forward, choose_kept(case.channels), statistics, case)
        check_reads(frozenset(component.required()), reads, "compensate()")

    def test_updates_are_the_same_every_time(self, component: Compensator) -> None:
        """Updates depend on nothing that ran before, and change no global setting."""
        sample, kept = make_sample(), choose_kept(12)
        statistics = self.measure(component, sample)
        first, second = run_twice(component, lambda c: _compensate(c, sample.feed_forward, kept, statistics))
        for name, tensor in _tensors(first).items():
            repeated = getattr(second, name)
            if repeated is None or not torch.equal(tensor, repeated):
                raise ContractError(
                    f"compensate() returned different updates for the same input (`{name}` differs). Keep no state on "
                    "the component, and draw with generator=feed_forward.generator()."
                )

    def test_updates_follow_the_channels(self, component: Compensator) -> None:
        """Channels in another order give the same function."""
        sample, kept = make_sample(Case(form="plain")), choose_kept(12)
        order = permutation(12)
        other, moved = sample.permuted(order), torch.isin(order, kept).nonzero().flatten()  # (K,), new places of kept
        left = _apply(sample.feed_forward, kept, self.update(component, sample, kept))
        right = _apply(other.feed_forward, moved, self.update(component, other, moved))
        if not close(compute_output(left, sample.held_out), compute_output(right, sample.held_out), 2e-2):
            raise ContractError(
                "compensate() depends on the position of a channel, not only on its weights and statistics; index with "
                "`kept`, which is ascending, and nothing else."
            )

    def test_stream_and_target_are_possible(self, component: Compensator) -> None:
        """``stream()`` and ``target_mix()`` return what the host can use."""
        with checked_by_host():
            get_stream(configure(component))
            mix = get_target_mix(configure(component))
        if not 0 <= mix <= 1:
            raise ContractError(f"target_mix() returned {mix}; it is a share, in [0, 1].")

    def test_works_wherever_the_model_is(self, component: Compensator) -> None:
        """Weights, statistics and ``kept`` are on the device that ran the block, for example a GPU."""
        sample = make_sample(Case(form="plain"))
        statistics = self.measure(component, sample)
        with other_device():
            _compensate(component, sample.moved("cuda").feed_forward, choose_kept(12), statistics.to("cuda"))

    def test_works_on_whole_models(self, component: Compensator) -> None:
        """On blocks of tiny models of several families, one with experts."""
        for name in models.TINY:
            models.compensate_block(component, name, self.find_collectors(component))


def choose_kept(channels: int, count: int | None = None) -> Tensor:
    """Return ``count`` channel indices ``(K,)``, by default two thirds of all, ascending; channel 0 is removed."""
    count = max(1, channels * 2 // 3) if count is None else count
    order = torch.randperm(channels - 1, generator=torch.Generator().manual_seed(count)) + 1  # (F - 1,)
    return order[:count].sort().values


def _compensate(
    component: Compensator | ConfiguredComponent[Compensator],
    feed_forward: FeedForward,
    kept: Tensor,
    statistics: BlockStatistics,
    given: object = None,
) -> Update:
    with checked_by_host(given, may_refuse=True):
        return compensate(configure(component), feed_forward, kept, statistics)


def _tensors(update: Update) -> dict[str, Tensor]:
    return {f.name: value for f in fields(update) if isinstance(value := getattr(update, f.name), Tensor)}


def _apply(feed_forward: FeedForward, kept: Tensor, update: Update) -> FeedForward:
    """Return the pruned feed-forward with the update in it, float32."""
    narrow = {
        name: weight[:, kept] if name == "down" else weight if name == "down_bias" else weight[kept]
        for name, weight in weights_of(feed_forward).items()
    }
    weights: dict[str, Any] = {name: weight.float() for name, weight in (narrow | _tensors(update)).items()}
    return replace(feed_forward, **weights)
