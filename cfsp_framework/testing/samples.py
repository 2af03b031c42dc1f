"""Small feed-forwards of every form a family may have, with what they compute, and statistics measured on it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.components import Collector, Component
from cfsp_framework.api.data import BlockStatistics, FeedForward, Site, Statistic, Windows
from cfsp_framework.errors import CfspError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import ConfiguredComponent, Origin, Plugins
from cfsp_framework.testing.errors import ContractError

if TYPE_CHECKING:
    from torch._prims_common import DeviceLikeType

Form = Literal["gated", "plain", "fused", "conv1d", "expert"]
FORMS: tuple[Form, ...] = get_args(Form)
_BUILT_IN = "cfsp-framework"


@dataclass(frozen=True)
class Case:
    """What a sample is made of. Windows 9, 19 ... are held out, so with fewer than ten none is.

    ``gated`` has up, gate and down in parameters of their own; ``plain`` has no gate, and biases; in ``fused`` gate and
    up are halves of one parameter; in ``conv1d`` all parameters lie transposed, with biases and no gate; ``expert`` is
    one of a mixture's, whose parameters have three dimensions, with biases.
    """

    form: Form = "gated"
    channels: int = 12
    hidden: int = 8
    dtype: torch.dtype = torch.float32
    windows: int = 12
    tokens: int = 9
    """Per window; 0 is an expert that no token was routed to."""
    dead: int = 0
    """So many channels, the first ones, have no weights and no activations."""
    silent: bool = False
    """Whether all activations are zero."""
    seed: int = 0

    def __str__(self) -> str:
        words = [f"{self.form} feed-forward", f"{self.channels} channels", f"{self.hidden} hidden units"]
        words += [str(self.dtype).removeprefix("torch."), f"{self.windows} windows of {self.tokens} tokens"]
        words += [f"{self.dead} dead"] * bool(self.dead) + ["activations all zero"] * self.silent
        return ", ".join([*words, f"seed {self.seed}"])


CASES: tuple[Case, ...] = (
    *(Case(form=form, seed=seed) for seed, form in enumerate(FORMS)),
    *(Case(form=form, dtype=torch.bfloat16) for form in ("gated", "plain")),
    Case(windows=5),
    Case(channels=1, hidden=5, form="gated"),
    Case(channels=1, hidden=5, form="plain"),
    Case(channels=7, hidden=1),
    Case(dead=3),
    Case(dead=12),
    Case(silent=True),
    Case(form="expert", tokens=0),
)
"""What every contract tries, whether or not hypothesis is there to draw more."""


@dataclass(frozen=True)
class Sample:
    """A feed-forward, and what was heard at its sites while ``N`` windows of ``T`` tokens passed."""

    feed_forward: FeedForward
    inputs: Tensor  # (N, T, D)
    activations: Tensor  # (N, T, F), the down projection's input
    outputs: Tensor  # (N, T, D), the down projection's output without its bias
    gradients: Tensor  # (N, T, F), of a loss with respect to the activations
    before: Tensor  # (N, T', D), the residual stream that enters the block
    after: Tensor  # (N, T', D), the one that leaves it
    own: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """The feed-forward's tensors by name."""

    @cached_property
    def held_out(self) -> Tensor:
        """Inputs of the feed-forward in held-out windows, or in all where none is, ``(n, D)``."""
        chosen = [number for number in range(len(self.inputs)) if Windows.HELD_OUT.include(number)]
        return (self.inputs[chosen] if chosen else self.inputs).flatten(0, 1)

    def heard(self, site: Site) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of one site, ``(N, T, F or D)`` each."""
        bias = self.feed_forward.down_bias
        return {
            Site.BLOCK: (self.before, self.after),
            Site.FEED_FORWARD: (self.inputs, self.outputs if bias is None else self.outputs + bias),
            Site.DOWN_PROJECTION: (self.activations, self.outputs),
            Site.GRADIENT: (self.activations, self.gradients),
        }[site]

    def statistics(self, required: Iterable[Statistic], collectors: Sequence[type[Collector]]) -> BlockStatistics:
        """What ``collectors`` measure of it, as the host would have them measure.

        Raises:
            ContractError: no collector provides what is required, or it fails.
        """
        from cfsp_framework.engine.measure import BlockCollectors
        from cfsp_framework.engine.replay import Batch

        required = frozenset(required)
        if not required:
            return BlockStatistics({}, 0)
        chosen = [
            ConfiguredComponent(made(provider(one, collectors)), Origin("under test")) for one in sorted(required)
        ]
        try:
            tallies = BlockCollectors(chosen, [self.feed_forward.path])
            batch = Batch(self.before, (), tuple(range(len(self.before))), None)
            tallies.add_block(batch, self.after)
            sites = sorted({one.component.site for one in chosen} - {Site.BLOCK}, key=lambda site: site.value)
            inputs_and_outputs = [self.heard(site) for site in sites]
            tallies.add_feed_forward(
                0,
                [
                    (site, i.flatten(0, 1), o.flatten(0, 1))
                    for site, (i, o) in zip(sites, inputs_and_outputs, strict=True)
                ],
                None,
                batch,
            )
            return tallies.values(self.feed_forward.block)[0]
        except CfspError as error:
            raise ContractError(f"A statistic it requires cannot be measured: {error}") from error

    def permuted(self, order: Tensor) -> Sample:
        """The same function with its channels in another ``order (F,)``."""
        return replace(
            self,
            feed_forward=replace(
                self.feed_forward,
                up=self.feed_forward.up[order],
                down=self.feed_forward.down[:, order],
                gate=_rows(self.feed_forward.gate, order),
                up_bias=_rows(self.feed_forward.up_bias, order),
                gate_bias=_rows(self.feed_forward.gate_bias, order),
            ),
            activations=self.activations[..., order],
            gradients=self.gradients[..., order],
        )

    def moved(self, device: DeviceLikeType) -> Sample:
        """The same on another device."""
        return self._mapped(lambda tensor: tensor.to(device))

    def in_float32(self) -> Sample:
        """The same numbers in float32."""
        return self._mapped(lambda tensor: tensor.float())

    def tensors(self) -> dict[str, Tensor]:
        """The feed-forward's tensors by name."""
        return tensors_of(self.feed_forward)

    def _mapped(self, change: object) -> Sample:
        assert callable(change)
        weights = {name: change(tensor) for name, tensor in self.tensors().items()}
        heard = ("inputs", "activations", "outputs", "gradients", "before", "after")
        return replace(
            self,
            feed_forward=replace(self.feed_forward, **weights),
            **{name: change(getattr(self, name)) for name in heard},
        )


def tensors_of(feed_forward: FeedForward) -> dict[str, Tensor]:
    """A feed-forward's tensors by name, those it has."""
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    return {name: value for name in names if (value := getattr(feed_forward, name)) is not None}


def make_sample(case: Case = Case()) -> Sample:
    """A feed-forward of the wanted form with random weights, and what it computes on random inputs."""
    draw = torch.Generator().manual_seed(case.seed)
    feed_forward = _feed_forward(case, draw)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = (random(case.windows, case.tokens, case.hidden) + 0.3).to(case.dtype)  # (N, T, D)
    inner = activations(feed_forward, inputs.float())  # (N, T, F)
    if case.silent:
        inner = torch.zeros_like(inner)
    inner[..., : case.dead] = 0
    before = random(case.windows, case.tokens or 9, case.hidden)  # (N, T', D)
    return Sample(
        feed_forward=feed_forward,
        inputs=inputs,
        activations=inner.to(case.dtype),
        outputs=(inner @ feed_forward.down.float().mT).to(case.dtype),
        gradients=random(*inner.shape).to(case.dtype) / 8,
        before=before.to(case.dtype),
        after=(before + random(*before.shape) / 2).to(case.dtype),
    )


def activations(feed_forward: FeedForward, inputs: Tensor) -> Tensor:
    """What enters the down projection, float32: ``(..., D)`` -> ``(..., F)``; the activation is SiLU in every sample."""

    def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())

    up = linear(feed_forward.up, feed_forward.up_bias)  # (..., F)
    if feed_forward.gate is None:
        return functional.silu(up)
    return functional.silu(linear(feed_forward.gate, feed_forward.gate_bias)) * up


def output(feed_forward: FeedForward, inputs: Tensor) -> Tensor:
    """What the feed-forward gives, float32: ``(n, D)`` -> ``(n, D)``."""
    bias = feed_forward.down_bias
    inner = activations(feed_forward, inputs)  # (n, F)
    return functional.linear(inner, feed_forward.down.float(), None if bias is None else bias.float())


def provider(statistic: Statistic, collectors: Sequence[type[Collector]]) -> type[Collector]:
    """The collector of a statistic: of those given, else of the built-ins, else of what is installed.

    Raises:
        ContractError: nobody provides it.
    """
    for cls in (*collectors, *built_ins().collectors.values()):
        if cls.provides == statistic:
            return cls
    for cls in _installed():
        if cls.provides == statistic:
            return cls
    raise ContractError(
        f"No collector provides the statistic {statistic.name!r}, which it requires; "
        "say which one does: collectors = (TheCollector,)."
    )


def made(cls: type[Collector]) -> Collector:
    """The collector with its default options, as the host makes it."""
    try:
        return cls()
    except Exception as error:
        raise ContractError(
            f"The host makes collectors without options, and {cls.__name__}() fails: {one_line(error)} "
            "Give every option a default."
        ) from error


def neighbours(component: Component) -> tuple[type[Collector], ...]:
    """Collectors in the module a component is from, or in its package: they need not be installed."""
    name = type(component).__module__
    modules = [sys.modules[part] for part in (name, name.rpartition(".")[0]) if part in sys.modules]
    found = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return tuple(dict.fromkeys(c for c in found if issubclass(c, Collector) and hasattr(c, "provides")))


@cache
def built_ins() -> Plugins:
    """A host with nothing but what comes with this package."""
    return only()


def only(*names: str) -> Plugins:
    """A host with the built-in plugins and those named: entry points, modules, or files.

    Raises:
        PluginError: one of them cannot be loaded.
    """
    from importlib.metadata import entry_points

    from cfsp_framework.api.hookspecs import NAMESPACE

    points = entry_points(group=NAMESPACE)
    others = {p.name for p in points if p.name not in names and not (p.dist and p.dist.name == _BUILT_IN)}
    known = {point.name for point in points}
    return load_plugins([*(f"no:{name}" for name in sorted(others)), *(name for name in names if name not in known)])


def one_line(error: BaseException) -> str:
    """An exception in one line, with a full stop."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}".rstrip(": .") + "."


@cache
def _installed() -> tuple[type[Collector], ...]:
    try:
        return tuple(load_plugins().collectors.values())
    except CfspError:  # of another plugin's; what is missing will be said
        return ()


def _rows(tensor: Tensor | None, order: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[order]


def _feed_forward(case: Case, draw: torch.Generator) -> FeedForward:
    """Views of parameters as the form has them."""
    count, hidden = case.channels, case.hidden
    gated = case.form in ("gated", "fused", "expert")
    biased = case.form in ("plain", "conv1d", "expert")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) * 0.4

    up, down, gate = random(count, hidden), random(hidden, count), random(count, hidden)
    up_bias, gate_bias, down_bias = random(count), random(count), random(hidden)
    for rows in (up, gate, down.mT, up_bias, gate_bias):
        rows[: case.dead] = 0
    up, down, gate, up_bias, gate_bias, down_bias = (
        tensor.to(case.dtype) for tensor in (up, down, gate, up_bias, gate_bias, down_bias)
    )
    if case.form in ("fused", "expert"):
        both = torch.cat([gate, up])  # (2F, D)
        if case.form == "expert":  # the second of two
            both, down = torch.stack([-both, both])[1], torch.stack([-down, down])[1]
        gate, up = both.chunk(2)
    elif case.form == "conv1d":
        up, down = up.mT.contiguous().mT, down.mT.contiguous().mT
    return FeedForward(
        block=1,
        path="mlp.experts.1" if case.form == "expert" else "mlp",
        up=up,
        down=down,
        activation="silu",
        gate=gate if gated else None,
        up_bias=up_bias if biased else None,
        gate_bias=gate_bias if biased and gated else None,
        down_bias=down_bias if biased else None,
        expert=int(case.form == "expert"),
        seed=case.seed,
    )
