"""Run ``cfsp benchmark``: open the models, cut, time and compare them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePath

import torch

from cfsp_framework.benchmark.candidates import Cuts, cut_in_memory, open_candidate
from cfsp_framework.benchmark.timing import BenchmarkReport, BenchmarkSettings, time_models
from cfsp_framework.config import RunConfig
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.runtime.progress import Progress


def run_benchmark(
    config: RunConfig,
    pruned: Sequence[str] = (),
    cuts: Cuts | None = None,
    settings: BenchmarkSettings | None = None,
    *,
    random_weights: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> BenchmarkReport:
    """Time the model of ``config``, its ``pruned`` checkpoints and ``cuts`` of it in memory, on ``threads`` of a CPU.

    Raises:
        ModelError: a model cannot be opened.
        ConfigError: the models cannot be compared, or an allocator is unknown.
    """
    plugins = load_plugins(config.run.plugins)
    sources = [config.model.source, *pruned]
    default_threads = torch.get_num_threads()
    torch.set_num_threads(threads or default_threads)
    try:
        candidates = [
            open_candidate(source, config, plugins, random_weights=random_weights, name=name)
            for source, name in zip(sources, short_names(sources), strict=True)
        ]
        candidates += cut_in_memory(candidates[0], cuts, config, plugins) if cuts else ()
        settings = settings or BenchmarkSettings()
        return time_models(candidates, settings, random_weights=random_weights, progress=progress)
    finally:
        torch.set_num_threads(default_threads)


def short_names(sources: Sequence[str]) -> list[str]:
    """Name each source by its last path parts, as many as make the names differ."""
    parts = [PurePath(source.rstrip("/")).parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, 1)]
