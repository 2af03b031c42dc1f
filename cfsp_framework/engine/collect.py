"""Pass over the calibration windows block by block: measure, score, keep what is light."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from typing import Literal

import torch
from torch import Tensor

from cfsp_framework.api.components import Collector, Criterion
from cfsp_framework.api.data import BlockStatistics, FeedForward, Site
from cfsp_framework.api.events import BlockFinished
from cfsp_framework.engine.cache import MeasurementCache
from cfsp_framework.engine.gradients import measure_gradients
from cfsp_framework.engine.measure import measure_block, read_only_inputs
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import Batch, ForwardOptions, embed, pass_block
from cfsp_framework.engine.sensitivity import measure_sensitivities
from cfsp_framework.errors import CfspError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import find_tensor_problem
from cfsp_framework.linalg import compensated_curve, damped_inverse, plain_curve
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

CurveKind = Literal["plain", "compensated"]
CURVE_DAMPING = 1e-2
"""Share of the Gram matrix's mean diagonal that is added before it is inverted."""


def collect(
    decoder: Decoder,
    windows: Tensor | None,
    criteria: Mapping[str, ConfiguredComponent[Criterion]],
    collectors: Sequence[ConfiguredComponent[Collector]],
    *,
    curves: Mapping[str, tuple[str, CurveKind]] | None = None,
    sensitivities: Mapping[str, str] | None = None,
    forward_options: ForwardOptions | None = None,
    seed: int,
    progress: Progress,
    cache: MeasurementCache | None = None,
    failures: dict[str, CfspError] | None = None,
) -> tuple[FeedForwardMeasurement, ...]:
    """Measure every feed-forward on ``windows (N, T)`` and score its channels with every criterion.

    Each block runs exactly once per batch, the head never. Without a collector nothing runs and ``windows`` may be
    None. Blocks in the ``cache`` are read instead of measured. ``curves`` maps the label of a removal-error curve to the
    label of the criterion that gives its order, and its kind; ``sensitivities`` maps the label of the blocks'
    sensitivities to that of the criterion whose lower-scored half is cut.

    With ``failures`` a criterion that fails does not end the collection: its error is put there under its label, and
    its scores are missing from that block on.
    """
    options = forward_options or ForwardOptions()
    count = len(decoder.blocks)
    measurements = list(cache.load(count)) if cache else []
    if len(measurements) < count:
        measurements = _collect_blocks(
            decoder, windows, criteria, collectors, curves or {}, options, seed, progress, cache, failures, measurements
        )
    missing = {
        label: order
        for label, order in (sensitivities or {}).items()
        if all(order in m.scores and label not in m.sensitivities for m in chain.from_iterable(measurements))
    }
    if missing and windows is not None:
        measurements = _add_sensitivities(decoder, windows, measurements, missing, options, progress)
        for index, block in enumerate(measurements if cache else ()):
            assert cache is not None
            cache.replace(index, block)
    return tuple(chain.from_iterable(measurements))


def _add_sensitivities(
    decoder: Decoder,
    windows: Tensor,
    measurements: Sequence[Sequence[FeedForwardMeasurement]],
    labels: Mapping[str, str],
    options: ForwardOptions,
    progress: Progress,
) -> list[list[FeedForwardMeasurement]]:
    """Measure the sensitivity of every block under each label, along the scores of the criterion it names."""
    orders = {order: [[m.scores[order] for m in block] for block in measurements] for order in labels.values()}
    values = options.ranks.agree(measure_sensitivities(decoder, windows, orders, options, progress))
    return [
        [
            replace(m, sensitivities={**m.sensitivities, **{label: values[o][index] for label, o in labels.items()}})
            for m in block
        ]
        for index, block in enumerate(measurements)
    ]


def _collect_blocks(
    decoder: Decoder,
    windows: Tensor | None,
    criteria: Mapping[str, ConfiguredComponent[Criterion]],
    collectors: Sequence[ConfiguredComponent[Collector]],
    curves: Mapping[str, tuple[str, CurveKind]],
    options: ForwardOptions,
    seed: int,
    progress: Progress,
    cache: MeasurementCache | None,
    failures: dict[str, CfspError] | None,
    measurements: list[list[FeedForwardMeasurement]],
) -> list[list[FeedForwardMeasurement]]:
    """Measure and score the blocks behind those that have ``measurements``, and return all."""
    count = len(decoder.blocks)
    gradients: Sequence[Sequence[BlockStatistics]] | None = None
    batches: Sequence[Batch] = []
    if windows is not None:
        backward = [collector for collector in collectors if collector.component.site is Site.GRADIENT]
        collectors = [collector for collector in collectors if collector.component.site is not Site.GRADIENT]
        if backward:
            gradients = measure_gradients(decoder, windows, backward, progress, options)
        batches = embed(decoder, windows, options) if collectors else batches
    start = cache.resume(batches) if cache and batches else 0
    with progress.bar("collect", total=count * len(batches)) as step:
        for index in range(min(start, len(measurements)) if batches else len(measurements), count):
            with decoder.loaded(index) if criteria or batches else nullcontext():
                if index < len(measurements):  # in the cache, but the hidden states after it are not
                    pass_block(decoder, index, batches, step)
                    continue
                # No name here refers to what a block measured: it would stay alive while the next one is measured.
                measurements.append(
                    score_block(
                        decoder.feed_forwards(index, seed),
                        _measure(decoder, index, batches, collectors, gradients, options, step),
                        criteria,
                        curves,
                        failures,
                    )
                )
            if cache:
                cache.store(index, measurements[index], batches)
            progress.notify(BlockFinished("collect", index, count))
    return measurements


def _measure(
    decoder: Decoder,
    index: int,
    batches: Sequence[Batch],
    collectors: Sequence[ConfiguredComponent[Collector]],
    gradients: Sequence[Sequence[BlockStatistics]] | None,
    forward_options: ForwardOptions,
    step: Callable[[], None],
) -> Sequence[BlockStatistics]:
    """Return each feed-forward's statistics, those of gradients among them."""
    if not batches:
        empty = [BlockStatistics({}, 0)] * len(decoder.feed_forwards(index))
        return empty if gradients is None else gradients[index]
    statistics = measure_block(decoder, index, batches, collectors, step, ranks=forward_options.ranks)
    if gradients is None:
        return statistics
    return [forward | backward for forward, backward in zip(statistics, gradients[index], strict=True)]


def score_block(
    feed_forwards: Sequence[FeedForward],
    statistics: Sequence[BlockStatistics],
    criteria: Mapping[str, ConfiguredComponent[Criterion]],
    curves: Mapping[str, tuple[str, CurveKind]],
    failures: dict[str, CfspError] | None,
) -> list[FeedForwardMeasurement]:
    """Score one block's channels with every criterion, and return what may outlive the block."""
    measurements: list[FeedForwardMeasurement] = []
    for feed_forward, measured in zip(feed_forwards, statistics, strict=True):
        scores: dict[str, Tensor] = {}
        for label, criterion in criteria.items():
            if failures and label in failures:
                continue
            try:
                scores[label] = score(criterion, feed_forward, measured)
            except CfspError as error:
                if failures is None:
                    raise
                failures[label] = error
        orders: dict[str, tuple[Tensor, CurveKind]] = {
            label: (scores[order], kind) for label, (order, kind) in curves.items() if order in scores
        }
        drawn = error_curves(feed_forward, measured, orders)
        measurements.append(
            FeedForwardMeasurement(
                feed_forward.block, feed_forward.path, feed_forward.width, measured.light(), scores, drawn
            )
        )
    return measurements


def score(criterion: ConfiguredComponent[Criterion], feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
    """Return the criterion's scores, ``(F,)`` float32 on the CPU, checked for shape and finiteness.

    PyTorch's global generator is seeded for each feed-forward, so that other criteria do not change what one draws.

    Raises:
        PluginError: the criterion failed or returned something else.
    """
    place = f"block {feed_forward.block}, {feed_forward.path}"
    torch.manual_seed(feed_forward.generator().initial_seed())
    required = statistics.only(criterion.required())
    with (
        torch.no_grad(),
        criterion.call_component(f"score() at {place}", read_only_inputs(feed_forward, required)) as component,
    ):
        scores: object = component.score(feed_forward, required)
    problem = find_tensor_problem(scores, (feed_forward.width,), torch.float32)
    if problem is not None:
        raise PluginError(f"{criterion}: the result of score() at {place} {problem}.")
    assert isinstance(scores, Tensor)
    return scores.detach().float().cpu()


def error_curves(
    feed_forward: FeedForward, statistics: BlockStatistics, orders: Mapping[str, tuple[Tensor, CurveKind]]
) -> dict[str, Tensor]:
    """Return removal-error curves ``(F + 1,)`` float64 on the CPU, by label.

    Entry k is the squared output error after removing the k channels with the lowest of some scores ``(F,)``. The
    inverse of the Gram matrix, which is costly, is computed once for all curves.
    """
    if not orders:
        return {}
    weight, gram = feed_forward.down, statistics[DOWN_INPUT_GRAM_RELATIVE]
    compensated = any(kind == "compensated" for _, kind in orders.values())
    inverse = damped_inverse(gram, CURVE_DAMPING) if compensated else None  # (F, F)
    curves: dict[str, Tensor] = {}
    for label, (scores, kind) in orders.items():
        order = scores.to(weight.device).neg().argsort(stable=True).flip(0)  # (F,): the last of equals goes first
        curve = compensated_curve(weight, inverse, order) if inverse is not None and kind == "compensated" else None
        curves[label] = (plain_curve(weight, gram, order) if curve is None else curve).cpu()
    return curves
