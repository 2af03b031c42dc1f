"""What a run works on, opened and checked: components, model, data. Whatever the user got wrong shows here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cfsp_framework.api.data import Site
from cfsp_framework.api.events import RunStarted
from cfsp_framework.config import RunConfig
from cfsp_framework.data.windows import PADDING, calibration_windows
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.errors import ConfigError
from cfsp_framework.evaluation.perplexity import EvaluationSet, evaluation_set
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.observers import start_observing
from cfsp_framework.host.registry import Plugins
from cfsp_framework.host.selection import Selection, select
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import LoadedModel, context_length, load_model
from cfsp_framework.modeling.size import measure_size
from cfsp_framework.modeling.streaming import Streamed
from cfsp_framework.pruning import surgery
from cfsp_framework.pruning.planning import check_shared
from cfsp_framework.runtime.distributed import Ranks, join_ranks
from cfsp_framework.runtime.progress import Progress


@dataclass(frozen=True)
class RunContext:
    """What a run works on once everything is open: the model, its components, its data."""

    config: RunConfig
    plugins: Plugins
    selection: Selection
    loaded: LoadedModel
    decoder: Decoder
    parameters: int
    """Of the model as it was opened."""
    windows: Tensor | None  # (N, T)
    evaluation_sets: tuple[EvaluationSet, ...]
    progress: Progress
    forward_options: ForwardOptions

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.forward_options.ranks

    @property
    def windows_to_select(self) -> Tensor | None:
        """The windows of the first pass: all, or every other one where the rest is kept for the second pass."""
        if self.windows is None or self.config.calibration.reuse_windows or not self.selection.second_pass:
            return self.windows
        return self.windows[::2] if len(self.windows) > 1 else self.windows

    @property
    def windows_to_compensate(self) -> Tensor | None:
        """The windows of the second pass; None where there is none."""
        if self.windows is None or not self.selection.second_pass:
            return None
        return self.windows if self.config.calibration.reuse_windows or len(self.windows) < 2 else self.windows[1::2]


def set_up(config: RunConfig, progress: Progress, *, planned: bool = False, ranks: Ranks | None = None) -> RunContext:
    """Choose the components, open the model, read the data: whatever the user got wrong shows here."""
    ranks = ranks or join_ranks(config.model.device)
    plugins = load_plugins(config.run.plugins)
    selection = select(config, plugins, planned=planned)
    check_selection(config, selection, ranks)
    if ranks.first:
        progress.notify = start_observing(selection.observers)
    progress.notify(RunStarted(config))
    context = open_context(config, plugins, selection, progress, ranks)
    check_rounding(config, context.decoder, planned=planned)
    with progress.phase("calibrate"):
        measured = selection.measures or (config.budget.drop_attention and not planned)
        windows = open_windows(config, context.loaded) if measured else None
        return replace(context, windows=windows, evaluation_sets=open_evaluation_sets(config, context.loaded))


def open_context(
    config: RunConfig, plugins: Plugins, selection: Selection, progress: Progress, ranks: Ranks
) -> RunContext:
    """Open the model; there are no data yet."""
    torch.manual_seed(config.run.seed)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
        decoder = open_streamed(config, loaded, plugins) if config.model.stream else open_decoder(loaded.model, plugins)
    parameters = measure_size(loaded.model).parameters
    forward_options = ForwardOptions(
        config.calibration.batch_size, skipped_ids(config, loaded), config.run.spill, ranks
    )
    return RunContext(config, plugins, selection, loaded, decoder, parameters, None, (), progress, forward_options)


def check_selection(config: RunConfig, selection: Selection, ranks: Ranks) -> None:
    """Refuse what the chosen way of running cannot do."""
    chosen = (*selection.collectors, *selection.second_pass)
    backward = [one.component.provides.name for one in chosen if one.component.site is Site.GRADIENT]
    if config.model.stream and backward:
        raise ConfigError(f"--stream: {backward[0]} needs a backward pass through the whole model; leave --stream out.")
    if config.model.stream and config.budget.drop_attention:
        raise ConfigError("--stream: which attention to drop is found with the whole model; leave one of both out.")
    if config.model.stream and config.model.device_map == "auto":
        raise ConfigError("--stream reads blocks one by one, --device-map spreads them all; leave one of both out.")
    recovery = selection.recovery.component.name
    if config.model.stream and recovery != "none":
        raise ConfigError(
            f"--stream: {recovery} trains the whole model, not one block at a time; prune first, then `cfsp recover`."
        )
    ordered = [one.component.name for one in chosen if one.component.ordered]
    if ranks.world > 1 and ordered:
        raise ConfigError(
            f"{ordered[0]} depends on the order of all windows and cannot be shared out; run one process."
        )


def check_rounding(config: RunConfig, decoder: Decoder, *, planned: bool) -> None:
    """Refuse a rounding that experts could not be run with, and a model that cannot be shared out as asked for."""
    if config.budget.tensor_parallel > 1:
        heads = decoder.config.num_attention_heads
        if heads % config.budget.tensor_parallel:
            raise ConfigError(
                f"--tensor-parallel {config.budget.tensor_parallel}: so many processes cannot share {heads} attention heads alike."
            )
        check_shared(decoder.places, config.budget.tensor_parallel)
    step = surgery.expert_step(decoder)
    if config.budget.round_to % step and not planned:
        raise ConfigError(
            f"--round-to {config.budget.round_to}: the products of experts need widths that are multiples of {step} in "
            f"{str(decoder.model.dtype).removeprefix('torch.')}."
        )


def open_streamed(config: RunConfig, loaded: LoadedModel, plugins: Plugins, folder: Path | None = None) -> Decoder:
    """A model that is read block by block from its folder."""
    decoder = open_decoder(loaded.model, plugins)
    streamed = Streamed(loaded.model, folder or loaded.folder, decoder.architecture.blocks, loaded.device)
    return replace(decoder, loaded=streamed)


def skipped_ids(config: RunConfig, loaded: LoadedModel) -> frozenset[int]:
    """The tokens left out of the statistics."""
    if not config.calibration.skip_bos:
        return frozenset()
    if loaded.tokenizer.bos_token_id is None:
        raise ConfigError("--skip-bos: this model's tokenizer has no beginning-of-sequence token.")
    return frozenset({int(loaded.tokenizer.bos_token_id)})


def open_windows(config: RunConfig, loaded: LoadedModel) -> Tensor:
    """The calibration windows, ``(N, T)``."""
    seqlen = sequence_length(config, loaded)
    return calibration_windows(
        config.calibration.data,
        loaded.tokenizer,
        config.calibration.samples,
        seqlen,
        config.run.seed,
        pack=config.calibration.pack,
    )


def open_evaluation_sets(config: RunConfig, loaded: LoadedModel) -> tuple[EvaluationSet, ...]:
    """The windows of every data SPEC to evaluate on."""
    seqlen = sequence_length(config, loaded)
    return tuple(
        evaluation_set(spec, loaded.tokenizer, seqlen, config.evaluation.windows) for spec in config.evaluation.data
    )


def sequence_length(config: RunConfig, loaded: LoadedModel) -> int:
    """Tokens per window: what was asked for, else 1024 or the model's context where that is shorter."""
    context = context_length(loaded.model)
    if config.calibration.seqlen is None:
        return min(1024, context or 1024)
    if context is not None and config.calibration.seqlen > context:
        raise ConfigError(f"--seqlen {config.calibration.seqlen} is longer than the model's context of {context}.")
    return config.calibration.seqlen


def sample_ids(context: RunContext) -> Tensor:
    """Some tokens to compare logits on, ``(1, T)``: the first calibration window, or any valid ids."""
    if context.windows is not None:
        return context.windows[:1, context.windows[0] != PADDING]
    vocabulary = context.decoder.config.vocab_size
    return torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(context.config.run.seed))
