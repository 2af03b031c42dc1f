"""Open the models that a benchmark compares: checkpoints, models with random weights, and cuts in memory."""

from __future__ import annotations

import copy
import itertools
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
from cfsp_framework.host.selection import select
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
"""Random windows, and tokens in each, on which allocators measure."""


@dataclass(frozen=True)
class Candidate:
    """A model on its device, with its name in tables."""

    name: str
    model: PreTrainedModel
    widths: tuple[int, ...]
    """Channels of each feed-forward."""

    @property
    def dtype(self) -> str:
        return str(self.model.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Cuts:
    """Cuts of one model to compare: one for each allocator and rounding."""

    ratio: float
    allocators: tuple[str, ...] = ("uniform",)
    roundings: tuple[int, ...] = (128,)


def open_candidate(
    source: str, config: RunConfig, plugins: Plugins, *, random_weights: bool = False, name: str | None = None
) -> Candidate:
    """Open a checkpoint or, with ``random_weights``, build a model of the shape in its ``config.json``.

    Raises:
        ModelError: the model cannot be opened.
    """
    device = parse_device(config.model.device)
    config = config.replace(model=source)
    if random_weights:
        model = random_model(config, device)
    else:
        silence_transformers()
        folder, trusted = resolve(source), config.model.trust_remote_code
        check_checkpoint(folder, trust_remote_code=trusted)
        model = open_model(folder, config.model.dtype, device=device, trust_remote_code=trusted)
    return Candidate(name or source, model, open_decoder(model, plugins).widths)


def random_model(config: RunConfig, device: torch.device) -> PreTrainedModel:
    """Build a model of the shape of ``config.model.source`` with small random matrices, as before training.

    Only the configuration is read, and of a Hub id only that is fetched; the source may be a ``config.json``.
    """
    sketch, stored = build_from_config(config)
    dtype = stored if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    family: Any = type(sketch)
    with without_weights():
        model: Any = family._from_config(sketch.config, dtype=dtype)
    model.tie_weights()  # without weights, each tied module got its own parameter
    draw = torch.Generator().manual_seed(config.run.seed)
    # The same million values fill all matrices: as slow to multiply with as others, and quick to draw.
    values = (0.02 * torch.randn(1 << 20, generator=draw)).to(device, dtype)  # (2^20,)
    filled: dict[int, nn.Parameter] = {}  # by the parameter replaced: tied parameters stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled:
                filled[id(parameter)] = nn.Parameter(_fill(parameter, name, values), requires_grad=False)
            setattr(module, name, filled[id(parameter)])
    opened: PreTrainedModel = model.to(device).eval()
    return opened


def _fill(parameter: Tensor, name: str, values: Tensor) -> Tensor:
    """Return a tensor of ``parameter``'s shape: a matrix of ``values (V,)``, a scale of ones or a bias of zeros."""
    if parameter.ndim < 2:
        return torch.full_like(parameter, float("bias" not in name), device=values.device, dtype=values.dtype)
    filled = torch.empty(parameter.shape, device=values.device, dtype=values.dtype)
    for part in filled.view(-1).split(len(values)):
        part.copy_(values[: len(part)])
    return filled


def cut_in_memory(dense: Candidate, cuts: Cuts, config: RunConfig, plugins: Plugins) -> Iterator[Candidate]:
    """Yield cuts of an open model: channels of least magnitude are removed, and the allocators choose the widths.

    Allocators measure random tokens, so the widths are typical of the allocator, not those of a real run. Weights that
    are not cut are shared with the dense model.

    Raises:
        ConfigError: an allocator is unknown, or needs the gradients of a loss.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*dense.model.parameters(), *dense.model.buffers())}
    for allocator, step in itertools.product(cuts.allocators, cuts.roundings):
        # A deep copy with shared tensors: the cut replaces parameters and changes none in place.
        decoder = open_decoder(copy.deepcopy(dense.model, dict(shared)), plugins)
        options = {"criterion": "magnitude", "allocator": allocator, "ratio": cuts.ratio, "round_to": step}
        settings = RunConfig.build(model=config.model.source, seed=config.run.seed, **options)
        cut_model(decoder, _plan(decoder, settings, plugins))
        yield Candidate(f"{allocator}/{step}", decoder.model, decoder.widths)


def _plan(decoder: Decoder, config: RunConfig, plugins: Plugins) -> PruningPlan:
    selection, seed, budget = select(config, plugins), config.run.seed, config.budget
    draw = torch.Generator().manual_seed(seed)
    windows = torch.randint(decoder.config.vocab_size, (_WINDOWS, _TOKENS), generator=draw)  # (N, T)
    curve = selection.curve
    measured = collect(
        decoder,
        windows,
        {"criterion": selection.criterion},
        selection.collectors,
        curves={"criterion": ("criterion", curve)} if curve else {},
        seed=seed,
        progress=Progress(),
    )
    summaries = summarise(decoder, measured, "criterion")
    family = decoder.architecture.family
    return PruningPlan(
        model=ModelIdentity(source=config.model.source, family=family, fingerprint="", parameters=0),
        calibration=None,
        ratio=budget.ratio,
        budget="channels",
        round_to=budget.round_to,
        seed=seed,
        components=selection.describe(),
        versions={},
        blocks=plan_blocks(summaries, selection.allocator, Budget(budget.ratio, budget.round_to)),
    )


def parse_device(name: str) -> torch.device:
    """Parse --device as for every command; in addition ``mps``, which only benchmarks support.

    Raises:
        ConfigError: the device is unknown or absent.
    """
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: PyTorch finds no Apple GPU on this machine.")
        return torch.device("mps")
    return pick_device(name)
