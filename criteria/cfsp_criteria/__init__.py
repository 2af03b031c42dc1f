"""The fine criteria that ship with cfsp-framework, one a file."""

from __future__ import annotations

from cfsp_framework import Criterion, hookimpl

from .cfsp import Cfsp
from .flap import Flap
from .magnitude import Magnitude
from .obs import Obs
from .random import Random
from .wanda_l2 import WandaL2
from .wanda_sp import WandaSp

__all__ = ["Cfsp", "Flap", "Magnitude", "Obs", "Random", "WandaL2", "WandaSp"]


@hookimpl
def cfsp_criteria() -> list[type[Criterion]]:
    return [Cfsp, Flap, Magnitude, Obs, Random, WandaL2, WandaSp]
