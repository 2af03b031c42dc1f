"""What every compensator promises."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Compensator
from cfsp_framework.api.data import FeedForward, Statistic, Stream, Update
from cfsp_framework.errors import CfspError
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
from cfsp_framework.testing.samples import FORMS, Case, Sample, make_sample, output, tensors_of

_ERROR_SLACK = 1e-3
"""By how much of plain pruning's error a measured one may exceed it: rounding."""
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
    """``component = TheCompensator()``."""

    component: ClassVar[Compensator | None] = None
    kind: ClassVar[str] = "compensator"

    def update(self, component: Compensator, sample: Sample, kept: Tensor, on: object = "") -> Update:
        """What changes in a sample, checked as far as the host checks it."""
        statistics = self.measured(component, sample)
        return _checked(_called(component, sample.feed_forward, kept, statistics, on), sample.feed_forward, kept, on)

    def test_an_update_of_the_right_shapes(self, component: Compensator) -> None:
        """Tensors of the kept channels, finite: with and without gate and biases, in bfloat16, dead or silent."""

        def check(case: Case) -> None:
            if case.tokens and case.channels > 1:
                for count in {1, case.channels - 1}:
                    self.update(component, make_sample(case), keep(case.channels, count), case)

        for_each_case(check, CASES)

    def test_weights_and_statistics_are_left_alone(self, component: Compensator) -> None:
        """The tensors of a feed-forward are the model's own."""
        for case in CASES:
            sample, kept = make_sample(case), keep(case.channels)
            statistics = self.measured(component, sample)
            values = {one.name: value for one, value in statistics.items()}
            with (
                unwritten("compensate()", sample.tensors(), "feed_forward"),
                unwritten("compensate()", values, "statistics"),
                unwritten("compensate()", {"channels": kept}, "kept"),
            ):
                _called(component, sample.feed_forward, kept, statistics, case)

    def test_keeping_everything_changes_nothing(self, component: Compensator) -> None:
        """There is nothing to make up for."""
        sample = make_sample()
        kept = torch.arange(sample.feed_forward.width)
        after = _applied(sample.feed_forward, kept, self.update(component, sample, kept))
        if not close(output(after, sample.held_out), output(sample.feed_forward, sample.held_out), 1e-2):
            raise ContractError(
                "compensate() changes the feed-forward's output though all channels are kept; what it adds is to be made "
                "from the removed channels alone."
            )

    def test_errors_reported_are_true_and_no_worse(self, component: Compensator) -> None:
        """A change that is returned lowers the error on held-out tokens, where errors are reported."""
        reported = False
        for case in (Case(), Case(form="plain", seed=3), Case(form="conv1d", windows=40, seed=4)):
            sample, kept = make_sample(case), keep(case.channels, case.channels * 3 // 4)
            update = self.update(component, sample, kept)
            if (update.error is None) != (update.error_plain is None):
                raise ContractError("compensate() reports one error without the other; give both, or none.")
            if update.error is None or update.error_plain is None:
                continue
            reported = True
            if min(update.error, update.error_plain) < 0:
                raise ContractError(f"compensate() reports a negative error, {min(update.error, update.error_plain)}.")
            if not _changes(update):
                continue
            target = output(sample.feed_forward, sample.held_out)  # (n, D)
            found, plain = (
                float((output(_applied(sample.feed_forward, kept, one), sample.held_out) - target).square().sum())
                for one in (update, Update())
            )
            if update.error > update.error_plain or found > plain * (1 + _ERROR_SLACK):
                raise ContractError(
                    f"compensate() returned a change that makes the output on held-out tokens worse: {found:.4g} squared "
                    f"error, {plain:.4g} without it ({update.error:.4g} and {update.error_plain:.4g} were reported). "
                    "Judge on the held-out statistics, and return both errors without tensors where the change does "
                    "not help."
                )
        if not reported:
            raise NotApplicable("it reports no errors")

    def test_reads_what_it_requires_and_nothing_else(self, component: Compensator) -> None:
        """Every statistic costs a part of a pass over the data, and some are as large as a weight matrix."""
        reads = set[Statistic]()
        for case in (Case(), Case(form="plain"), Case(windows=5)):
            sample = make_sample(case)
            statistics = watched(self.measured(component, sample))
            statistics.reads.clear()
            _called(component, sample.feed_forward, keep(case.channels), statistics, case)
            reads |= statistics.reads
        usage(frozenset(component.required()), reads, "compensate()")

    def test_updates_are_the_same_every_time(self, component: Compensator) -> None:
        """Whatever ran before, and it changes nothing for what runs after it."""
        sample, kept = make_sample(), keep(12)
        with unchanged_process("compensate()"):
            first = self.update(component, sample, kept)
        with torch.random.fork_rng():
            torch.manual_seed(12345)
            with unchanged_process("compensate()"):
                second = self.update(component, sample, kept)
        for name, value in _tensors(first).items():
            again = getattr(second, name)
            if again is None or not torch.equal(value, again):
                raise ContractError(
                    f"compensate() gave two answers for the same input (`{name}` differs). Keep no state on the "
                    "component, and draw with generator=feed_forward.generator()."
                )

    def test_updates_follow_the_channels(self, component: Compensator) -> None:
        """Channels in another order give the same function."""
        sample, kept = make_sample(Case(form="plain")), keep(12)
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        other = sample.permuted(order)
        its = torch.isin(order, kept).nonzero().flatten()  # (K,): where the kept channels are now
        left = output(_applied(sample.feed_forward, kept, self.update(component, sample, kept)), sample.held_out)
        right = output(_applied(other.feed_forward, its, self.update(component, other, its)), sample.held_out)
        if not close(left, right, 2e-2):
            raise ContractError(
                "compensate() depends on where a channel is, not only on its weights and statistics; index with `kept`, "
                "which is ascending, and nothing else."
            )

    def test_stream_and_target_are_possible(self, component: Compensator) -> None:
        """``stream()`` and ``target_mix()`` return what the host can use."""
        with call_component("stream() or target_mix()", "nothing"):
            stream: object = component.stream()
            mix: Any = component.target_mix()
        if not isinstance(stream, Stream):
            raise ContractError(f"stream() returned {stream!r}; return Stream.DENSE or Stream.PRUNED.")
        if not 0 <= mix <= 1:
            raise ContractError(f"target_mix() returned {mix}; it is a share, in [0, 1].")

    def test_works_wherever_the_model_is(self, component: Compensator) -> None:
        """Weights, statistics and ``kept`` are where the block ran, a GPU say."""
        from cfsp_framework.testing.contract import away

        sample = make_sample(Case(form="plain"))
        statistics = self.measured(component, sample)
        with torch.no_grad(), other_device("compensate()", sample, statistics) as (feed_forward, moved):
            component.compensate(feed_forward, away(keep(12)), moved)

    def test_works_on_whole_models(self, component: Compensator) -> None:
        """On blocks of tiny models of several families, experts among them."""
        from cfsp_framework.testing import models

        for name in models.TINY:
            models.update(component, name, self.found_collectors(component))


def keep(channels: int, count: int | None = None) -> Tensor:
    """Indices of ``count`` channels, by default two thirds of them, ascending; the first goes."""
    count = max(1, channels * 2 // 3) if count is None else count
    order = torch.randperm(channels - 1, generator=torch.Generator().manual_seed(count)) + 1
    return order[:count].sort().values


def _called(component: Compensator, feed_forward: FeedForward, kept: Tensor, statistics: Any, on: object) -> object:
    with torch.no_grad():
        try:
            with call_component("compensate()", on or feed_forward.path):
                return component.compensate(feed_forward, kept, statistics)
        except ContractError as error:
            if isinstance(error.__cause__, CfspError):  # it refuses what it cannot do, in words
                raise NotApplicable(str(error.__cause__)) from error
            raise


def _checked(found: object, feed_forward: FeedForward, kept: Tensor, on: object) -> Update:
    if not isinstance(found, Update):
        raise ContractError(
            f"compensate() returned a {type(found).__name__}; return an Update, Update() for no change."
        )
    hidden, count = feed_forward.hidden, len(kept)
    shapes = {"down": (hidden, count), "down_bias": (hidden,), "up": (count, hidden), "gate": (count, hidden)}
    shapes |= {"up_bias": (count,), "gate_bias": (count,)}
    for name, value in _tensors(found).items():
        if not isinstance(value, Tensor) or value.shape != shapes[name]:
            given = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ContractError(
                f"compensate() returned a `{name}` of {given}, not of {shapes[name]}: {count} channels are kept and there "
                f"are {hidden} hidden units. Index with `kept`. Given: {on}."
            )
        if not value.to(feed_forward.down.dtype).isfinite().all():
            raise ContractError(
                f"compensate() returned a `{name}` that is not finite in {feed_forward.down.dtype}; damp what is inverted, "
                f"and guard what may be zero. Given: {on}."
            )
        if name in ("gate", "gate_bias") and feed_forward.gate is None:
            raise ContractError(f"compensate() returned a `{name}` for a feed-forward without a gate; leave it None.")
    for name in ("error", "error_plain"):
        value = getattr(found, name)
        if value is not None and not math.isfinite(value):
            raise ContractError(
                f"compensate() reports the {name} {value}; report a finite number, or None. Given: {on}."
            )
    return found


def _tensors(update: Update) -> dict[str, Any]:
    names = [one.name for one in fields(update) if not one.name.startswith("error")]
    return {name: value for name in names if (value := getattr(update, name)) is not None}


def _changes(update: Update) -> bool:
    return bool(_tensors(update))


def _applied(feed_forward: FeedForward, kept: Tensor, update: Update) -> FeedForward:
    """The narrowed feed-forward with the change in it, float32."""
    rows = ("up", "gate", "up_bias", "gate_bias")
    narrow: dict[str, Any] = {}
    for name, value in tensors_of(feed_forward).items():
        narrow[name] = value[:, kept] if name == "down" else value[kept] if name in rows else value
    return replace(feed_forward, **{name: value.float() for name, value in (narrow | _tensors(update)).items()})
