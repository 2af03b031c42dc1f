"""Types of the fixtures in ``conftest.py``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel

MakeModel = Callable[..., Path]
MakePlan = Callable[..., PruningPlan]
OpenTiny = Callable[..., tuple[LoadedModel, Decoder]]
