"""One pass over the calibration windows, block by block: measure, score, forget what is heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Literal, Protocol

import torch
from torch import Tensor

from cfsp_framework.api.components import Collector, Criterion
from cfsp_framework.api.data import BlockStatistics, BlockSummary, FeedForward, Site
from cfsp_framework.api.events import BlockFinished
from cfsp_framework.engine.gradients import measure_gradients
from cfsp_framework.engine.measure import measure_block, read_only_inputs
from cfsp_framework.engine.replay import Batch, ForwardOptions, embed, pass_block
from cfsp_framework.errors import CfspError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import tensor_problem
from cfsp_framework.linalg import compensated_curve, damped_inverse, plain_curve
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import DOWN_INPUT_GRAM

CurveKind = Literal["plain", "compensated"]


class FinishedCollection(Protocol):
    """What a collection that was cut short left behind."""

    def load(self, count: int) -> Sequence[list[FeedForwardMeasurement]]:
        """The measurements of the first blocks of ``count``, as far as there are any without a gap."""
        ...

    def resume(self, batches: Sequence[Batch]) -> int:
        """Bring the batches as far as their hidden states were kept, and return the block they enter there."""
        ...

    def store(self, index: int, measured: list[FeedForwardMeasurement], batches: Sequence[Batch]) -> None:
        """Keep what block ``index`` measured; the batches have passed it."""
        ...


@dataclass(frozen=True)
class FeedForwardMeasurement:
    """What is kept of one feed-forward: its light statistics, and the scores of every criterion asked for."""

    block: int
    path: str
    width: int
    statistics: BlockStatistics
    scores: Mapping[str, Tensor]  # label -> (F,) float32, CPU
    curves: Mapping[str, Tensor]  # label -> (F + 1,) float64, CPU; empty where no allocator asked


def summarise(decoder: Decoder, measurements: Sequence[FeedForwardMeasurement], label: str) -> tuple[BlockSummary, ...]:
    """What an allocator sees under the criterion called ``label``: one summary for every width that can be chosen."""
    remaining, summaries = list(measurements), list[BlockSummary]()
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            count = sum(len(module.paths) for module in group.modules)
            summaries.append(_summary(remaining[:count], label))
            del remaining[:count]
    return tuple(summaries)


def _summary(members: Sequence[FeedForwardMeasurement], label: str) -> BlockSummary:
    """Feed-forwards of one width seen as one; their scalars are averaged, each token counting once."""
    first = members[0]
    tokens = [member.statistics.tokens for member in members]
    scalars = {
        statistic: sum(m.statistics[statistic].item() * n for m, n in zip(members, tokens, strict=True)) / sum(tokens)
        for statistic, value in first.statistics.items()
        if value.ndim == 0
    }
    return BlockSummary(
        block=first.block,
        path=first.path,
        width=sum(member.width for member in members),
        tokens=max(tokens),
        statistics=scalars if len(members) > 1 else {s: v.item() for s, v in first.statistics.items() if v.ndim == 0},
        scores=torch.cat([member.scores[label] for member in members]),
        curve=_joint_curve([member.curves[label] for member in members]) if label in first.curves else None,
        members={member.path: member.width for member in members} if len(members) > 1 else {},
    )


def _joint_curve(curves: Sequence[Tensor]) -> Tensor:
    """The error of ``k`` channels gone in all, the same share from each: ``(sum F + 1,)`` from ``(F + 1,)`` each."""
    if len(curves) == 1:
        return curves[0]
    total = sum(len(curve) - 1 for curve in curves)
    share = torch.linspace(0, 1, total + 1, dtype=torch.float64)  # (sum F + 1,)
    joint = torch.zeros_like(share)
    for curve in curves:
        place = share * (len(curve) - 1)  # between two entries of this curve
        left = place.long().clamp(max=len(curve) - 2)
        joint += torch.lerp(curve[left], curve[left + 1], place - left)
    return joint


def collect(
    decoder: Decoder,
    windows: Tensor | None,
    criteria: Mapping[str, ConfiguredComponent[Criterion]],
    collectors: Sequence[ConfiguredComponent[Collector]],
    *,
    curves: Mapping[str, tuple[str, CurveKind]] | None = None,
    forward_options: ForwardOptions | None = None,
    seed: int,
    progress: Progress,
    finished: FinishedCollection | None = None,
    failures: dict[str, CfspError] | None = None,
) -> tuple[FeedForwardMeasurement, ...]:
    """Measure every feed-forward on ``windows (N, T)`` and score its channels with every criterion.

    Each block runs exactly once per batch and the head never. Where no collector is needed nothing runs at all, and
    the windows may be None. Blocks that are ``finished`` already are read, not measured. ``curves`` says along which
    criterion's order, and of which kind, each removal-error curve is.

    With ``failures`` a criterion that fails does not end the collection: its scores are missing from that block on,
    and why is put there under its label.
    """
    forward_options = forward_options or ForwardOptions()
    count = len(decoder.blocks)
    measurements = list(finished.load(count)) if finished else []
    if len(measurements) == count:
        return tuple(chain.from_iterable(measurements))
    gradients: Sequence[Sequence[BlockStatistics]] | None = None
    batches: Sequence[Batch] = []
    if windows is not None:
        backward = [chosen for chosen in collectors if chosen.component.site is Site.GRADIENT]
        collectors = [chosen for chosen in collectors if chosen.component.site is not Site.GRADIENT]
        if backward:
            gradients = measure_gradients(decoder, windows, backward, progress, forward_options)
        batches = embed(decoder, windows, forward_options) if collectors else batches
    start = finished.resume(batches) if finished and batches else 0
    with progress.bar("collect", total=count * len(batches)) as step:
        for index in range(min(start, len(measurements)) if batches else len(measurements), count):
            with decoder.loaded(index) if criteria or batches else nullcontext():
                if index < len(measurements):  # measured before, but the hidden states after it were not kept
                    pass_block(decoder, index, batches, step)
                    continue
                # No name here holds what a block measured: it would live on while the next one is measured.
                measurements.append(
                    score_block(
                        decoder.feed_forwards(index, seed),
                        _measured(decoder, index, batches, collectors, gradients, forward_options, step),
                        criteria,
                        curves or {},
                        failures,
                    )
                )
            if finished:
                finished.store(index, measurements[index], batches)
            progress.notify(BlockFinished("collect", index, count))
    return tuple(chain.from_iterable(measurements))


def _measured(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[ConfiguredComponent[Collector]],
    gradients: Sequence[Sequence[BlockStatistics]] | None,
    forward_options: ForwardOptions,
    step: Callable[[], None],
) -> Sequence[BlockStatistics]:
    """Each feed-forward's statistics, those of gradients among them."""
    nothing = [BlockStatistics({}, 0)] * len(decoder.feed_forwards(index))
    forward = (
        measure_block(decoder, index, batches, collectors, step, ranks=forward_options.ranks) if batches else nothing
    )
    if gradients is None:
        return forward
    return [before | one if batches else one for before, one in zip(forward, gradients[index], strict=True)]


def score_block(
    feed_forwards: Sequence[FeedForward],
    statistics: Sequence[BlockStatistics],
    criteria: Mapping[str, ConfiguredComponent[Criterion]],
    curves: Mapping[str, tuple[str, CurveKind]],
    failures: dict[str, CfspError] | None,
) -> list[FeedForwardMeasurement]:
    """Score one block's channels with every criterion, and keep what may outlive the block."""
    found: list[FeedForwardMeasurement] = []
    for one, seen in zip(feed_forwards, statistics, strict=True):
        scores: dict[str, Tensor] = {}
        for label, criterion in criteria.items():
            if failures and label in failures:
                continue
            try:
                scores[label] = score(criterion, one, seen)
            except CfspError as error:
                if failures is None:
                    raise
                failures[label] = error
        wanted: dict[str, tuple[Tensor, CurveKind]] = {
            label: (scores[along], kind) for label, (along, kind) in curves.items() if along in scores
        }
        drawn = error_curves(one, seen, wanted)
        found.append(FeedForwardMeasurement(one.block, one.path, one.width, seen.light(), scores, drawn))
    return found


def score(criterion: ConfiguredComponent[Criterion], feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
    """The criterion's scores, ``(F,)`` float32 on the CPU, checked: right shape, all finite.

    PyTorch's own generator is seeded for a criterion that draws from it: what else is scored changes nothing.
    """
    where = f"block {feed_forward.block}, {feed_forward.path}"
    torch.manual_seed(feed_forward.generator().initial_seed())
    seen = statistics.only(criterion.required())
    with (
        torch.no_grad(),
        criterion.call_component(f"score() at {where}", read_only_inputs(feed_forward, seen)) as component,
    ):
        scores: object = component.score(feed_forward, seen)
    problem = tensor_problem(scores, (feed_forward.width,), torch.float32)
    if problem is not None:
        raise PluginError(f"{criterion}: what score() returned at {where} {problem}.")
    assert isinstance(scores, Tensor)
    return scores.detach().float().cpu()


CURVE_DAMPING = 1e-2


def error_curves(
    feed_forward: FeedForward, statistics: BlockStatistics, wanted: Mapping[str, tuple[Tensor, CurveKind]]
) -> dict[str, Tensor]:
    """Squared output error after removing the k lowest of some scores ``(F,)``, for every k: ``(F + 1,)`` float64, CPU.

    The costly inverse of the Gram matrix is made once for all of them.
    """
    if not wanted:
        return {}
    weight, gram = feed_forward.down, statistics[DOWN_INPUT_GRAM]
    compensated = any(kind == "compensated" for _, kind in wanted.values())
    inverse = damped_inverse(gram, CURVE_DAMPING) if compensated else None  # (F, F)
    found: dict[str, Tensor] = {}
    for label, (scores, kind) in wanted.items():
        order = scores.to(weight.device).neg().argsort(stable=True).flip(0)  # (F,): of equals the last goes first
        curve = compensated_curve(weight, inverse, order) if inverse is not None and kind == "compensated" else None
        found[label] = (plain_curve(weight, gram, order) if curve is None else curve).cpu()
    return found
