"""Accumulators of float64 sums, and collectors derived for held-out windows and for relative products."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cfsp_framework import AccumulatorFactory, Collector, Windows


class Sums:
    """Keep named float64 sums that take their shape from the first value added.

    A subclass adds to them in ``update``. ``value`` returns the sum called ``total`` unless a subclass overrides it.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add ``value`` to the sum called ``name``."""
        value = value.double()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def value(self, tokens: int) -> Tensor:
        """Return the total."""
        return self.sums["total"]


class OutputSquares(Sums):
    """Sum of squares of the site's outputs, ``()``."""

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        self.add("total", outputs.float().square().sum(dtype=torch.float64))  # ()


def held_out(collector: type[Collector]) -> type[Collector]:
    """Derive a collector that measures the same on held-out windows only, under the statistic's held-out name."""
    return type(
        f"{collector.__name__}HeldOut",
        (collector,),
        {
            "__module__": collector.__module__,
            "__doc__": f"{(collector.__doc__ or '').partition('.')[0]}, over held-out windows.",
            "name": f"{collector.name}-held-out",
            "provides": collector.provides.held_out(),
            "windows": Windows.HELD_OUT,
        },
    )


class RelativeProducts:
    """Weigh each token in an accumulator of products, by the root of its weight on both factors."""

    def __init__(self, accumulator: AccumulatorFactory) -> None:
        self._accumulator = accumulator()

    @property
    def sums(self) -> dict[str, Tensor]:
        """Sums of the accumulator."""
        return self._accumulator.sums

    def update(self, inputs: Tensor, outputs: Tensor, weights: Tensor | None = None) -> None:
        assert weights is not None, "the collector is relative"
        root = weights.sqrt().unsqueeze(1)  # (T, 1)
        self._accumulator.update(inputs.float() * root, outputs.float() * root)

    def value(self, tokens: int) -> Tensor:
        return self._accumulator.value(tokens)


def relative(collector: type[Collector]) -> type[Collector]:
    """Derive a collector of the same products with every token over its squared residual norm."""
    return type(
        f"{collector.__name__}Relative",
        (collector,),
        {
            "__module__": collector.__module__,
            "__doc__": f"{(collector.__doc__ or '').partition('.')[0]}, each token over its squared residual norm.",
            "name": f"{collector.name}-relative",
            "provides": collector.provides.relative(),
            "relative": True,
            "accumulator": partial(RelativeProducts, collector.accumulator),
        },
    )
