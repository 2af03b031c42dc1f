"""CFSP's collectors, compensators, recovery schedulers, observers and architectures."""

from __future__ import annotations

from cfsp_framework import Collector, Compensator, Observer, RecoveryScheduler, hookimpl

from .activations import (
    DownInputFluctuation,
    DownInputMean,
    DownInputMeanHeldOut,
    DownInputSquares,
    DownInputTaylor,
    DownInputTaylorSquared,
    DownInputVariance,
)
from .architectures import cfsp_architecture
from .compensators import Bias, NoCompensation
from .distances import AngularDistance, CosineDistance, MaeDistance, MseDistance
from .least_squares import LeastSquares, LeastSquaresBias, Procrustes, Sequential
from .local_reconstruction import LocalReconstruction
from .observers import Jsonl, TensorBoard
from .recovery import Full, IgLora, NoRecovery, UniformLora
from .second_order import (
    BlockOutputSquares,
    DownCross,
    DownCrossHeldOut,
    DownInputGram,
    DownInputGramHeldOut,
    DownTargetSquares,
    DownTargetSquaresHeldOut,
    FeedForwardInputs,
    FeedForwardInputsHeldOut,
    FeedForwardTargets,
    FeedForwardTargetsHeldOut,
)

__all__ = ["cfsp_architecture", "cfsp_collectors", "cfsp_compensators", "cfsp_observers", "cfsp_recovery_schedulers"]


@hookimpl
def cfsp_collectors() -> list[type[Collector]]:
    return [
        DownInputSquares,
        DownInputMean,
        DownInputMeanHeldOut,
        DownInputVariance,
        DownInputFluctuation,
        DownInputTaylor,
        DownInputTaylorSquared,
        AngularDistance,
        CosineDistance,
        MseDistance,
        MaeDistance,
        DownInputGram,
        DownInputGramHeldOut,
        DownCross,
        DownCrossHeldOut,
        DownTargetSquares,
        DownTargetSquaresHeldOut,
        FeedForwardInputs,
        FeedForwardInputsHeldOut,
        FeedForwardTargets,
        FeedForwardTargetsHeldOut,
        BlockOutputSquares,
    ]


@hookimpl
def cfsp_compensators() -> list[type[Compensator]]:
    return [NoCompensation, Bias, LeastSquares, LeastSquaresBias, Procrustes, Sequential, LocalReconstruction]


@hookimpl
def cfsp_recovery_schedulers() -> list[type[RecoveryScheduler]]:
    return [NoRecovery, UniformLora, IgLora, Full]


@hookimpl
def cfsp_observers() -> list[type[Observer]]:
    return [Jsonl, TensorBoard]
