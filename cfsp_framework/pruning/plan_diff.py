"""Compare two plans for the same model: the channels they keep, block by block, and their settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from cfsp_framework.api.records import BlockPlan, PruningPlan, feed_forward_path
from cfsp_framework.config import FrozenRecord
from cfsp_framework.errors import PlanError

_DIGITS = 12
"""Digits of a fingerprint that are shown."""


class Overlap(FrozenRecord):
    """Overlap of the channels that two plans keep."""

    width: int
    """Channels before the cut."""
    first: int
    """Channels kept by the first plan."""
    second: int
    """Channels kept by the second plan."""
    both: int
    only_first: int
    only_second: int
    jaccard: float
    """Channels that both keep, as a share of those that either keeps."""
    chance: float
    """Approximate ``jaccard`` of plans that draw their channels at random, block by block."""


class BlockComparison(Overlap):
    """One feed-forward, or all experts of a mixture together."""

    block: int
    path: str
    experts: int
    importance_first: float | None
    importance_second: float | None


class Difference(FrozenRecord):
    """A setting that differs."""

    name: str
    first: str | None
    second: str | None


class Comparison(FrozenRecord):
    """Two plans side by side."""

    format: Literal["cfsp-comparison"] = "cfsp-comparison"
    version: Literal[1] = 1
    first: str
    """Source of the first plan."""
    second: str
    """Source of the second plan."""
    same_cut: bool
    """Whether both remove the same channels, and the same attention."""
    blocks: tuple[BlockComparison, ...]
    total: Overlap
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Return indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def compare(first: PruningPlan, second: PruningPlan, names: tuple[str, str], *, experts: bool = False) -> Comparison:
    """Compare the channels that two plans keep; ``names`` are their names in the result.

    With ``experts`` every expert of a mixture is compared by itself; otherwise those of a module are one entry.

    Raises:
        PlanError: the plans are for different models: other feed-forwards, or other widths.
    """
    _check_comparable(first, second, names)
    entries = {(entry.block, entry.path): entry for entry in second.blocks}
    pairs = [(entry, entries[entry.block, entry.path]) for entry in first.blocks]
    grouped: dict[tuple[int, str], list[tuple[BlockPlan, BlockPlan]]] = {}
    for pair in pairs:
        path = pair[0].path if experts else feed_forward_path(pair[0].path)
        grouped.setdefault((pair[0].block, path), []).append(pair)
    same = all(a.kept == b.kept for a, b in pairs) and first.dropped_attention == second.dropped_attention
    return Comparison(
        first=names[0],
        second=names[1],
        same_cut=same,
        blocks=tuple(
            BlockComparison(
                block=block,
                path=path,
                experts=len(members),
                importance_first=members[0][0].importance,
                importance_second=members[0][1].importance,
                **_overlap(members).model_dump(),
            )
            for (block, path), members in grouped.items()
        ),
        total=_overlap(pairs),
        differences=tuple(_differences(first, second)),
        notes=tuple(_notes(first, second, names)),
    )


def _overlap(pairs: Sequence[tuple[BlockPlan, BlockPlan]]) -> Overlap:
    width = sum(a.width for a, _ in pairs)
    first, second = sum(len(a.kept) for a, _ in pairs), sum(len(b.kept) for _, b in pairs)
    both = sum(len({*a.kept} & {*b.kept}) for a, b in pairs)
    expected = sum(len(a.kept) * len(b.kept) / a.width for a, b in pairs)
    return Overlap(
        width=width,
        first=first,
        second=second,
        both=both,
        only_first=first - both,
        only_second=second - both,
        jaccard=both / (first + second - both),
        chance=expected / (first + second - expected),
    )


def _check_comparable(first: PruningPlan, second: PruningPlan, names: tuple[str, str]) -> None:
    widths = [{(entry.block, entry.path): entry.width for entry in plan.blocks} for plan in (first, second)]
    places = [*widths[0], *(place for place in widths[1] if place not in widths[0])]
    for place in places:
        pair = [plan_widths.get(place) for plan_widths in widths]
        if pair[0] != pair[1]:
            states = [f"has {width} channels" if width else "is missing" for width in pair]
            raise PlanError(
                f"These plans are for different models: block {place[0]}, {place[1]} {states[0]} in {names[0]} "
                f"({first.model.source}) and {states[1]} in {names[1]} ({second.model.source})."
            )


def _notes(first: PruningPlan, second: PruningPlan, names: tuple[str, str]) -> list[str]:
    notes = []
    if first.model.fingerprint != second.model.fingerprint:
        notes.append(
            f"the plans are for models of one shape but different weights, {first.model.fingerprint[:_DIGITS]} and "
            f"{second.model.fingerprint[:_DIGITS]}: their channels may not correspond"
        )
    return notes


def _differences(first: PruningPlan, second: PruningPlan) -> list[Difference]:
    left, right = _settings(first), _settings(second)
    return [
        Difference(name=name, first=left.get(name), second=right.get(name))
        for name in {**left, **right}
        if left.get(name) != right.get(name)
    ]


def _settings(plan: PruningPlan) -> dict[str, str]:
    """Return everything that led to a plan, flat and as text."""
    settings = {
        "model": plan.model.source,
        "model fingerprint": plan.model.fingerprint,
        "ratio": f"{plan.ratio:g}",
        "budget": plan.budget,
        "round-to": str(plan.round_to),
        "seed": str(plan.seed),
        "dropped attention": json.dumps(plan.dropped_attention),
        **plan.components,
    }
    if plan.calibration is not None:
        calibration = plan.calibration
        settings |= {
            "calibration": calibration.spec,
            "calibration samples": str(calibration.samples),
            "calibration seqlen": str(calibration.seqlen),
            "calibration seed": str(calibration.seed),
            "calibration fingerprint": calibration.fingerprint,
        }
    return settings | {f"version of {name}": version for name, version in plan.versions.items()}
