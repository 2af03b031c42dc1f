"""A run, top to bottom: configure, select, open, calibrate, collect, plan, cut, save, evaluate, tell."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, report, surgery
from .api import Budget, Update
from .architectures import Decoder, open_decoder
from .attention import choose_attentions, count_to_drop
from .calibration import calibration_windows, identify
from .collect import BlockMeasurement, collect
from .compensation import FinishedBlocks, FirstPass, SecondPass
from .config import RunConfig
from .errors import ConfigError, PlanError
from .evaluation import EvaluationSet, Perplexity, evaluation_set, perplexity
from .files import staged_folder
from .models import LoadedModel, context_length, load_model
from .notes import gather_notes
from .pages import html_report, model_card
from .planning import ModelIdentity, PruningPlan, channel_ratio, plan_blocks
from .plugins import Plugins, load_plugins
from .progress import Progress
from .report import Evaluation, Report, Size
from .selection import Selection, select

CRITERION = "criterion"
"""The label of a run's only criterion among the scores."""


@dataclass(frozen=True)
class RunResult:
    """A finished run: what was asked, what was decided, what came out, and where it lies."""

    config: RunConfig
    plan: PruningPlan
    report: Report
    folder: Path


@dataclass(frozen=True)
class Bench:
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

    @property
    def windows_to_select(self) -> Tensor | None:
        """The windows of the first pass: all, or every other one where the rest is kept for the second pass."""
        if self.windows is None or self.config.reuse_windows or not self.selection.second_pass:
            return self.windows
        return self.windows[::2] if len(self.windows) > 1 else self.windows

    @property
    def windows_to_compensate(self) -> Tensor | None:
        """The windows of the second pass; None where there is none."""
        if self.windows is None or not self.selection.second_pass:
            return None
        return self.windows if self.config.reuse_windows or len(self.windows) < 2 else self.windows[1::2]


def prune(
    config: RunConfig,
    out: Path,
    *,
    plan: PruningPlan | None = None,
    overwrite: bool = False,
    keep_statistics: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Prune a model into the checkpoint folder ``out``; nothing is left there unless everything succeeded.

    With a ``plan`` the channels are taken from it, and data is only needed by a compensator that asks for some.
    """
    checkpoint.check_output(out, overwrite=overwrite)
    progress = progress or Progress()
    with staged_folder(out) as folder:
        bench = set_up(config, progress, planned=plan is not None)
        if plan is not None:
            check_plan(bench, plan)
            ran = bench.selection.describe()
            kinds = ("compensator", "recovery")  # these are this run's, whatever the plan was made with
            plan = plan.model_copy(update={"components": plan.components | {kind: ran[kind] for kind in kinds}})
        dense, before = evaluate(bench), report.measure_size(bench.decoder.model)
        drop_attention(bench, plan)
        measurements = measure(bench, planned=plan is not None)
        plan = plan or make_plan(bench, measurements)
        check_recovery(bench, plan, measurements)
        native = surgery.added_biases(bench.decoder.config)
        updates = cut(bench, plan, measurements)
        notes = gather_notes(bench, plan, measurements, updates, native)
        difference = save(bench, plan, folder)
        pruned = evaluate(bench)
        told = tell(bench, plan, updates, (dense, pruned), before, notes, difference)
        write_report(told, folder)
        if keep_statistics:
            metadata = {"model": bench.loaded.fingerprint, **plan.components}
            report.save_statistics(folder / checkpoint.STATISTICS_FILE, measurements, metadata)
    result = RunResult(config, plan, told, out)
    bench.plugins.run_finished(result)
    return result


def plan_only(config: RunConfig, progress: Progress | None = None) -> PruningPlan:
    """The plan ``prune`` would cut by."""
    bench = set_up(config.model_copy(update={"evaluate": ()}), progress or Progress())
    drop_attention(bench)
    return make_plan(bench, measure(bench))


def evaluate_only(config: RunConfig, progress: Progress | None = None) -> list[tuple[EvaluationSet, Perplexity]]:
    """Perplexity of a model as it is, on every data SPEC of ``config.evaluate``."""
    progress = progress or Progress()
    with progress.phase("load"):
        loaded = load_model(config)
        sets = open_evaluation_sets(config, loaded)
    with progress.phase("evaluate"):
        return [(data, perplexity(loaded.model, data, progress)) for data in sets]


def set_up(config: RunConfig, progress: Progress, *, planned: bool = False) -> Bench:
    """Choose the components, open the model, read the data: whatever the user got wrong shows here."""
    plugins = load_plugins(config.plugins)
    selection = select(config, plugins, planned=planned)
    torch.manual_seed(config.seed)
    with progress.phase("load"):
        loaded = load_model(config)
        decoder = open_decoder(loaded.model, plugins)
    with progress.phase("calibrate"):
        measured = selection.collectors or selection.second_pass or (config.drop_attention and not planned)
        windows = open_windows(config, loaded) if measured else None
        evaluation_sets = open_evaluation_sets(config, loaded)
    parameters = report.measure_size(loaded.model).parameters
    return Bench(config, plugins, selection, loaded, decoder, parameters, windows, evaluation_sets, progress)


def open_windows(config: RunConfig, loaded: LoadedModel) -> Tensor:
    """The calibration windows, ``(N, T)``."""
    seqlen = sequence_length(config, loaded)
    return calibration_windows(config.calibration, loaded.tokenizer, config.samples, seqlen, config.seed)


def open_evaluation_sets(config: RunConfig, loaded: LoadedModel) -> tuple[EvaluationSet, ...]:
    """The windows of every data SPEC to evaluate on."""
    seqlen = sequence_length(config, loaded)
    return tuple(evaluation_set(spec, loaded.tokenizer, seqlen, config.evaluate_windows) for spec in config.evaluate)


def sequence_length(config: RunConfig, loaded: LoadedModel) -> int:
    """Tokens per window: what was asked for, else 1024 or the model's context where that is shorter."""
    context = context_length(loaded.model)
    if config.seqlen is None:
        return min(1024, context or 1024)
    if context is not None and config.seqlen > context:
        raise ConfigError(f"--seqlen {config.seqlen} is longer than the model's context of {context}.")
    return config.seqlen


def drop_attention(bench: Bench, plan: PruningPlan | None = None) -> None:
    """Take out the attentions the plan names, or those missed least; what is measured afterwards knows about it."""
    config, decoder = bench.config, bench.decoder
    if plan is not None:
        surgery.drop_attention(decoder, plan.dropped_attention)
        return
    if config.drop_attention == 0 or bench.windows is None:
        return
    if config.drop_attention == "auto" and config.budget != "parameters":
        raise ConfigError("--drop-attention auto needs --budget parameters: its rule is about all parameters.")
    with bench.progress.phase("attention"):
        count = count_to_drop(decoder, config.ratio) if config.drop_attention == "auto" else config.drop_attention
        surgery.drop_attention(decoder, choose_attentions(decoder, bench.windows, count, bench.progress))


def measure(bench: Bench, *, planned: bool = False) -> tuple[BlockMeasurement, ...]:
    """Run the blocks once over the calibration windows; without a collector nothing runs."""
    config, selection = bench.config, bench.selection
    with bench.progress.phase("collect"):
        return collect(
            bench.decoder,
            bench.windows_to_select,
            {} if planned else {CRITERION: selection.criterion},
            selection.collectors,
            curve=selection.allocator.component.curve(),
            batch_size=config.batch_size,
            seed=config.seed,
            progress=bench.progress,
        )


def make_plan(bench: Bench, measurements: Sequence[BlockMeasurement]) -> PruningPlan:
    """Spread the budget over the blocks and pick each block's channels."""
    config, decoder = bench.config, bench.decoder
    with bench.progress.phase("plan"):
        ratio = config.ratio
        if config.budget == "parameters":
            gone = bench.parameters - report.measure_size(decoder.model).parameters
            ratio = channel_ratio(ratio, bench.parameters, decoder.channel_parameters, gone)
        summaries = [measured.summary(block, CRITERION) for block, measured in enumerate(measurements)]
        blocks = plan_blocks(
            summaries, bench.selection.allocator, Budget(ratio, config.round_to), rebalance=config.rebalance
        )
        return PruningPlan(
            model=ModelIdentity(
                source=config.model,
                family=decoder.architecture.family,
                fingerprint=bench.loaded.fingerprint,
                parameters=bench.parameters,
            ),
            calibration=identify(config.calibration, bench.windows, config.seed) if bench.windows is not None else None,
            ratio=config.ratio,
            budget=config.budget,
            round_to=config.round_to,
            seed=config.seed,
            components=bench.selection.describe(),
            versions=versions(bench.selection),
            dropped_attention=tuple(surgery.dropped_attention(decoder.config)),
            blocks=blocks,
        )


def check_plan(bench: Bench, plan: PruningPlan) -> None:
    """Refuse a plan made for other weights or other shapes."""
    surgery.check_fits(bench.decoder, plan)
    if plan.model.fingerprint != bench.loaded.fingerprint:
        raise PlanError(
            f"the plan was made for another model than {bench.config.model!r}: {plan.model.source!r}, "
            f"fingerprint {plan.model.fingerprint[:12]} against {bench.loaded.fingerprint[:12]}."
        )


def evaluate(bench: Bench) -> list[Perplexity]:
    """Perplexity of the model as it is now, on every evaluation set."""
    with bench.progress.phase("evaluate"):
        return [perplexity(bench.decoder.model, data, bench.progress) for data in bench.evaluation_sets]


def cut(bench: Bench, plan: PruningPlan, measurements: Sequence[BlockMeasurement]) -> dict[int, Update]:
    """Narrow the model and compensate, block by block; what the compensator answered for each block that lost some."""
    decoder, selection, config = bench.decoder, bench.selection, bench.config
    updates: dict[int, Update] = {}
    phase = "compensate" if selection.second_pass else "cut"
    with bench.progress.phase(phase), bench.progress.bar(phase, total=len(decoder.blocks)) as step:
        answer: FirstPass | SecondPass
        if bench.windows_to_compensate is not None:
            answer = SecondPass(
                decoder,
                bench.windows_to_compensate,
                selection.compensator,
                selection.second_pass,
                batch_size=config.batch_size,
                seed=config.seed,
                finished=FinishedBlocks(config.resume, second_pass_key(bench, plan)) if config.resume else None,
            )
        else:
            statistics = [measured.statistics for measured in measurements]
            answer = FirstPass(decoder, statistics, selection.compensator, seed=config.seed)

        def compensate(index: int, kept: Tensor) -> Update:
            updates[index] = answer(index, kept)
            step()
            return updates[index]

        surgery.apply_plan(decoder, plan, compensate)
    return updates


def check_recovery(bench: Bench, plan: PruningPlan, measurements: Sequence[BlockMeasurement]) -> None:
    """Refuse a recovery scheduler that wants training: this version has nothing to run it with, and says so in time."""
    scored = [(block, measured) for block, measured in enumerate(measurements) if CRITERION in measured.scores]
    summaries = [measured.summary(block, CRITERION) for block, measured in scored]
    with bench.selection.recovery.blamed("schedule()") as component:
        wanted = component.schedule(summaries, plan)
    if wanted is not None:
        raise ConfigError(f"{bench.selection.recovery} asks for training, which this version cannot run; use none.")


def second_pass_key(bench: Bench, plan: PruningPlan) -> str:
    """A hash of all that decides what the second pass answers."""
    model, windows = bench.decoder.model, bench.windows_to_compensate
    told = {
        "plan": plan.model_dump(mode="json", exclude={"components", "versions"}),
        "components": bench.selection.describe(),
        "versions": versions(bench.selection),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest() if windows is not None else None,
        "numerics": [bench.config.seed, bench.config.batch_size, str(model.dtype), str(model.device)],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def save(bench: Bench, plan: PruningPlan, folder: Path) -> float:
    """Write the checkpoint and the plan, open the checkpoint again and compare: the largest difference of a logit."""
    with bench.progress.phase("save"):
        checkpoint.save_model(bench.decoder, bench.loaded, folder)
        (folder / checkpoint.PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
    with bench.progress.phase("verify"):
        return checkpoint.verify(folder, bench.decoder, sample_ids(bench))


def sample_ids(bench: Bench) -> Tensor:
    """Some tokens to compare logits on, ``(1, T)``: the first calibration window, or any valid ids."""
    if bench.windows is not None:
        return bench.windows[:1]
    vocabulary = bench.decoder.config.vocab_size
    return torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(bench.config.seed))


def tell(
    bench: Bench,
    plan: PruningPlan,
    updates: Mapping[int, Update],
    perplexities: tuple[list[Perplexity], list[Perplexity]],
    before: Size,
    notes: tuple[str, ...],
    difference: float,
) -> Report:
    """Put what was measured into one report."""
    config, decoder = bench.config, bench.decoder
    after = report.measure_size(decoder.model)
    in_blocks = sum(parameter.numel() for block in decoder.blocks for parameter in block.parameters())
    return Report(
        model=config.model,
        fingerprint=bench.loaded.fingerprint,
        family=decoder.architecture.family,
        dtype=str(decoder.model.dtype).removeprefix("torch."),
        device=str(decoder.model.device),
        calibration=plan.calibration.spec if plan.calibration else None,
        samples=plan.calibration.samples if plan.calibration else 0,
        seqlen=sequence_length(config, bench.loaded),
        seed=config.seed,
        components=plan.components,
        ratio_requested=plan.ratio,
        budget=plan.budget,
        round_to=plan.round_to,
        channels_before=sum(block.width for block in plan.blocks),
        channels_after=sum(plan.widths),
        channel_ratio=plan.achieved_ratio,
        block_parameter_ratio=1 - in_blocks / (in_blocks + before.parameters - after.parameters),
        parameter_ratio=1 - after.parameters / before.parameters,
        dense=before,
        pruned=after,
        evaluations=tuple(
            Evaluation(
                data=data.spec,
                seqlen=data.windows.shape[1],
                windows=len(data.windows),
                dense=dense,
                pruned=pruned,
                excess_nll=pruned.nll - dense.nll,
            )
            for data, dense, pruned in zip(bench.evaluation_sets, *perplexities, strict=True)
        ),
        blocks=report.block_reports(plan, updates),
        notes=notes,
        reload_difference=difference,
        seconds={name: round(seconds, 3) for name, seconds in bench.progress.seconds.items()},
        peak_memory_bytes=report.peak_memory(),
        versions=versions(bench.selection),
    )


def write_report(told: Report, folder: Path) -> None:
    """The report for programs and for people, and the model card."""
    code = (folder / checkpoint.CODE_FILE).exists()
    for name, text in (
        (checkpoint.REPORT_FILE, told.to_json()),
        (checkpoint.PAGE_FILE, html_report(told)),
        (checkpoint.CARD_FILE, model_card(told, code=code)),
    ):
        (folder / name).write_text(text, encoding="utf-8")


def versions(selection: Selection) -> dict[str, str]:
    """Of Python, the libraries that compute, and every distribution a component comes from."""
    libraries = {name: importlib.metadata.version(name) for name in ("cfsp-framework", "torch", "transformers")}
    return {"python": platform.python_version(), **libraries, **selection.distributions()}
