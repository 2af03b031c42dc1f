"""What every collector promises."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from cfsp_framework.api.components import Accumulator, Collector
from cfsp_framework.api.data import Site
from cfsp_framework.testing.contract import (
    ComponentContract,
    ContractError,
    NotApplicable,
    call_component,
    close,
    explore,
    mixed,
    unwritten,
)
from cfsp_framework.testing.fake_device import DeviceMismatchError, Elsewhere, sent
from cfsp_framework.testing.guards import unchanged_process
from cfsp_framework.testing.samples import Case, Sample, make_sample, one_line

Rows = Sequence[tuple[Tensor, Tensor]]
"""Inputs and outputs of each window."""
_TOLERANCE = 1e-4


class CollectorContract(ComponentContract):
    """``component = TheCollector()``."""

    component: ClassVar[Collector | None] = None
    kind: ClassVar[str] = "collector"

    def value(self, component: Collector, windows: Rows) -> Tensor:
        """The statistic after these windows, checked: a tensor, finite, in full precision."""
        return _value(component, _fed(component, windows), sum(len(inputs) for inputs, _ in windows))

    def test_the_value_is_as_the_statistic_says(self, component: Collector) -> None:
        """Shape as in ``Statistic.shape``, finite, float32 or float64; ``heavy`` where it is more than a vector."""
        for case in (
            Case(),
            Case(channels=1, hidden=1),
            Case(channels=5, hidden=9, dtype=torch.bfloat16),
            Case(dead=12),
        ):
            windows = rows(component, make_sample(case))
            value = self.value(component, windows)
            expected = _shape(component, case, sum(len(inputs) for inputs, _ in windows))
            if expected is not None and tuple(value.shape) != expected:
                raise ContractError(
                    f"value() returned the shape {tuple(value.shape)}, but Statistic({component.provides.name!r}) says "
                    f"{component.provides.shape}, which is {expected} for {case}. Change one of them."
                )
            if value.ndim > 1 and not component.provides.heavy:
                raise ContractError(
                    f"value() returned {value.ndim} dimensions, and the statistic would be held for all blocks at once; "
                    f"say Statistic({component.provides.name!r}, ..., heavy=True)."
                )

    def test_sums_of_shared_windows_add_up(self, component: Collector) -> None:
        """Processes that each see some of the windows add their ``sums``; so does any other order of windows."""
        if component.ordered:
            raise NotApplicable("ordered: its windows are not shared out")
        windows = rows(component, make_sample())
        whole = self.value(component, windows)
        count = sum(len(inputs) for inputs, _ in windows)

        def check(cut: int) -> None:
            parts = [_fed(component, part) for part in (windows[:cut], windows[cut:])]
            total, other = parts[0].sums, parts[1].sums
            if total.keys() != other.keys():
                raise ContractError(
                    f"`sums` has the names {sorted(total)} after some windows and {sorted(other)} after others; "
                    "fill the same ones at every update()."
                )
            parts[0].sums.update({name: value + other[name] for name, value in total.items()})
            if not close(_value(component, parts[0], count), whole, _TOLERANCE):
                raise ContractError(
                    "`sums` of two shares of the windows, added, do not give the value of all of them, so a run on "
                    "several processes would measure something else. Keep in `sums` only what adds up and read nothing "
                    "else in value(), or set ordered = True."
                )

        for cut in (1, 5, len(windows) - 1):
            check(cut)
        if not close(self.value(component, windows[::-1]), whole, _TOLERANCE):
            raise ContractError(
                "value() depends on the order of the windows; keep in `sums` only what adds up, or set ordered = True."
            )

    def test_the_split_into_windows_changes_nothing(self, component: Collector) -> None:
        """The same tokens in windows of other lengths give the same statistic."""
        if component.ordered:
            raise NotApplicable("ordered: it may depend on the windows")
        windows = rows(component, make_sample())
        inputs, outputs = (torch.cat([window[part] for window in windows]) for part in (0, 1))
        whole = self.value(component, windows)

        def check(cuts: set[int]) -> None:
            edges = [0, *sorted(cuts), len(inputs)]
            split = [(inputs[a:b], outputs[a:b]) for a, b in pairwise(edges)]
            if not close(self.value(component, split), whole, _TOLERANCE):
                raise ContractError(
                    "value() depends on how tokens are split into windows: add up over tokens, and divide by `tokens` "
                    "in value(), not by window; or set ordered = True."
                )

        for cuts in (set[int](), {1}, {40, 41, 80}):
            check(cuts)
        try:
            import hypothesis  # noqa: F401
        except ImportError:
            return
        explore(check, lambda strategies: strategies.sets(strategies.integers(1, len(inputs) - 1), max_size=8))

    def test_windows_without_tokens(self, component: Collector) -> None:
        """An expert may get no token of a window, or of any: ``update()`` then gets no rows."""
        windows = rows(component, make_sample())
        nothing = [(inputs[:0], outputs[:0]) for inputs, outputs in windows[:1]]
        found = _value(component, _fed(component, nothing), 1)
        full = self.value(component, windows)
        expected = _shape(component, Case(), 0) or tuple(full.shape)
        if tuple(found.shape) != expected:
            raise ContractError(
                f"value() after windows without tokens returned the shape {tuple(found.shape)}, not {expected}; make the "
                "sums in the first update(), with inputs.new_zeros(...), also when it has no rows."
            )
        if not component.ordered and not close(self.value(component, [*nothing, *windows, *nothing]), full, _TOLERANCE):
            raise ContractError("A window without tokens changes the value; add nothing when update() gets no rows.")

    def test_inputs_are_left_alone_and_not_kept(self, component: Collector) -> None:
        """What ``update()`` is shown is overwritten by the next block."""
        windows = rows(component, make_sample())
        running = _started(component)
        for inputs, outputs in windows:
            mine = {"inputs": inputs.clone(), "outputs": outputs.clone()}
            with unwritten("update()", mine, "the argument"):
                _update(running, mine["inputs"], mine["outputs"])
            for tensor in mine.values():
                tensor.fill_(float("nan"))
        expected = self.value(component, windows)
        try:
            same = close(_value(component, running, sum(len(i) for i, _ in windows)), expected, 1e-6)
        except ContractError:
            same = False
        if not same:
            raise ContractError(
                "update() keeps a view of what it is shown, which the host overwrites; keep a copy, inputs.clone()."
            )

    def test_every_start_is_fresh_and_gives_the_same(self, component: Collector) -> None:
        """One accumulator a block: they share nothing, and nothing is drawn from global generators."""
        windows = rows(component, make_sample())
        with unchanged_process("update()"):
            first = self.value(component, windows)
        other = _fed(component, windows[:3])
        second = self.value(component, windows)
        if not torch.equal(first, second) or other is _started(component):
            raise ContractError(
                "start() gives accumulators that share state, so that blocks add to each other's statistics; "
                "make a new object with new tensors at every start()."
            )

    def test_half_precision_is_added_up_in_full(self, component: Collector) -> None:
        """Activations in bfloat16 are accumulated as the same numbers in float32 are."""
        windows = rows(component, make_sample(Case(dtype=torch.bfloat16, windows=60, tokens=16)))
        half = _fed(component, windows)
        narrow = [name for name, one in half.sums.items() if isinstance(one, Tensor) and one.itemsize < 4]
        whole = self.value(component, [(inputs.float(), outputs.float()) for inputs, outputs in windows])
        count = sum(len(inputs) for inputs, _ in windows)
        if narrow or not close(_value(component, half, count), whole, 1e-3):
            what = f"`sums[{narrow[0]!r}]` is {half.sums[narrow[0]].dtype}" if narrow else "the value is off"
            raise ContractError(
                f"update() adds up in the model's half precision ({what}), where small terms vanish; "
                "start with inputs.float(), and sum in float64."
            )

    def test_the_value_follows_the_channels(self, component: Collector) -> None:
        """Channels in another order have their values in that order."""
        if component.site in (Site.BLOCK, Site.FEED_FORWARD):
            raise NotApplicable("it does not see channels")
        sample = make_sample()
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        value = self.value(component, rows(component, sample))
        moved = self.value(component, rows(component, sample.permuted(order)))
        if component.provides.shape == "(F, F)":
            expected = value[order][:, order]
        elif component.provides.shape.endswith("F)") or component.provides.shape == "(F,)":
            expected = value[..., order]
        else:
            expected = value
        if not close(moved, expected, _TOLERANCE):
            raise ContractError(
                "value() depends on where a channel is, not only on its activations; reduce over tokens, the first "
                "dimension of inputs (T, F)."
            )

    def test_works_wherever_the_model_is(self, component: Collector) -> None:
        """Windows are where the block ran, a GPU say."""
        windows = rows(component, make_sample())
        try:
            if torch.cuda.is_available():
                self.value(component, [(inputs.cuda(), outputs.cuda()) for inputs, outputs in windows])
                return
            with Elsewhere():
                self.value(component, [(sent(inputs), sent(outputs)) for inputs, outputs in windows])
        except ContractError as error:
            if isinstance(error.__cause__, DeviceMismatchError) or "device" in str(error.__cause__):
                cause = error.__cause__
                assert isinstance(cause, Exception)
                raise mixed("update() or value()", cause) from error
            raise

    def test_works_on_whole_models(self, component: Collector) -> None:
        """In a pass over tiny models of several families, experts among them; the batch size changes nothing."""
        from cfsp_framework.testing import models

        for name in models.TINY:
            models.statistics(component, name, batch_size=4)
        one, four = (models.statistics(component, "llama", batch_size=size) for size in (1, 4))
        for left, right in zip(one, four, strict=True):
            if not close(left, right, 1e-3):
                raise ContractError(
                    "The value changes with the batch size, which only changes speed: keep no state between windows "
                    "but in the accumulator."
                )


def rows(component: Collector, sample: Sample) -> Rows:
    """What the collector would be shown of a sample: its site, the windows it wants."""
    inputs, outputs = sample.heard(component.site)
    wanted = [number for number in range(len(inputs)) if component.windows.include(number)]
    if len(wanted) < 12:  # held-out windows alone are too few to share out
        wanted = list(range(len(inputs)))
    return [(inputs[number].clone(), outputs[number].clone()) for number in wanted]


def _started(component: Collector) -> Accumulator:
    with call_component("start()", "nothing"):
        running = component.start()
    for name in ("update", "value"):
        if not callable(getattr(running, name, None)):
            raise ContractError(
                f"start() returned a {type(running).__name__} without {name}(); return a new accumulator: an object with "
                "`sums`, update(inputs, outputs) and value(tokens)."
            )
    if not isinstance(getattr(running, "sums", None), dict):
        raise ContractError("The accumulator has no `sums`; set self.sums = {} in its __init__(), be it left empty.")
    return running


def _update(running: Accumulator, inputs: Tensor, outputs: Tensor) -> None:
    with (
        torch.no_grad(),
        call_component("update()", f"inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)}"),
    ):
        running.update(inputs, outputs)


def _fed(component: Collector, windows: Rows) -> Accumulator:
    running = _started(component)
    for inputs, outputs in windows:
        _update(running, inputs, outputs)
    return running


def _value(component: Collector, running: Accumulator, tokens: int) -> Tensor:
    with torch.no_grad(), call_component("value()", f"{max(tokens, 1)} tokens"):
        value: Any = running.value(max(tokens, 1))
    if not isinstance(value, Tensor):
        raise ContractError(f"value() returned a {type(value).__name__}; return a tensor, torch.tensor(...).")
    if not value.isfinite().all():
        raise ContractError("value() is not finite for finite activations; guard what may be zero before dividing.")
    return value


def _shape(component: Collector, case: Case, tokens: int) -> tuple[int, ...] | None:
    """What the statistic's documented shape is for a case; None where its letters are others."""
    letters = {"F": case.channels, "D": case.hidden, "n": tokens}
    parts = [part.strip() for part in component.provides.shape.strip("()").split(",") if part.strip()]
    if any(part not in letters and not part.isdigit() for part in parts):
        return None
    return tuple(letters[part] if part in letters else int(part) for part in parts)


__all__ = ["CollectorContract", "one_line", "rows"]
