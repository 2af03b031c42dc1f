"""What one seed's cells take from its calibration windows, measured once, kept in a folder, widened by what is missing."""

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
from cfsp_framework.host.selection import Selection, get_curve_kind
from cfsp_framework.run.cache_keys import fingerprint_of, library_versions, numerics
from cfsp_framework.run.context import RunContext
from cfsp_framework.run.steps import CRITERION
from cfsp_framework.runtime.atomic_files import write_text
from cfsp_framework.runtime.hashing import hash_json
from cfsp_framework.statistics import DOWN_INPUT_GRAM

_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class MeasurementRequest:
    """What is to be found out about every feed-forward, by labels that change with the code that finds it out."""

    criteria: Mapping[str, ConfiguredComponent[Criterion]] = field(
        default_factory=dict[str, ConfiguredComponent[Criterion]]
    )
    curves: Mapping[str, tuple[str, CurveKind]] = field(default_factory=dict[str, tuple[str, CurveKind]])
    """Removal-error curves: along which criterion's order, and of which kind."""
    statistics: Mapping[str, Statistic] = field(default_factory=dict[str, Statistic])
    """Those that are kept; what a criterion alone needs is measured and forgotten."""

    def required(self) -> frozenset[Statistic]:
        """The statistics to measure for it."""
        needed = {*self.statistics.values(), *([DOWN_INPUT_GRAM] if self.curves else [])}
        for chosen in self.criteria.values():
            needed |= chosen.required()
        return frozenset(needed)

    @property
    def labels(self) -> frozenset[str]:
        """All of it by name."""
        return frozenset({*self.criteria, *self.curves, *self.statistics})

    def __or__(self, more: MeasurementRequest) -> MeasurementRequest:
        return MeasurementRequest(
            {**self.criteria, **more.criteria},
            {**self.curves, **more.curves},
            {**self.statistics, **more.statistics},
        )

    def without(self, labels: Iterable[str]) -> MeasurementRequest:
        """What is left to find out; a curve still needs its criterion's order."""
        known = frozenset(labels)
        curves = {label: one for label, one in self.curves.items() if label not in known}
        orders = {along for along, _ in curves.values()}
        return MeasurementRequest(
            {label: one for label, one in self.criteria.items() if label not in known or label in orders},
            curves,
            {label: one for label, one in self.statistics.items() if label not in known},
        )


def want(selection: Selection, plugins: Plugins) -> MeasurementRequest:
    """What one cell takes from a collection."""
    needed = selection.criterion.required()
    label = _label(selection.criterion, plugins.collectors_for(needed))
    kind = get_curve_kind(selection.allocator)
    curve = f"{_label(selection.criterion, plugins.collectors_for(needed | {DOWN_INPUT_GRAM}))}-{kind}"
    light = [chosen for chosen in selection.collectors if not chosen.component.provides.heavy]
    return MeasurementRequest(
        {label: selection.criterion},
        {curve: (label, kind)} if kind else {},
        {_label(chosen): chosen.component.provides for chosen in light},
    )


def _label(
    chosen: ConfiguredComponent[Criterion] | ConfiguredComponent[Collector],
    collectors: Sequence[ConfiguredComponent[Collector]] = (),
) -> str:
    """A component's name and a hash of all that decides what it says."""
    return f"{chosen.component.name}-{hash_json([identity_of(chosen), *map(identity_of, collectors)])[:16]}"


@dataclass(frozen=True)
class Part:
    """One pass over the windows."""

    labels: frozenset[str]
    """What every feed-forward has of it."""
    measured: bool
    """Whether any token was looked at."""
    measurements: Sequence[FeedForwardMeasurement]


@dataclass(frozen=True)
class Collection:
    """What is known of the feed-forwards on some calibration windows, and why something is not."""

    parts: tuple[Part, ...]
    failures: Mapping[str, str] = field(default_factory=dict[str, str])
    """Why what was wanted is not there, by label."""

    @property
    def labels(self) -> frozenset[str]:
        """What is known."""
        return frozenset().union(*(part.labels for part in self.parts))

    def problem(self, wanted: MeasurementRequest) -> str | None:
        """Why a cell that wants this cannot be made, if so."""
        missing = [
            label for label in (*wanted.criteria, *wanted.curves, *wanted.statistics) if label not in self.labels
        ]
        return self.failures.get(missing[0], "it could not be measured") if missing else None

    def seen_by(self, wanted: MeasurementRequest, selection: Selection) -> tuple[FeedForwardMeasurement, ...]:
        """The measurements exactly as a run of this cell alone has them."""
        source = {label: next(part for part in self.parts if label in part.labels) for label in wanted.labels}
        [criterion] = wanted.criteria
        looked = [part for part in (source[criterion], *map(source.__getitem__, wanted.statistics)) if part.measured]
        found: list[FeedForwardMeasurement] = []
        for number, one in enumerate(source[criterion].measurements):
            values = {
                statistic: source[label].measurements[number].statistics[statistic]
                for label, statistic in wanted.statistics.items()
            }
            statistics = BlockStatistics(values, 0)
            if looked and selection.collectors:
                seen = looked[0].measurements[number].statistics
                statistics = BlockStatistics(values, 0 if seen.unseen else seen.tokens, seen.held_out_tokens)
            scores = {CRITERION: one.scores[criterion]}
            drawn = [source[label].measurements[number].curves[label] for label in wanted.curves]  # one at most
            curves = {CRITERION: drawn[0]} if drawn else {}
            found.append(FeedForwardMeasurement(one.block, one.path, one.width, statistics, scores, curves))
        return tuple(found)


class CollectionFolder:
    """A folder with all that was found out on some windows; whatever decides that is in its name."""

    def __init__(self, root: Path, context: RunContext, windows: Tensor | None) -> None:
        self._context = context
        self._windows = windows  # (N, T)
        self.key = collection_base(context, windows)
        self._folder = root / self.key[:32]

    def open(self, wanted: Sequence[MeasurementRequest]) -> Collection:
        """What is there, and what some cells want beyond it, measured in one pass.

        Where that pass fails as a whole every cell's wishes are tried alone, so that only those fail that have to.
        """
        parts, failures = self.read(), dict[str, str]()
        missing = self._missing(reduce(or_, wanted, MeasurementRequest()), parts)
        if missing.labels:
            try:
                parts.append(self._measure(missing, failures))
            except OutputError:
                raise
            except Exception as error:  # noqa: BLE001  (whoever is to blame, the others go on)
                alone = {one.labels: one for one in wanted}.values()
                if len(alone) == 1:
                    failures |= dict.fromkeys(missing.labels, one_line(error))
                else:
                    for one in alone:
                        found = self.open([one])
                        parts, failures = list(found.parts), {**failures, **found.failures}
        return Collection(tuple(parts), failures)

    def read(self) -> list[Part]:
        """All finished passes."""
        parts: list[Part] = []
        count = len(self._context.decoder.blocks)
        for manifest in sorted(self._folder.glob(f"*/{_MANIFEST}")):
            told = json.loads(manifest.read_text(encoding="utf-8"))
            blocks = MeasurementCache(manifest.parent, told["key"]).load(count)
            if len(blocks) == count:
                parts.append(_part([one for block in blocks for one in block], told["statistics"], told["measured"]))
        return parts

    def _missing(self, wanted: MeasurementRequest, parts: Sequence[Part]) -> MeasurementRequest:
        return wanted.without(frozenset[str]().union(*(part.labels for part in parts)))

    def _measure(self, missing: MeasurementRequest, failures: dict[str, str]) -> Part:
        context = self._context
        collectors = context.plugins.collectors_for(missing.required())
        key = hash_json([self.key, sorted(missing.labels)])
        folder = self._folder / key[:16]
        failed: dict[str, CfspError] = {}
        with context.progress.phase("collect"):
            found = collect(
                context.decoder,
                self._windows if collectors else None,
                missing.criteria,
                collectors,
                curves=missing.curves,
                forward_options=context.forward_options,
                seed=context.config.run.seed,
                progress=context.progress,
                cache=MeasurementCache(folder, key, context.ranks, labels=frozenset(missing.criteria)),
                failures=failed,
            )
        failures |= {label: one_line(error) for label, error in failed.items()}
        statistics = sorted(missing.statistics)
        told = {"key": key, "statistics": statistics, "measured": bool(collectors)}
        write_text(folder / _MANIFEST, json.dumps(told, indent=2) + "\n")  # last: what has one is whole
        return _part(found, statistics, measured=bool(collectors))


def _part(measurements: Sequence[FeedForwardMeasurement], statistics: Iterable[str], measured: bool) -> Part:
    everywhere = [{*one.scores, *one.curves} for one in measurements]
    return Part(frozenset(statistics) | frozenset.intersection(*map(frozenset, everywhere)), measured, measurements)


def collection_base(context: RunContext, windows: Tensor | None) -> str:
    """A hash of all that decides what is measured, except for the components."""
    told = {
        "model": context.loaded.fingerprint,
        "windows": fingerprint_of(windows),
        "versions": dict(library_versions()),
        "numerics": numerics(context),
    }
    return hash_json(told)
