"""Train a pruned model, then merge the result into it or keep it as an adapter, and write the recovery plan.

Transformers' Trainer and peft are imported when something is trained.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cfsp_framework.api.data import RecoveryPlan
from cfsp_framework.api.records import Perplexity, PruningPlan, RecoveryReport
from cfsp_framework.engine.replay import logits
from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import fingerprint, open_model
from cfsp_framework.recovery.plan import RecoveryTask
from cfsp_framework.recovery.targets import list_parameters, training_precision
from cfsp_framework.run.cache_keys import second_pass_key
from cfsp_framework.run.context import RunContext, sample_ids
from cfsp_framework.runtime.hashing import hash_json

RECOVERY_PLAN_FILE = "recovery_plan.json"
ADAPTER_FOLDER = "adapter"


@dataclass(frozen=True)
class Outcome:
    """The result of a training, which the model holds unless an adapter is kept."""

    expected: Tensor  # (1, T, V): the logits of the sample after the training
    report: RecoveryReport | None
    """None where a kept adapter was merged and nothing trained."""


@dataclass(frozen=True)
class FinishedTraining:
    """A finished training, and the quality of the model before it."""

    plan: RecoveryPlan
    pruned: list[Perplexity]
    """Perplexity on every evaluation set before the training."""
    outcome: Outcome


def train_model(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train the cut model; afterwards its parameters have the dtypes they had.

    With ``--keep-adapter`` the model does not change, and ``folder/adapter`` holds the adapter.
    """
    with context.progress.phase("recover"):
        torch.manual_seed(context.config.run.seed)
        context.decoder.model.requires_grad_(False)
        outcome = (train_weights if task.plan.full else train_adapters)(context, plan, task, folder)
        context.decoder.model.requires_grad_(True)
    return outcome


def train_weights(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train all weights of the feed-forwards."""
    with training_precision(context.decoder, task.plan) as autocast:
        parameters = list_parameters(context.decoder, task.plan)
        for parameter in parameters:
            parameter.requires_grad_(True)
        report = run_training(context, plan, task, context.decoder.model, autocast=autocast)
    return Outcome(logits(context.decoder, sample_ids(context)), report)


def train_adapters(context: RunContext, plan: PruningPlan, task: RecoveryTask, folder: Path) -> Outcome:
    """Train adapters and merge them, or write them into ``folder``."""
    from cfsp_framework.recovery.lora import add_adapters, merge_adapters, remove_adapters, save_adapter

    keep = context.config.recovery.keep_adapter
    with training_precision(context.decoder, task.plan) as autocast:
        adapted = add_adapters(context.decoder, task.matrices)
        report = run_training(context, plan, task, adapted, autocast=autocast)
        if not keep:
            merge_adapters(adapted)
    expected = logits(context.decoder, sample_ids(context))
    if keep:
        if context.ranks.first:
            save_adapter(adapted, folder / ADAPTER_FOLDER)
        remove_adapters(adapted)
    return Outcome(expected, report)


def run_training(
    context: RunContext, plan: PruningPlan, task: RecoveryTask, model: nn.Module, *, autocast: bool
) -> RecoveryReport:
    """Train the parameters of ``model`` that require gradients; with ``--resume`` continue from the last checkpoint."""
    from cfsp_framework.recovery.trainer import train

    with tempfile.TemporaryDirectory(prefix="cfsp-recovery-") as scratch:
        folder = Path(scratch)
        if context.config.run.resume:
            folder = context.config.run.resume / f"recovery-{recovery_key(context, plan, task)[:32]}"
        report = train(context, task, model, context.ranks.agree(folder), autocast=autocast)
        context.ranks.wait()  # the first process removes its folder
    return report


def recovery_key(context: RunContext, plan: PruningPlan, task: RecoveryTask) -> str:
    """Hash everything that decides the result of a training."""
    deciding = {
        "model": context.loaded.fingerprint,
        "weights": second_pass_key(context, plan),  # decides the weights after the cut and the compensation
        "recovery": task.plan.model_dump(mode="json"),
        "data": task.data.fingerprint,
        "checks": [context.config.recovery.check_every, context.config.recovery.patience],
        "peft": importlib.metadata.version("peft"),
    }
    return hash_json(deciding)


def save_recovery_plan(plan: RecoveryPlan, folder: Path, *, kept: bool) -> None:
    """Write ``recovery_plan.json`` beside the weights in ``folder``, and beside an adapter that is kept."""
    text = plan.model_copy(update={"base": fingerprint(folder) if kept else None}).to_json()
    for place in (folder, folder / ADAPTER_FOLDER) if kept else (folder,):
        (place / RECOVERY_PLAN_FILE).write_text(text, encoding="utf-8")


def open_with_adapter(context: RunContext, folder: Path) -> Decoder:
    """Open the pruned checkpoint in ``folder`` with the adapter beside it, as users open them."""
    from cfsp_framework.recovery.lora import load_adapter

    model = open_model(folder, device=context.decoder.device)
    load_adapter(model, folder / ADAPTER_FOLDER)
    return replace(context.decoder, model=model.eval())


def read_adapter_plan(context: RunContext, folder: Path) -> RecoveryPlan:
    """Read the plan beside a kept adapter, which has to be for the opened model.

    Raises:
        ModelError: the folder holds no such adapter, or one for another checkpoint.
    """
    try:
        plan = RecoveryPlan.model_validate_json((folder / RECOVERY_PLAN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"adapter {str(folder)!r} has no readable {RECOVERY_PLAN_FILE}; give a folder that --keep-adapter wrote."
        ) from error
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"adapter {str(folder)!r} has no adapter_model.safetensors; pickled weights are refused.")
    if plan.base != context.loaded.fingerprint:
        raise ModelError(
            f"adapter {str(folder)!r} is for another checkpoint than {context.config.model.source!r}: fingerprint "
            f"{(plan.base or 'none')[:12]} against {context.loaded.fingerprint[:12]}."
        )
    return plan


def merge_kept_adapter(context: RunContext, folder: Path) -> Outcome:
    """Merge an adapter that was kept into the opened model."""
    from cfsp_framework.recovery.lora import load_adapter, merge_adapters

    with context.progress.phase("recover"), training_precision(context.decoder, read_adapter_plan(context, folder)):
        merge_adapters(load_adapter(context.decoder.model, folder))
    return Outcome(logits(context.decoder, sample_ids(context)), None)
