"""Plot the speeds of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp_framework.benchmark.timing import BenchmarkReport
from cfsp_framework.errors import ConfigError
from cfsp_framework.runtime.atomic_files import check_parent

_FORMATS = (".svg", ".png", ".pdf")


def check_plot_file(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be plotted into."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"--plot {path}: a picture's name ends in {', '.join(_FORMATS)}.")
    check_parent(path)


def plot_speeds(report: BenchmarkReport, path: Path) -> None:
    """Draw a panel for each phase: speed-ups as bars with the ideal, or milliseconds of a single model."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(speed.phase for speed in report.speeds))
    points = report.workload.points
    figure: Any = Figure(figsize=(max(6.4, 0.9 * len(points) * len(report.models)), 3.4 * len(phases)))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
    for panel, phase in zip(panels, phases, strict=True):
        _draw(panel, report, phase)
        panel.set_title(f"{phase}, {report.device}, {report.dtype}", loc="left", fontsize=9)
    panels[-1].set_xlabel("batch size x tokens of the prompt")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(panel: Any, report: BenchmarkReport, phase: str) -> None:
    models, points = [model.name for model in report.models], report.workload.points
    names = models[1:] or models
    slot = 0.8 / len(names)
    speeds = {(speed.model, speed.batch_size, speed.length): speed for speed in report.speeds if speed.phase == phase}
    for number, name in enumerate(names):
        for place, (batch, length) in enumerate(points):
            speed, x = speeds[name, batch, length], place + (number - (len(names) - 1) / 2) * slot
            spread, scale = (speed.speed_up, 1) if speed.speed_up else (speed.seconds, 1000)
            error = [[scale * (spread.median - spread.low)], [scale * (spread.high - spread.median)]]
            label = name if place == 0 else None
            height = scale * spread.median
            panel.bar(x, height, slot * 0.9, yerr=error, capsize=3, color=f"C{number}", label=label)
            if speed.ideal:
                label = None if number or place else "ideal"
                panel.hlines(speed.ideal.expected, x - slot / 2, x + slot / 2, color="black", label=label)
    panel.set_xticks(range(len(points)), [f"{batch} x {length}" for batch, length in points])
    panel.set_ylabel("speed-up" if len(models) > 1 else "milliseconds")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    if len(models) > 1:
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
