"""Numbers and names on the pages of a run."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.api.records import LossPoint, RecoveryReport, Report
from cfsp_framework.reporting.figures import plotly_script
from cfsp_framework.reporting.html import html_report, human_count, page_environment


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4_587_520, "4,587,520"), (123_456_789, "123.5 million"), (15_010_000_000, "15.01 billion"),
     (2_300_000_000_000, "2.3 trillion")],
)  # fmt: skip
def test_large_counts_are_written_in_words(value: int, text: str) -> None:
    assert human_count(value) == text


@given(st.integers(0, 10**15))
def test_any_count_fits_a_card(value: int) -> None:
    assert len(human_count(value)) <= 14


@pytest.mark.parametrize(
    ("spec", "name"), [("texts/ptb.txt", "ptb.txt"), ("c4", "c4"), ("hf:allenai/c4:en:train", "hf:allenai/c4:en:train")]
)
def test_files_go_by_their_names_and_repositories_by_their_specs(spec: str, name: str) -> None:
    assert page_environment().filters["filename"](spec) == name


@pytest.mark.parametrize(
    ("model", "name"),
    [("demo", "demo"), ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"), ("./out/a", "a"), ("/models/a", "a")],
)
def test_a_page_is_headed_by_a_folders_name_or_a_hub_id(model: str, name: str) -> None:
    assert page_environment().filters["model"](model) == name


def test_the_page_of_a_run_is_one_file_with_its_figures(report: Report) -> None:
    recovery = RecoveryReport(
        data="c4", sequences=8, seqlen=32, parameters=100, ranks=(), steps=2, tokens=512, adapter=False,
        curve=(LossPoint(step=1, loss=2.0, held_out=2.1), LossPoint(step=2, loss=1.5)),
    )  # fmt: skip
    page = html_report(report.model_copy(update={"model": "</script><script>x", "recovery": recovery}))
    assert page.count(plotly_script()) == 1
    body = page.replace(plotly_script(), "")
    assert re.findall(r'Plotly.newPlot\(\s*"([^"]+)"', body) == ["widths", "losses"]
    assert "<script>x" not in body
    assert re.findall(r'(?:src|href)="', body) == []
