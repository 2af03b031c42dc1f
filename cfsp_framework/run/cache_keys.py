"""Compute the keys of cached work: hashes of everything that decides it, so that nothing stale is reused."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from torch import Tensor

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.engine.cache import identity_of
from cfsp_framework.host.selection import Selection
from cfsp_framework.pruning import surgery
from cfsp_framework.run.context import RunContext
from cfsp_framework.runtime.hashing import hash_json, hash_windows


def collection_key(context: RunContext) -> str:
    """Hash everything that decides a block's measurements and scores; the ratio does not."""
    selection, windows = context.selection, context.windows_to_select
    parts = {
        "model": context.loaded.fingerprint,
        "windows": fingerprint_of(windows),
        "criterion": identity_of(selection.criterion),
        "collectors": [identity_of(collector) for collector in selection.collectors],
        "curve": selection.curve,
        "dropped_attention": surgery.dropped_attention(context.decoder.config),
        "versions": versions(selection),
        "numerics": numerics(context),
        **_history(context),
    }
    return hash_json(parts)


def _history(context: RunContext) -> dict[str, str]:
    """Return what distinguishes a model that was cut in earlier rounds from the dense one."""
    return {"history": context.history} if context.history else {}


def numerics(context: RunContext) -> list[object]:
    """Return what may change the last digits of a result."""
    model, config = context.decoder.model, context.config
    forward_options = [config.calibration.batch_size, sorted(context.forward_options.skip), context.ranks.world]
    return [config.run.seed, *forward_options, str(model.dtype), context.decoder.device.type]


def second_pass_key(context: RunContext, plan: PruningPlan) -> str:
    """Hash everything that decides the updates of the second pass."""
    windows = context.windows_to_compensate
    parts = {
        "plan": plan.model_dump(mode="json", exclude={"components", "versions", "search"}),
        "components": context.selection.describe(),
        "versions": versions(context.selection),
        "windows": fingerprint_of(windows),
        "compensator": identity_of(context.selection.compensator),
        "collectors": [identity_of(collector) for collector in context.selection.second_pass],
        "numerics": numerics(context),
        **_history(context),
    }
    return hash_json(parts)


def versions(selection: Selection) -> dict[str, str]:
    """Return the versions of Python, the computing libraries and every distribution a component comes from."""
    return {**library_versions(), **selection.distributions()}


@cache
def library_versions() -> Mapping[str, str]:
    """Return the versions of Python and the computing libraries."""
    libraries = {name: importlib.metadata.version(name) for name in ("cfsp-framework", "torch", "transformers")}
    return MappingProxyType({"python": platform.python_version(), **libraries})


def fingerprint_of(windows: Tensor | None) -> str | None:
    """Hash windows ``(N, T)``; None stays None."""
    return hash_windows(windows) if windows is not None else None
