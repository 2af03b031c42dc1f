"""A run, top to bottom: configure, select, open, calibrate, collect, plan, cut, save, evaluate, tell."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from . import checkpoint, report, surgery
from .api import Budget, Site, Update
from .architectures import Decoder, open_decoder
from .attention import choose_attentions, count_to_drop
from .blocks import PADDING, Batch, Passage, embed, finish, logits, pass_block
from .calibration import calibration_windows, identify
from .collect import FeedForwardMeasurement, collect, summarise
from .compensation import FinishedBlocks, FirstPass, SecondPass
from .config import RunConfig
from .errors import ConfigError, PlanError
from .evaluation import EvaluationSet, Perplexity, evaluation_set, perplexity
from .files import staged_folder
from .models import LoadedModel, context_length, load_model, open_model, open_skeleton
from .notes import gather_notes
from .pages import html_report, model_card
from .planning import ModelIdentity, PruningPlan, channel_ratio, plan_blocks
from .plugins import Plugins, load_plugins
from .progress import Progress
from .ranks import Ranks, join_ranks
from .report import Evaluation, Report, Size
from .resume import KeptCollection, identity_of
from .selection import Selection, select
from .streaming import ShardWriter, Streamed

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
    passage: Passage

    @property
    def ranks(self) -> Ranks:
        """The processes that share the work."""
        return self.passage.ranks

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
    ranks = join_ranks(config.device)
    with staged_folder(out) if ranks.first else nullcontext(out) as folder:
        bench = set_up(config, progress, planned=plan is not None, ranks=ranks)
        if plan is not None:
            check_plan(bench, plan)
            ran = bench.selection.describe()
            kinds = ("compensator", "recovery")  # these are this run's, whatever the plan was made with
            plan = plan.model_copy(update={"components": plan.components | {kind: ran[kind] for kind in kinds}})
        dense, before = evaluate(bench, bench.decoder), report.measure_size(bench.decoder.model)
        drop_attention(bench, plan)
        measurements = measure(bench, planned=plan is not None)
        plan = plan or make_plan(bench, measurements)
        check_recovery(bench, plan, measurements)
        native = surgery.added_biases(bench.decoder.config)
        made = cut(bench, plan, measurements, folder)
        notes = gather_notes(bench, plan, measurements, made.updates, native)
        save(bench, plan, made, folder)
        written, difference = reopen(bench, made, folder)
        pruned = evaluate(bench, written)
        told = tell(bench, plan, made.updates, (dense, pruned), before, notes, difference)
        if ranks.first:
            write_report(told, folder)
            if keep_statistics:
                metadata = {"model": bench.loaded.fingerprint, **plan.components}
                report.save_statistics(folder / checkpoint.STATISTICS_FILE, measurements, metadata)
        ranks.wait()
    result = RunResult(config, plan, told, out)
    if ranks.first:
        bench.plugins.run_finished(result)
    return result


def plan_only(config: RunConfig, progress: Progress | None = None) -> PruningPlan:
    """The plan ``prune`` would cut by."""
    ranks = join_ranks(config.device)
    bench = set_up(config.model_copy(update={"evaluate": ()}), progress or Progress(), ranks=ranks)
    drop_attention(bench)
    return make_plan(bench, measure(bench))


def evaluate_only(config: RunConfig, progress: Progress | None = None) -> list[tuple[EvaluationSet, Perplexity]]:
    """Perplexity of a model as it is, on every data SPEC of ``config.evaluate``."""
    progress = progress or Progress()
    ranks = join_ranks(config.device)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
        decoder = open_streamed(config, loaded, load_plugins(config.plugins)) if config.stream else None
        sets = open_evaluation_sets(config, loaded)
    passage = Passage(spill=config.spill, ranks=ranks)
    with progress.phase("evaluate"):
        return [(data, perplexity(decoder or loaded.model, data, progress, passage)) for data in sets]


def set_up(config: RunConfig, progress: Progress, *, planned: bool = False, ranks: Ranks | None = None) -> Bench:
    """Choose the components, open the model, read the data: whatever the user got wrong shows here."""
    ranks = ranks or join_ranks(config.device)
    plugins = load_plugins(config.plugins)
    selection = select(config, plugins, planned=planned)
    check_selection(config, selection, ranks)
    torch.manual_seed(config.seed)
    with progress.phase("load"):
        loaded = load_model(config, ranks)
        decoder = open_streamed(config, loaded, plugins) if config.stream else open_decoder(loaded.model, plugins)
    with progress.phase("calibrate"):
        measured = selection.collectors or selection.second_pass or (config.drop_attention and not planned)
        windows = open_windows(config, loaded) if measured else None
        evaluation_sets = open_evaluation_sets(config, loaded)
    parameters = report.measure_size(loaded.model).parameters
    passage = Passage(config.batch_size, skipped_ids(config, loaded), config.spill, ranks)
    return Bench(config, plugins, selection, loaded, decoder, parameters, windows, evaluation_sets, progress, passage)


def check_selection(config: RunConfig, selection: Selection, ranks: Ranks) -> None:
    """Refuse what the chosen way of running cannot do."""
    chosen = (*selection.collectors, *selection.second_pass)
    backward = [one.component.provides.name for one in chosen if one.component.site is Site.GRADIENT]
    if config.stream and backward:
        raise ConfigError(f"--stream: {backward[0]} needs a backward pass through the whole model; leave --stream out.")
    if config.stream and config.drop_attention:
        raise ConfigError("--stream: which attention to drop is found with the whole model; leave one of both out.")
    if config.stream and config.device_map == "auto":
        raise ConfigError("--stream reads blocks one by one, --device-map spreads them all; leave one of both out.")
    ordered = [one.component.name for one in chosen if one.component.ordered]
    if ranks.world > 1 and ordered:
        raise ConfigError(
            f"{ordered[0]} depends on the order of all windows and cannot be shared out; run one process."
        )


def open_streamed(config: RunConfig, loaded: LoadedModel, plugins: Plugins, folder: Path | None = None) -> Decoder:
    """A model that is read block by block from its folder."""
    decoder = open_decoder(loaded.model, plugins)
    resident = Streamed(loaded.model, folder or loaded.folder, decoder.architecture.blocks, loaded.device)
    return replace(decoder, resident=resident)


def skipped_ids(config: RunConfig, loaded: LoadedModel) -> frozenset[int]:
    """The tokens left out of the statistics."""
    if not config.skip_bos:
        return frozenset()
    if loaded.tokenizer.bos_token_id is None:
        raise ConfigError("--skip-bos: this model's tokenizer has no beginning-of-sequence token.")
    return frozenset({int(loaded.tokenizer.bos_token_id)})


def open_windows(config: RunConfig, loaded: LoadedModel) -> Tensor:
    """The calibration windows, ``(N, T)``."""
    seqlen = sequence_length(config, loaded)
    return calibration_windows(
        config.calibration, loaded.tokenizer, config.samples, seqlen, config.seed, pack=config.pack
    )


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


def measure(bench: Bench, *, planned: bool = False) -> tuple[FeedForwardMeasurement, ...]:
    """Run the blocks once over the calibration windows; without a collector nothing runs."""
    config, selection = bench.config, bench.selection
    finished = None
    if config.resume and not planned:
        finished = KeptCollection(config.resume, collection_key(bench), bench.ranks)
    with bench.progress.phase("collect"):
        return collect(
            bench.decoder,
            bench.windows_to_select,
            {} if planned else {CRITERION: selection.criterion},
            selection.collectors,
            curve=None if planned else selection.allocator.component.curve(),
            passage=bench.passage,
            seed=config.seed,
            progress=bench.progress,
            finished=finished,
        )


def collection_key(bench: Bench) -> str:
    """A hash of all that decides what a block measures and scores; the ratio is not among it."""
    selection, windows = bench.selection, bench.windows_to_select
    told = {
        "model": bench.loaded.fingerprint,
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest() if windows is not None else None,
        "criterion": identity_of(selection.criterion),
        "collectors": [identity_of(chosen) for chosen in selection.collectors],
        "curve": selection.allocator.component.curve(),
        "dropped_attention": surgery.dropped_attention(bench.decoder.config),
        "versions": versions(selection),
        "numerics": numerics(bench),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def numerics(bench: Bench) -> list[object]:
    """What may change the last digits."""
    model, config = bench.decoder.model, bench.config
    passage = [config.batch_size, sorted(bench.passage.skip), bench.ranks.world]
    return [config.seed, *passage, str(model.dtype), bench.decoder.device.type]


def make_plan(bench: Bench, measurements: Sequence[FeedForwardMeasurement]) -> PruningPlan:
    """Spread the budget over the blocks and pick each block's channels; every process gets the first one's plan."""
    config, decoder = bench.config, bench.decoder
    with bench.progress.phase("plan"):
        ratio = config.ratio
        if config.budget == "parameters":
            gone = bench.parameters - report.measure_size(decoder.model).parameters
            ratio = channel_ratio(ratio, bench.parameters, decoder.channel_parameters, gone)
        summaries = summarise(decoder, measurements, CRITERION)
        blocks = plan_blocks(
            summaries, bench.selection.allocator, Budget(ratio, config.round_to), rebalance=config.rebalance
        )
        plan = PruningPlan(
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
        return bench.ranks.agree(plan)


def check_plan(bench: Bench, plan: PruningPlan) -> None:
    """Refuse a plan made for other weights or other shapes."""
    surgery.check_fits(bench.decoder, plan)
    if plan.model.fingerprint != bench.loaded.fingerprint:
        raise PlanError(
            f"the plan was made for another model than {bench.config.model!r}: {plan.model.source!r}, "
            f"fingerprint {plan.model.fingerprint[:12]} against {bench.loaded.fingerprint[:12]}."
        )


def evaluate(bench: Bench, decoder: Decoder) -> list[Perplexity]:
    """Perplexity of a model as it is now, on every evaluation set."""
    model = decoder if bench.config.stream else decoder.model
    with bench.progress.phase("evaluate"):
        return [perplexity(model, data, bench.progress, bench.passage) for data in bench.evaluation_sets]


@dataclass(frozen=True)
class Cut:
    """What is left to know of a model that was cut."""

    updates: Mapping[tuple[int, str], Update]
    """What the compensator answered for each feed-forward that lost some channels, by block and path."""
    expected: Tensor  # (1, T, V): the logits of the sample, which the checkpoint has to give again
    writer: ShardWriter | None
    """Has the blocks on disk already, where they are streamed."""


def cut(bench: Bench, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement], folder: Path) -> Cut:
    """Narrow the model and compensate, block by block; a streamed block is written before the next one is read."""
    decoder, selection = bench.decoder, bench.selection
    updates: dict[tuple[int, str], Update] = {}
    phase = "compensate" if selection.second_pass else "cut"
    with bench.progress.phase(phase), bench.progress.bar(phase, total=len(decoder.blocks)) as step:
        answer = compensation(bench, plan, measurements)
        writer = ShardWriter(decoder.model, decoder.architecture.blocks, folder) if bench.config.stream else None
        sample: list[Batch] = embed(decoder, sample_ids(bench), Passage(batch_size=1)) if writer else []

        def compensate(index: int, kept: Sequence[Tensor]) -> Sequence[Update]:
            found = answer(index, kept)
            parts = decoder.feed_forwards(index)
            told = zip(parts, kept, found, strict=True)
            updates.update({(one.block, one.path): update for one, k, update in told if len(k) < one.width})
            return found

        def leave(index: int) -> None:
            if index + 1 < len(decoder.blocks):
                answer.leave(index)
            if writer is not None:
                pass_block(decoder, index, sample)
                if bench.ranks.first:
                    writer.write_block(index)
            step()

        surgery.apply_plan(decoder, plan, compensate, leave)
        expected = (
            finish(decoder, sample_ids(bench), sample[0].hidden) if writer else logits(decoder, sample_ids(bench))
        )
    return Cut(updates, expected, writer)


def compensation(
    bench: Bench, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]
) -> FirstPass | SecondPass:
    """What answers for each block how its kept weights change."""
    config, selection = bench.config, bench.selection
    if bench.windows_to_compensate is None:
        statistics = {(measured.block, measured.path): measured.statistics for measured in measurements}
        return FirstPass(bench.decoder, statistics, selection.compensator, seed=config.seed)
    return SecondPass(
        bench.decoder,
        bench.windows_to_compensate,
        selection.compensator,
        selection.second_pass,
        seed=config.seed,
        passage=bench.passage,
        finished=FinishedBlocks(config.resume, second_pass_key(bench, plan)) if config.resume else None,
    )


def check_recovery(bench: Bench, plan: PruningPlan, measurements: Sequence[FeedForwardMeasurement]) -> None:
    """Refuse a recovery scheduler that wants training: this version has nothing to run it with, and says so in time."""
    scored = all(CRITERION in measured.scores for measured in measurements)
    summaries = summarise(bench.decoder, measurements, CRITERION) if scored else ()
    with bench.selection.recovery.blamed("schedule()") as component:
        wanted = component.schedule(summaries, plan)
    if wanted is not None:
        raise ConfigError(f"{bench.selection.recovery} asks for training, which this version cannot run; use none.")


def second_pass_key(bench: Bench, plan: PruningPlan) -> str:
    """A hash of all that decides what the second pass answers."""
    windows = bench.windows_to_compensate
    told = {
        "plan": plan.model_dump(mode="json", exclude={"components", "versions"}),
        "components": bench.selection.describe(),
        "versions": versions(bench.selection),
        "windows": hashlib.sha256(windows.numpy().tobytes()).hexdigest() if windows is not None else None,
        "compensator": identity_of(bench.selection.compensator),
        "collectors": [identity_of(chosen) for chosen in bench.selection.second_pass],
        "numerics": numerics(bench),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def save(bench: Bench, plan: PruningPlan, made: Cut, folder: Path) -> None:
    """Write the checkpoint, or what is left of it, and the plan; the first process does."""
    with bench.progress.phase("save"):
        if bench.ranks.first:
            if made.writer is None:
                checkpoint.save_model(bench.decoder, bench.loaded, folder)
            else:
                checkpoint.save_streamed(bench.decoder, bench.loaded, made.writer, folder)
            (folder / checkpoint.PLAN_FILE).write_text(plan.to_json(), encoding="utf-8")
        bench.ranks.wait()


def reopen(bench: Bench, made: Cut, folder: Path) -> tuple[Decoder, float]:
    """Open the checkpoint as anybody would and compare: the pruned model, and the largest difference of a logit."""
    config, decoder, dtype = bench.config, bench.decoder, bench.decoder.model.dtype
    with bench.progress.phase("verify"):
        if isinstance(decoder.resident, Streamed):
            decoder.resident.close()  # its embeddings, before others come
            folder = bench.ranks.agree(folder)
            decoder = open_streamed(config, replace(bench.loaded, model=open_skeleton(folder)), bench.plugins, folder)
            return decoder, checkpoint.verify(decoder, made.expected, sample_ids(bench), dtype)
        difference = 0.0
        if bench.ranks.first:
            written = replace(decoder, model=open_model(folder, device=decoder.device))
            difference = checkpoint.verify(written, made.expected, sample_ids(bench), dtype)
        return decoder, bench.ranks.agree(difference)


def sample_ids(bench: Bench) -> Tensor:
    """Some tokens to compare logits on, ``(1, T)``: the first calibration window, or any valid ids."""
    if bench.windows is not None:
        return bench.windows[:1, bench.windows[0] != PADDING]
    vocabulary = bench.decoder.config.vocab_size
    return torch.randint(vocabulary, (1, 64), generator=torch.Generator().manual_seed(bench.config.seed))


def tell(
    bench: Bench,
    plan: PruningPlan,
    updates: Mapping[tuple[int, str], Update],
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
        device=str(decoder.device),
        processes=bench.ranks.world,
        streamed=config.stream,
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
