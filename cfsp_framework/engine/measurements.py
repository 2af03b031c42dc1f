"""Results of measuring feed-forwards, and their summary for allocators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cfsp_framework.api.data import BlockStatistics, BlockSummary
from cfsp_framework.modeling.decoder import Decoder


@dataclass(frozen=True)
class FeedForwardMeasurement:
    """The part of one feed-forward's measurement that outlives its block."""

    block: int
    path: str
    width: int
    statistics: BlockStatistics
    """Light statistics only."""
    scores: Mapping[str, Tensor]  # label of a criterion -> (F,) float32, CPU
    curves: Mapping[str, Tensor]  # label of a removal-error curve -> (F + 1,) float64, CPU
    sensitivities: Mapping[str, float | None] = field(default_factory=dict[str, "float | None"])
    """Sensitivity of the block by label; see ``BlockSummary.sensitivity``."""


def summarise(decoder: Decoder, measurements: Sequence[FeedForwardMeasurement], label: str) -> tuple[BlockSummary, ...]:
    """Summarise measurements for an allocator, with the scores and curve of one ``label``: one summary for each width."""
    remaining, summaries = list(measurements), list[BlockSummary]()
    for index in range(len(decoder.blocks)):
        for group in decoder.groups(index):
            count = sum(len(module.paths) for module in group.modules)
            summaries.append(_summarise_group(remaining[:count], label))
            del remaining[:count]
    return tuple(summaries)


def _summarise_group(members: Sequence[FeedForwardMeasurement], label: str) -> BlockSummary:
    """Summarise feed-forwards of one width as one; their scalars are averaged over tokens."""
    first = members[0]
    tokens = [member.statistics.tokens for member in members]
    scalars = {statistic: value.item() for statistic, value in first.statistics.items() if value.ndim == 0}
    if len(members) > 1:
        weighted = list(zip(members, tokens, strict=True))
        scalars = {s: sum(m.statistics[s].item() * n for m, n in weighted) / sum(tokens) for s in scalars}
    return BlockSummary(
        block=first.block,
        path=first.path,
        width=sum(member.width for member in members),
        tokens=max(tokens),
        statistics=scalars,
        scores=torch.cat([member.scores[label] for member in members]),
        curve=_joint_curve([member.curves[label] for member in members]) if label in first.curves else None,
        sensitivity=first.sensitivities.get(label),
        members={member.path: member.width for member in members} if len(members) > 1 else {},
    )


def _joint_curve(curves: Sequence[Tensor]) -> Tensor:
    """Add curves ``(F + 1,)`` where the same share of channels is removed from each, ``(sum F + 1,)``."""
    if len(curves) == 1:
        return curves[0]
    total = sum(len(curve) - 1 for curve in curves)
    share = torch.linspace(0, 1, total + 1, dtype=torch.float64)  # (sum F + 1,)
    joint = torch.zeros_like(share)
    for curve in curves:
        position = share * (len(curve) - 1)  # between two entries of this curve
        left = position.long().clamp(max=len(curve) - 2)
        joint += torch.lerp(curve[left], curve[left + 1], position - left)
    return joint
