"""The page of a sweep."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cfsp_framework.ablation import summary
from cfsp_framework.ablation.page import clock, number, sweep_page
from cfsp_framework.ablation.results import CellResult, SweepResults
from cfsp_framework.reporting.figures import plotly_script, shorten
from helpers.sweeps import ALLOCATORS, CRITERIA, make_sweep

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@given(st.text(), st.integers(2, 40))
def test_a_shortened_text_fits_and_keeps_its_ends(text: str, room: int) -> None:
    actual = shorten(text, room)
    assert len(actual) == min(len(text), room)
    assert (actual == text) == (len(text) <= room)
    assert actual[0:1] == text[0:1]


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
    actual = summary.groups(full)
    assert len(rows) == len(actual) == 96
    for group in actual:
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
    sweep = make_sweep(criteria=CRITERIA[:1], allocators=ALLOCATORS[:1], ratios=(0.5,), blocks=2)
    first = sweep.cells[0]
    broken = CellResult(key=first.key, spec=first.spec, status="failed", error="out of luck", command="cfsp prune")
    text = sweep_page(sweep.model_copy(update={"cells": (broken, *sweep.cells[1:])}))
    assert "1 of 3 seeds failed." in text
    assert "2<small>/3</small>" in text
    assert text.count("out of luck") == 4  # above, twice in the words to filter by, with the command


HOSTILE = (
    "</script><script>document.title='run'</script>",
    "<img src=x onerror=\"document.title='run'\">",
    "规则:a=$x$ %{y}",
)


def test_names_are_text_everywhere() -> None:
    sweep = make_sweep(criteria=HOSTILE, allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), blocks=2, model="/m/<i>&")
    text = sweep_page(sweep)
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
    sweep = make_sweep(criteria=HOSTILE, allocators=ALLOCATORS[:2], ratios=(0.3, 0.5), blocks=2)
    text = sweep_page(sweep)
    script = "out.push(document.title, document.querySelectorAll('.js-plotly-plot .main-svg').length > 0, document.images.length, "
    script += "document.querySelector('.legendtext').textContent.includes('<' + '/script>'))"
    assert run_in_browser(text, script, tmp_path) == ["Ablation of wiki9m", "true", "0", "true"]


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_the_table_sorts_and_filters_in_a_browser(tmp_path: Path) -> None:
    sweep = make_sweep(
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
    up, down, tasks, labels, ratios, filtered, commands = run_in_browser(sweep_page(sweep), script, tmp_path)
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
