"""Under which name finished work is filed: hashes of all that decides it, so that nothing stale is used again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from torch import Tensor

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.engine.cache import identity_of
from cfsp_framework.host.selection import Selection, curve_of
from cfsp_framework.pruning import surgery
from cfsp_framework.run.context import Bench


def collection_key(bench: Bench) -> str:
    """A hash of all that decides what a block measures and scores; the ratio is not among it."""
    selection, windows = bench.selection, bench.windows_to_select
    told = {
        "model": bench.loaded.fingerprint,
        "windows": fingerprint_of(windows),
        "criterion": identity_of(selection.criterion),
        "collectors": [identity_of(chosen) for chosen in selection.collectors],
        "curve": curve_of(selection.allocator),
        "dropped_attention": surgery.dropped_attention(bench.decoder.config),
        "versions": versions(selection),
        "numerics": numerics(bench),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def numerics(bench: Bench) -> list[object]:
    """What may change the last digits."""
    model, config = bench.decoder.model, bench.config
    passage = [config.batch_size, sorted(bench.passage.skip), bench.ranks.world]
    return [config.seed, *passage, str(model.dtype), bench.decoder.device.type]


def second_pass_key(bench: Bench, plan: PruningPlan) -> str:
    """A hash of all that decides what the second pass answers."""
    windows = bench.windows_to_compensate
    told = {
        "plan": plan.model_dump(mode="json", exclude={"components", "versions"}),
        "components": bench.selection.describe(),
        "versions": versions(bench.selection),
        "windows": fingerprint_of(windows),
        "compensator": identity_of(bench.selection.compensator),
        "collectors": [identity_of(chosen) for chosen in bench.selection.second_pass],
        "numerics": numerics(bench),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def versions(selection: Selection) -> dict[str, str]:
    """Of Python, the libraries that compute, and every distribution a component comes from."""
    return {**library_versions(), **selection.distributions()}


@cache
def library_versions() -> Mapping[str, str]:
    """Of Python and the libraries that compute."""
    libraries = {name: importlib.metadata.version(name) for name in ("cfsp-framework", "torch", "transformers")}
    return MappingProxyType({"python": platform.python_version(), **libraries})


def fingerprint_of(windows: Tensor | None) -> str | None:
    """A hash of windows ``(N, T)``, where there are some."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest() if windows is not None else None
