"""Render a run's report as a page and as a model card, each one self-contained file."""

from __future__ import annotations

from pathlib import PurePath

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

from cfsp_framework.api.records import Report
from cfsp_framework.reporting.figures import plot_losses, plot_widths, plotly_script, to_fragment
from cfsp_framework.reporting.metrics import describe_feed_forward, describe_training, is_mixed
from cfsp_framework.reporting.model_card import BaseModel, front_matter
from cfsp_framework.runtime.atomic_files import format_bytes

PLACE = "PATH_OR_REPOSITORY"
"""The checkpoint's location in a card's examples, until it is published."""


def html_report(report: Report) -> str:
    """Return a report as one HTML page with its figures inside; it fetches nothing."""
    totals = [
        ("feed-forward channels", report.channels_before, report.channels_after, human_count),
        ("parameters", report.dense.parameters, report.pruned.parameters, human_count),
        ("weights", report.dense.bytes, report.pruned.bytes, format_bytes),
        ("FLOPs per token", report.dense.flops_per_token, report.pruned.flops_per_token, human_count),
    ]
    losses = plot_losses(report.recovery.curve) if report.recovery else None
    return (
        page_environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            totals=totals,
            plotly=plotly_script(),
            widths=to_fragment(plot_widths(report.blocks), "widths"),
            losses=to_fragment(losses, "losses") if losses else None,
            compensated=any(block.error is not None for block in report.blocks),
            ranked=any(block.importance is not None for block in report.blocks),
            mixed=is_mixed(report.blocks),
            dense=any(evaluation.dense for evaluation in report.evaluations),
            training=_describe_recovery(report),
        )
    )


def model_card(report: Report, *, code: bool, base: BaseModel | None = None) -> str:
    """Return the checkpoint's README.md; ``code`` says whether it brings the code that its widths need."""
    base = base or BaseModel(PurePath(report.model).name)
    dense, pruned = report.dense, report.pruned
    totals = [
        ("feed-forward channels", report.channels_before, report.channels_after, "{:,}".format),
        ("parameters", dense.parameters, pruned.parameters, "{:,}".format),
        ("weights", dense.bytes, pruned.bytes, format_bytes),
        ("FLOPs per token", dense.flops_per_token, pruned.flops_per_token, "{:,}".format),
    ]
    return (
        page_environment()
        .get_template("card.md.j2")
        .render(
            report=report,
            code=code,
            name=base.name,
            base=base,
            metadata=front_matter(report, base, f"{base.name}-pruned", code=code),
            place=PLACE,
            totals=[(name, form(old), form(new), f"{new / old - 1:+.1%}") for name, old, new, form in totals],
            dense=any(evaluation.dense for evaluation in report.evaluations),
            training=_describe_recovery(report),
        )
    )


def human_count(value: int) -> str:
    """Return a number short enough for a card: 4,587,520, 123 million, 15.01 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= max(size, 1e7):
            return f"{value / size:.4g} {word}"
    return f"{value:,}"


def _describe_recovery(report: Report) -> str:
    if report.recovery is None:
        return ""
    return describe_training(report.recovery.model_copy(update={"data": PurePath(report.recovery.data).name}))


def model_title(source: str) -> str:
    """Return the name of a model's folder, or its id on the Hub."""
    folder = PurePath(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return PurePath(source).name if folder else source


def page_environment() -> Environment:
    """Return the environment of all templates: an undefined value is an error, and HTML pages escape values."""
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("cfsp_framework", f"{folder}/templates") for folder in ("reporting", "ablation")]
        ),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=False,
    )
    environment.filters["filename"] = lambda spec: spec if spec.startswith("hf:") else PurePath(spec).name
    environment.filters["model"] = model_title
    environment.filters["bytes"] = format_bytes
    environment.filters["feed_forward"] = describe_feed_forward
    return environment
