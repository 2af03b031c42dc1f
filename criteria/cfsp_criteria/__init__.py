"""The fine criteria that ship with cfsp-framework, one a file."""

from __future__ import annotations

from cfsp_framework import Criterion, hookimpl

from .cfsp import Cfsp
from .flap import Flap
from .leverage import Leverage
from .magnitude import Magnitude
from .obs import Obs
from .random import Random
from .taylor import Taylor
from .variance_weighted import VarianceWeighted
from .wanda_l2 import WandaL2
from .wanda_sp import WandaSp

__all__ = ["Cfsp", "Flap", "Leverage", "Magnitude", "Obs", "Random", "Taylor", "VarianceWeighted", "WandaL2", "WandaSp"]


@hookimpl
def cfsp_criteria() -> list[type[Criterion]]:
    """Offer the built-in criteria."""
    return [Cfsp, Flap, Leverage, Magnitude, Obs, Random, Taylor, VarianceWeighted, WandaL2, WandaSp]
