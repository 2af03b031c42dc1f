"""The built-in compensators, one a file."""

from __future__ import annotations

from cfsp_framework import Compensator

from .bias import Bias, NoCompensation
from .least_squares import LeastSquares
from .least_squares_bias import LeastSquaresBias
from .local_reconstruction import LocalReconstruction
from .procrustes import Procrustes
from .sequential import Sequential

COMPENSATORS: tuple[type[Compensator], ...] = (
    NoCompensation,
    Bias,
    LeastSquares,
    LeastSquaresBias,
    Procrustes,
    Sequential,
    LocalReconstruction,
)
"""Every built-in compensator."""

__all__ = [
    "COMPENSATORS",
    "Bias",
    "LeastSquares",
    "LeastSquaresBias",
    "LocalReconstruction",
    "NoCompensation",
    "Procrustes",
    "Sequential",
]
