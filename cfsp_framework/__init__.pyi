from .api import (
    HELD_OUT_EVERY,
    Accumulator,
    Allocator,
    Architecture,
    BlockStatistics,
    BlockSummary,
    Budget,
    Collector,
    Compensator,
    Component,
    Criterion,
    FeedForward,
    FeedForwardLayout,
    RecoveryPlan,
    RecoveryScheduler,
    Site,
    Statistic,
    Stream,
    Update,
)
from .config import RunConfig
from .errors import CfspError
from .hookspecs import hookimpl
from .pipeline import RunResult, prune
from .planning import PruningPlan

__all__ = [
    "HELD_OUT_EVERY",
    "Accumulator",
    "Allocator",
    "Architecture",
    "BlockStatistics",
    "BlockSummary",
    "Budget",
    "CfspError",
    "Collector",
    "Compensator",
    "Component",
    "Criterion",
    "FeedForward",
    "FeedForwardLayout",
    "PruningPlan",
    "RecoveryPlan",
    "RecoveryScheduler",
    "RunConfig",
    "RunResult",
    "Site",
    "Statistic",
    "Stream",
    "Update",
    "hookimpl",
    "prune",
]
