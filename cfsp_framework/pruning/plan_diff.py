"""Where two plans for the same model differ: in what they cut, block by block, and in what led to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

from cfsp_framework.api.records import BlockPlan, PruningPlan, feed_forward_path
from cfsp_framework.config import FrozenRecord
from cfsp_framework.errors import PlanError

_DIGITS = 12
"""Of a hash, as much as tells two apart."""


class Overlap(FrozenRecord):
    """How the channels two plans keep overlap, ``first`` in the one and ``second`` in the other."""

    width: int
    """Channels before the cut."""
    first: int
    second: int
    both: int
    only_first: int
    only_second: int
    jaccard: float
    """Channels both keep, as a share of those that either keeps."""
    chance: float
    """About what ``jaccard`` would be had each plan drawn its channels at random, block by block."""


class BlockComparison(Overlap):
    """One feed-forward, or all experts of a mixture together."""

    block: int
    path: str
    experts: int
    importance_first: float | None
    importance_second: float | None


class Difference(FrozenRecord):
    """A setting that is not the same."""

    name: str
    first: str | None
    second: str | None


class Comparison(FrozenRecord):
    """Two plans side by side."""

    format: Literal["cfsp-comparison"] = "cfsp-comparison"
    version: Literal[1] = 1
    first: str
    """Where the plan was read."""
    second: str
    same_cut: bool
    """Whether both remove the same channels, and the same attention."""
    blocks: tuple[BlockComparison, ...]
    total: Overlap
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> str:
        """Indented JSON."""
        return self.model_dump_json(indent=2) + "\n"


def compare(first: PruningPlan, second: PruningPlan, names: tuple[str, str], *, experts: bool = False) -> Comparison:
    """Compare what two plans keep; ``names`` is what they are called.

    ``experts`` compares every expert of a mixture by itself; otherwise those of a module are one.

    Raises:
        PlanError: they are for different models: not the same feed-forwards, or not of the same widths.
    """
    _check_comparable(first, second, names)
    theirs = {(entry.block, entry.path): entry for entry in second.blocks}
    pairs = [(entry, theirs[entry.block, entry.path]) for entry in first.blocks]
    together: dict[tuple[int, str], list[tuple[BlockPlan, BlockPlan]]] = {}
    for pair in pairs:
        path = pair[0].path if experts else feed_forward_path(pair[0].path)
        together.setdefault((pair[0].block, path), []).append(pair)
    same = all(one.kept == other.kept for one, other in pairs) and first.dropped_attention == second.dropped_attention
    return Comparison(
        first=names[0],
        second=names[1],
        same_cut=same,
        blocks=tuple(
            BlockComparison(
                block=block,
                path=path,
                experts=len(held),
                importance_first=held[0][0].importance,
                importance_second=held[0][1].importance,
                **_overlap(held).model_dump(),
            )
            for (block, path), held in together.items()
        ),
        total=_overlap(pairs),
        differences=tuple(_differences(first, second)),
        notes=tuple(_notes(first, second, names)),
    )


def _overlap(pairs: Sequence[tuple[BlockPlan, BlockPlan]]) -> Overlap:
    width = sum(one.width for one, _ in pairs)
    kept, other = sum(len(one.kept) for one, _ in pairs), sum(len(one.kept) for _, one in pairs)
    both = sum(len({*one.kept} & {*two.kept}) for one, two in pairs)
    expected = sum(len(one.kept) * len(two.kept) / one.width for one, two in pairs)
    return Overlap(
        width=width,
        first=kept,
        second=other,
        both=both,
        only_first=kept - both,
        only_second=other - both,
        jaccard=both / (kept + other - both),
        chance=expected / (kept + other - expected),
    )


def _check_comparable(first: PruningPlan, second: PruningPlan, names: tuple[str, str]) -> None:
    widths = [{(entry.block, entry.path): entry.width for entry in plan.blocks} for plan in (first, second)]
    places = [*widths[0], *(place for place in widths[1] if place not in widths[0])]
    for place in places:
        mine, other = widths[0].get(place), widths[1].get(place)
        if mine != other:
            where = f"block {place[0]}, {place[1]}"
            told = [f"has {width} channels" if width else "is missing" for width in (mine, other)]
            raise PlanError(
                f"These plans are for different models: {where} {told[0]} in {names[0]} ({first.model.source}) and "
                f"{told[1]} in {names[1]} ({second.model.source})."
            )


def _notes(first: PruningPlan, second: PruningPlan, names: tuple[str, str]) -> list[str]:
    notes = []
    if first.model.fingerprint != second.model.fingerprint:
        notes.append(
            f"the plans are for models of one shape but other weights, {first.model.fingerprint[:_DIGITS]} and "
            f"{second.model.fingerprint[:_DIGITS]}: their channels need not mean the same"
        )
    return notes


def _differences(first: PruningPlan, second: PruningPlan) -> list[Difference]:
    mine, other = _settings(first), _settings(second)
    names = [*mine, *(name for name in other if name not in mine)]
    return [
        Difference(name=name, first=mine.get(name), second=other.get(name))
        for name in names
        if mine.get(name) != other.get(name)
    ]


def _settings(plan: PruningPlan) -> dict[str, str]:
    """All that led to a plan, flat and as text."""
    told = {
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
        told |= {
            "calibration": calibration.spec,
            "calibration samples": str(calibration.samples),
            "calibration seqlen": str(calibration.seqlen),
            "calibration seed": str(calibration.seed),
            "calibration fingerprint": calibration.fingerprint,
        }
    return told | {f"version of {name}": version for name, version in plan.versions.items()}
