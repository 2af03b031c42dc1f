"""One training with Transformers' Trainer: batches, learning rate, looks at held-out data, checkpoints, a teacher."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import SAFE_WEIGHTS_NAME

from cfsp_framework.api.data import Distillation, RecoveryPlan
from cfsp_framework.api.records import LossPoint
from cfsp_framework.data.training import NOT_LEARNT, Example, TrainingData, collate
from cfsp_framework.errors import CfspError, ConfigError, did_you_mean
from cfsp_framework.runtime.distributed import SOLO, Ranks
from cfsp_framework.runtime.progress import Progress

_TOKENS_AT_ONCE = 2048
_TOKENS_AT_ONCE_GPU = 8192
_LOGGED = 50
"""Points of a loss curve, at most."""
_CHECKPOINTS = 10
"""Checkpoints of a training that may be resumed, two of which are kept at a time."""
_DECAYS = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class TrainerSettings:
    """How a training runs; none of it but ``check_every`` and ``patience`` changes what is learnt."""

    folder: Path
    """For checkpoints."""
    device: torch.device
    batch_sequences: int
    """Of one step, over all processes."""
    seqlen: int
    """Tokens of the longest sequence."""
    keep: bool = False
    """Write checkpoints, and go on after the last whole one that is there."""
    batch_size: int | None = None
    """Sequences at once; None: what keeps a batch small."""
    check_every: int | None = None
    patience: int | None = None
    report_to: tuple[str, ...] = ()
    autocast: bool = False
    """Compute in bfloat16 where that loses little."""
    seed: int = 0
    ranks: Ranks = SOLO
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True)
class Teacher:
    """The model to learn from, and how."""

    model: nn.Module
    settings: Distillation


@dataclass(frozen=True)
class History:
    """How a training went."""

    steps: int
    """Taken, also those before it was resumed."""
    curve: tuple[LossPoint, ...]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that Transformers does not know, or that are not installed.

    Raises:
        ConfigError: one of them.
    """
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(f"--report-to {name}: no such tracker.{did_you_mean(name, INTEGRATION_TO_CALLBACK)}")
        if name not in get_available_reporting_integrations():
            raise ConfigError(f"--report-to {name}: it is not installed here.")


def train(
    model: nn.Module, plan: RecoveryPlan, data: TrainingData, course: TrainerSettings, teacher: Teacher | None = None
) -> History:
    """Train what takes gradients in ``model``, in place; with ``check_every`` it ends as it was at the best look.

    Raises:
        CfspError: the loss is no number any more.
    """
    if "tensorboard" in course.report_to:  # its default is the folder of the checkpoints, which may go
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", "runs")
    with _undisturbed(model), course.progress.bar("recover", total=plan.steps) as step:
        trainer = _Learner(
            model=model,
            args=_arguments(plan, course),
            train_dataset=_Examples(data.train),
            eval_dataset=_Examples(data.held_out) if course.check_every else None,
            data_collator=collate,
            callbacks=[_Steps(step), *([EarlyStoppingCallback(course.patience)] if course.patience else [])],
        )
        trainer.teacher = teacher
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=_last_whole(course) if course.keep else None)
        curve = tuple(_curve(trainer.state.log_history))
    bad = next((point for point in curve if not math.isfinite((point.loss or 0.0) + (point.held_out or 0.0))), None)
    if bad is not None:
        raise CfspError(f"training failed: the loss at step {bad.step} is no number; try a smaller learning_rate.")
    return History(trainer.state.global_step, curve)


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of logits ``(n, V)`` from a teacher's, times the squared temperature: ``(n,)``."""
    ours = functional.log_softmax(student.float() / temperature, dim=-1)
    theirs = functional.log_softmax(teacher.float() / temperature, dim=-1)
    return functional.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1) * temperature**2


class _Learner(Trainer):
    """Transformers' Trainer with a teacher, where there is one."""

    teacher: Teacher | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The cross-entropy, mixed with the divergence from the teacher while training."""
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"][:, 1:]  # (B, T - 1)
        seen = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**seen, use_cache=False)
        with torch.no_grad():
            theirs = self.teacher.model(**seen, use_cache=False).logits
        learnt = labels != NOT_LEARNT
        ours, theirs = outputs.logits[:, :-1][learnt].float(), theirs[:, :-1][learnt]  # (n, V)
        settings = self.teacher.settings
        cross_entropy = functional.cross_entropy(ours, labels[learnt], reduction="sum")
        far = divergence(ours, theirs, settings.temperature).sum()
        loss = (1 - settings.weight) * cross_entropy + settings.weight * far
        # As Trainer does with a model's own loss: over all tokens of the step, times the processes it averages over.
        counted = learnt.sum() if num_items_in_batch is None else num_items_in_batch
        processes = 1 if num_items_in_batch is None else self.accelerator.num_processes
        loss = loss / counted * processes
        return (loss, outputs) if return_outputs else loss

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """A checkpoint's weights: adapters as peft writes them, else what is trained alone, under the model's own names.

        A model's ``save_pretrained`` may write other names, an expert's for instance, which Trainer would not find again.
        """
        if isinstance(self.model, PeftModel):
            super()._save(output_dir, state_dict)
        elif self.args.should_save:
            model: Any = self.model
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            folder = Path(str(output_dir or self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            save_file(trained, folder / SAFE_WEIGHTS_NAME)


class _Examples(Dataset[dict[str, Tensor]]):
    """Sequences in the form models take."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        one = self._examples[index]
        return {"input_ids": one.ids, "labels": one.labels}


class _Steps(TrainerCallback):
    """Tells the bar."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for _ in range(state.global_step):
            self._step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step()


def _arguments(plan: RecoveryPlan, course: TrainerSettings) -> TrainingArguments:
    cpu = course.device.type == "cpu"
    mine = course.batch_sequences // course.ranks.world
    most = course.batch_size or max(1, (_TOKENS_AT_ONCE if cpu else _TOKENS_AT_ONCE_GPU) // course.seqlen)
    at_once = max(count for count in range(1, min(mine, most) + 1) if mine % count == 0)
    every = course.check_every or max(1, plan.steps // _CHECKPOINTS)
    kept = course.keep or course.check_every is not None
    arguments = TrainingArguments(
        output_dir=str(course.folder),
        max_steps=plan.steps,
        per_device_train_batch_size=at_once,
        per_device_eval_batch_size=at_once,
        gradient_accumulation_steps=mine // at_once,
        gradient_checkpointing=plan.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        learning_rate=plan.learning_rate,
        lr_scheduler_type=_DECAYS[plan.decay],
        warmup_steps=math.ceil(plan.warmup * plan.steps),
        weight_decay=0.0,
        bf16=course.autocast,
        logging_steps=max(1, plan.steps // _LOGGED),
        save_strategy="steps" if kept else "no",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if course.check_every else "no",
        eval_steps=course.check_every,
        load_best_model_at_end=course.check_every is not None,
        metric_for_best_model="eval_loss" if course.check_every else None,
        greater_is_better=False if course.check_every else None,
        prediction_loss_only=True,
        restore_callback_states_from_checkpoint=True,
        report_to=list(course.report_to),
        remove_unused_columns=False,
        dataloader_pin_memory=not cpu,
        ddp_find_unused_parameters=False,
        use_cpu=cpu,
        seed=course.seed,
        disable_tqdm=True,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several GPUs are for several processes
    return arguments


def _last_whole(course: TrainerSettings) -> str | None:
    """The newest checkpoint that was written to its end; what a killed process left of another is never used."""
    found: list[tuple[int, Path]] = []
    for path in course.folder.glob("checkpoint-*") if course.ranks.first else ():
        try:  # the state is written last
            found.append((json.loads((path / "trainer_state.json").read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            continue
    newest = str(max(found)[1]) if found else None
    return course.ranks.agree(newest)


def _curve(history: Sequence[dict[str, float]]) -> Generator[LossPoint]:
    """The loss curve in Trainer's log."""
    for entry in history:
        if "loss" in entry:
            yield LossPoint(step=int(entry["step"]), loss=float(entry["loss"]))
        elif "eval_loss" in entry:
            yield LossPoint(step=int(entry["step"]), held_out=float(entry["eval_loss"]))


@contextmanager
def _undisturbed(model: nn.Module) -> Generator[None]:
    """Put back what Trainer changes beside weights, and keep its advice off the terminal."""
    learner: Any = model
    caches = learner.config.__dict__.get("use_cache")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            if caches is not None:
                learner.config.use_cache = caches
            if learner.is_gradient_checkpointing:
                learner.gradient_checkpointing_disable()
            learner.eval()
