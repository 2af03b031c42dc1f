"""Plotly figures of the pages: one style, HTML fragments, and the two figures of a run."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from cfsp_framework.api.records import BlockReport, LossPoint
from cfsp_framework.reporting.metrics import describe_feed_forward, is_mixed

INK, SOFT, LINE, MUTED = "#1d2430", "#667085", "#e3e7ee", "#c3cad6"
KEPT, REMOVED, HELD_OUT = "#2563a8", "#dfe6f0", "#b54708"
_LOG_SPAN = 3.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""


def plotly_script() -> Markup:
    """Return plotly.js as a ``<script>`` element; a page with figures needs it once."""
    from plotly.offline import get_plotlyjs

    return Markup(f"<script>{get_plotlyjs()}</script>")


def new_figure(title: str = "", *, height: int, legend: str = "") -> Any:
    """Return an empty figure in the pages' style, as wide as its place on the page and ``height`` pixels high.

    The legend lies below the axes, where it leaves their width alone on a narrow screen; ``legend`` is its title.
    """
    from plotly.graph_objects import Figure

    axis = {"gridcolor": LINE, "linecolor": MUTED, "zeroline": False, "automargin": True, "tickcolor": MUTED}
    return Figure(
        layout={
            "template": "none",
            "title": {"text": f"<b>{title}</b>", "font": {"size": 14}, "x": 0, "xref": "container", "y": 1, "pad": {"t": 14},
                      "yanchor": "top"},
            "height": height,
            "margin": {"l": 10, "r": 10, "t": 44 if title else 20, "b": 10},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": SOFT},
            "title_font_color": INK,
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom", "x": 0, "title": {"text": legend}},
            "hoverlabel": {"align": "left", "namelength": -1},
            "hovermode": "closest",
        }
    )  # fmt: skip


def to_fragment(figure: Any, name: str) -> Markup:
    """Return a figure as an HTML fragment whose element has the id ``name``; the page holds plotly.js itself."""
    from plotly.io import to_html

    config = {
        "responsive": True,
        "displaylogo": False,
        "showSendToCloud": False,  # a button that uploads the data
        "typesetMath": False,
        "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
    }
    height = f"{figure.layout.height}px"
    text = to_html(figure, config, include_plotlyjs=False, full_html=False, default_height=height, div_id=name)
    return Markup(text)


def plain_text(text: str) -> str:
    """Return text that Plotly shows letter by letter: it would read ``<b>`` as bold."""
    return html.escape(text, quote=False)


def shorten(text: str, length: int) -> str:
    """Return at most ``length`` characters of a text, the middle left out where there are more."""
    if len(text) <= length:
        return text
    kept = length - 1
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def set_value_axis(axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic where positive values span a factor of 3 or more, and fit its range to them."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _LOG_SPAN:
        steps = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 300 else (1,)
        ticks = [
            step * 10**power
            for power in range(math.floor(math.log10(low)), 1 + math.ceil(math.log10(high)))
            for step in steps
        ]
        axis.update(type="log", tickvals=ticks, ticktext=[f"{tick:,.6g}" for tick in ticks])
        low, high = math.log10(low), math.log10(high)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    axis.range = (low - room, high + room)


def plot_widths(blocks: Sequence[BlockReport]) -> Any:
    """Return a bar for each feed-forward: the width kept in front of the width before."""
    mixed = is_mixed(blocks)
    labels = [f"{block.block} {block.path}" if mixed else str(block.block) for block in blocks]
    hover = [
        f"block {block.block}"
        + (f", {plain_text(describe_feed_forward(block))}" if mixed else "")
        + f"<br>{block.width_after:,} of {block.width_before:,} channels"
        + (f"<br>importance {block.importance:.4g}" if block.importance is not None else "")
        for block in blocks
    ]
    figure = new_figure(height=320)
    shared: dict[str, Any] = {"x": labels, "hovertext": hover, "hoverinfo": "text"}
    figure.add_bar(y=[block.width_before for block in blocks], name="before", marker={"color": REMOVED}, **shared)
    figure.add_bar(
        y=[block.width_after for block in blocks],
        name="kept",
        marker={"color": KEPT},
        text=[f"{block.width_after / block.width_before:.0%}" for block in blocks],
        textposition="outside" if len(blocks) <= 16 else "none",
        textfont={"color": INK},
        **shared,
    )
    figure.update_layout(barmode="overlay", bargap=0.2, hovermode="x", legend={"traceorder": "reversed"})
    figure.update_xaxes(type="category", title="block", showgrid=False)
    figure.update_yaxes(title="channels")
    return figure


def plot_losses(points: Sequence[LossPoint]) -> Any | None:
    """Return training and held-out loss by step, or None where there are not two points to join."""
    if len(points) < 2:
        return None
    figure = new_figure(height=300)
    for name, colour, losses in (
        ("training", KEPT, [(point.step, point.loss) for point in points]),
        ("held-out", HELD_OUT, [(point.step, point.held_out) for point in points]),
    ):
        measured = [(step, loss) for step, loss in losses if loss is not None]
        if measured:
            figure.add_scatter(
                x=[step for step, _ in measured],
                y=[loss for _, loss in measured],
                name=name,
                mode="lines+markers",
                line={"color": colour},
                showlegend=True,
            )
    figure.update_xaxes(title="step")
    figure.update_yaxes(title="loss, nats per token")
    figure.update_layout(hovermode="x unified")
    return figure
