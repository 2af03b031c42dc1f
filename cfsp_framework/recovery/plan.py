"""Plan a training: check its options, ask the scheduler what to train, check that against the model, load the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cfsp_framework.api.data import BlockRecovery, BlockSummary, RecoveryPlan
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.config import RunConfig
from cfsp_framework.data.training import TrainingData, check_training_data, load_training_data
from cfsp_framework.errors import CfspError, ConfigError, ModelError, did_you_mean, one_line
from cfsp_framework.host.selection import Selection, schedule_recovery
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import fingerprint, resolve
from cfsp_framework.recovery.targets import list_trainable_blocks, select_matrices
from cfsp_framework.run.context import RunContext, sequence_length
from cfsp_framework.runtime.distributed import join_ranks


def check_recovery_options(config: RunConfig, selection: Selection, plan: PruningPlan | None = None) -> None:
    """Refuse options that contradict each other, this machine or the data on it; ``plan`` is that of a pruned model.

    Nothing is checked where nothing is trained.

    Raises:
        ConfigError: a message for each.
        DataError: the training data cannot be read.
    """
    if selection.recovery.component.name == "none":
        return
    options, device = config.recovery, config.model.device
    if options.patience and not options.check_every:
        raise ConfigError("--recovery-patience counts held-out losses; give --recovery-check-every too.")
    check_keep_adapter(config, full=selection.recovery.component.trains_all_weights)
    index = device.removeprefix("cuda:")
    if index.isdigit() and int(index) and join_ranks(device).world == 1:
        raise ConfigError(f"--device {device}: training uses the first visible GPU; set CUDA_VISIBLE_DEVICES={index}.")
    check_trackers(options.report_to)
    check_training_data(choose_training_data(config, selection, plan))


def check_keep_adapter(config: RunConfig, *, full: bool) -> None:
    """Refuse to keep an adapter where all weights are trained."""
    if config.recovery.keep_adapter and full:
        raise ConfigError("--keep-adapter and a recovery of all weights cannot be combined: no adapter is trained.")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Transformers does not know, or that are not installed.

    Raises:
        ConfigError: one of them.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"--report-to {name}: unknown tracker.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"--report-to {name}: the package is not installed.")


def choose_training_data(config: RunConfig, selection: Selection, plan: PruningPlan | None = None) -> str:
    """Return the data SPEC to train on: the one given, else that of the calibration."""
    spec = config.recovery.data
    if spec is None and plan is not None:
        spec = plan.calibration.spec if plan.calibration else None
    elif spec is None and (selection.measures or config.budget.drop_attention):
        spec = config.calibration.data
    if spec is None:
        raise ConfigError("--recovery: this run has no calibration text to train on; give --recovery-data.")
    return spec


@dataclass(frozen=True)
class RecoveryTask:
    """A training to run: its plan, checked against the model, and its data."""

    plan: RecoveryPlan
    data: TrainingData
    matrices: Mapping[str, BlockRecovery]
    """Full names of the matrices that get adapters, with their rank and alpha; empty with ``plan.full``."""
    teacher: Path | None
    """Folder of the dense model."""
    seqlen: int

    def batch_sequences(self, world: int) -> int:
        """Return the sequences of one step over ``world`` processes, at least one each."""
        return world * max(1, round(self.plan.batch_tokens / self.seqlen / world))


def plan_recovery(
    context: RunContext, plan: PruningPlan, summaries: Sequence[BlockSummary] = ()
) -> RecoveryTask | None:
    """Ask the scheduler what to train and load the data; everything that could fail later is checked here.

    Raises:
        ConfigError, DataError, ModelError: the options, the data or the model do not allow the training.
        PluginError: the scheduler's plan does not fit the model.
    """
    config, decoder = context.config, context.decoder
    check_recovery_options(config, context.selection, plan)
    blocks = list_trainable_blocks(decoder, plan)
    scheduled = schedule_recovery(context.selection.recovery, summaries, plan, blocks)
    if scheduled is None:
        return None
    if config.recovery.steps is not None:
        scheduled = scheduled.model_copy(update={"steps": config.recovery.steps})
    check_keep_adapter(config, full=scheduled.full)
    matrices = {} if scheduled.full else select_matrices(decoder, scheduled, blocks)
    check_adaptable(decoder, matrices)
    seqlen = sequence_length(config, context.loaded)
    with context.progress.phase("calibrate"):
        data = load_training_data(
            choose_training_data(config, context.selection, plan),
            context.loaded.tokenizer,
            seqlen,
            scheduled.steps * scheduled.batch_tokens,
            hold_out=config.recovery.check_every is not None,
        )
    teacher = find_dense_model(context, plan) if scheduled.distillation else None
    return RecoveryTask(scheduled, data, matrices, teacher, seqlen)


def check_adaptable(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> None:
    """Refuse a model that peft does not adapt as planned, by adding adapters and removing them: see ``name_targets``.

    Raises:
        ConfigError: peft adapts other matrices, or with other ranks.
    """
    if not matrices:
        return
    from cfsp_framework.recovery.lora import add_adapters, remove_adapters

    try:
        remove_adapters(add_adapters(decoder, matrices))
    except (CfspError, ValueError) as error:
        raise ConfigError(
            f"adapters: peft does not adapt this {decoder.architecture.family} model as planned "
            f"({one_line(error)[:120].rstrip('.')}); choose --recovery full or none."
        ) from error
    decoder.model.requires_grad_(True)


def find_dense_model(context: RunContext, plan: PruningPlan) -> Path:
    """Return the folder of the dense model that the plan was made for.

    Raises:
        ModelError: it does not exist any more, or has changed since.
    """
    if context.loaded.fingerprint == plan.model.fingerprint:
        return context.loaded.folder
    folder = resolve(plan.model.source)
    if context.ranks.agree(fingerprint(folder) if context.ranks.first else "") != plan.model.fingerprint:
        raise ModelError(f"distillation: {plan.model.source!r} has changed since it was pruned.")
    return folder


def require_task(context: RunContext, task: RecoveryTask | None) -> RecoveryTask:
    """Return the task of a command that only trains.

    Raises:
        ConfigError: the scheduler trains nothing.
    """
    if task is None:
        raise ConfigError(f"{context.selection.recovery} trains nothing; choose another --recovery.")
    return task
