"""The coarse allocators that ship with cfsp-framework, one a file."""

from __future__ import annotations

from cfsp_framework import Allocator, hookimpl

from .cfsp import Cfsp
from .global_zscore import GlobalZscore
from .uniform import Uniform

__all__ = ["Cfsp", "GlobalZscore", "Uniform"]


@hookimpl
def cfsp_allocators() -> list[type[Allocator]]:
    return [Cfsp, GlobalZscore, Uniform]
