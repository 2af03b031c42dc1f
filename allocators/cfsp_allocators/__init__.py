"""The coarse allocators that ship with cfsp-framework, one a file."""

from __future__ import annotations

from cfsp_framework import Allocator, hookimpl

from .cfsp import Cfsp
from .error_curve import ErrorCurve
from .global_zscore import GlobalZscore
from .log_increase import LogIncrease
from .owl import Owl
from .search import Search
from .softmax_bi import SoftmaxBi
from .uniform import Uniform

__all__ = ["Cfsp", "ErrorCurve", "GlobalZscore", "LogIncrease", "Owl", "Search", "SoftmaxBi", "Uniform"]


@hookimpl
def cfsp_allocators() -> list[type[Allocator]]:
    """Offer the built-in allocators."""
    return [Cfsp, ErrorCurve, GlobalZscore, LogIncrease, Owl, Search, SoftmaxBi, Uniform]
