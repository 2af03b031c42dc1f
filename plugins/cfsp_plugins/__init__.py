"""CFSP's collectors, compensators, recovery schedulers, observers and architectures."""

from __future__ import annotations

from cfsp_framework import Collector, Compensator, Observer, RecoveryScheduler, hookimpl

from .architectures import cfsp_architecture
from .collectors import COLLECTORS
from .compensators import COMPENSATORS
from .observers import Jsonl, TensorBoard
from .recovery import Full, IgLora, NoRecovery, UniformLora

__all__ = ["cfsp_architecture", "cfsp_collectors", "cfsp_compensators", "cfsp_observers", "cfsp_recovery_schedulers"]


@hookimpl
def cfsp_collectors() -> tuple[type[Collector], ...]:
    """Offer the built-in collectors."""
    return COLLECTORS


@hookimpl
def cfsp_compensators() -> tuple[type[Compensator], ...]:
    """Offer the built-in compensators."""
    return COMPENSATORS


@hookimpl
def cfsp_recovery_schedulers() -> list[type[RecoveryScheduler]]:
    """Offer the built-in recovery schedulers."""
    return [NoRecovery, UniformLora, IgLora, Full]


@hookimpl
def cfsp_observers() -> list[type[Observer]]:
    """Offer the built-in observers."""
    return [Jsonl, TensorBoard]
