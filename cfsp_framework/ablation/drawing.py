"""From a matplotlib figure to SVG that stands inside a page: small, the same every time, in the page's own font."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, SOFT, LINE, MUTED = "#1d2430", "#667085", "#e3e7ee", "#c3cad6"
ACCENT, BAD = "#2563a8", "#b54708"
HIGHLIGHTS = (
    ("#0072b2", "o", "-"),
    ("#d55e00", "s", "-"),
    ("#009e73", "^", "-"),
    ("#cc79a7", "D", "--"),
    ("#e69f00", "v", "--"),
    ("#56b4e9", "P", "--"),
)
"""Colour, marker and line of the few methods that stand out: of Okabe and Ito's palette, safe for the colour-blind."""

_SVG = "http://www.w3.org/2000/svg"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d+")
_SERIES = re.compile(r"series-(\d+)")
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": SOFT,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.8,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.family": "sans-serif",
    "font.size": 8.5,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "svg.fonttype": "none",
    "svg.hashsalt": "cfsp",
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
    "xtick.color": SOFT,
    "xtick.labelsize": 8,
    "xtick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.color": SOFT,
    "ytick.labelsize": 8,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@contextmanager
def page_style() -> Generator[None]:
    """While open, matplotlib draws as the pages look; its settings are as before afterwards."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def to_svg(figure: Figure, name: str, label: str, titles: Mapping[str, str] | None = None) -> str:
    """One ``<svg>`` element, that takes the room it is given, within what leaves its text legible.

    Text stays text, in the font of the page around it. An artist whose ``gid`` is ``series-N`` becomes a group of class
    ``sN``, and shows ``titles[gid]`` under the mouse; ``name`` keeps the identifiers of several pictures apart.
    """
    written = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a browser has fonts for what matplotlib has none
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(written.getvalue())
    for unwanted in ("metadata", "defs/{*}style"):
        parent, _, last = unwanted.rpartition("/")
        holder = root.find(f"{{{_SVG}}}{parent}") if parent else root
        found = holder.find(last if last.startswith("{") else f"{{{_SVG}}}{last}") if holder is not None else None
        if holder is not None and found is not None:
            holder.remove(found)
    _rename(root, name, titles or {})
    for attribute in ("width", "height", "version"):
        root.attrib.pop(attribute, None)
    inches = figure.get_size_inches()[0]
    room = f"width:{inches * 100:.0f}px;max-width:100%;min-width:{inches * 64:.0f}px"  # between these its text is well read
    root.attrib |= {"role": "img", "aria-label": label, "stroke-linejoin": "round", "style": room}
    ElementTree.register_namespace("", _SVG)
    return re.sub(r">\s+<", "><", ElementTree.tostring(root, encoding="unicode"))


def _rename(root: ElementTree.Element, name: str, titles: Mapping[str, str]) -> None:
    """Shorten what matplotlib writes and give the identifiers something refers to a prefix; drop all others."""
    referred = {found for one in root.iter() for value in one.attrib.values() for found in _REFERENCE.findall(value)}
    referred |= {one.attrib[_HREF][1:] for one in root.iter() if one.attrib.get(_HREF, "").startswith("#")}
    new = {old: f"{name}-{place}" for place, old in enumerate(sorted(referred))}
    for one in root.iter():
        identifier = one.attrib.pop("id", None)
        if identifier in new:
            one.set("id", new[identifier])
        elif identifier and (series := _SERIES.match(identifier)):
            one.set("class", f"s{series[1]}")
            if identifier in titles:
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = titles[identifier]
                one.insert(0, title)
        if (reference := one.attrib.pop(_HREF, None)) is not None:
            one.set("href", f"#{new[reference[1:]]}" if reference.startswith("#") else reference.replace("\n", ""))
        for key, value in one.attrib.items():
            if key in ("d", "x", "y", "transform", "points"):
                value = _NUMBER.sub(_longer if key == "transform" else _short, value)
            value = _REFERENCE.sub(lambda found: f"url(#{new[found[1]]})", value)
            one.set(key, re.sub(r"font-family: [^;]+;? ?", "", value).replace("\n", " ").strip())


def _short(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _longer(number: re.Match[str]) -> str:
    """Scales of embedded images are small numbers times large ones."""
    return f"{float(number[0]):.5g}"


def dodge(wanted: Sequence[float], room: float, low: float = 0.0, high: float = 1.0) -> list[float]:
    """Places for labels in the order of the ``wanted`` ones, at least ``room`` apart and as near to them as that allows.

    The sum of the squared distances is the least there is; where the labels have room between ``low`` and ``high`` they
    stay there.
    """
    from scipy.optimize import isotonic_regression

    if not wanted:
        return []
    order = sorted(range(len(wanted)), key=lambda place: wanted[place])
    spread = isotonic_regression([wanted[place] - room * rank for rank, place in enumerate(order)]).x
    top = max(low, high - room * (len(wanted) - 1))
    found = [0.0] * len(wanted)
    for rank, place in enumerate(order):
        found[place] = min(max(float(spread[rank]), low), top) + room * rank
    return found


def use_share_axis(axes: Axes, axis: str = "x") -> None:
    """Shares as whole percents."""
    from matplotlib.ticker import PercentFormatter

    chosen = axes.xaxis if axis == "x" else axes.yaxis
    chosen.set_major_formatter(PercentFormatter(1.0, decimals=0))


def use_log_axis(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic vertical axis with plain numbers at some six places: 0.02, 0.5, 1, 20, 1000."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_yscale("log")
    decades = max(values) / min(values)
    steps: tuple[float, ...] = (1.0, 2.0, 5.0) if decades < 300 else (1.0,)
    if decades < 10:
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.6g}" if 1e-3 <= value < 1e6 else f"{value:.0e}")
    )
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def shortened(text: str, room: int) -> str:
    """At most ``room`` letters, the middle left out where there are more."""
    if len(text) <= room:
        return text
    kept = room - 1
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def percent(share: float) -> str:
    """``30%``, ``12.5%``."""
    return f"{100 * share:.4g}%"
