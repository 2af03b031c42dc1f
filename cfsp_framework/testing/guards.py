"""Record and refuse side effects of a component that the host's own checks cannot see."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from cfsp_framework.api.components import Component
from cfsp_framework.api.data import BlockStatistics, Statistic
from cfsp_framework.testing.errors import ContractError

C = TypeVar("C", bound=Component)


def record_reads(component: C, method: str, reads: set[Statistic]) -> C:
    """Return the component with a ``method`` that adds to ``reads`` the statistics it looks up, available or not."""
    return cast("C", _ReadRecorder(component, method, reads))


class _ReadRecorder:
    def __init__(self, component: Component, method: str, reads: set[Statistic]) -> None:
        self._component = component
        self._method = method
        self._reads = reads

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._component, name)
        return self._record if name == self._method else value

    def _record(self, *arguments: object) -> Any:
        method = getattr(self._component, self._method)
        return method(*(self._watch(value) if isinstance(value, BlockStatistics) else value for value in arguments))

    def _watch(self, statistics: BlockStatistics) -> BlockStatistics:
        return _RecordedStatistics(statistics, self._reads)


class _RecordedStatistics(BlockStatistics):
    """Tensor statistics of a feed-forward that record every look-up."""

    def __init__(self, statistics: BlockStatistics, reads: set[Statistic]) -> None:
        tokens = 0 if statistics.unseen else statistics.tokens
        super().__init__(dict(statistics), tokens, statistics.held_out_tokens)
        self._reads = reads

    def __getitem__(self, statistic: Statistic) -> Tensor:
        self._reads.add(statistic)
        return super().__getitem__(statistic)


class RecordedScalars(Mapping[Statistic, float]):
    """Scalar statistics of a block summary that record every look-up."""

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


def check_reads(required: frozenset[Statistic], reads: set[Statistic], methods: str) -> None:
    """Require that ``methods`` read every declared statistic and no other one.

    Raises:
        ContractError: a statistic is read and not declared, or declared and not read.
    """
    if undeclared := sorted(statistic.name for statistic in reads - required):
        raise ContractError(
            f"{methods} reads {', '.join(undeclared)}, which `required()` does not name, so that it is never measured. "
            "Add it to `requires`, or do not read it."
        )
    if unread := sorted(statistic.name for statistic in required - reads):
        raise ContractError(
            f"{methods} never reads {', '.join(unread)}, which is required, so that every run measures it in vain. "
            "Remove it from `requires`; if options decide, override required()."
        )


@contextmanager
def read_only(method: str, tensors: Mapping[str, Tensor]) -> Generator[None]:
    """Refuse changed values of ``tensors``, also those written through ``.data`` or numpy, which PyTorch does not count."""
    copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if not torch.equal(_comparable(tensor), _comparable(copies[name])):
            raise ContractError(f"{method} wrote to {name}; work on a copy: {name}.clone().")


def _comparable(tensor: Tensor) -> Tensor:
    """Replace NaN, which does not equal itself."""
    return tensor.detach().nan_to_num(nan=12345.678)
