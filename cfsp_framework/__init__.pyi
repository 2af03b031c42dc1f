from .api import (
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
    Update,
)
from .config import RunConfig
from .errors import CfspError
from .hookspecs import hookimpl
from .pipeline import RunResult, prune
from .planning import PruningPlan

__all__ = [
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
    "Update",
    "hookimpl",
    "prune",
]
