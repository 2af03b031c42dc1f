"""Render a run's report as a page and as a model card, each one self-contained file."""

from __future__ import annotations

from collections.abc import Callable
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
    losses = plot_losses(report.recovery.curve) if report.recovery else None
    return _render(
        "report.html.j2",
        report,
        human_count,
        plotly=plotly_script(),
        widths=to_fragment(plot_widths(report.blocks), "widths"),
        losses=to_fragment(losses, "losses") if losses else None,
        compensated=any(block.error is not None for block in report.blocks),
        ranked=any(block.importance is not None for block in report.blocks),
        mixed=is_mixed(report.blocks),
    )


def model_card(report: Report, *, code: bool, base: BaseModel | None = None) -> str:
    """Return the checkpoint's README.md; ``code`` says whether it brings the code that its widths need."""
    base = base or BaseModel(PurePath(report.model).name)
    metadata = front_matter(report, base, f"{base.name}-pruned", code=code)
    return _render("card.md.j2", report, "{:,}".format, code=code, base=base, metadata=metadata, place=PLACE)


def _render(template: str, report: Report, count: Callable[[int], str], **values: object) -> str:
    dense, pruned, recovery = report.dense, report.pruned, report.recovery
    if recovery:
        recovery = recovery.model_copy(update={"data": PurePath(recovery.data).name})
    return (
        page_environment()
        .get_template(template)
        .render(
            report=report,
            totals=[
                ("feed-forward channels", report.channels_before, report.channels_after, count),
                ("parameters", dense.parameters, pruned.parameters, count),
                ("weights", dense.bytes, pruned.bytes, format_bytes),
                ("FLOPs per token", dense.flops_per_token, pruned.flops_per_token, count),
            ],
            dense=any(evaluation.dense for evaluation in report.evaluations),
            training=describe_training(recovery) if recovery else "",
            **values,
        )
    )


def human_count(value: int) -> str:
    """Return a number short enough for a card: 4,587,520, 123 million, 15.01 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= max(size, 1e7):
            return f"{value / size:.4g} {word}"
    return f"{value:,}"


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
