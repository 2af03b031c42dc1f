"""Open everything a run works on: components, model, data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cfsp_framework.api.events import RunStarted
from cfsp_framework.config import RunConfig
from cfsp_framework.data.windows import PADDING, calibration_windows
from cfsp_framework.engine.replay import ForwardOptions, check_replay
from cfsp_framework.errors import ConfigError
from cfsp_framework.evaluation.perplexity import EvaluationSet, evaluation_set
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.observers import start_observing
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import Selection, select
from cfsp_framework.modeling.config_facts import context_length
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import LoadedModel, load_model
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.streaming import Streamed
from cfsp_framework.run.checks import check_model, check_options
from cfsp_framework.runtime.distributed import Ranks, join_ranks
from cfsp_framework.runtime.progress import Progress

_REPLAYED = 64
"""Tokens on which the blocks, run one by one, are compared with the model."""


@dataclass(frozen=True)
class RunContext:
    """Everything a run works on once it is open."""

    config: RunConfig
    plugins: Plugins
    selection: Selection
    loaded: LoadedModel
    decoder: Decoder
    parameters: int
    """Parameters of the model when it was opened."""
    windows: Tensor | None  # (N, T)
    evaluation_sets: tuple[EvaluationSet, ...]
    progress: Progress
    forward_options: ForwardOptions
    history: str = ""
    """Hash of the rounds that the model was cut by before; empty for the dense model."""

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.forward_options.ranks

    @property
    def windows_to_select(self) -> Tensor | None:
        """The windows of the first pass: all, or every other one if the rest serves the second pass."""
        if self.windows is None or self.config.calibration.reuse_windows or not self.selection.second_pass:
            return self.windows
        return self.windows[::2] if len(self.windows) > 1 else self.windows

    @property
    def windows_to_compensate(self) -> Tensor | None:
        """The windows of the second pass; None without a second pass."""
        if self.windows is None or not self.selection.second_pass:
            return None
        return self.windows if self.config.calibration.reuse_windows or len(self.windows) < 2 else self.windows[1::2]


def set_up(
    config: RunConfig,
    progress: Progress,
    *,
    planned: bool = False,
    ranks: Ranks | None = None,
    check: Callable[[RunConfig, Selection], None] | None = None,
) -> RunContext:
    """Select the components, check every option, start the observers, open the model, read the data.

    With ``planned`` the channels come from a plan, and only what a compensator requires is measured. ``check`` refuses
    options of later steps before the model is opened.

    Raises:
        ConfigError: options are unknown or cannot be combined (before the model is opened), or do not fit the model.
        DataError, ModelError: the data or the model cannot be opened.
        PluginError: a plugin cannot be loaded.
    """
    ranks = ranks or join_ranks(config.model.device)
    plugins = load_plugins(config.run.plugins)
    selection = select(config, plugins, planned=planned)
    check_options(config, selection, ranks)
    if check is not None:
        check(config, selection)
    if ranks.first:
        progress.notify = start_observing(selection.observers)
    progress.notify(RunStarted(config))
    context = open_context(config, plugins, selection, progress, ranks)
    check_model(config, context.decoder, planned=planned)
    with progress.phase("calibrate"):
        measured = selection.measures or (config.budget.drop_attention and not planned)
        windows = open_windows(config, context.loaded) if measured else None  # (N, T)
        if windows is not None and not config.model.stream:  # a streamed model has no forward of its own
            check_replay(context.decoder, windows[:1, windows[0] != PADDING][:, :_REPLAYED])
        return replace(context, windows=windows, evaluation_sets=open_evaluation_sets(config, context.loaded))


def open_context(
    config: RunConfig, plugins: Plugins, selection: Selection, progress: Progress, ranks: Ranks
) -> RunContext:
    """Open the model without any data."""
    torch.manual_seed(config.run.seed)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
        decoder = open_streamed(loaded, plugins) if config.model.stream else open_decoder(loaded.model, plugins)
    parameters = measure_size(loaded.model).parameters
    options = ForwardOptions(config.calibration.batch_size, skipped_ids(config, loaded), config.run.spill, ranks)
    return RunContext(config, plugins, selection, loaded, decoder, parameters, None, (), progress, options)


def open_streamed(loaded: LoadedModel, plugins: Plugins, folder: Path | None = None) -> Decoder:
    """Open a model whose blocks are read one by one from its folder."""
    decoder = open_decoder(loaded.model, plugins)
    streamed = Streamed(loaded.model, folder or loaded.folder, decoder.architecture.blocks, loaded.device)
    return replace(decoder, loaded=streamed)


def skipped_ids(config: RunConfig, loaded: LoadedModel) -> frozenset[int]:
    """Return the token ids that no statistic counts.

    Raises:
        ConfigError: the tokenizer lacks the token that is to be skipped.
    """
    if not config.calibration.skip_bos:
        return frozenset()
    if loaded.tokenizer.bos_token_id is None:
        raise ConfigError("--skip-bos: this model's tokenizer has no beginning-of-sequence token.")
    return frozenset({int(loaded.tokenizer.bos_token_id)})


def open_windows(config: RunConfig, loaded: LoadedModel) -> Tensor:
    """Return the calibration windows, ``(N, T)`` int64."""
    calibration, seqlen = config.calibration, sequence_length(config, loaded)
    return calibration_windows(
        calibration.data, loaded.tokenizer, calibration.samples, seqlen, config.run.seed, pack=calibration.pack
    )


def open_evaluation_sets(config: RunConfig, loaded: LoadedModel) -> tuple[EvaluationSet, ...]:
    """Return the windows of every data SPEC to evaluate on."""
    evaluation, seqlen = config.evaluation, sequence_length(config, loaded)
    return tuple(evaluation_set(spec, loaded.tokenizer, seqlen, evaluation.windows) for spec in evaluation.data)


def sequence_length(config: RunConfig, loaded: LoadedModel) -> int:
    """Return the tokens of a window: ``--seqlen``, else 1024 or the model's context if that is shorter.

    Raises:
        ConfigError: ``--seqlen`` exceeds the model's context.
    """
    seqlen, context = config.calibration.seqlen, context_length(loaded.model.config)
    if seqlen is None:
        return min(1024, context or 1024)
    if context is not None and seqlen > context:
        raise ConfigError(f"--seqlen {seqlen} is longer than the model's context of {context}.")
    return seqlen


def sample_ids(context: RunContext) -> Tensor:
    """Return tokens to compare logits on, ``(1, T)``: the first calibration window, or random ids."""
    if context.windows is not None:
        return context.windows[:1, context.windows[0] != PADDING]
    vocabulary = context.decoder.config.vocab_size
    return torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(context.config.run.seed))
