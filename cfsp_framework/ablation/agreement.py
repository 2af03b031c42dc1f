"""How alike criteria rank the channels of each feed-forward: Spearman's correlation, and what both would keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

import torch
from torch import Tensor

from cfsp_framework.ablation.results import Agreement
from cfsp_framework.api.records import feed_forward_path
from cfsp_framework.engine.measurements import FeedForwardMeasurement


@dataclass(frozen=True)
class Scored:
    """One feed-forward's scores by criterion, ``(F,)`` each."""

    block: int
    path: str
    scores: Mapping[str, Tensor]


def scored(found: Mapping[str, tuple[str, Sequence[FeedForwardMeasurement]]]) -> list[Scored]:
    """Feed-forwards with the scores of every criterion: by its name, its label and the measurements that have it."""
    if not found:
        return []
    places = next(iter(found.values()))[1]
    return [
        Scored(one.block, one.path, {name: there[number].scores[label] for name, (label, there) in found.items()})
        for number, one in enumerate(places)
    ]


def agreements(seed: int, feed_forwards: Sequence[Scored], ratios: Sequence[float]) -> list[Agreement]:
    """One row for each pair of criteria and each feed-forward; experts of a mixture are averaged into one."""
    found: list[Agreement] = []
    for (block, path), members in groupby(feed_forwards, key=lambda one: (one.block, feed_forward_path(one.path))):
        matrices: list[tuple[Tensor, dict[float, Tensor]]] = []
        names: list[str] = []
        for one in members:
            names = list(one.scores)
            scores = torch.stack(list(one.scores.values())).double()  # (C, F)
            matrices.append((rank_correlations(scores), {ratio: overlaps(scores, ratio) for ratio in ratios}))
        correlation = torch.stack([one for one, _ in matrices]).mean(0)  # (C, C)
        shares = {ratio: torch.stack([kept[ratio] for _, kept in matrices]).mean(0) for ratio in ratios}
        found += [
            Agreement(
                seed=seed,
                block=block,
                path=path,
                first=names[i],
                second=names[j],
                rank_correlation=round(correlation[i, j].item(), 6),
                overlap={f"{ratio:g}": round(share[i, j].item(), 6) for ratio, share in shares.items()},
            )
            for i, j in combinations(range(len(names)), 2)
        ]
    return found


def rank_correlations(scores: Tensor) -> Tensor:
    """Spearman's correlation of every pair of rows of ``scores (C, F)``, ``(C, C)``; 0 where a row is constant."""
    ranks = torch.stack([average_ranks(row) for row in scores])  # (C, F)
    centred = ranks - ranks.mean(1, keepdim=True)
    lengths = centred.norm(dim=1)  # (C,)
    scale = torch.outer(lengths, lengths)
    return torch.where(scale > 0, (centred @ centred.mT) / scale, 0.0).clamp(-1, 1)


def average_ranks(values: Tensor) -> Tensor:
    """Ranks from 1 of ``values (F,)``, float64; equal ones share the mean of theirs."""
    _, place, count = values.unique(sorted=True, return_inverse=True, return_counts=True)
    last = count.cumsum(0)  # of each distinct value
    ranks: Tensor = (last - (count - 1) / 2).double()
    return ranks[place]


def overlaps(scores: Tensor, ratio: float) -> Tensor:
    """The share of kept channels that each pair of rows of ``scores (C, F)`` has in common, ``(C, C)``.

    Each keeps the nearest whole number of channels to ``1 - ratio``, at least one, as a plan would.
    """
    width = scores.shape[1]
    count = min(width, max(1, round((1 - ratio) * width)))
    order = scores.neg().argsort(dim=1, stable=True)[:, :count]  # (C, K)
    kept = torch.zeros_like(scores).scatter_(1, order, 1.0)  # (C, F)
    shared: Tensor = kept @ kept.mT  # (C, C)
    return shared / count
