"""Measure once what all cells of a seed need on its calibration windows, keep it in a folder, and add what is missing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from pathlib import Path

from torch import Tensor

from cfsp_framework.api.components import Collector, Criterion
from cfsp_framework.api.data import BlockStatistics, Statistic
from cfsp_framework.engine.cache import MeasurementCache, identity_of
from cfsp_framework.engine.collect import CurveKind, collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.errors import CfspError, OutputError, one_line
from cfsp_framework.host.registry import ConfiguredComponent, Plugins
from cfsp_framework.host.selection import Selection
from cfsp_framework.run.cache_keys import fingerprint_of, library_versions, numerics
from cfsp_framework.run.context import RunContext
from cfsp_framework.run.steps import CRITERION
from cfsp_framework.runtime.atomic_files import write_text
from cfsp_framework.runtime.hashing import hash_json
from cfsp_framework.statistics import DOWN_INPUT_GRAM_RELATIVE

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class MeasurementRequest:
    """Scores, curves and statistics to measure of every feed-forward, by labels that change with the code they depend on."""

    criteria: Mapping[str, ConfiguredComponent[Criterion]] = field(
        default_factory=dict[str, ConfiguredComponent[Criterion]]
    )
    curves: Mapping[str, tuple[str, CurveKind]] = field(default_factory=dict[str, tuple[str, CurveKind]])
    """Removal-error curves: the label of the criterion whose order they follow, and their kind."""
    sensitivities: Mapping[str, str] = field(default_factory=dict[str, str])
    """Sensitivities of the blocks: the label of the criterion whose lower-scored half is cut."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict[str, Statistic])
    """Statistics to keep; those that only a criterion needs are measured and dropped."""

    def required(self) -> frozenset[Statistic]:
        """Return the statistics to measure for this request."""
        needed = {*self.statistics.values(), *([DOWN_INPUT_GRAM_RELATIVE] if self.curves else [])}
        for chosen in self.criteria.values():
            needed |= chosen.required()
        return frozenset(needed)

    @property
    def labels(self) -> frozenset[str]:
        """Labels of all parts of the request."""
        return frozenset({*self.criteria, *self.curves, *self.sensitivities, *self.statistics})

    def __or__(self, more: MeasurementRequest) -> MeasurementRequest:
        return MeasurementRequest(
            {**self.criteria, **more.criteria},
            {**self.curves, **more.curves},
            {**self.sensitivities, **more.sensitivities},
            {**self.statistics, **more.statistics},
        )

    def without(self, labels: Iterable[str]) -> MeasurementRequest:
        """Return the request without some labels; a curve still needs its criterion's order."""
        known = frozenset(labels)
        curves = {label: curve for label, curve in self.curves.items() if label not in known}
        sensitivities = {label: along for label, along in self.sensitivities.items() if label not in known}
        orders = {*(along for along, _ in curves.values()), *sensitivities.values()}
        return MeasurementRequest(
            {label: item for label, item in self.criteria.items() if label not in known or label in orders},
            curves,
            sensitivities,
            {label: item for label, item in self.statistics.items() if label not in known},
        )


def request_measurements(selection: Selection, plugins: Plugins) -> MeasurementRequest:
    """Return the measurements that one cell needs."""
    needed = selection.criterion.required()
    label = _label(selection.criterion, plugins.collectors_for(needed))
    kind = selection.curve
    curve = f"{_label(selection.criterion, plugins.collectors_for(needed | {DOWN_INPUT_GRAM_RELATIVE}))}-{kind}"
    light = [chosen for chosen in selection.collectors if not chosen.component.provides.heavy]
    return MeasurementRequest(
        {label: selection.criterion},
        {curve: (label, kind)} if kind else {},
        {f"{label}-sensitivity": label} if selection.probes else {},
        {_label(chosen): chosen.component.provides for chosen in light},
    )


def _label(
    chosen: ConfiguredComponent[Criterion] | ConfiguredComponent[Collector],
    collectors: Sequence[ConfiguredComponent[Collector]] = (),
) -> str:
    """Return a component's name with a hash of everything that decides its output."""
    return f"{chosen.component.name}-{hash_json([identity_of(chosen), *map(identity_of, collectors)])[:16]}"


@dataclass(frozen=True)
class Part:
    """One pass over the windows."""

    labels: frozenset[str]
    """Labels that every feed-forward has."""
    measured: bool
    """Whether it read any token."""
    measurements: Sequence[FeedForwardMeasurement]


@dataclass(frozen=True)
class Collection:
    """Measurements of the feed-forwards on some calibration windows, and why some are missing."""

    parts: tuple[Part, ...]
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    """Errors of missing measurements by label."""

    @property
    def labels(self) -> frozenset[str]:
        """Labels of all measurements."""
        return frozenset().union(*(part.labels for part in self.parts))

    def problem(self, request: MeasurementRequest) -> str | None:
        """Return why a cell cannot be run for lack of measurements, or None."""
        missing = [
            label
            for label in (*request.criteria, *request.curves, *request.sensitivities, *request.statistics)
            if label not in self.labels
        ]
        return self.failures.get(missing[0], "it could not be measured") if missing else None

    def select(self, request: MeasurementRequest, selection: Selection) -> tuple[FeedForwardMeasurement, ...]:
        """Return one cell's measurements, exactly as in a run of this cell alone."""
        source = {label: next(part for part in self.parts if label in part.labels) for label in request.labels}
        [criterion] = request.criteria
        measured = [part for part in (source[criterion], *map(source.__getitem__, request.statistics)) if part.measured]
        selected: list[FeedForwardMeasurement] = []
        for number, scored in enumerate(source[criterion].measurements):
            values = {
                statistic: source[label].measurements[number].statistics[statistic]
                for label, statistic in request.statistics.items()
            }
            statistics = BlockStatistics(values, 0)
            if measured and selection.collectors:
                counted = measured[0].measurements[number].statistics
                statistics = BlockStatistics(values, 0 if counted.unseen else counted.tokens, counted.held_out_tokens)
            scores = {CRITERION: scored.scores[criterion]}
            curves = [source[label].measurements[number].curves[label] for label in request.curves]  # at most one
            sensitivities = [source[label].measurements[number].sensitivities[label] for label in request.sensitivities]
            selected.append(
                FeedForwardMeasurement(
                    scored.block,
                    scored.path,
                    scored.width,
                    statistics,
                    scores,
                    {CRITERION: curves[0]} if curves else {},
                    {CRITERION: sensitivities[0]} if sensitivities else {},
                )
            )
        return tuple(selected)


class CollectionFolder:
    """A folder with all measurements on some windows; its name is a hash of everything that decides them."""

    def __init__(self, root: Path, context: RunContext, windows: Tensor | None) -> None:
        self._context = context
        self._windows = windows  # (N, T)
        self.key = collection_base(context, windows)
        self._folder = root / self.key[:32]

    def open(self, requests: Sequence[MeasurementRequest]) -> Collection:
        """Read the measurements, and measure in one pass what is missing for some requests.

        Where that pass fails as a whole each request is tried alone, so that only those at fault fail.
        """
        parts, failures = self.read(), dict[str, str]()
        missing = self._missing(reduce(or_, requests, MeasurementRequest()), parts)
        if missing.labels:
            try:
                parts.append(self._measure(missing, failures))
            except OutputError:
                raise
            except Exception as error:  # noqa: BLE001  (the other requests go on)
                alone = {request.labels: request for request in requests}.values()
                if len(alone) == 1:
                    failures |= dict.fromkeys(missing.labels, one_line(error))
                else:
                    for request in alone:
                        collection = self.open([request])
                        parts, failures = list(collection.parts), {**failures, **collection.failures}
        return Collection(tuple(parts), failures)

    def read(self) -> list[Part]:
        """Read all finished passes."""
        parts: list[Part] = []
        count = len(self._context.decoder.blocks)
        for manifest in sorted(self._folder.glob(f"*/{_MANIFEST}")):
            described = json.loads(manifest.read_text(encoding="utf-8"))
            blocks = MeasurementCache(manifest.parent, described["key"]).load(count)
            if len(blocks) == count:
                flat = [measurement for block in blocks for measurement in block]
                parts.append(_part(flat, described["statistics"], described["measured"]))
        return parts

    def _missing(self, request: MeasurementRequest, parts: Sequence[Part]) -> MeasurementRequest:
        return request.without(frozenset[str]().union(*(part.labels for part in parts)))

    def _measure(self, missing: MeasurementRequest, failures: dict[str, str]) -> Part:
        context = self._context
        collectors = context.plugins.collectors_for(missing.required())
        key = hash_json([self.key, sorted(missing.labels)])
        folder = self._folder / key[:16]
        failed: dict[str, CfspError] = {}
        with context.progress.phase("collect"):
            measurements = collect(
                context.decoder,
                self._windows if collectors or missing.sensitivities else None,
                missing.criteria,
                collectors,
                curves=missing.curves,
                sensitivities=missing.sensitivities,
                forward_options=context.forward_options,
                seed=context.config.run.seed,
                progress=context.progress,
                cache=MeasurementCache(folder, key, context.ranks, labels=frozenset(missing.criteria)),
                failures=failed,
            )
        failures |= {label: one_line(error) for label, error in failed.items()}
        statistics = sorted(missing.statistics)
        manifest = {"key": key, "statistics": statistics, "measured": bool(collectors)}
        write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")  # last: it marks a finished pass
        return _part(measurements, statistics, measured=bool(collectors))


def _part(measurements: Sequence[FeedForwardMeasurement], statistics: Iterable[str], measured: bool) -> Part:
    everywhere = [
        {*measurement.scores, *measurement.curves, *measurement.sensitivities} for measurement in measurements
    ]
    return Part(frozenset(statistics) | frozenset.intersection(*map(frozenset, everywhere)), measured, measurements)


def collection_base(context: RunContext, windows: Tensor | None) -> str:
    """Hash everything that decides the measurements, except for the components."""
    key = {
        "model": context.loaded.fingerprint,
        "windows": fingerprint_of(windows),
        "versions": dict(library_versions()),
        "numerics": numerics(context),
    }
    return hash_json(key)
