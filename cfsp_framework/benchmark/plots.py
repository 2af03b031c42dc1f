"""The picture of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cfsp_framework.benchmark.timing import Benchmark, Speed
from cfsp_framework.errors import ConfigError
from cfsp_framework.runtime.atomic_files import check_parent

_FORMATS = (".svg", ".png", ".pdf")


def check_file(path: Path) -> None:
    """Refuse, before anything is measured, a file that cannot be drawn."""
    if path.suffix not in _FORMATS:
        raise ConfigError(f"--plot {path}: a picture's name ends in {', '.join(_FORMATS)}.")
    check_parent(path)


def plot_speeds(found: Benchmark, path: Path) -> None:
    """A panel for each phase: speed-ups as bars over the ideal, or milliseconds where there is one model only."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    phases = list(dict.fromkeys(one.phase for one in found.speeds))
    settings = list(dict.fromkeys((one.batch_size, one.length) for one in found.speeds))
    figure: Any = Figure(figsize=(max(6.4, 0.9 * len(settings) * len(found.models)), 3.4 * len(phases)))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(phases), 1, squeeze=False)[:, 0]
    for panel, phase in zip(panels, phases, strict=True):
        of_phase = [one for one in found.speeds if one.phase == phase]
        _draw(panel, of_phase, [model.name for model in found.models], settings)
        panel.set_title(f"{phase}, {found.device}, {found.dtype}", loc="left", fontsize=9)
    panels[-1].set_xlabel("batch size x tokens of the prompt")
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw(panel: Any, speeds: list[Speed], models: list[str], settings: list[tuple[int, int]]) -> None:
    compared = models[1:] or models
    slot = 0.8 / len(compared)
    for number, name in enumerate(compared):
        mine = {(one.batch_size, one.length): one for one in speeds if one.model == name}
        for place, setting in enumerate(settings):
            one, x = mine[setting], place + (number - (len(compared) - 1) / 2) * slot
            spread = one.speed_up or one.seconds
            scale = 1 if one.speed_up else 1000
            error = [[scale * (spread.median - spread.low)], [scale * (spread.high - spread.median)]]
            panel.bar(
                x, scale * spread.median, slot * 0.9, yerr=error, capsize=3,
                color=f"C{number}", label=name if place == 0 else None,
            )  # fmt: skip
            if one.ideal:
                ideal = one.ideal.expected
                panel.hlines(
                    ideal, x - slot / 2, x + slot / 2, color="black", label=None if number or place else "ideal"
                )
    panel.set_xticks(range(len(settings)), [f"{batch} x {length}" for batch, length in settings])
    panel.set_ylabel("speed-up" if len(models) > 1 else "milliseconds")
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    if len(models) > 1:
        panel.axhline(1, color="grey", linewidth=0.8)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
