"""Compare how criteria rank the channels of each feed-forward: Spearman's correlation, and the channels both would keep."""

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
class ScoredFeedForward:
    """One feed-forward's scores by criterion, ``(F,)`` each."""

    block: int
    path: str
    scores: Mapping[str, Tensor]


def collect_scores(
    measured: Mapping[str, tuple[str, Sequence[FeedForwardMeasurement]]],
) -> list[ScoredFeedForward]:
    """Return all feed-forwards with their scores; ``measured`` has each criterion's label and measurements by its name."""
    if not measured:
        return []
    return [
        ScoredFeedForward(
            feed_forward.block,
            feed_forward.path,
            {name: measurements[place].scores[label] for name, (label, measurements) in measured.items()},
        )
        for place, feed_forward in enumerate(next(iter(measured.values()))[1])
    ]


def measure_agreements(
    seed: int, feed_forwards: Sequence[ScoredFeedForward], ratios: Sequence[float]
) -> list[Agreement]:
    """Return the agreement of each pair of criteria on each feed-forward; experts of a mixture are averaged into one."""
    agreements: list[Agreement] = []
    for (block, path), members in groupby(
        feed_forwards, key=lambda member: (member.block, feed_forward_path(member.path))
    ):
        held = list(members)
        names = list(held[0].scores)
        scores = [torch.stack(list(member.scores.values())).double() for member in held]  # (C, F) each
        correlation = torch.stack([rank_correlations(rows) for rows in scores]).mean(0)  # (C, C)
        shares = {ratio: torch.stack([overlaps(rows, ratio) for rows in scores]).mean(0) for ratio in ratios}  # (C, C)
        agreements += [
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
    return agreements


def rank_correlations(scores: Tensor) -> Tensor:
    """Return Spearman's correlation of every pair of rows of ``scores (C, F)``, ``(C, C)``; 0 where a row is constant."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.cpu().numpy(), axis=1))  # (C, F)
    centred = ranks - ranks.mean(1, keepdim=True)
    lengths = centred.norm(dim=1)  # (C,)
    scale = torch.outer(lengths, lengths)
    return torch.where(scale > 0, (centred @ centred.mT) / scale, 0.0).clamp(-1, 1)


def overlaps(scores: Tensor, ratio: float) -> Tensor:
    """Return the share of kept channels that each pair of rows of ``scores (C, F)`` has in common, ``(C, C)``.

    Each row keeps the nearest whole number of channels to ``1 - ratio``, at least one, as a plan would.
    """
    width = scores.shape[1]
    count = min(width, max(1, round((1 - ratio) * width)))
    order = scores.neg().argsort(dim=1, stable=True)[:, :count]  # (C, K)
    kept = torch.zeros_like(scores).scatter_(1, order, 1.0)  # (C, F)
    shared: Tensor = kept @ kept.mT  # (C, C)
    return shared / count
