"""Results of a sweep as plain data: its cells, the dense model, and the agreement of its criteria.

The store writes these records, and tables and page read nothing else.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cfsp_framework.config import FrozenRecord


class Quality(FrozenRecord):
    """Perplexity of one model on one text."""

    data: str
    """The data SPEC."""
    windows: int = Field(ge=0)
    seqlen: int = Field(ge=0)
    perplexity: float
    nll: float
    """Nats per token."""
    bits_per_byte: float


class Latency(FrozenRecord):
    """Time of a forward over one batch of ``tokens`` tokens, measured in turn with the dense model."""

    tokens: int
    milliseconds: float
    """Median."""
    dense_milliseconds: float


class CellSpec(FrozenRecord):
    """Everything that distinguishes one cell of a sweep from the others."""

    row: str
    """Its name in tables: the name of a named row, or its components' names."""
    criterion: str
    """NAME:option=value,... with every option, as in a plan; likewise the other components."""
    allocator: str
    compensator: str
    recovery: str
    ratio: float
    """Requested share of feed-forward channels (or of parameters, by the budget) to remove."""
    samples: int
    """Calibration windows."""
    seed: int


class CellResult(FrozenRecord):
    """One cell, finished or failed."""

    key: str
    """Hash of everything that decides the result: model, data, components with options and code, versions."""
    spec: CellSpec
    status: Literal["done", "failed"]
    error: str | None = None
    """Error of a failed cell, on one line."""
    channel_ratio: float | None = None
    """Share of feed-forward channels removed."""
    parameter_ratio: float | None = None
    parameters: int | None = None
    """Parameters of the pruned model."""
    widths: tuple[int, ...] = ()
    """Width of each feed-forward, in the plan's order."""
    qualities: tuple[Quality, ...] = ()
    """Quality of the pruned (and recovered) model on every evaluation SPEC."""
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metric by task, as lm-evaluation-harness names them."""
    latency: Latency | None = None
    seconds: float = 0.0
    """Time of the cell itself: plan, cut, compensation, recovery, evaluation; without the shared measurements."""
    command: str = ""
    """Command that runs this cell alone."""


class Agreement(FrozenRecord):
    """Agreement of two criteria on the channels of one feed-forward."""

    seed: int
    block: int
    path: str
    first: str
    """As in ``CellSpec.criterion``."""
    second: str
    rank_correlation: float
    """Spearman's correlation over all channels; 0 where either criterion scores all channels alike."""
    overlap: dict[str, float] = Field(default_factory=dict)
    """By ratio, as text: the share of kept channels that both would keep if each removed that share of this block."""


class SweepResults(FrozenRecord):
    """A whole sweep."""

    format: Literal["cfsp-ablation"] = "cfsp-ablation"
    version: Literal[1] = 1
    model: str
    fingerprint: str
    family: str
    dtype: str
    device: str
    parameters: int
    """Parameters of the dense model."""
    widths: tuple[int, ...]
    """Width of each dense feed-forward."""
    places: tuple[tuple[int, str], ...]
    """Block and path of each feed-forward, in the order of the widths."""
    budget: Literal["channels", "parameters"]
    round_to: int
    calibration: str
    seqlen: int
    dense: tuple[Quality, ...] = ()
    dense_tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    cells: tuple[CellResult, ...] = ()
    agreements: tuple[Agreement, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    """Seconds of the whole sweep by phase: load, calibrate, collect, plan, evaluate ..."""
