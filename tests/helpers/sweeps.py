"""Results of sweeps that never ran."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import combinations, product

from cfsp_framework.ablation.results import Agreement, CellResult, CellSpec, Latency, Quality, SweepResults

CRITERIA = (
    "cfsp:variant=rel,b=1.0,c=1",
    "cfsp:variant=act,b=1.0,c=1",
    "wanda-sp",
    "flap:released=False",
    "obs:damping=0.01,batch=null",
    "taylor:squared=False",
    "magnitude",
    "random",
)
ALLOCATORS = (
    "cfsp:distance=angular,a=1.0,temperature=null,released=False",
    "uniform:released=False",
    "error-curve:compensated=True",
    "owl:outlier=5.0,spread=0.08",
)


def make_sweep(
    *,
    criteria: Sequence[str] = CRITERIA,
    allocators: Sequence[str] = ALLOCATORS,
    compensators: Sequence[str] = ("none",),
    ratios: Sequence[float] = (0.3, 0.5, 0.8),
    seeds: Sequence[int] = (0, 1, 2),
    samples: Sequence[int] = (128,),
    blocks: int = 8,
    data: Sequence[str] = ("wikitext2",),
    latency: bool = True,
    tasks: bool = False,
    agreements: bool = True,
    dense: bool = True,
    failing: Sequence[str] = (),
    exploding: Sequence[str] = (),
    model: str = "models/wiki9m",
) -> SweepResults:
    """Return invented results of a grid: the first names are best, ``failing`` criteria fail, ``exploding`` ones diverge."""
    draw = random.Random(0)
    cells: list[CellResult] = []
    grid = product(enumerate(criteria), enumerate(allocators), compensators, samples, ratios, seeds)
    for (first, criterion), (second, allocator), compensator, windows, ratio, seed in grid:
        chosen = [name.partition(":")[0] for name in (criterion, allocator, compensator) if name != "none"]
        spec = CellSpec(
            row=" + ".join(chosen),
            criterion=criterion,
            allocator=allocator,
            compensator=compensator,
            recovery="none",
            ratio=ratio,
            samples=windows,
            seed=seed,
        )
        worse = (1 + 0.25 * first + 0.12 * second) * (0.8 if compensator != "none" else 1) * (128 / windows) ** 0.1
        loss = 2.2 * ratio**2.5 * worse * (1 + 0.02 * draw.gauss(0, 1))
        if chosen[0] in exploding and ratio >= 0.5:
            loss = math.inf if ratio < 0.8 else math.nan
        tilt = 0.15 * second
        shares = [1 - ratio * (1 + tilt * math.cos(3 * block / max(blocks - 1, 1))) for block in range(blocks)]
        failed = chosen[0] in failing
        cells.append(make_cell(spec, len(cells), shares, loss, data, failed=failed, latency=latency, tasks=tasks))
    return SweepResults(
        model=model,
        fingerprint="ab" * 32,
        family="llama",
        dtype="float32",
        device="cpu",
        parameters=9_000_000,
        widths=(512,) * blocks,
        places=tuple((block, "mlp") for block in range(blocks)),
        budget="channels",
        round_to=8,
        calibration="wikitext2",
        seqlen=256,
        dense=tuple(make_quality(name, 2.9 + 0.3 * place) for place, name in enumerate(data)) if dense else (),
        dense_tasks={"piqa": {"acc": 0.78}, "arc_easy": {"acc_norm": 0.74}} if tasks and dense else {},
        cells=tuple(cells),
        agreements=tuple(make_agreements(criteria, ratios, seeds, blocks)) if agreements else (),
        versions={"cfsp-framework": "0.1.0", "torch": "2.13.0"},
        seconds={"load": 1.2, "calibrate": 0.6, "collect": 14.2, "plan": 2.9, "evaluate": 88.0},
    )


def make_cell(
    spec: CellSpec,
    number: int,
    shares: Sequence[float],
    loss: float,
    data: Sequence[str],
    *,
    failed: bool,
    latency: bool,
    tasks: bool,
) -> CellResult:
    command = (
        f"cfsp prune MODEL OUT --criterion '{spec.criterion}' --allocator '{spec.allocator}' --ratio {spec.ratio} "
        f"--seed {spec.seed}"
    )
    key = f"{number:064x}"
    if failed:
        return CellResult(key=key, spec=spec, status="failed", error="3 of 512 scores are <NaN>", command=command)
    widths = tuple(min(512, max(8, round(512 * share))) for share in shares)
    kept = sum(widths) / (512 * len(widths))
    return CellResult(
        key=key,
        spec=spec,
        status="done",
        channel_ratio=1 - kept,
        parameter_ratio=(1 - kept) * 0.6,
        parameters=round(9_000_000 * (1 - (1 - kept) * 0.6)),
        widths=widths,
        qualities=tuple(make_quality(name, 2.9 + 0.3 * place + loss) for place, name in enumerate(data)),
        tasks={"piqa": {"acc": 0.75 - loss / 12}, "arc_easy": {"acc_norm": 0.7 - loss / 11}} if tasks else {},
        latency=Latency(tokens=512, milliseconds=40 - 22 * (1 - kept) + number % 3, dense_milliseconds=40)
        if latency
        else None,
        seconds=2.0 + number % 2,
        command=command,
    )


def make_quality(data: str, nll: float) -> Quality:
    """Perplexity and bits per byte that belong to a loss, where a token is four bytes."""
    perplexity = math.exp(nll) if not nll > 700 else math.inf
    return Quality(data=data, windows=100, seqlen=256, perplexity=perplexity, nll=nll, bits_per_byte=nll / math.log(16))


def make_agreements(
    criteria: Sequence[str], ratios: Sequence[float], seeds: Sequence[int], blocks: int
) -> list[Agreement]:
    return [
        Agreement(
            seed=seed,
            block=block,
            path="mlp",
            first=first,
            second=second,
            rank_correlation=0.95 - 0.12 * abs(criteria.index(first) - criteria.index(second)) - 0.04 * (block % 3),
            overlap={f"{ratio:g}": 1 - ratio * (0.2 + 0.1 * criteria.index(second)) for ratio in ratios},
        )
        for (first, second), block, seed in product(combinations(criteria, 2), range(blocks), seeds)
    ]
