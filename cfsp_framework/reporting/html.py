"""The report as a page to look at, and the model card: both from templates, both self-contained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape

from cfsp_framework.api.records import BlockReport, LossPoint, Report
from cfsp_framework.reporting.metrics import describe_training, is_mixed, place
from cfsp_framework.reporting.model_card import BaseModel, front_matter
from cfsp_framework.runtime.atomic_files import format_bytes

_CHART_WIDTH, _CHART_HEIGHT = 960.0, 260.0
_CURVE_HEIGHT = 160.0
_MARGIN_TOP, _MARGIN_BOTTOM = 24.0, 22.0


@dataclass(frozen=True)
class Bar:
    """One block in the chart of widths, in the picture's own units."""

    block: BlockReport
    x: float
    width: float
    top: float
    full: float
    kept: float
    labelled: bool

    @property
    def share(self) -> float:
        """Share of the channels kept."""
        return self.block.width_after / self.block.width_before


@dataclass(frozen=True)
class Chart:
    """The bars of all blocks."""

    width: float
    height: float
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Curve:
    """A training's losses as points of polylines."""

    width: float
    height: float
    points: str
    held_out: str
    highest: float
    lowest: float


def html_report(report: Report) -> str:
    """One page with the pictures inside it and nothing fetched from elsewhere."""
    totals = [
        ("feed-forward channels", report.channels_before, report.channels_after, human_count),
        ("parameters", report.dense.parameters, report.pruned.parameters, human_count),
        ("weights", report.dense.bytes, report.pruned.bytes, format_bytes),
        ("FLOPs per token", report.dense.flops_per_token, report.pruned.flops_per_token, human_count),
    ]
    compensated = any(block.error is not None for block in report.blocks)
    ranked = any(block.importance is not None for block in report.blocks)
    page = page_environment().get_template("report.html.j2")
    return page.render(
        report=report,
        totals=totals,
        chart=_chart(report.blocks),
        compensated=compensated,
        ranked=ranked,
        mixed=is_mixed(report.blocks),
        dense=any(found.dense for found in report.evaluations),
        trained=_described(report),
        curve=_curve(report.recovery.curve) if report.recovery else None,
    )


PLACE = "PATH_OR_REPOSITORY"
"""What stands in a card's examples where nobody knows yet where the checkpoint will lie."""


def model_card(report: Report, *, code: bool, base: BaseModel | None = None) -> str:
    """README.md of the checkpoint; ``code`` says that it brings the code its widths need."""
    base = base or BaseModel(PurePath(report.model).name)
    dense, pruned = report.dense, report.pruned
    totals = [
        ("feed-forward channels", report.channels_before, report.channels_after, "{:,}".format),
        ("parameters", dense.parameters, pruned.parameters, "{:,}".format),
        ("weights", dense.bytes, pruned.bytes, format_bytes),
        ("FLOPs per token", dense.flops_per_token, pruned.flops_per_token, "{:,}".format),
    ]
    name = f"{base.name}-pruned"
    return (
        page_environment()
        .get_template("card.md.j2")
        .render(
            report=report,
            code=code,
            name=base.name,
            base=base,
            metadata=front_matter(report, base, name, code=code),
            place=PLACE,
            totals=[(what, form(old), form(new), f"{new / old - 1:+.1%}") for what, old, new, form in totals],
            dense=any(found.dense for found in report.evaluations),
            trained=_described(report),
        )
    )


def human_count(value: int) -> str:
    """A number as wide as a card holds it: 4,587,520, 123 million, 15.01 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if value >= max(size, 1e7):
            return f"{value / size:.4g} {word}"
    return f"{value:,}"


def _chart(blocks: tuple[BlockReport, ...]) -> Chart:
    room = _CHART_HEIGHT - _MARGIN_TOP - _MARGIN_BOTTOM
    widest = max(block.width_before for block in blocks)
    slot = _CHART_WIDTH / len(blocks)
    every = max(1, round(36 / slot))  # a label needs about 36 units
    bars = tuple(
        Bar(
            block=block,
            x=round(slot * (index + 0.1), 2),
            width=round(slot * 0.8, 2),
            top=round(_MARGIN_TOP + room * (1 - block.width_before / widest), 2),
            full=round(room * block.width_before / widest, 2),
            kept=round(room * block.width_after / widest, 2),
            labelled=index % every == 0,
        )
        for index, block in enumerate(blocks)
    )
    return Chart(_CHART_WIDTH, _CHART_HEIGHT, bars)


def _described(report: Report) -> str:
    if report.recovery is None:
        return ""
    return describe_training(report.recovery.model_copy(update={"data": PurePath(report.recovery.data).name}))


def _curve(points: tuple[LossPoint, ...]) -> Curve | None:
    """None where there are not two points to join."""
    losses = [value for one in points for value in (one.loss, one.held_out) if value is not None]
    if len(points) < 2:
        return None
    last, highest, lowest = max(one.step for one in points), max(losses), min(losses)
    room = _CURVE_HEIGHT - _MARGIN_TOP - _MARGIN_BOTTOM

    def line(values: list[tuple[int, float | None]]) -> str:
        return " ".join(
            f"{step / last * _CHART_WIDTH:.1f},{_MARGIN_TOP + room * (highest - value) / ((highest - lowest) or 1):.1f}"
            for step, value in values
            if value is not None
        )

    trained, held_out = [(one.step, one.loss) for one in points], [(one.step, one.held_out) for one in points]
    return Curve(_CHART_WIDTH, _CURVE_HEIGHT, line(trained), line(held_out), highest, lowest)


def model_title(source: str) -> str:
    """A model's folder by its name alone; a Hub id as it is."""
    folder = PurePath(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1
    return PurePath(source).name if folder else source


def page_environment() -> Environment:
    """Of all templates: what is missing is an error, and pages escape what they are given."""
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
    environment.filters["place"] = place
    return environment
