"""A sweep's summary, and its page."""

from __future__ import annotations

import math
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cfsp_framework.ablation import summary
from cfsp_framework.ablation.page import clock, number, sweep_page
from cfsp_framework.ablation.results import Agreement, CellResult, CellSpec, Latency, Quality, SweepResults
from cfsp_framework.reporting.figures import plotly_script, shorten

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

untimed = settings(deadline=None)  # a busy machine is no failure
finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 6))

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
    """A grid made up. What is named first is better; ``failing`` criteria fail, ``exploding`` ones lose everything."""
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


# --- summary ----------------------------------------------------------------------------------------------------------


@untimed
@given(st.lists(finite, min_size=2, max_size=8))
def test_an_interval_is_students(values: list[float]) -> None:
    found = summary.interval(values)
    assert found is not None
    assert found.half is not None
    scale = max(map(abs, values)) + 1e-300
    assert found.count == len(values)
    assert found.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-12 * scale)
    if len({*values}) > 1 and found.half > 1e-9 * scale:
        low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
        assert (found.mean - found.half, found.mean + found.half) == pytest.approx(
            (low, high), rel=1e-6, abs=1e-9 * scale
        )


@given(finite)
def test_one_value_has_no_interval(value: float) -> None:
    assert summary.interval([value]) == summary.Interval(value, None, 1)
    assert summary.interval([]) is None


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_mean_over_what_is_not_finite_is_not_finite(bad: float) -> None:
    found = summary.interval([1.0, bad, 2.0])
    assert found is not None
    assert not math.isfinite(found.mean)
    assert found.half is None


points = st.lists(st.tuples(*[st.integers(0, 6).map(float) | st.just(math.nan) | st.just(math.inf)] * 2), max_size=12)


@given(points)
def test_the_front_is_what_nothing_beats(found: list[tuple[float, float]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] <= b[1] and a != b

    usable = [place for place, point in enumerate(found) if all(map(math.isfinite, point))]
    expected = {one for one in usable if not any(beats(found[other], found[one]) for other in usable)}
    front = summary.pareto_front(found)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [found[place][0] for place in front] == sorted(found[place][0] for place in front)


choices = st.builds(
    lambda name, options: ":".join([name, *([",".join(f"{k}={v}" for k, v in options.items())] if options else [])]),
    st.sampled_from(["cfsp", "flap", "obs"]),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 2), max_size=3),
)


@given(st.lists(choices, max_size=8))
def test_short_labels_tell_components_apart(specs: list[str]) -> None:
    labels = summary.short_labels(specs)
    assert len({*labels.values()}) == len({*specs}) == len(labels)
    assert all(label.partition(":")[0] == spec.partition(":")[0] for spec, label in labels.items())
    assert all(len(label) <= len(spec) for spec, label in labels.items())


def test_short_labels_keep_only_what_differs() -> None:
    labels = summary.short_labels(["cfsp:variant=rel,b=1.0", "cfsp:variant=act,b=1.0", "flap:released=False"])
    assert list(labels.values()) == ["cfsp:variant=rel", "cfsp:variant=act", "flap"]


@untimed
@given(st.permutations(range(24)))
def test_a_sweeps_groups_do_not_depend_on_the_order_of_its_cells(order: list[int]) -> None:
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), agreements=False)
    shuffled = made.model_copy(update={"cells": tuple(made.cells[place] for place in order)})
    plain, other = summary.groups(made), summary.groups(shuffled)
    assert {(group.method, group.ratio): group.cells for group in plain} == {
        (group.method, group.ratio): group.cells for group in other
    }
    assert all([cell.spec.seed for cell in group.cells] == [0, 1, 2] for group in plain)
    assert sum(len(group.cells) for group in plain) == len(made.cells)


def test_methods_of_one_name_are_told_apart_by_what_differs() -> None:
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], samples=(32, 128), ratios=(0.5,), seeds=(0,))
    labels = [group.method.label for group in summary.groups(made)]
    assert labels == [
        f"cfsp + cfsp (cfsp:variant={variant}, {windows} windows)"
        for variant in ("rel", "act")
        for windows in (32, 128)
    ]


def test_the_best_of_a_ratio_has_the_lowest_mean_loss() -> None:
    made = make_sweep(criteria=CRITERIA[:3], exploding=["cfsp"], failing=["flap"])
    found = summary.groups(made)
    best = summary.best_per_ratio(found, "wikitext2")
    assert list(best) == [0.3, 0.5, 0.8]
    for ratio, one in best.items():
        scores = [
            mean.mean
            for group in found
            if group.ratio == ratio and (mean := group.interval(lambda cell: summary.nll(cell, "wikitext2")))
        ]
        own = one.group.interval(lambda cell: summary.nll(cell, "wikitext2"))
        assert own is not None
        assert own.mean == min(score for score in scores if math.isfinite(score))
        assert one.margin is not None
        assert one.margin.mean >= 0
        assert one.margin.count == 3
    assert best[0.5].group.method.criterion == "wanda-sp"


@untimed
@given(st.lists(st.floats(0, 9) | st.sampled_from([math.nan, math.inf]), max_size=8))
def test_ranks_are_of_finite_losses(losses: list[float]) -> None:
    made = make_sweep(criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,))
    [group] = summary.groups(made)
    every = [
        summary.Group(
            group.method, 0.5, (group.cells[0].model_copy(update={"qualities": (make_quality("wikitext2", loss),)}),)
        )
        for loss in losses
    ]
    found = [one.cells[0].qualities[0].nll for one in summary.ranked(every, "wikitext2")]
    assert found == sorted(loss for loss in losses if math.isfinite(loss))


def test_nothing_is_best_where_nothing_was_measured() -> None:
    failed = summary.groups(make_sweep(criteria=["flap"], failing=["flap"]))
    assert summary.best_per_ratio(failed, "wikitext2") == {}
    assert summary.best_per_ratio(summary.groups(make_sweep(data=())), "wikitext2") == {}


def test_a_margin_is_paired_by_seed() -> None:
    made = make_sweep(criteria=CRITERIA[:2], allocators=ALLOCATORS[:1], ratios=(0.5,))
    first, second = summary.groups(made)
    fewer = summary.Group(second.method, second.ratio, second.cells[1:])
    found = summary.paired_difference(fewer, first, "wikitext2")
    differences = [b.qualities[0].nll - a.qualities[0].nll for a, b in zip(first.cells[1:], fewer.cells, strict=True)]
    assert found == summary.interval(differences)
    assert summary.paired_difference(summary.Group(second.method, 0.5, ()), first, "wikitext2") is None


def test_methods_are_ordered_by_their_places_and_failing_is_last() -> None:
    made = make_sweep(allocators=ALLOCATORS[:1], failing=["wanda-sp"], exploding=["flap"])
    order = [method.criterion.partition(":")[0] for method in summary.by_quality(summary.groups(made), "wikitext2")]
    assert order == ["cfsp", "cfsp", "obs", "taylor", "magnitude", "random", "flap", "wanda-sp"]


def test_excess_is_over_the_dense_model_on_the_same_text() -> None:
    made = make_sweep(data=("wikitext2", "ptb"))
    cell = made.cells[0]
    for place, name in enumerate(("wikitext2", "ptb")):
        expected = cell.qualities[place].nll - made.dense[place].nll
        assert summary.excess_nll(cell, made, name) == expected
    assert summary.excess_nll(cell, make_sweep(dense=False), "wikitext2") is None
    assert summary.excess_nll(cell, made, "c4") is None


def test_agreement_is_averaged_over_seeds_and_feed_forwards_of_a_block() -> None:
    def agreement(seed: int, block: int, path: str, first: str, value: float) -> Agreement:
        second = "b" if first == "a" else "a"
        return Agreement(
            seed=seed,
            block=block,
            path=path,
            first=first,
            second=second,
            rank_correlation=value,
            overlap={"0.5": value},
        )

    found = (
        agreement(0, 0, "mlp.experts.0", "a", 0.2),
        agreement(0, 0, "mlp.experts.1", "a", 0.4),
        agreement(1, 0, "mlp.experts.0", "b", 0.6),
        agreement(0, 1, "mlp.experts.0", "a", 1.0),
    )
    [pair] = summary.agreement_pairs(make_sweep().model_copy(update={"agreements": found}))
    assert pair.correlation == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.overlap["0.5"] == pytest.approx({0: 0.4, 1: 1.0})
    assert pair.mean_correlation == pytest.approx(0.7)
    assert pair.mean_overlap("0.5") == pytest.approx(0.7)
    assert pair.mean_overlap("0.3") is None


def test_a_blocks_share_counts_all_its_feed_forwards() -> None:
    made = make_sweep(blocks=2, criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,))
    mixture = made.model_copy(update={"places": ((3, "mlp.experts.0"), (3, "mlp.experts.1")), "widths": (64, 32)})
    cell = made.cells[0].model_copy(update={"widths": (32, 8)})
    assert summary.kept_by_block(cell, mixture) == {3: 40 / 96}
    assert summary.kept_by_block(cell.model_copy(update={"widths": ()}), mixture) == {}


def test_a_full_sweep_is_one_grid_with_its_best_first() -> None:
    made = make_sweep(criteria=CRITERIA[:3], allocators=ALLOCATORS[:2], failing=["wanda-sp"])
    [grid] = summary.grids(summary.groups(made), "wikitext2")
    assert (grid.row_axis, grid.column_axis, grid.fixed) == ("criterion", "allocator", ())
    assert grid.rows == ("cfsp:variant=rel", "cfsp:variant=act", "wanda-sp")
    assert grid.columns == ("cfsp", "uniform")
    assert list(grid.groups) == [0.3, 0.5, 0.8]
    for ratio, rows in grid.groups.items():
        for name, row in zip(CRITERIA, rows, strict=False):
            for allocator, group in zip(ALLOCATORS, row, strict=False):
                assert group is not None
                assert (group.ratio, group.method.criterion, group.method.allocator) == (ratio, name, allocator)


def test_what_is_fixed_makes_several_grids_and_sizes_stay_in_order() -> None:
    made = make_sweep(
        criteria=CRITERIA[:2],
        allocators=ALLOCATORS[:1],
        compensators=("none", "least-squares:damping=0.001"),
        samples=(32, 512, 128),
        seeds=(0,),
    )
    found = summary.grids(summary.groups(made), "wikitext2")
    assert {grid.fixed for grid in found} == {("none",), ("least-squares",)}
    assert all((grid.row_axis, grid.rows) == ("samples", ("32", "128", "512")) for grid in found)


def test_named_rows_are_no_grid() -> None:
    made = make_sweep(criteria=CRITERIA[:4], allocators=ALLOCATORS, ratios=(0.5,), seeds=(0,))
    named = [
        cell for cell in made.cells if CRITERIA.index(cell.spec.criterion) == ALLOCATORS.index(cell.spec.allocator)
    ]
    assert summary.grids(summary.groups(made.model_copy(update={"cells": tuple(named)})), "wikitext2") == ()


# --- writing -----------------------------------------------------------------------------------------------------------


@given(st.text(), st.integers(2, 40))
def test_a_shortened_text_fits_and_keeps_its_ends(text: str, room: int) -> None:
    found = shorten(text, room)
    assert len(found) == min(len(text), room)
    assert (found == text) == (len(text) <= room)
    assert found[0:1] == text[0:1]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.235"), (123.456, "123.5"), (12345.6, "12,346"), (1.2e7, "1.2e+07"), (math.inf, "∞"),
        (-math.inf, "-∞"), (math.nan, "NaN"),
    ],
)  # fmt: skip
def test_perplexities_are_written_as_long_as_they_mean_something(value: float, text: str) -> None:
    assert number(value) == text


def test_times_are_written_as_people_say_them() -> None:
    assert [clock(seconds) for seconds in (0.4, 42, 200, 7500)] == ["0 s", "42 s", "3 min 20 s", "2 h 5 min"]


# --- the page ---------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The parts of a page that the tests look at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: Counter[str] = Counter()
        self.links: list[str] = []
        self.opened: list[str] = []
        self.rows: list[list[str]] = []
        self.sections: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids.update([given["id"]] if "id" in given else [])
        self.links += [given[name] for name in ("href", "src") if name in given]
        if tag == "section":
            self.sections.append(given["id"])
        if tag == "tr" and "data-words" in given:
            self.rows.append([])
        if self.rows and "data-sort" in given:
            self.rows[-1].append(given["data-sort"])
        if tag not in ("meta", "input"):
            self.opened.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


@pytest.fixture(scope="module")
def full() -> SweepResults:
    """A sweep with everything: failures, infinities, tasks, latency, three seeds."""
    return make_sweep(failing=["taylor"], exploding=["random"], tasks=True)


@pytest.fixture(scope="module")
def page(full: SweepResults) -> str:
    return sweep_page(full)


def test_the_page_is_one_file_the_same_every_time(full: SweepResults, page: str) -> None:
    parsed = Page(page)
    assert parsed.opened == []
    assert all(count == 1 for count in parsed.ids.values())
    assert page.count("plotly.js v") == 1
    assert "@import" not in page
    assert [link for link in parsed.links if link[0] != "#" or link[1:] not in parsed.ids] == []
    assert sweep_page(full) == page


def test_the_page_has_a_row_for_every_method_and_ratio(full: SweepResults, page: str) -> None:
    rows = {(row[0], row[1]): row for row in Page(page).rows}
    found = summary.groups(full)
    assert len(rows) == len(found) == 96
    for group in found:
        row = rows[group.method.label, str(group.ratio)]
        assert row[2] == str(len(group.done))
        mean = group.interval(lambda cell: summary.perplexity(cell, "wikitext2"))
        if mean is None:
            assert row[3] == ""
        elif math.isfinite(mean.mean):
            assert float(row[3]) == mean.mean


def figure_names(page: str) -> list[str]:
    return re.findall(r'Plotly.newPlot\(\s*"([^"]+)"', page)


def test_the_page_has_a_figure_for_every_result(page: str) -> None:
    names = figure_names(page)
    assert len(names) == len({*names})
    kinds = Counter(re.sub(r"-\d+.*", "", name) for name in names)
    assert kinds == {"quality": 2, "grid": 3, "pareto": 1, "widths": 3, "agreement": 4, "agreement-blocks": 4}


def test_every_command_and_every_error_is_on_the_page(full: SweepResults, page: str) -> None:
    for cell in full.cells:
        assert cell.command.replace("'", "&#39;") in page
    assert "3 of 512 scores are &lt;NaN&gt;" in page
    assert "<NaN>" not in page
    assert "36 of 288 cells failed" in page


def test_what_was_not_measured_has_no_section() -> None:
    everything = {"quality", "grids", "table", "commands", "cost", "widths", "agreement", "how"}
    assert {*Page(sweep_page(make_sweep(blocks=2, seeds=(0,)))).sections} == everything
    single = make_sweep(criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), seeds=(0,), latency=False)
    bare = make_sweep(criteria=CRITERIA[:2], seeds=(0,), data=(), latency=False, agreements=False)
    nothing = make_sweep().model_copy(update={"cells": (), "agreements": ()})
    failed = make_sweep(criteria=CRITERIA[:1], failing=["cfsp"])
    for results, sections in (
        (single, ["table", "commands", "widths", "how"]),
        (bare, ["table", "commands", "widths", "how"]),
        (nothing, ["how"]),
        (failed, ["table", "commands", "how"]),
    ):
        text = sweep_page(results)
        assert Page(text).sections == sections
        assert ("plotly.js v" in text) == ("widths" in sections)


def test_the_page_says_how_certain_its_numbers_are() -> None:
    grid: dict[str, Any] = {"criteria": CRITERIA[:2], "allocators": ALLOCATORS[:1], "blocks": 2}
    assert "no confidence intervals" in sweep_page(make_sweep(**grid, seeds=(0,)))
    assert "95% t-interval" in sweep_page(make_sweep(**grid))


def test_quality_is_against_parameters_where_nothing_was_timed() -> None:
    text = sweep_page(make_sweep(criteria=CRITERIA[:2], latency=False, blocks=2, seeds=(0,)))
    assert "Quality against parameters" in text
    assert "Quality against latency" not in text


def test_a_failed_seed_is_counted_and_its_error_shown() -> None:
    made = make_sweep(criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), blocks=2)
    first = made.cells[0]
    broken = CellResult(key=first.key, spec=first.spec, status="failed", error="out of luck", command="cfsp prune")
    text = sweep_page(made.model_copy(update={"cells": (broken, *made.cells[1:])}))
    assert "1 of 3 seeds failed." in text
    assert "2<small>/3</small>" in text
    assert text.count("out of luck") == 4  # above, twice in the words to filter by, with the command


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "规则:a=$x$ %{y}",
)


def test_names_are_text_everywhere() -> None:
    made = make_sweep(criteria=HOSTILE, allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), blocks=2, model="/m/<i>&")
    text = sweep_page(made)
    assert Page(text).opened == []
    body = text.replace(plotly_script(), "")
    assert "<script>document" not in body
    assert "<img" not in body
    assert "规则 + cfsp" in body


sweeps = st.fixed_dictionaries(
    {
        "criteria": st.sampled_from([CRITERIA[:1], CRITERIA[:3], CRITERIA]),
        "allocators": st.sampled_from([ALLOCATORS[:1], ALLOCATORS[:2]]),
        "ratios": st.sampled_from([(0.5,), (0.2, 0.5, 0.8)]),
        "seeds": st.sampled_from([(0,), (0, 1)]),
        "blocks": st.sampled_from([1, 3, 80]),
        "data": st.sampled_from([(), ("demo",), ("demo", "hf:allenai/c4:en:validation")]),
        "latency": st.booleans(),
        "tasks": st.booleans(),
        "agreements": st.booleans(),
        "dense": st.booleans(),
        "failing": st.sampled_from([(), ("cfsp",), ("wanda-sp",)]),
        "exploding": st.sampled_from([(), ("cfsp",), ("wanda-sp", "flap")]),
    }
)


@settings(deadline=None, max_examples=15)
@given(sweeps)
def test_any_sweep_has_a_page(shape: dict[str, Any]) -> None:
    text = sweep_page(make_sweep(**shape))
    assert Page(text).opened == []
    assert ">nan<" not in text
    assert "inf<" not in text


def run_in_browser(text: str, script: str, tmp_path: Path) -> list[str]:
    """Load a page in Chromium, run a script that fills ``out``, and return its items."""
    path = tmp_path / "report.html"
    script = f"const out = []; {script}; document.body.innerHTML = '<pre>' + out.join('|') + '</pre>';"
    path.write_text(text.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    ended = subprocess.run(
        [str(BROWSER), *words, path.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    match = re.search(r"<pre>([^\"]*)</pre>", ended.stdout, flags=re.DOTALL)
    assert match is not None, ended.stdout[-500:]
    return match[1].split("|")


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_names_do_not_run_and_figures_are_drawn_in_a_browser(tmp_path: Path) -> None:
    made = make_sweep(criteria=HOSTILE, allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), blocks=2)
    text = sweep_page(made)
    script = "out.push(document.title, document.querySelectorAll('.js-plotly-plot .main-svg').length > 0, document.images.length, "
    script += "document.querySelector('.legendtext').textContent.includes('<' + '/script>'))"
    assert run_in_browser(text, script, tmp_path) == ["Ablation of wiki9m", "true", "0", "true"]


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_the_table_sorts_and_filters_in_a_browser(tmp_path: Path) -> None:
    made = make_sweep(
        criteria=CRITERIA[:4], allocators=ALLOCATORS[:2], exploding=["wanda-sp"], failing=["flap"], tasks=True
    )
    script = """
    const shown = (items) => [...document.querySelectorAll(items)].filter((item) => !item.hidden);
    const column = (name) => [...document.querySelectorAll("#cells th button")].find((button) => button.textContent === name);
    const values = (place) => shown("#cells tr[data-words]").map((row) => row.cells[place]?.dataset.sort ?? '').join(",");
    const search = document.querySelector("#search");
    const filter = (text) => { search.value = text; search.dispatchEvent(new Event("input")); };
    column("perplexity").click(); out.push(values(3));
    column("perplexity").click(); out.push(values(3));
    column("acc").click(); out.push(values(6));
    column("method").click(); out.push(values(0));
    filter("50%"); out.push(values(1));
    filter("UNIFORM failed  50%"); out.push(values(0), shown("details").length);
    """
    up, down, tasks, labels, ratios, filtered, commands = run_in_browser(sweep_page(made), script, tmp_path)
    rising = [float(value) for value in up.split(",") if value]
    assert rising == sorted(rising)
    assert rising[-1] == math.inf
    empty = ["" for value in up.split(",") if not value]  # NaN and failed: last in both directions
    assert up.split(",")[len(rising) :] == empty == down.split(",")[len(rising) :]
    assert [float(value) for value in down.split(",") if value] == rising[::-1]
    falling = [float(value) for value in tasks.split(",") if value]
    assert falling == sorted(falling, reverse=True)  # the highest accuracy comes first
    assert labels.split(",") == sorted(labels.split(","))
    assert {*ratios.split(",")} == {"0.5"}
    assert (filtered, commands) == ("flap + uniform", "1")
