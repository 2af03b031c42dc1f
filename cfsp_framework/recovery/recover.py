"""Recovery: a scheduler's plan is checked against the model and carried out, and the result merged or kept apart.

Transformers' Trainer and peft are imported when something is trained.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cfsp_framework.api.data import BlockRecovery, BlockSummary, RecoveryPlan, TrainableBlock
from cfsp_framework.api.records import Perplexity, PruningPlan, RecoveryReport
from cfsp_framework.data.training import TrainingData, training_data
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import CfspError, ConfigError, ModelError, PluginError
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import fingerprint, open_model, resolve
from cfsp_framework.recovery.targets import adapted, feed_forward_parameters, trainable_blocks, trained_precision
from cfsp_framework.run.cache_keys import second_pass_key
from cfsp_framework.run.context import RunContext, sample_ids, sequence_length

if TYPE_CHECKING:
    from cfsp_framework.recovery.trainer import History, Teacher

PLAN_FILE = "recovery_plan.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class RecoveryTask:
    """What is to be trained, checked against the model, with its data."""

    plan: RecoveryPlan
    data: TrainingData
    matrices: Mapping[str, BlockRecovery]
    """The full names of the matrices that get adapters, with their rank and alpha; none with ``plan.full``."""
    teacher: Path | None
    """The folder of the dense model."""
    seqlen: int

    def batch_sequences(self, world: int) -> int:
        """Sequences of one step over ``world`` processes, at least one each."""
        return world * max(1, round(self.plan.batch_tokens / self.seqlen / world))


@dataclass(frozen=True)
class Outcome:
    """What came of a training; the model itself holds the result, or what it held before if an adapter is kept."""

    expected: Tensor  # (1, T, V): the logits of the sample after the training
    report: RecoveryReport | None
    """None where a kept adapter was merged and nothing trained."""


@dataclass(frozen=True)
class Training:
    """A training that was done, and what the model was before it."""

    plan: RecoveryPlan
    pruned: list[Perplexity]
    """On every evaluation set, before the training."""
    outcome: Outcome


def plan_recovery(
    context: RunContext, plan: PruningPlan, summaries: Sequence[BlockSummary] = ()
) -> RecoveryTask | None:
    """Ask the scheduler what to train, and open the data; whatever cannot be done shows here.

    Raises:
        ConfigError, DataError, ModelError: what the user chose cannot be trained.
        PluginError: the scheduler's plan does not fit the model.
    """
    config, decoder, chosen = context.config, context.decoder, context.selection.recovery
    blocks = trainable_blocks(decoder, plan)
    with chosen.call_component("schedule()") as component:
        wanted: object = component.schedule(summaries, plan, blocks)
    if wanted is None:
        return None
    if not isinstance(wanted, RecoveryPlan):
        raise PluginError(f"{chosen}: schedule() returned a {type(wanted).__name__}, not a RecoveryPlan or None.")
    if config.recovery.steps is not None:
        wanted = wanted.model_copy(update={"steps": config.recovery.steps})
    check_options(context, wanted)
    check_schedule(chosen, wanted, blocks)
    matrices = {} if wanted.full else adapted(decoder, wanted, blocks)
    check_adaptable(decoder, matrices)
    seqlen = sequence_length(config, context.loaded)
    with context.progress.phase("calibrate"):
        data = training_data(
            config.recovery.data or calibrated_on(plan),
            context.loaded.tokenizer,
            seqlen,
            wanted.steps * wanted.batch_tokens,
            hold_out=config.recovery.check_every is not None,
        )
    teacher = teacher_folder(context, plan) if wanted.distillation else None
    return RecoveryTask(wanted, data, matrices, teacher, seqlen)


def check_options(context: RunContext, wanted: RecoveryPlan) -> None:
    """Refuse options that contradict each other or this machine.

    Raises:
        ConfigError: they do.
    """
    config, device = context.config, context.loaded.device
    if config.recovery.report_to:
        from cfsp_framework.recovery.trainer import check_trackers

        check_trackers(config.recovery.report_to)
    if config.recovery.patience and not config.recovery.check_every:
        raise ConfigError("--recovery-patience counts looks at held-out data; give --recovery-check-every too.")
    if config.recovery.keep_adapter and wanted.full:
        raise ConfigError("--keep-adapter: all weights are trained, there is no adapter; leave one of both out.")
    if device.index and context.ranks.world == 1:
        raise ConfigError(
            f"--device {config.model.device}: training takes the first GPU it sees; set CUDA_VISIBLE_DEVICES={device.index}."
        )


def check_schedule(chosen: ConfiguredComponent[Any], wanted: RecoveryPlan, blocks: Sequence[TrainableBlock]) -> None:
    """Refuse a plan that does not fit the model.

    Raises:
        PluginError: it names what is not there, or nothing at all.
    """
    numbers = [one.block for one in wanted.blocks]
    if len({*numbers}) < len(numbers) or max(numbers) >= len(blocks):
        raise PluginError(f"{chosen}: its recovery plan names blocks {numbers}; the model has {len(blocks)}.")
    trained = [one.block for one in wanted.blocks if one.rank]
    if not trained:
        raise PluginError(f"{chosen}: its recovery plan trains no block; None says that nothing is to be trained.")
    known = {path for block in blocks for path in (*block.feed_forward, *block.attention)}
    unknown = [path for path in wanted.targets if path not in known]
    if unknown:
        raise PluginError(f"{chosen}: no block has {unknown[0]!r}, a target of its recovery plan.")


def check_adaptable(decoder: Decoder, matrices: Mapping[str, BlockRecovery]) -> None:
    """Refuse what peft does not adapt as meant, by trying: it may rename what it is told (``targets_of``).

    Raises:
        ConfigError: it adapts something else, or with other ranks.
    """
    if not matrices:
        return
    from cfsp_framework.recovery.lora import add_adapters, remove_adapters

    try:
        remove_adapters(add_adapters(decoder, matrices))
    except (CfspError, ValueError) as error:
        raise ConfigError(
            f"adapters: peft does not adapt this {decoder.architecture.family} model as meant "
            f"({' '.join(str(error).split())[:120].rstrip('.')}); choose --recovery full or none."
        ) from error
    decoder.model.requires_grad_(True)


def teacher_folder(context: RunContext, plan: PruningPlan) -> Path:
    """Where the dense model is that the plan was made for.

    Raises:
        ModelError: it is not there any more, or another one is.
    """
    if context.loaded.fingerprint == plan.model.fingerprint:
        return context.loaded.folder
    folder = resolve(plan.model.source)
    if context.ranks.agree(fingerprint(folder) if context.ranks.first else "") != plan.model.fingerprint:
        raise ModelError(f"distillation: {plan.model.source!r} is not the model any more that was pruned.")
    return folder


def train_model(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train the cut model.

    Afterwards it holds the result in the dtypes it had; with ``--keep-adapter`` it holds what it held, and
    ``folder/adapter`` an adapter for it.
    """
    with context.progress.phase("recover"):
        torch.manual_seed(context.config.run.seed)
        context.decoder.model.requires_grad_(False)
        train = train_weights if task.plan.full else train_adapters
        outcome = train(context, plan, task, folder)
        context.decoder.model.requires_grad_(True)
    return outcome


def train_weights(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train the feed-forwards' own weights."""
    with trained_precision(context.decoder, task.plan) as autocast:
        parameters = feed_forward_parameters(context.decoder, task.plan)
        for parameter in parameters:
            parameter.requires_grad_(True)
        history = run_training(context, plan, task, context.decoder.model, autocast)
    told = tell_training(context, task, sum(parameter.numel() for parameter in parameters), history)
    return Outcome(logits(context.decoder, sample_ids(context)), told)


def train_adapters(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train adapters and merge them, or write them into ``folder``."""
    from cfsp_framework.recovery import lora as adapters

    kept = context.config.recovery.keep_adapter
    with trained_precision(context.decoder, task.plan) as autocast:
        learner = adapters.add_adapters(context.decoder, task.matrices)
        count = sum(parameter.numel() for parameter in learner.parameters() if parameter.requires_grad)
        told = tell_training(context, task, count, run_training(context, plan, task, learner, autocast))
        if not kept:
            adapters.merge(learner)
    expected = logits(context.decoder, sample_ids(context))
    if kept:
        if context.ranks.first:
            adapters.save_adapter(learner, folder / ADAPTER_FOLDER)
        adapters.remove_adapters(learner)
    return Outcome(expected, told)


def tell_training(context: RunContext, task: RecoveryTask, parameters: int, history: History) -> RecoveryReport:
    """What the report says of a training."""
    return RecoveryReport(
        data=task.data.spec,
        sequences=len(task.data.train),
        seqlen=task.seqlen,
        parameters=parameters,
        ranks=() if task.plan.full else tuple(one.rank for one in task.plan.blocks),
        steps=history.steps,
        tokens=history.steps * task.batch_sequences(context.ranks.world) * task.seqlen,
        adapter=context.config.recovery.keep_adapter,
        curve=history.curve,
    )


def kept_plan(context: RunContext, folder: Path) -> RecoveryPlan:
    """The plan beside an adapter that was kept.

    Raises:
        ModelError: it is no such adapter, or one for another checkpoint.
    """
    try:
        plan = RecoveryPlan.model_validate_json((folder / PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter {str(folder)!r} has no {PLAN_FILE} to tell which model it is for.") from error
    if plan.base != context.loaded.fingerprint:
        raise ModelError(
            f"adapter {str(folder)!r} is for another checkpoint than {context.config.model.source!r}: fingerprint "
            f"{(plan.base or 'none')[:12]} against {context.loaded.fingerprint[:12]}."
        )
    return plan


def merge_adapter(context: RunContext, folder: Path) -> Outcome:
    """Merge an adapter that was kept."""
    from cfsp_framework.recovery import lora as adapters

    with context.progress.phase("recover"), trained_precision(context.decoder, kept_plan(context, folder)):
        adapters.merge(adapters.open_adapted(context.decoder.model, folder))
    return Outcome(logits(context.decoder, sample_ids(context)), None)


def needed(context: RunContext, task: RecoveryTask | None) -> RecoveryTask:
    """The task of a command that does nothing but train.

    Raises:
        ConfigError: there is none.
    """
    if task is None:
        raise ConfigError(f"{context.selection.recovery} trains nothing; choose another --recovery.")
    return task


def save_recovery_plan(plan: RecoveryPlan, folder: Path, *, kept: bool) -> None:
    """Write ``recovery_plan.json`` into ``folder``, where the weights are; with a kept adapter, beside that too."""
    told = plan.model_copy(update={"base": fingerprint(folder) if kept else None}).to_json()
    for place in (folder, folder / ADAPTER_FOLDER) if kept else (folder,):
        (place / PLAN_FILE).write_text(told, encoding="utf-8")


def open_with_adapter(context: RunContext, folder: Path) -> Decoder:
    """The pruned checkpoint in ``folder`` with the adapter beside it, as the user opens them."""
    from cfsp_framework.recovery.lora import open_adapted

    model = open_model(folder, device=context.decoder.device)
    open_adapted(model, folder / ADAPTER_FOLDER)
    return replace(context.decoder, model=model.eval())


def calibrated_on(plan: PruningPlan) -> str:
    """The data SPEC that a plan was measured on.

    Raises:
        ConfigError: nothing was measured.
    """
    if plan.calibration is None:
        raise ConfigError("nothing was measured for this plan, so there is no text to train on; give --recovery-data.")
    return plan.calibration.spec


def run_training(
    context: RunContext, plan: PruningPlan, task: RecoveryTask, learner: nn.Module, autocast: bool
) -> History:
    """Train what takes gradients in ``learner``; with ``--resume`` from the last checkpoint on."""
    from cfsp_framework.recovery.trainer import TrainerSettings, train

    config = context.config
    with tempfile.TemporaryDirectory(prefix="cfsp-recovery-") as scratch:
        folder = (
            config.run.resume / f"recovery-{recovery_key(context, plan, task)[:32]}"
            if config.run.resume
            else Path(scratch)
        )
        course = TrainerSettings(
            folder=context.ranks.agree(folder),
            device=context.decoder.device,
            keep=config.run.resume is not None,
            batch_size=config.calibration.batch_size,
            check_every=config.recovery.check_every,
            patience=config.recovery.patience,
            report_to=config.recovery.report_to,
            autocast=autocast,
            batch_sequences=task.batch_sequences(context.ranks.world),
            seqlen=task.seqlen,
            seed=config.run.seed,
            ranks=context.ranks,
            progress=context.progress,
        )
        history = train(learner, task.plan, task.data, course, _teacher(context, task, autocast))
        context.ranks.wait()  # the first process's folder goes
    return history


def _teacher(context: RunContext, task: RecoveryTask, autocast: bool) -> Teacher | None:
    from cfsp_framework.recovery.trainer import Teacher

    if task.teacher is None or task.plan.distillation is None:
        return None
    model = open_model(
        task.teacher,
        "auto" if autocast else "float32",
        device=context.decoder.device,
        trust_remote_code=context.config.model.trust_remote_code,
    )
    return Teacher(model.requires_grad_(False), task.plan.distillation)


def recovery_key(context: RunContext, plan: PruningPlan, task: RecoveryTask) -> str:
    """A hash of all that decides what is learnt."""
    told = {
        "model": context.loaded.fingerprint,
        "weights": second_pass_key(context, plan),  # what decides them once they are cut and compensated
        "recovery": task.plan.model_dump(mode="json"),
        "data": task.data.fingerprint,
        "checks": [context.config.recovery.check_every, context.config.recovery.patience],
        "peft": importlib.metadata.version("peft"),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
