"""What is trained after the cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from cfsp_framework import BlockSummary, PruningPlan, RecoveryPlan, RecoveryScheduler


class NoRecovery(RecoveryScheduler):
    """Train nothing."""

    name: ClassVar[str] = "none"

    def schedule(self, summaries: Sequence[BlockSummary], plan: PruningPlan) -> RecoveryPlan | None:
        return None
