"""Helpers shared by the scripts of this folder: arguments, memory, result files and spreads."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def make_parser(description: str | None, *arguments: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return a parser with positional ``arguments``, and an option for each default, of the default's type."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in arguments:
        parser.add_argument(name)
    add_options(parser, **defaults)
    return parser


def add_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add an option for each default: a list takes several values, False is a flag."""
    for name, default in defaults.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(default, list):
            parser.add_argument(flag, nargs="+", type=type(default[0]), default=default)
        elif default is False:
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=str if default is None else type(default), default=default)


def status_bytes(key: str) -> int:
    """Return a figure of ``/proc/self/status`` in bytes: VmRSS, VmHWM (the peak) or RssAnon."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def reset_peak() -> None:
    """Return freed memory to the system and reset the peak VmHWM."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def read_cells(results: Path) -> list[dict[str, Any]]:
    """Read the finished cells of a file of JSON lines."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def append_cell(results: Path, cell: Mapping[str, Any]) -> None:
    """Print a finished cell and append it to a file of JSON lines."""
    print(json.dumps(cell), flush=True)
    with results.open("a") as file:
        file.write(json.dumps(cell) + "\n")


def format_spread(values: Sequence[float], digits: int) -> str:
    """Format the mean, and half the range over seeds."""
    spread = f" ±{(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"
