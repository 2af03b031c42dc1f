"""``cfsp benchmark`` from top to bottom: open the models, cut, time them, compare."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import PurePath

import torch

from cfsp_framework.benchmark.candidates import Contestant, Cuts, cut_in_memory, open_contestant
from cfsp_framework.benchmark.timing import Benchmark, Workload, benchmark
from cfsp_framework.config import RunConfig
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.runtime.progress import Progress


def race(
    config: RunConfig,
    pruned: Sequence[str] = (),
    cuts: Cuts | None = None,
    workload: Workload | None = None,
    *,
    random_weights: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Benchmark:
    """Time ``config.model.source``, the checkpoints ``pruned`` from it and ``cuts`` of it in memory against each other.

    Raises:
        ModelError: one of them cannot be opened.
        ConfigError: they cannot be compared, or an allocator is unknown.
    """
    progress = progress or Progress()
    plugins = load_plugins(config.run.plugins)
    with _threads(threads):
        names = short_names([config.model.source, *pruned])
        dense = open_contestant(config.model.source, config, plugins, random_weights=random_weights, name=names[0])
        contestants: list[Contestant] = [dense]
        for source, name in zip(pruned, names[1:], strict=True):
            contestants.append(open_contestant(source, config, plugins, random_weights=random_weights, name=name))
        contestants += cut_in_memory(dense, cuts, config, plugins) if cuts else ()
        return benchmark(contestants, workload or Workload(), random_weights=random_weights, progress=progress)


def short_names(sources: Sequence[str]) -> list[str]:
    """Each source by its last part, or with as many parts as tell it from the others."""
    parts = [PurePath(source.rstrip("/")).parts for source in sources]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(part)} ({number})" for number, part in enumerate(parts, 1)]


@contextmanager
def _threads(count: int | None) -> Generator[None]:
    """While open, a CPU's products run on ``count`` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
