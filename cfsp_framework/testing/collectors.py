"""The contract of collectors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise
from typing import ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Collector
from cfsp_framework.api.data import Site
from cfsp_framework.engine.measure import CollectorState, TokenCounts, WindowRows
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.host.sandbox import find_tensor_problem
from cfsp_framework.runtime.distributed import SOLO
from cfsp_framework.testing import models
from cfsp_framework.testing.contract import (
    ComponentContract,
    checked_by_host,
    close,
    configure,
    explore,
    other_device,
    permutation,
    run_twice,
)
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.guards import read_only
from cfsp_framework.testing.samples import Case, Sample, make_sample, token_weights

Rows = Sequence[tuple[Tensor, Tensor]]
"""Inputs and outputs of each window, ``(T, F or D)``."""
_TOLERANCE = 1e-4


class CollectorContract(ComponentContract):
    """Set ``component = TheCollector()``."""

    component: ClassVar[Collector | None] = None
    kind: ClassVar[str] = "collector"

    def value(self, component: Collector | ConfiguredComponent[Collector], windows: Rows) -> Tensor:
        """Return the statistic after these windows, checked by the host."""
        return _Run(component, windows).value()

    def test_the_value_is_as_the_statistic_says(self, component: Collector) -> None:
        """Shape as in ``Statistic.shape``, finite, float32 or float64; ``heavy`` if it is more than a vector."""
        for case in (
            Case(),
            Case(channels=1, hidden=1),
            Case(channels=5, hidden=9, dtype=torch.bfloat16),
            Case(dead=12),
        ):
            value = _Run(component, windows_at(component, make_sample(case)), case).value()
            if value.ndim > 1 and not component.provides.heavy:
                raise ContractError(
                    f"value() returned {value.ndim} dimensions, and the statistic would be held for all blocks at once; "
                    f"declare Statistic({component.provides.name!r}, ..., heavy=True)."
                )

    def test_sums_of_shared_windows_add_up(self, component: Collector) -> None:
        """Processes that each see some of the windows add their ``sums``; the order of windows does not matter."""
        if component.ordered:
            raise NotApplicable("ordered: processes do not share its windows")
        windows = windows_at(component, make_sample())
        whole = self.value(component, windows)
        for cut in (1, 5, len(windows) - 1):
            run = _Run(component, windows[:cut])
            run.merge(_Run(component, windows[cut:]))
            if not close(run.value(), whole, _TOLERANCE):
                raise ContractError(
                    "`sums` of two shares of the windows, added, do not give the value of all windows, so that a run on "
                    "several processes would measure something else. Keep in `sums` only what adds up and read nothing "
                    "else in value(), or set ordered = True."
                )
        if not close(self.value(component, windows[::-1]), whole, _TOLERANCE):
            raise ContractError(
                "value() depends on the order of the windows; keep in `sums` only what adds up, or set ordered = True."
            )

    def test_the_split_into_windows_changes_nothing(self, component: Collector) -> None:
        """Tokens give the same statistic in windows of other lengths."""
        if component.ordered:
            raise NotApplicable("ordered: it may depend on the windows")
        windows = windows_at(component, make_sample())
        inputs, outputs = (torch.cat([window[part] for window in windows]) for part in (0, 1))  # (N T, F or D)
        whole = self.value(component, windows)

        def check(cuts: set[int]) -> None:
            split = [(inputs[a:b], outputs[a:b]) for a, b in pairwise([0, *sorted(cuts), len(inputs)])]
            if not close(self.value(component, split), whole, _TOLERANCE):
                raise ContractError(
                    "value() depends on how tokens are split into windows: add up over tokens, and divide by `tokens` "
                    "in value(), not by window; or set ordered = True."
                )

        for cuts in (set[int](), {1}, {40, 41, 80}):
            check(cuts)
        explore(check, lambda strategies: strategies.sets(strategies.integers(1, len(inputs) - 1), max_size=8))

    def test_windows_without_tokens(self, component: Collector) -> None:
        """An expert may get no token of a window, or of any: ``update()`` then gets no rows."""
        windows = windows_at(component, make_sample())
        empty = [(inputs[:0], outputs[:0]) for inputs, outputs in windows[:1]]
        _Run(component, empty, "windows without tokens").value()
        full = self.value(component, windows)
        if not component.ordered and not close(self.value(component, [*empty, *windows, *empty]), full, _TOLERANCE):
            raise ContractError("A window without tokens changes the value; add nothing when update() gets no rows.")

    def test_inputs_are_left_alone_and_not_kept(self, component: Collector) -> None:
        """The next block overwrites the tensors that ``update()`` is given."""
        windows = windows_at(component, make_sample())
        expected = self.value(component, windows)
        run = _Run(component, ())
        for inputs, outputs in windows:
            tensors = {"inputs": inputs.clone(), "outputs": outputs.clone()}
            with read_only("update()", tensors):
                run.add(tensors["inputs"], tensors["outputs"])
            for tensor in tensors.values():
                tensor.fill_(float("nan"))
        if not close(run.raw_value(), expected, 1e-6):
            raise ContractError(
                "update() keeps a view of its inputs, which the host overwrites; keep a copy, inputs.clone()."
            )

    def test_every_start_is_fresh_and_gives_the_same(self, component: Collector) -> None:
        """The accumulators of two blocks share nothing, and change no global setting."""
        windows = windows_at(component, make_sample())
        _Run(component, windows[:3])
        first, second = run_twice(component, lambda c: self.value(c, windows))
        if not torch.equal(first, second):
            raise ContractError(
                "start() returns accumulators that share state, so that blocks add to each other's statistics; "
                "make a new object with new tensors at every start()."
            )

    def test_half_precision_is_added_up_in_full(self, component: Collector) -> None:
        """Activations in bfloat16 are accumulated as the same numbers in float32 are."""
        windows = windows_at(component, make_sample(Case(dtype=torch.bfloat16, windows=60, tokens=16)))
        sums = _Run(component, windows).sums
        narrow = [name for name, value in sums.items() if isinstance(value, Tensor) and value.itemsize < 4]
        full = self.value(component, [(inputs.float(), outputs.float()) for inputs, outputs in windows])
        if narrow or not close(self.value(component, windows), full, 1e-3):
            reason = f"`sums[{narrow[0]!r}]` is {sums[narrow[0]].dtype}" if narrow else "the value is off"
            raise ContractError(
                f"update() adds up in the model's half precision ({reason}), where small terms vanish; "
                "start with inputs.float(), and sum in float64."
            )

    def test_the_value_follows_the_channels(self, component: Collector) -> None:
        """Channels in another order have their values in that order."""
        if component.site in (Site.BLOCK, Site.FEED_FORWARD):
            raise NotApplicable("it does not see channels")
        sample, order = make_sample(), permutation(12)
        expected = self.value(component, windows_at(component, sample))
        moved = self.value(component, windows_at(component, sample.permuted(order)))
        if component.provides.shape == "(F, F)":
            expected = expected[order][:, order]
        elif component.provides.shape.endswith(("F)", "(F,)")):
            expected = expected[..., order]
        if not close(moved, expected, _TOLERANCE):
            raise ContractError(
                "value() depends on the position of a channel, not only on its activations; reduce over tokens, the "
                "first dimension of inputs (T, F)."
            )

    def test_works_wherever_the_model_is(self, component: Collector) -> None:
        """Windows are on the device that ran the block, for example a GPU."""
        sample = make_sample()
        with other_device():
            self.value(component, windows_at(component, sample.moved("cuda")))

    def test_works_on_whole_models(self, component: Collector) -> None:
        """In a pass over tiny models of several families, one with experts; the batch size changes nothing."""
        for name in models.TINY:
            models.measure_model(component, name, batch_size=4)
        single, batched = (models.measure_model(component, "llama", batch_size=size) for size in (1, 4))
        if not all(close(left, right, 1e-3) for left, right in zip(single, batched, strict=True)):
            raise ContractError(
                "The value changes with the batch size, which should only change speed: keep state between windows in "
                "the accumulator alone."
            )


class _Run:
    """An accumulator that the host starts and feeds with windows."""

    def __init__(
        self, component: Collector | ConfiguredComponent[Collector], windows: Rows, given: object = None
    ) -> None:
        self._given = given
        with checked_by_host(given):
            self._state = CollectorState(configure(component))
        listened = self._state.collector.component.windows
        self._numbers = (number for number in count() if listened.include(number))
        self._tokens = TokenCounts()
        for inputs, outputs in windows:
            self.add(inputs, outputs)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The tensors that add up over windows and processes."""
        return self._state.accumulator.sums

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Feed the next window that the collector listens to."""
        rows = WindowRows(next(self._numbers), inputs, outputs, token_weights(outputs))
        self._tokens.add(rows)
        given = self._given or f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)}"
        with torch.no_grad(), checked_by_host(given):
            self._state.add(rows)

    def merge(self, other: _Run) -> None:
        """Add the sums and token counts of another process."""
        if self.sums.keys() != other.sums.keys():
            raise ContractError(
                f"`sums` has the names {sorted(self.sums)} after some windows and {sorted(other.sums)} after others; "
                "fill the same ones at every update()."
            )
        self.sums.update({name: value + other.sums[name] for name, value in self.sums.items()})
        self._tokens.all += other._tokens.all
        self._tokens.held_out += other._tokens.held_out

    def raw_value(self) -> Tensor:
        """Return the statistic as the host reads it."""
        with torch.no_grad(), checked_by_host(self._given):
            return self._state.value(self._tokens, "block 1, mlp", SOLO)

    def value(self) -> Tensor:
        """Return the statistic and require that it is finite, as the host does of a measured block."""
        value = self.raw_value()
        if problem := find_tensor_problem(value, tuple(value.shape)):
            raise ContractError(f"value() {problem}, for finite activations; guard what may be zero before dividing.")
        return value


def windows_at(component: Collector, sample: Sample) -> Rows:
    """Return copies of a sample's inputs and outputs at the collector's site, window by window."""
    inputs, outputs = sample.at(component.site)
    return [(window.clone(), result.clone()) for window, result in zip(inputs, outputs, strict=True)]
