"""Base classes of the six kinds of component that plugins implement.

Shapes use these letters everywhere: ``F`` channels of a feed-forward (its intermediate size), ``D`` hidden size,
``T`` tokens of a calibration window, ``K`` channels that are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from cfsp_framework.api.data import (
    BlockStatistics,
    BlockSummary,
    Budget,
    FeedForward,
    FitnessOptions,
    RecoveryPlan,
    Site,
    Statistic,
    Stream,
    TrainableBlock,
    Update,
    Windows,
)

if TYPE_CHECKING:  # torch is imported by the commands that need it, not by `cfsp --help`
    from torch import Tensor

    from cfsp_framework.api.events import Event
    from cfsp_framework.api.records import PruningPlan


API_VERSION = 1
"""Version of the plugin API: this module, ``data`` and ``hookspecs``. A plugin may declare the version it needs, ``cfsp_api = 1``."""


class Component(BaseModel, ABC):
    """A part of a run that is selected by name. Its fields are its options; an unknown option is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: ClassVar[str]
    """Set by the base class of each kind."""
    name: ClassVar[str]
    """Unique among components of the kind; users select by it."""
    requires: ClassVar[frozenset[Statistic]] = frozenset()
    """Statistics that the component reads; the host measures their union and passes no others."""

    def required(self) -> frozenset[Statistic]:
        """Return the statistics this component reads. Set ``requires``; override this only if options decide."""
        return self.requires


class Accumulator(Protocol):
    """Running state of one statistic at one site.

    ``sums`` holds every tensor that adds up over windows, in float64 if it is small enough: the host adds the sums of all
    processes before it calls ``value``. There is at least one update, possibly without tokens.
    """

    sums: dict[str, Tensor]

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add one calibration window: ``inputs (T, F or D)`` and ``outputs (T, D)`` of the site, without padding.

        ``T`` is 0 for an expert that no token of the window was routed to.
        """
        ...

    def value(self, tokens: int) -> Tensor:
        """Return the statistic after ``tokens`` tokens, at least 1; it is not called for an expert without tokens."""
        ...


class AccumulatorFactory(Protocol):
    """Anything that makes an accumulator without arguments: its class, or a partial call of the class."""

    def __call__(self) -> Accumulator:
        """Return a fresh accumulator."""
        ...


class Collector(Component):
    """Measure one statistic at one site of every block."""

    kind: ClassVar[str] = "collector"
    provides: ClassVar[Statistic]
    """The statistic; exactly one loaded collector may provide it."""
    site: ClassVar[Site]
    """The place in a block whose inputs and outputs it gets."""
    windows: ClassVar[Windows] = Windows.ALL
    """The calibration windows it gets."""
    ordered: ClassVar[bool] = False
    """Whether its state is more than sums, so that windows cannot be distributed over processes."""
    relative: ClassVar[bool] = False
    """Whether ``update`` gets a third argument ``weights (T,)``: 1 / the squared norm of each token's residual stream.

    The norm is that of the residual stream that leaves the block; declare the argument as ``weights: Tensor | None = None``.

    The next normalisation divides by that norm, so an error counts relative to it. In models with massive activations
    (arXiv 2402.17762) the squared norms of a few tokens are thousands of times those of all others, and unweighted sums
    of squares measure those tokens only.
    """
    accumulator: ClassVar[AccumulatorFactory]
    """Class of the accumulator, without required arguments; a collector with options overrides ``start`` instead."""

    def start(self) -> Accumulator:
        """Return a fresh accumulator; called once per block and feed-forward."""
        return type(self).accumulator()


class Allocator(Component):
    """Coarse importance: spread the budget over the blocks."""

    kind: ClassVar[str] = "allocator"

    @abstractmethod
    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Sequence[float]:
        """Return the share of its channels each block keeps, in (0, 1]; the host rounds and restores the exact total."""

    def curve(self) -> Literal["plain", "compensated"] | None:
        """Ask for each block's removal-error curve along the criterion's order, in ``BlockSummary.curve``.

        Entry k is the squared error of the block's feed-forward output without its k lowest-scored channels, relative to
        each token's squared residual norm and summed over tokens: with the other weights unchanged (``plain``), or
        re-fitted by least squares (``compensated``).
        """
        return None

    def sensitivity(self) -> bool:
        """Return whether the host measures ``BlockSummary.sensitivity``, which takes about half a forward more.

        A few windows also run through a copy of each block without its lower-scored half, and on to the end of the
        model. The sensitivity is the Kullback-Leibler divergence from the dense model's predictions that this adds, over
        the mean relative squared error that it makes in the block's output.
        """
        return False

    def importance(self, summaries: Sequence[BlockSummary]) -> Sequence[float] | None:
        """Return the coarse importance of each block, for reports and recovery; None if the allocator has none."""
        return None


class Fitness(Protocol):
    """Loss of the model cut to some widths, measured on held-out calibration windows; lower is better.

    Channels are kept in the order of the criterion's scores, and no weight is compensated.
    """

    @property
    def starts(self) -> Mapping[str, Sequence[float]]:
        """Shares of each allocator named by ``SearchingAllocator.starts``, by name, in that order."""
        ...

    @property
    def seed(self) -> int:
        """Seed of the run."""
        ...

    def widths(self, shares: Sequence[float]) -> tuple[int, ...]:
        """Return the widths that shares, one per block, are rounded to for a plan, the exact total included."""
        ...

    def __call__(self, candidates: Sequence[Sequence[float]]) -> list[float]:
        """Return the loss of the model at each candidate's widths; widths measured before cost nothing.

        A candidate is one share per block. A model whose outputs are not finite has the loss ``inf``.
        """
        ...


class SearchingAllocator(Allocator):
    """Spread the budget by trying widths on the model. The host calls ``search`` in place of ``allocate``."""

    def fitness(self) -> FitnessOptions:
        """Return what the fitness measures."""
        return FitnessOptions()

    def starts(self) -> Sequence[str]:
        """Return names of allocators whose shares the search gets; the host measures what they require."""
        return ()

    @abstractmethod
    def search(self, summaries: Sequence[BlockSummary], budget: Budget, fitness: Fitness) -> Sequence[float]:
        """Return the share of its channels each block keeps, in (0, 1], as ``allocate`` does.

        It is called in the first process only; the others measure their share of the windows of each candidate.
        """

    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Sequence[float]:
        """Refuse to allocate from summaries alone."""
        raise TypeError("a searching allocator tries widths on the model; call search() with a fitness")


class Criterion(Component):
    """Fine importance: score the channels of a block."""

    kind: ClassVar[str] = "criterion"

    @abstractmethod
    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        """Return one finite score per channel, ``(F,)``; the highest stay. Scores are compared inside a block only."""


class Compensator(Component):
    """Change the kept weights after the channels are selected."""

    kind: ClassVar[str] = "compensator"

    def stream(self) -> Stream:
        """Return the model whose hidden states the required heavy statistics are measured on."""
        return Stream.DENSE

    def target_mix(self) -> float:
        """Return the target on the pruned stream, between the feed-forward's own output (0) and the dense stream (1).

        With 1 the target restores the dense model's block output, so that the feed-forward also compensates for earlier
        blocks. Families that normalise the feed-forward's output always use 0.
        """
        return 0.0

    @abstractmethod
    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        """Return the change of the dense ``feed_forward`` that keeps the channels ``kept (K,)``, ascending int64."""


class RecoveryScheduler(Component):
    """Plan the training after the cut: which matrices, with which ranks."""

    kind: ClassVar[str] = "recovery"
    trains_all_weights: ClassVar[bool] = False
    """Whether its plans train all weights, so that no adapter can be kept."""

    @abstractmethod
    def schedule(
        self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]
    ) -> RecoveryPlan | None:
        """Return the training to do, or None; ``summaries`` is empty if nothing was measured."""


class Observer(Component):
    """React to the events of a run: write a log, feed a tracker, send a message at the end."""

    kind: ClassVar[str] = "observer"

    @abstractmethod
    def start(self) -> Callable[[Event], None]:
        """Return a function to call with every event; called once, before the model is opened.

        An exception here ends the run; one raised by the function becomes a warning. Only the first of several processes
        is observed.
        """
