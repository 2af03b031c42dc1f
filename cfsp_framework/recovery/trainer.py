"""One training with Transformers' Trainer: batches, learning rate, held-out loss, checkpoints, distillation."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_NAME

from cfsp_framework.api.data import Distillation
from cfsp_framework.api.records import LossPoint, RecoveryReport
from cfsp_framework.data.training import IGNORED_LABEL, Example, collate
from cfsp_framework.errors import CfspError
from cfsp_framework.modeling.loading import open_model
from cfsp_framework.recovery.plan import RecoveryTask
from cfsp_framework.run.context import RunContext
from cfsp_framework.runtime.distributed import Ranks

_TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 8192}
_LOGGED_STEPS = 50
"""Points of a loss curve, at most."""
_CHECKPOINTS = 10
"""Checkpoints of a training that may be resumed, two of which are kept at a time."""
_DECAYS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


def train(
    context: RunContext, task: RecoveryTask, model: nn.Module, folder: Path, *, autocast: bool = False
) -> RecoveryReport:
    """Train the parameters of ``model`` that require gradients, in place.

    Checkpoints are written into ``folder``; with ``--resume`` training continues from the last complete one. Held-out
    losses are measured with ``--recovery-check-every``: the model then ends with the weights of the lowest.
    With ``autocast`` forward passes compute in bfloat16.

    Raises:
        CfspError: the loss is not finite.
    """
    options, plan = context.config.recovery, task.plan
    if (
        "tensorboard" in options.report_to
    ):  # by default it logs into the folder of the checkpoints, which may be removed
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "runs")
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    checkpoint = _last_complete_checkpoint(folder, context.ranks) if context.config.run.resume else None
    with _model_flags_restored(model), context.progress.bar("recover", total=plan.steps) as advance:
        stopping = [EarlyStoppingCallback(options.patience)] if options.patience else []
        trainer = _DistillationTrainer(
            model=model,
            args=_training_arguments(context, task, folder, autocast=autocast),
            train_dataset=_as_dataset(task.data.train),
            eval_dataset=_as_dataset(task.data.held_out) if options.check_every else None,
            data_collator=collate,
            callbacks=[StepCallback(advance), *stopping],
        )
        trainer.distillation = plan.distillation
        trainer.teacher = _open_teacher(context, task, autocast=autocast)
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=checkpoint)
        curve = tuple(_read_curve(trainer.state.log_history))
    for point in curve:
        if not math.isfinite((point.loss or 0.0) + (point.held_out or 0.0)):
            raise CfspError(
                f"training failed: the loss at step {point.step} is not finite; try a smaller learning_rate."
            )
    steps = trainer.state.global_step
    return RecoveryReport(
        data=task.data.spec,
        sequences=len(task.data.train),
        seqlen=task.seqlen,
        parameters=parameters,
        ranks=() if plan.full else tuple(entry.rank for entry in plan.blocks),
        steps=steps,
        tokens=steps * task.batch_sequences(context.ranks.world) * task.seqlen,
        adapter=options.keep_adapter,
        curve=curve,
    )


def _open_teacher(context: RunContext, task: RecoveryTask, *, autocast: bool) -> nn.Module | None:
    if task.teacher is None:
        return None
    model = open_model(
        task.teacher,
        "auto" if autocast else "float32",
        device=context.decoder.device,
        trust_remote_code=context.config.model.trust_remote_code,
    )
    return model.requires_grad_(False)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the Kullback-Leibler divergence of logits ``(n, V)`` from a teacher's: ``(n,)``.

    It is multiplied by the squared temperature (arXiv 1503.02531).
    """
    student_log = functional.log_softmax(student.float() / temperature, dim=-1)  # (n, V)
    teacher_log = functional.log_softmax(teacher.float() / temperature, dim=-1)  # (n, V)
    return functional.kl_div(student_log, teacher_log, log_target=True, reduction="none").sum(-1) * temperature**2


class _DistillationTrainer(Trainer):
    """Transformers' Trainer with an optional teacher, and checkpoints of the trained parameters alone."""

    teacher: nn.Module | None = None
    distillation: Distillation | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the cross-entropy, mixed with the divergence from the teacher while training."""
        if self.teacher is None or self.distillation is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # (B, T - 1)
        model_inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**model_inputs, use_cache=False)
        with torch.no_grad():
            teacher_logits = self.teacher(**model_inputs, use_cache=False).logits  # (B, T, V)
        learned = labels != IGNORED_LABEL  # (B, T - 1)
        student, teacher = outputs.logits[:, :-1][learned].float(), teacher_logits[:, :-1][learned]  # (n, V)
        cross_entropy = functional.cross_entropy(student, labels[learned], reduction="sum")
        distance = divergence(student, teacher, self.distillation.temperature).sum()
        loss = (1 - self.distillation.weight) * cross_entropy + self.distillation.weight * distance
        # As Trainer does with a model's own loss: over all tokens of the step, times the processes it averages over.
        tokens = learned.sum() if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = loss / tokens * processes
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write a checkpoint's weights: adapters as peft writes them, else the trained parameters by their own names.

        A model's ``save_pretrained`` may use other names, an expert's for instance, which Trainer would not recognise.
        """
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            model: Any = self.model
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / SAFE_WEIGHTS_NAME)


class StepCallback(TrainerCallback):
    """Advance the progress bar after each step."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self._advance = advance

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step):
            self._advance()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._advance()


def _as_dataset(examples: Sequence[Example]) -> Any:
    """Return sequences in the form models take them; Trainer needs no more than a list."""
    return [{"input_ids": example.ids, "labels": example.labels} for example in examples]


def _training_arguments(context: RunContext, task: RecoveryTask, folder: Path, *, autocast: bool) -> TrainingArguments:
    plan, config, device = task.plan, context.config, context.decoder.device.type
    sequences = task.batch_sequences(context.ranks.world) // context.ranks.world
    limit = config.calibration.batch_size or max(1, _TOKENS_PER_BATCH[device] // task.seqlen)
    batch_size = max(count for count in range(1, min(sequences, limit) + 1) if sequences % count == 0)
    check_every = config.recovery.check_every
    checked = check_every is not None
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=plan.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=sequences // batch_size,
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=plan.learning_rate,
        lr_scheduler_type=_DECAYS[plan.decay],
        warmup_steps=math.ceil(plan.warmup * plan.steps),
        weight_decay=0.0,
        bf16=autocast,
        logging_steps=max(1, plan.steps // _LOGGED_STEPS),
        save_strategy="steps" if config.run.resume or checked else "no",
        save_steps=check_every or max(1, plan.steps // _CHECKPOINTS),
        save_total_limit=2,
        eval_strategy="steps" if checked else "no",
        eval_steps=check_every,
        load_best_model_at_end=checked,
        metric_for_best_model="eval_loss" if checked else None,
        greater_is_better=False if checked else None,
        prediction_loss_only=True,
        restore_callback_states_from_checkpoint=True,
        report_to=list(config.recovery.report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=device != "cpu",
        ddp_find_unused_parameters=False,
        use_cpu=device == "cpu",
        seed=config.run.seed,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes
    return arguments


def _last_complete_checkpoint(folder: Path, ranks: Ranks) -> str | None:
    """Return the newest checkpoint that was written to its end; one that a killed process left incomplete is not used."""
    complete: list[tuple[int, Path]] = []
    for path in folder.glob("checkpoint-*") if ranks.first else ():
        try:  # the state is written last
            complete.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    return ranks.agree(str(max(complete)[1]) if complete else None)


def _read_curve(history: Sequence[dict[str, float]]) -> Generator[LossPoint]:
    """Yield the loss curve in Trainer's log."""
    for entry in history:
        if "loss" in entry:
            yield LossPoint(step=int(entry["step"]), loss=float(entry["loss"]))
        elif "eval_loss" in entry:
            yield LossPoint(step=int(entry["step"]), held_out=float(entry["eval_loss"]))


@contextmanager
def _model_flags_restored(model: nn.Module) -> Generator[None]:
    """Restore the flags that Trainer changes on a model, and keep its advice off the terminal."""
    trained: Any = model
    use_cache = trained.config.__dict__.get("use_cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if use_cache is not None:
                trained.config.use_cache = use_cache
            if trained.is_gradient_checkpointing:
                trained.gradient_checkpointing_disable()
            trained.eval()
