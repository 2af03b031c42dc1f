"""What a plugin author implements: six kinds of component, and the data each of them sees.

Shapes use these letters everywhere: ``F`` channels of a feed-forward (its intermediate size), ``D`` hidden size,
``T`` tokens of a calibration window, ``K`` channels that are kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict

from cfsp_framework.api.data import (
    BlockStatistics,
    BlockSummary,
    Budget,
    FeedForward,
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
"""The version of what this module and ``hookspecs`` promise; a plugin may declare the one it needs: ``cfsp_api = 1``."""


class Component(BaseModel, ABC):
    """Anything selected by name. Its fields are its options; an option it does not have is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: ClassVar[str]
    name: ClassVar[str]
    requires: ClassVar[frozenset[Statistic]] = frozenset()

    def required(self) -> frozenset[Statistic]:
        """The statistics this component reads. Override it where options decide; else set ``requires``."""
        return self.requires


class Accumulator(Protocol):
    """Running state of one statistic at one site.

    ``sums`` holds every tensor that adds up over windows, in float64 where it is small enough: the host adds the sums
    of several processes together before it asks for the value. There is at least one update, be it without tokens.
    """

    sums: dict[str, Tensor]

    def update(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add one calibration window: ``inputs (T, F or D)`` and ``outputs (T, D)`` of the site, without padding.

        ``T`` is 0 where an expert got no token of the window.
        """
        ...

    def value(self, tokens: int) -> Tensor:
        """The statistic after ``tokens`` tokens, at least 1 (an expert that saw none is not asked for its value)."""
        ...


class Collector(Component):
    """Measures one statistic at one site, on the ``windows`` it wants.

    ``ordered`` says that its state is more than sums, so that windows cannot be shared out over processes.
    """

    kind: ClassVar[str] = "collector"
    provides: ClassVar[Statistic]
    site: ClassVar[Site]
    windows: ClassVar[Windows] = Windows.ALL
    ordered: ClassVar[bool] = False

    @abstractmethod
    def start(self) -> Accumulator:
        """A fresh accumulator; called once per block and feed-forward."""


class Allocator(Component):
    """Coarse importance: how the budget is spread over the blocks."""

    kind: ClassVar[str] = "allocator"

    @abstractmethod
    def allocate(self, summaries: Sequence[BlockSummary], budget: Budget) -> Sequence[float]:
        """The share of its channels each block keeps, in (0, 1]. Rounding and the exact total are the host's."""

    def curve(self) -> Literal["plain", "compensated"] | None:
        """Ask for each block's removal-error curve along the criterion's order, in ``BlockSummary.curve``.

        Entry k is the squared error of the block's feed-forward output when its k lowest-scored channels go and
        nothing else changes (``plain``), or the kept weights are re-fitted by least squares (``compensated``).
        """
        return None

    def importance(self, summaries: Sequence[BlockSummary]) -> Sequence[float] | None:
        """The coarse importance of each block, for reports and recovery; None where the allocator has none."""
        return None


class Criterion(Component):
    """Fine importance: which channels of a block stay."""

    kind: ClassVar[str] = "criterion"

    @abstractmethod
    def score(self, feed_forward: FeedForward, statistics: BlockStatistics) -> Tensor:
        """One finite score per channel, ``(F,)``; the highest stay. Scores are compared inside a block only."""


class Compensator(Component):
    """How the kept weights change once the channels are chosen."""

    kind: ClassVar[str] = "compensator"

    def stream(self) -> Stream:
        """Where the heavy statistics it requires come from."""
        return Stream.DENSE

    def target_mix(self) -> float:
        """On the pruned stream, the target between the feed-forward's own output (0) and what restores the block's.

        With 1 the target is what would make the block's output the dense model's, so that the feed-forward also makes
        up for the blocks before it; where a family normalises the feed-forward's output, 0 is taken.
        """
        return 0.0

    @abstractmethod
    def compensate(self, feed_forward: FeedForward, kept: Tensor, statistics: BlockStatistics) -> Update:
        """The change for the dense ``feed_forward`` of which the channels ``kept (K,)`` stay, ascending int64."""


class RecoveryScheduler(Component):
    """What is trained after the cut, where, and with how much capacity."""

    kind: ClassVar[str] = "recovery"
    trains_all_weights: ClassVar[bool] = False
    """Whether its plans train all weights, so that no adapter can be kept."""

    @abstractmethod
    def schedule(
        self, summaries: Sequence[BlockSummary], plan: PruningPlan, blocks: Sequence[TrainableBlock]
    ) -> RecoveryPlan | None:
        """The training to do, or None for none; ``summaries`` is empty where nothing was measured."""


class Observer(Component):
    """Hears what happens in a run while it happens: a log, a tracker, a message when it is over."""

    kind: ClassVar[str] = "observer"

    @abstractmethod
    def start(self) -> Callable[[Event], None]:
        """Called once, before anything is opened; what it returns is called with every event.

        Where ``start()`` raises, the run does not begin; what is raised later is a warning, and the run goes on. Of
        several processes only the first is observed.
        """
