"""Small feed-forwards of every form that model families use, with their activations and statistics measured on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from cfsp_framework.api.components import Collector, Component
from cfsp_framework.api.data import BlockStatistics, FeedForward, Site, Statistic, Windows
from cfsp_framework.api.hookspecs import NAMESPACE
from cfsp_framework.errors import CfspError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import ConfiguredComponent, Origin, Plugins, Registry
from cfsp_framework.testing.errors import ContractError

if TYPE_CHECKING:
    from torch._prims_common import DeviceLikeType

Form = Literal["gated", "plain", "fused", "conv1d", "expert"]
FORMS: tuple[Form, ...] = get_args(Form)
UNDER_TEST = Origin("under test")
"""The plugin that messages of the host name."""
_BUILT_IN = "cfsp-framework"


@dataclass(frozen=True)
class Case:
    """Settings of a sample. Windows 9, 19 ... are held out, so that fewer than ten windows hold out none.

    ``gated`` has separate parameters for up, gate and down; ``plain`` has biases and no gate; in ``fused`` gate and up
    are halves of one parameter; ``conv1d`` stores all parameters transposed, with biases and without a gate; ``expert``
    is an expert of a mixture, with parameters of three dimensions and biases.
    """

    form: Form = "gated"
    channels: int = 12
    hidden: int = 8
    dtype: torch.dtype = torch.float32
    windows: int = 12
    tokens: int = 9
    """Tokens per window; 0 for an expert that no token was routed to."""
    dead: int = 0
    """Number of leading channels without weights and activations."""
    silent: bool = False
    """Whether all activations are zero."""
    seed: int = 0


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
"""Cases that every contract tries; hypothesis, where it is installed, draws more."""


@dataclass(frozen=True)
class Sample:
    """A feed-forward with its inputs and outputs on ``N`` windows of ``T`` tokens."""

    feed_forward: FeedForward
    inputs: Tensor  # (N, T, D)
    activations: Tensor  # (N, T, F), inputs of the down projection
    outputs: Tensor  # (N, T, D), outputs of the down projection without its bias
    gradients: Tensor  # (N, T, F), of a loss with respect to the activations
    residual_in: Tensor  # (N, T', D), the residual stream before the block
    residual_out: Tensor  # (N, T', D), the residual stream after it

    @cached_property
    def held_out(self) -> Tensor:
        """Inputs of the feed-forward in held-out windows, or in all windows if none is held out, ``(n, D)``."""
        numbers = [number for number in range(len(self.inputs)) if Windows.HELD_OUT.include(number)]
        return (self.inputs[numbers] if numbers else self.inputs).flatten(0, 1)

    def at(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return inputs and outputs of a site, ``(N, T, F or D)`` each."""
        bias = self.feed_forward.down_bias
        return {
            Site.BLOCK: (self.residual_in, self.residual_out),
            Site.FEED_FORWARD: (self.inputs, self.outputs if bias is None else self.outputs + bias),
            Site.DOWN_PROJECTION: (self.activations, self.outputs),
            Site.GRADIENT: (self.activations, self.gradients),
        }[site]

    def statistics(self, required: Iterable[Statistic], collectors: Sequence[type[Collector]]) -> BlockStatistics:
        """Measure statistics with ``collectors``, as the host does in a run.

        Raises:
            ContractError: no collector provides a statistic, or it fails.
        """
        from cfsp_framework.engine.measure import BlockCollectors
        from cfsp_framework.engine.replay import Batch

        if not required:
            return BlockStatistics({}, 0)
        configured = find_collectors(required, collectors)
        try:
            states = BlockCollectors(configured, [self.feed_forward.path])
            batch = Batch(self.residual_in, (), tuple(range(len(self.residual_in))), None)
            states.add_block(batch, self.residual_out)
            sites = sorted({c.component.site for c in configured} - {Site.BLOCK}, key=lambda site: site.value)
            rows = [(site, self.at(site)[0].flatten(0, 1), self.at(site)[1].flatten(0, 1)) for site in sites]
            states.add_feed_forward(0, rows, torch.ones(self.outputs.flatten(0, 1).shape[0]), None, batch)
            return states.values(self.feed_forward.block)[0]
        except CfspError as error:
            raise ContractError(f"A required statistic cannot be measured: {error}") from error

    def permuted(self, order: Tensor) -> Sample:
        """Return the same function with its channels in another ``order (F,)``."""
        weights: dict[str, Any] = {
            name: weight[:, order] if name == "down" else weight[order]
            for name, weight in weights_of(self.feed_forward).items()
            if name != "down_bias"
        }
        return replace(
            self,
            feed_forward=replace(self.feed_forward, **weights),
            activations=self.activations[..., order],
            gradients=self.gradients[..., order],
        )

    def moved(self, device: DeviceLikeType) -> Sample:
        """Return the sample on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def in_float32(self) -> Sample:
        """Return the same numbers in float32."""
        return self._map(lambda tensor: tensor.float())

    def _map(self, convert: Callable[[Tensor], Tensor]) -> Sample:
        weights: dict[str, Any] = {name: convert(weight) for name, weight in weights_of(self.feed_forward).items()}
        names = [field.name for field in fields(self) if field.name != "feed_forward"]
        tensors: dict[str, Any] = {name: convert(getattr(self, name)) for name in names}
        return replace(self, feed_forward=replace(self.feed_forward, **weights), **tensors)


def token_weights(outputs: Tensor) -> Tensor:
    """Return weights ``(n,)`` that a residual stream might have whose tokens have the outputs ``(n, D or F)``."""
    return 1 / (1 + outputs.float().square().sum(-1))


def weights_of(feed_forward: FeedForward) -> dict[str, Tensor]:
    """Return the weights and biases that a feed-forward has, by name."""
    names = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")
    return {name: value for name in names if (value := getattr(feed_forward, name)) is not None}


def make_sample(case: Case = Case()) -> Sample:
    """Make a feed-forward with random weights and compute its activations and outputs on random inputs."""
    draw = torch.Generator().manual_seed(case.seed)
    feed_forward = _make_feed_forward(case, draw)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    inputs = (random(case.windows, case.tokens, case.hidden) + 0.3).to(case.dtype)  # (N, T, D)
    activations = compute_activations(feed_forward, inputs.float())  # (N, T, F)
    if case.silent:
        activations = torch.zeros_like(activations)
    activations[..., : case.dead] = 0
    residual_in = random(case.windows, case.tokens or 9, case.hidden)  # (N, T', D)
    return Sample(
        feed_forward=feed_forward,
        inputs=inputs,
        activations=activations.to(case.dtype),
        outputs=(activations @ feed_forward.down.float().mT).to(case.dtype),
        gradients=random(*activations.shape).to(case.dtype) / 8,
        residual_in=residual_in.to(case.dtype),
        residual_out=(residual_in + random(*residual_in.shape) / 2).to(case.dtype),
    )


def compute_activations(feed_forward: FeedForward, inputs: Tensor) -> Tensor:
    """Compute the inputs of the down projection in float32, ``(..., D)`` -> ``(..., F)``; every sample uses SiLU."""
    up = _linear(inputs, feed_forward.up, feed_forward.up_bias)  # (..., F)
    if feed_forward.gate is None:
        return functional.silu(up)
    return functional.silu(_linear(inputs, feed_forward.gate, feed_forward.gate_bias)) * up


def compute_output(feed_forward: FeedForward, inputs: Tensor) -> Tensor:
    """Compute the output of the feed-forward in float32, ``(n, D)`` -> ``(n, D)``."""
    return _linear(compute_activations(feed_forward, inputs), feed_forward.down, feed_forward.down_bias)


def _linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(inputs.float(), weight.float(), None if bias is None else bias.float())


def find_collectors(
    required: Iterable[Statistic], collectors: Sequence[type[Collector]]
) -> list[ConfiguredComponent[Collector]]:
    """Return a collector for each statistic: one of those given, of the built-in ones, or of installed plugins.

    Raises:
        ContractError: no collector provides a statistic, or one has an option without a default.
    """
    known = (*collectors, *built_ins().collectors.values())
    configured = list[ConfiguredComponent[Collector]]()
    for statistic in sorted(required):
        providers = [cls for cls in known if cls.provides == statistic]
        providers = providers or [cls for cls in _installed_collectors() if cls.provides == statistic]
        if not providers:
            raise ContractError(
                f"No collector provides the statistic {statistic.name!r}, which it requires; "
                "name the collector: collectors = (TheCollector,)."
            )
        cls = providers[0]
        try:
            configured.append(Registry("collector", {cls.name: (cls, UNDER_TEST)}).create(cls.name, {}))
        except CfspError as error:
            raise ContractError(f"Collectors run with their default options. {error}") from error
    return configured


def collectors_beside(component: Component) -> tuple[type[Collector], ...]:
    """Return the collectors in a component's module and package, which need not be installed."""
    name = type(component).__module__
    modules = [sys.modules[part] for part in (name, name.rpartition(".")[0]) if part in sys.modules]
    classes = [value for module in modules for value in vars(module).values() if isinstance(value, type)]
    return tuple(dict.fromkeys(c for c in classes if issubclass(c, Collector) and hasattr(c, "provides")))


def only(*names: str) -> Plugins:
    """Load the built-in plugins and those named (entry points, modules or files), and no other installed ones.

    Raises:
        PluginError: one of them cannot be loaded.
    """
    points = entry_points(group=NAMESPACE)
    others = {p.name for p in points if p.name not in names and not (p.dist and p.dist.name == _BUILT_IN)}
    files = [name for name in names if name not in points.names]
    return load_plugins([*(f"no:{name}" for name in sorted(others)), *files])


@cache
def built_ins() -> Plugins:
    """Return the plugins of this package alone."""
    return only()


@cache
def _installed_collectors() -> tuple[type[Collector], ...]:
    try:
        return tuple(load_plugins().collectors.values())
    except CfspError:  # of another plugin; the missing statistic is the error to report
        return ()


def _make_feed_forward(case: Case, draw: torch.Generator) -> FeedForward:
    """Make views of parameters that lie in memory as the form has them."""
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
        if case.form == "expert":  # the second of two experts
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
