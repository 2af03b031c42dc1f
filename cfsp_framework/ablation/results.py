"""What a sweep found, as plain data: its cells, the dense model beside them, and how far its criteria agree.

The store writes these, and every table, page and picture of a sweep is made from them and from nothing else.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from cfsp_framework.config import FrozenRecord


class Quality(FrozenRecord):
    """How well one model predicts one text."""

    data: str
    """The data SPEC."""
    windows: int = Field(ge=0)
    seqlen: int = Field(ge=0)
    perplexity: float
    nll: float
    """Nats per token."""
    bits_per_byte: float


class Latency(FrozenRecord):
    """A forward over one batch of ``tokens`` tokens, measured in turn with the dense model."""

    tokens: int
    milliseconds: float
    """The median."""
    dense_milliseconds: float


class CellSpec(FrozenRecord):
    """What one cell of a sweep is: everything that distinguishes it from the others."""

    row: str
    """What a table calls it: the name of a named row, or its components' names."""
    criterion: str
    """NAME:option=value,... with every option, as in a plan; likewise the other components."""
    allocator: str
    compensator: str
    recovery: str
    ratio: float
    """Share of feed-forward channels (or of parameters, by the budget) asked to be removed."""
    samples: int
    """Calibration windows."""
    seed: int


class CellResult(FrozenRecord):
    """One cell, finished or failed."""

    key: str
    """A hash of all that decides the result: model, data, components with options and code, versions."""
    spec: CellSpec
    status: Literal["done", "failed"]
    error: str | None = None
    """One line, where the cell failed."""
    channel_ratio: float | None = None
    """The share of feed-forward channels really removed."""
    parameter_ratio: float | None = None
    parameters: int | None = None
    """Of the pruned model."""
    widths: tuple[int, ...] = ()
    """Of each feed-forward, in the plan's order."""
    qualities: tuple[Quality, ...] = ()
    """Of the pruned (and recovered, where that was asked for) model, on every evaluation SPEC."""
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    """Metric by task, as lm-evaluation-harness names them."""
    latency: Latency | None = None
    seconds: float = 0.0
    """What the cell itself took: plan, cut, compensation, recovery, evaluation; not the shared collection."""
    command: str = ""
    """The command that gives this cell alone."""


class Agreement(FrozenRecord):
    """How alike two criteria rank the channels of one feed-forward."""

    seed: int
    block: int
    path: str
    first: str
    """As in ``CellSpec.criterion``."""
    second: str
    rank_correlation: float
    """Spearman's, over all channels; 0 where either criterion scores all channels alike."""
    overlap: dict[str, float] = Field(default_factory=dict)
    """By ratio, as text: the share of the kept channels both would keep if each kept that share of this block."""


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
    """Of the dense model."""
    widths: tuple[int, ...]
    """Of each dense feed-forward."""
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
    """By phase, of the whole sweep: load, calibrate, collect, plan, evaluate ..."""
