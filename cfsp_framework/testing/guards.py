"""Notes what a component does beside what it returns: what it reads, writes, and changes in this process."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from cfsp_framework.api.data import BlockStatistics, Statistic
from cfsp_framework.testing.errors import ContractError
from cfsp_framework.testing.samples import one_line


class WatchedStatistics(BlockStatistics):
    """The same statistics, with a note of every one that was asked for, be it there or not."""

    def __init__(self, statistics: BlockStatistics, reads: set[Statistic] | None = None) -> None:
        tokens = 0 if statistics.unseen else statistics.tokens
        super().__init__(dict(statistics), tokens, statistics.held_out_tokens)
        self.reads = set[Statistic]() if reads is None else reads

    def __getitem__(self, statistic: Statistic) -> Tensor:
        self.reads.add(statistic)
        return super().__getitem__(statistic)

    def _with(self, values: Mapping[Statistic, Tensor]) -> BlockStatistics:
        return WatchedStatistics(super()._with(values), self.reads)


class WatchedScalars(Mapping[Statistic, float]):
    """A block summary's scalar statistics, with a note of every one that was asked for."""

    def __init__(self, values: Mapping[Statistic, float], reads: set[Statistic]) -> None:
        self._values = values
        self._reads = reads

    def __getitem__(self, statistic: Statistic) -> float:
        self._reads.add(statistic)
        return self._values[statistic]

    def __iter__(self) -> Iterator[Statistic]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@contextmanager
def unwritten(method: str, tensors: Mapping[str, Tensor], whose: str) -> Generator[None]:
    """Refuse a change of ``tensors``, called ``whose.name``, while open."""
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if tensor.shape != before[name].shape or not torch.equal(_bits(tensor), _bits(before[name])):
            raise ContractError(f"{method} wrote to {whose}.{name}; work on a copy: {whose}.{name}.clone().")


@contextmanager
def unchanged_process(method: str) -> Generator[None]:
    """Refuse draws from global generators, and changes of torch's settings, while open."""
    before = _settings()
    states = torch.get_rng_state(), random.getstate()
    with restored():
        yield
        after = _settings()
    for name, value in after.items():
        if value != before[name]:
            raise ContractError(
                f"{method} left torch's {name} at {value}, which was {before[name]}; every component after it "
                "would run with that. Leave it alone, or put it back."
            )
    if not torch.equal(torch.get_rng_state(), states[0]) or random.getstate() != states[1]:
        raise ContractError(
            f"{method} drew from, or seeded, a global random generator, so that a run's result depends on what ran "
            "before. Draw with generator=feed_forward.generator(), or a torch.Generator of your own with a fixed seed."
        )


@contextmanager
def restored() -> Generator[None]:
    """Put torch's settings back at the end, whatever happens."""
    dtype, threads, gradients = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(deterministic)


@contextmanager
def call_component(method: str, on: object) -> Generator[None]:
    """Whatever a component raises while open becomes a ContractError that says on what."""
    try:
        yield
    except (ContractError, MemoryError):
        raise
    except KeyError as error:
        if "but not in `requires`" not in str(error):
            raise ContractError(f"{method} raised {one_line(error)} It was given: {on}.") from error
        raise ContractError(f"{method}: {error.args[0]}. Add it to `requires`.") from error
    except Exception as error:
        raise ContractError(f"{method} raised {one_line(error)} It was given: {on}.") from error


def _bits(tensor: Tensor) -> Tensor:
    """The tensor with values that equal themselves: a NaN is none."""
    return tensor.detach().nan_to_num(nan=12345.678)


def _settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "gradient mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
