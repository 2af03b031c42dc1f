"""What all contracts have in common: the components under test, and what holds for every kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, get_args, get_origin

import torch
from pydantic import ValidationError
from torch import Tensor

from cfsp_framework.api.components import Collector, Component
from cfsp_framework.api.data import BlockStatistics, FeedForward, Statistic
from cfsp_framework.config import Choice, parse_choice
from cfsp_framework.errors import ConfigError
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.fake_device import DEVICE, DeviceMismatchError, Elsewhere, sent
from cfsp_framework.testing.guards import WatchedStatistics, call_component, unwritten
from cfsp_framework.testing.samples import CASES, FORMS, Case, Sample, neighbours, one_line

_NAME = re.compile(r"[a-z0-9]+([-.][a-z0-9]+)*")
EXAMPLES = 20
"""How many cases hypothesis draws, where it is installed."""


class ComponentContract:
    """Set ``component``, or ``components`` for several sets of options; every ``test_`` method then runs on each.

    ``collectors`` are those of statistics this package does not have; those in the component's own module, and
    installed ones, are found without being named. A method that does not apply is skipped. Subclasses may override a
    method to say that their component makes no such promise.
    """

    component: ClassVar[Any] = None
    components: ClassVar[Sequence[Component]] = ()
    collectors: ClassVar[Sequence[type[Collector]]] = ()
    kind: ClassVar[str] = "component"

    @classmethod
    def instances(cls) -> tuple[Component, ...]:
        """The components under test."""
        found = (*cls.components, *([] if cls.component is None else [cls.component]))
        wrong = [one for one in found if not isinstance(one, Component) or (cls.kind not in ("component", one.kind))]
        if wrong or not found:
            given = f"got {wrong[0]!r}" if wrong else "there is none"
            raise ContractError(
                f"{cls.__name__} needs `component = TheClass()`, an instance of a {cls.kind}, not a class; {given}."
            )
        return found

    @classmethod
    def checks(cls) -> tuple[str, ...]:
        """The names of its methods that check something, in the order they are written in."""
        classes = reversed(cls.__mro__)
        return tuple(dict.fromkeys(name for one in classes for name in vars(one) if name.startswith("test_")))

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run every method on every component (pytest calls this)."""
        if "component" in metafunc.fixturenames:
            metafunc.parametrize("component", self.instances(), ids=describe)

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def found_collectors(self, component: Component) -> tuple[type[Collector], ...]:
        """Collectors to look for a statistic in, before the built-ins."""
        return (*self.collectors, *neighbours(component))

    def measured(self, component: Component, sample: Sample) -> BlockStatistics:
        """What the component requires of a sample, and nothing else."""
        with call_component("required()", "nothing"):
            required: object = component.required()
        if not isinstance(required, frozenset | set) or not all(isinstance(one, Statistic) for one in required):
            raise ContractError(f"required() returned {required!r}; return a frozenset of Statistics.")
        return sample.statistics(required, self.found_collectors(component))

    # --- what holds for every kind -----------------------------------------------------------------------------------

    def test_name_and_options_are_described(self, component: Component) -> None:
        """`cfsp plugins list` and `show` have something to say, and the name can be typed."""
        cls = type(component)
        if not _NAME.fullmatch(cls.name):
            raise ContractError(
                f"name = {cls.name!r} cannot be typed as NAME:option=value; use small letters, digits and '-'."
            )
        if not (cls.__doc__ or "").strip():
            raise ContractError(f"{cls.__name__} has no docstring; its first line is what `cfsp plugins list` shows.")
        for name, option in cls.model_fields.items():
            if not option.description:
                raise ContractError(
                    f"The option {name!r} has no description, which `cfsp plugins show` prints; "
                    f'write {name}: ... = Field(default=..., description="...").'
                )

    def test_options_are_json_and_can_be_typed(self, component: Component) -> None:
        """Options survive JSON, as reports and plans hold them, and ``NAME:option=value`` on the command line."""
        cls = type(component)
        try:
            text = component.model_dump_json()
            again = cls.model_validate_json(text)
        except (ValidationError, ValueError, TypeError) as error:
            raise ContractError(
                f"The options of {cls.name!r} do not survive JSON: {one_line(error)} "
                "Use numbers, strings, booleans, None, or Literals of them."
            ) from error
        if again != component:
            raise ContractError(f"The options of {cls.name!r} change in JSON: {component!r} came back as {again!r}.")
        typed = str(Choice(name=cls.name, options=json.loads(text)))
        try:
            options: Any = parse_choice(typed)["options"]
            again = cls.model_validate(options)
        except (ConfigError, ValidationError) as error:
            raise ContractError(
                f"The options of {cls.name!r} cannot be typed as {typed!r}: {one_line(error)} "
                "Use numbers, strings without commas, booleans, None, or Literals of them."
            ) from error
        if again != component:
            raise ContractError(f"{typed!r} is read as {again!r}, not as {component!r}; let the option take a string.")


def for_each_case(check: Callable[[Case], None], cases: Sequence[Case] = CASES, *, draw: bool = True) -> None:
    """Run a check on fixed cases, and on those hypothesis draws, always the same ones, where it is installed."""
    for case in cases:
        check(case)
    if draw and find_spec("hypothesis"):
        explore(check, lambda strategies: _drawn_cases())


def explore(check: Callable[[Any], None], strategy: Callable[[Any], Any]) -> None:
    """Run a check on what hypothesis draws from ``strategy(hypothesis.strategies)``; the same every time."""
    import hypothesis
    from hypothesis import strategies

    checks: Any = hypothesis.HealthCheck  # an enumeration, which its stubs do not say
    bounded: Any = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(checks),
    )
    drawing: Any = hypothesis.given(strategy(strategies))
    bounded(drawing(check))()


def usage(requires: frozenset[Statistic], reads: set[Statistic], methods: str) -> None:
    """Every declared statistic is read by one of the methods, and no other one."""
    more = sorted(one.name for one in reads - requires)
    if more:
        raise ContractError(
            f"{methods} reads {', '.join(more)}, which `required()` does not name: it is not measured, so it is never "
            "there. Add it to `requires`, or do not ask."
        )
    fewer = sorted(one.name for one in requires - reads)
    if fewer:
        raise ContractError(
            f"{methods} never reads {', '.join(fewer)}, which is required, so every run measures it for nothing. "
            "Remove it from `requires`; where options decide, override required()."
        )


def watched(statistics: BlockStatistics) -> WatchedStatistics:
    """The statistics, with a note of what is read."""
    return WatchedStatistics(statistics)


@contextmanager
def other_device(method: str, sample: Sample, statistics: BlockStatistics) -> Generator[tuple[FeedForward, Any]]:
    """While open, the feed-forward and statistics on a GPU, or on a pretended one."""
    try:
        if torch.cuda.is_available():
            yield sample.moved("cuda").feed_forward, statistics.to("cuda")
        else:
            away = sample.moved("cpu")
            with Elsewhere():
                yield (
                    _sent(away),
                    BlockStatistics(
                        {statistic: sent(value) for statistic, value in statistics.items()},
                        0 if statistics.unseen else statistics.tokens,
                        statistics.held_out_tokens,
                    ),
                )
    except DeviceMismatchError as error:
        raise mixed(method, error) from error
    except RuntimeError as error:
        if "device" not in str(error):
            raise
        raise mixed(method, error) from error


def mixed(method: str, error: Exception) -> ContractError:
    """What is said of a component that only works on the CPU."""
    return ContractError(
        f"{method} does not work where the model is on a GPU: {' '.join(str(error).split())}. Make tensors where the "
        "inputs are, torch.zeros(..., device=feed_forward.down.device), and name no device."
    )


def away(value: Tensor) -> Tensor:
    """A tensor on the other device; inside ``other_device`` only."""
    return value.cuda() if torch.cuda.is_available() else value.to(DEVICE)


def _sent(sample: Sample) -> FeedForward:
    from dataclasses import replace

    weights: dict[str, Any] = {name: sent(tensor) for name, tensor in sample.tensors().items()}
    return replace(sample.feed_forward, **weights)


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by no more than a share of the largest value."""
    largest = max(float(right.abs().max()), 1e-30) if right.numel() else 1.0
    return left.shape == right.shape and bool(((left.double() - right.double()).abs() <= tolerance * largest).all())


def describe(component: Component) -> str:
    """A component as it is chosen: its name and the options that are not their defaults."""
    options = {
        name: value
        for name, value in component.model_dump(mode="json").items()
        if value != type(component).model_fields[name].default
    }
    return str(Choice(name=component.name, options=options))


def variants(cls: type[Component]) -> Iterator[Component]:
    """The component with its default options, and once for every other value that a Literal or a bool may take.

    Raises:
        ConfigError: an option has no default.
    """
    try:
        standard = cls()
    except ValidationError as error:
        missing = ", ".join(str(one["loc"][0]) for one in error.errors() if one["loc"])
        raise ConfigError(
            f"{cls.kind} {cls.name!r} has options without a default ({missing}); "
            f"check it as {cls.name}:{missing.partition(',')[0]}=VALUE."
        ) from error
    yield standard
    for name, option in cls.model_fields.items():
        for value in _values(option.annotation):
            if value != getattr(standard, name):
                try:
                    yield cls.model_validate({name: value})
                except ValidationError:  # it needs another option with it
                    continue


def _values(annotation: Any) -> tuple[object, ...]:
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()


@cache
def _drawn_cases() -> Any:
    from hypothesis import strategies as st

    return st.builds(
        Case,
        form=st.sampled_from(FORMS),
        channels=st.integers(1, 20),
        hidden=st.integers(1, 12),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        windows=st.integers(1, 12),
        tokens=st.integers(1, 10),
        dead=st.sampled_from([0, 0, 1]),
        seed=st.integers(0, 1000),
    )


__all__ = [
    "ComponentContract",
    "ContractError",
    "NotApplicable",
    "away",
    "call_component",
    "close",
    "describe",
    "explore",
    "for_each_case",
    "other_device",
    "unwritten",
    "usage",
    "variants",
    "watched",
]
