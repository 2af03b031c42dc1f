"""The models a benchmark compares: checkpoints as they are, random ones of a shape, and cuts of them in memory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp_framework.api.data import Budget
from cfsp_framework.api.records import ModelIdentity, PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import summarise
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import get_curve_kind, select
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import (
    build_from_config,
    check_checkpoint,
    open_model,
    pick_device,
    resolve,
    silence_transformers,
)
from cfsp_framework.modeling.meta_init import without_weights
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.planning import plan_blocks
from cfsp_framework.runtime.progress import Progress

_WINDOWS, _TOKENS = 4, 64


@dataclass(frozen=True)
class Contestant:
    """A model on its device, under the name tables call it."""

    name: str
    model: PreTrainedModel
    widths: tuple[int, ...]
    """Of every feed-forward."""


@dataclass(frozen=True)
class Cuts:
    """Which cuts of one model to compare: one for each allocator and rounding."""

    ratio: float
    allocators: tuple[str, ...] = ("uniform",)
    roundings: tuple[int, ...] = (128,)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter([(allocator, step) for allocator in self.allocators for step in self.roundings])


def open_contestant(
    source: str, config: RunConfig, plugins: Plugins, *, random_weights: bool = False, name: str | None = None
) -> Contestant:
    """A checkpoint, or with ``random_weights`` a model of the shape its ``config.json`` says.

    Raises:
        ModelError: it cannot be opened.
    """
    device = device_of(config.model.device)
    config = config.replace(model=source)
    if random_weights:
        model = random_model(config, device)
    else:
        silence_transformers()
        folder = resolve(source)
        check_checkpoint(folder, trust_remote_code=config.model.trust_remote_code)
        model = open_model(folder, config.model.dtype, device=device, trust_remote_code=config.model.trust_remote_code)
    return Contestant(name or source, model, open_decoder(model, plugins).widths)


def random_model(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """A model of ``config.model.source``'s shape with random matrices, which are small, as before training.

    The configuration is enough: of a Hub id only that is fetched, and ``config.model.source`` may be the file itself.
    """
    sketch, stored = build_from_config(config)
    dtype = stored if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    family: Any = type(sketch)
    with without_weights():
        model: PreTrainedModel = family._from_config(sketch.config, dtype=dtype)
    model.tie_weights()  # without weights, each got a parameter of its own
    draw = torch.Generator().manual_seed(config.run.seed)
    # One draw over and over: a million values are as slow to multiply with as a billion, and drawn in no time.
    values = (0.02 * torch.randn(1 << 20, generator=draw)).to(device, dtype)
    made: dict[int, nn.Parameter] = {}  # tied parameters stay one
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_filled(parameter, name, values), requires_grad=False)
            setattr(module, name, made[id(parameter)])
    opened: Any = model.to(device)  # type: ignore[arg-type]
    model = opened.eval()
    return model


def _filled(parameter: Tensor, name: str, values: Tensor) -> Tensor:
    """Matrices of ``values``, scales of norms of ones, biases of zeros; on the device and in the dtype of ``values``."""
    if parameter.ndim < 2:
        return torch.full_like(parameter, float("bias" not in name), device=values.device, dtype=values.dtype)
    filled = torch.empty(parameter.shape, device=values.device, dtype=values.dtype)
    for part in filled.view(-1).split(len(values)):
        part.copy_(values[: len(part)])
    return filled


def cut_in_memory(dense: Contestant, cuts: Cuts, config: RunConfig, plugins: Plugins) -> Iterator[Contestant]:
    """The cuts of a model that is open: channels of least magnitude go, and the allocators choose the widths.

    What an allocator wants measured is measured on random tokens, so the widths are of its kind, not those of a real
    run. All weights that are not cut are shared with the dense model.

    Raises:
        ConfigError: an allocator is unknown, or needs the gradients of a loss.
    """
    for allocator, step in cuts:
        narrow = open_decoder(_sharing_copy(dense.model), plugins)
        plan = _plan(narrow, config, plugins, cuts.ratio, allocator, step)
        cut_model(narrow, plan)
        yield Contestant(f"{allocator}/{step}", narrow.model, narrow.widths)


def _sharing_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of its own with the same parameters: a cut puts new ones in their place and changes none."""
    kept: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, kept)


def _plan(
    decoder: Decoder, config: RunConfig, plugins: Plugins, ratio: float, allocator: str, step: int
) -> PruningPlan:
    settings = RunConfig.build(
        model=config.model.source,
        criterion="magnitude",
        allocator=allocator,
        ratio=ratio,
        round_to=step,
        seed=config.run.seed,
    )
    selection = select(settings, plugins)
    draw = torch.Generator().manual_seed(config.run.seed)
    windows = torch.randint(decoder.config.vocab_size, (_WINDOWS, _TOKENS), generator=draw)  # (N, T)
    curve = get_curve_kind(selection.allocator)
    measured = collect(
        decoder,
        windows,
        {"criterion": selection.criterion},
        selection.collectors,
        curves={"criterion": ("criterion", curve)} if curve else {},
        seed=config.run.seed,
        progress=Progress(),
    )
    summaries = summarise(decoder, measured, "criterion")
    return PruningPlan(
        model=ModelIdentity(
            source=config.model.source, family=decoder.architecture.family, fingerprint="", parameters=0
        ),
        calibration=None,
        ratio=ratio,
        budget="channels",
        round_to=step,
        seed=config.run.seed,
        components=selection.describe(),
        versions={},
        blocks=plan_blocks(summaries, selection.allocator, Budget(ratio, step)),
    )


def device_of(name: str) -> torch.device:
    """As for every command, and ``mps``, which no other command runs on."""
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: this PyTorch sees no Apple GPU here.")
        return torch.device("mps")
    return pick_device(name)
