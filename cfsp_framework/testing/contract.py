"""The base class of all contracts: the components under test, the host's checks, and the checks of every kind."""

from __future__ import annotations

import json
import random
import re
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

import torch
from pydantic import ValidationError
from torch import Tensor

from cfsp_framework.api.components import Collector, Component
from cfsp_framework.api.data import BlockStatistics
from cfsp_framework.config import Choice, parse_choice
from cfsp_framework.errors import CfspError, ConfigError, PluginError, PluginWarning, one_line
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.testing.errors import ContractError, NotApplicable
from cfsp_framework.testing.fake_device import FakeDevice
from cfsp_framework.testing.samples import CASES, FORMS, UNDER_TEST, Case, Sample, collectors_beside

C = TypeVar("C", bound=Component)
T = TypeVar("T")

EXAMPLES = 20
"""Number of cases that hypothesis draws, where it is installed."""
_NAME = re.compile(r"[a-z0-9]+([-.][a-z0-9]+)*")


class ComponentContract:
    """Set ``component``, or ``components`` for several sets of options; every ``test_`` method runs on each of them.

    ``collectors`` provide statistics that this package does not measure; those in the component's own module and
    installed ones need not be named. A method that does not apply is skipped. Override a method in a subclass if the
    component does not promise what it checks.
    """

    component: ClassVar[Any] = None
    components: ClassVar[Sequence[Component]] = ()
    collectors: ClassVar[Sequence[type[Collector]]] = ()
    kind: ClassVar[str] = "component"

    @classmethod
    def instances(cls) -> tuple[Component, ...]:
        """Return the components under test.

        Raises:
            ContractError: there are none, or one is of another kind.
        """
        given = (*cls.components, *([] if cls.component is None else [cls.component]))
        wrong = [c for c in given if not isinstance(c, Component) or (cls.kind not in ("component", c.kind))]
        if wrong or not given:
            raise ContractError(
                f"{cls.__name__} needs `component = TheClass()`, an instance of a {cls.kind}, not a class; "
                f"got {repr(wrong[0]) if wrong else 'nothing'}."
            )
        return given

    @classmethod
    def checks(cls) -> tuple[str, ...]:
        """Return the names of the methods that check something, in the order of their definition."""
        names = (name for base in reversed(cls.__mro__) for name in vars(base) if name.startswith("test_"))
        return tuple(dict.fromkeys(names))

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Run every method on every component (pytest calls this)."""
        if "component" in metafunc.fixturenames:
            metafunc.parametrize("component", self.instances(), ids=describe)

    # --- for subclasses ----------------------------------------------------------------------------------------------

    def find_collectors(self, component: Component) -> tuple[type[Collector], ...]:
        """Return collectors to search for a statistic before the built-in ones."""
        return (*self.collectors, *collectors_beside(component))

    def measure(self, component: Component, sample: Sample) -> BlockStatistics:
        """Measure what the component requires of a sample, and nothing else."""
        with checked_by_host():
            required = configure(component).required()
        return sample.statistics(required, self.find_collectors(component))

    # --- checks of every kind ----------------------------------------------------------------------------------------

    def test_name_and_options_are_described(self, component: Component) -> None:
        """The name can be typed, and `cfsp plugins list` and `show` have a text for the component and each option."""
        cls = type(component)
        if not _NAME.fullmatch(cls.name):
            raise ContractError(
                f"name = {cls.name!r} cannot be typed as NAME:option=value; use lower-case letters, digits and '-'."
            )
        if not (cls.__doc__ or "").strip():
            raise ContractError(f"{cls.__name__} has no docstring; `cfsp plugins list` shows its first line.")
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
            typed = str(Choice(name=cls.name, options=json.loads(text)))
            options: Any = parse_choice(typed)["options"]
            copies = {f"as JSON, {text},": cls.model_validate_json(text), f"as {typed!r}": cls.model_validate(options)}
        except (ConfigError, ValidationError, ValueError, TypeError) as error:
            raise ContractError(
                f"The options of {cls.name!r} cannot be typed as NAME:option=value, or do not survive JSON: "
                f"{one_line(error).rstrip('.')}. Use numbers, strings without commas, booleans, None, or Literals of them."
            ) from error
        for form, copy in copies.items():
            if copy != component:
                raise ContractError(f"{component!r} written {form} is read as {copy!r}; let the option take a string.")


def configure(component: C | ConfiguredComponent[C]) -> ConfiguredComponent[C]:
    """Return the component as the host runs it, with a record of its usage."""
    if isinstance(component, ConfiguredComponent):
        return component
    return ConfiguredComponent(component, UNDER_TEST)


@contextmanager
def checked_by_host(
    given: object = None, *, on_warning: Literal["ignore", "error"] = "ignore", may_refuse: bool = False
) -> Generator[None]:
    """Turn what the host refuses while open into a ContractError that adds what the component was ``given``.

    Raises:
        ContractError: the host raised an error, or with ``on_warning="error"`` a warning, about the component.
        NotApplicable: the component, which ``may_refuse`` what it is given, raised an error of this package.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(on_warning, PluginWarning)
            yield
    except (CfspError, PluginWarning) as error:
        if may_refuse and not isinstance(error, PluginError | PluginWarning):
            raise NotApplicable(str(error)) from error
        raise ContractError(f"{error} Given: {given}." if given else str(error)) from error


def run_twice(component: C, call: Callable[[ConfiguredComponent[C]], T]) -> tuple[T, T]:
    """Return the results of two calls, each with other global random numbers.

    Raises:
        ContractError: a call changed a global setting, or drew from a global random generator.
    """
    configured, results = configure(component), list[T]()
    for seed in (0, 12345):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            state = random.getstate()
            results.append(call(configured))
        changed = {
            *configured.usage.warned,
            *({"Python's global random numbers"} if random.getstate() != state else ()),
        }
        if changed:
            raise ContractError(
                f"{component.kind} {component.name!r} changed {' and '.join(sorted(changed))}, so that a run depends on "
                "what ran before. Restore settings, and draw with generator=feed_forward.generator(), or from a "
                "torch.Generator with a fixed seed."
            )
    return results[0], results[1]


def for_each_case(check: Callable[[Case], object], cases: Sequence[Case] = CASES) -> None:
    """Run a check on fixed cases, and on cases that hypothesis draws where it is installed."""
    for case in cases:
        check(case)
    explore(
        check,
        lambda st: st.builds(
            Case,
            form=st.sampled_from(FORMS),
            channels=st.integers(1, 20),
            hidden=st.integers(1, 12),
            dtype=st.sampled_from([torch.float32, torch.bfloat16]),
            windows=st.integers(1, 12),
            tokens=st.integers(1, 10),
            dead=st.sampled_from([0, 0, 1]),
            seed=st.integers(0, 1000),
        ),
    )


def explore(check: Callable[[Any], object], strategy: Callable[[Any], Any]) -> None:
    """Run a check on what hypothesis, where it is installed, draws from ``strategy(strategies)``, always the same."""
    try:
        import hypothesis
        from hypothesis import strategies
    except ImportError:
        return
    checks: Any = hypothesis.HealthCheck  # an enumeration, which its stubs hide
    bounded: Any = hypothesis.settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        suppress_health_check=list(checks),
    )

    drawing: Any = hypothesis.given(strategy(strategies))

    def run(drawn: Any) -> None:  # hypothesis refuses a test that returns something
        check(drawn)

    bounded(drawing(run))()


@contextmanager
def other_device() -> Generator[None]:
    """Provide a device called ``cuda``, a pretended one without a GPU, and refuse what fails only there."""
    try:
        with nullcontext() if torch.cuda.is_available() else FakeDevice():
            yield
    except ContractError as error:
        if "device" not in str(error):
            raise
        raise ContractError(
            f"It does not work where the model is on a GPU: {error} Make tensors where the inputs are, "
            "torch.zeros(..., device=feed_forward.down.device), and name no device."
        ) from error


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Return whether two tensors differ by at most a share of the largest value."""
    largest = max(float(right.abs().max()), 1e-30) if right.numel() else 1.0
    return left.shape == right.shape and bool(((left.double() - right.double()).abs() <= tolerance * largest).all())


def permutation(channels: int) -> Tensor:
    """Return a fixed random order of channels, ``(F,)``."""
    return torch.randperm(channels, generator=torch.Generator().manual_seed(1))


def describe(component: Component) -> str:
    """Return the component as the command line takes it: its name, and options that differ from their defaults."""
    return str(Choice(name=component.name, options=component.model_dump(mode="json", exclude_defaults=True)))


def variants(cls: type[Component]) -> Iterator[Component]:
    """Make the component with its default options, and once for every other value of each Literal or bool option.

    Raises:
        ConfigError: an option has no default.
    """
    try:
        standard = cls()
    except ValidationError as error:
        missing = [str(problem["loc"][0]) for problem in error.errors() if problem["loc"]]
        raise ConfigError(
            f"{cls.kind} {cls.name!r} has options without a default ({', '.join(missing)}); "
            f"check it as {cls.name}:{''.join(missing[:1])}=VALUE."
        ) from error
    yield standard
    for name, option in cls.model_fields.items():
        for value in _switch_values(option.annotation):
            if value != getattr(standard, name):
                try:
                    yield cls.model_validate({name: value})
                except ValidationError:  # this value needs another option
                    continue


def _switch_values(annotation: Any) -> tuple[object, ...]:
    if annotation is bool:
        return (False, True)
    return get_args(annotation) if get_origin(annotation) is Literal else ()
