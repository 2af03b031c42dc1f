"""Print results for people: tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from cfsp_framework.data.sources import shorten_spec
from cfsp_framework.runtime.atomic_files import format_bytes

if TYPE_CHECKING:
    from cfsp_framework.api.records import BlockReport, Evaluation, Perplexity, PruningPlan, RecoveryReport, Report
    from cfsp_framework.benchmark.timing import Benchmark, ModelSize, Speed
    from cfsp_framework.estimate.estimate import Estimate
    from cfsp_framework.evaluation.perplexity import EvaluationSet
    from cfsp_framework.evaluation.tasks import Metric, TaskResult, TaskResults
    from cfsp_framework.export.export import Exported
    from cfsp_framework.export.hub import Upload
    from cfsp_framework.pruning.plan_diff import BlockComparison, Comparison, Difference, Overlap


def show_report(report: Report, out: Path | None) -> None:
    """The final tables of a run."""
    console = Console(highlight=False, markup=False)
    console.print(_block_table(report.blocks, console))
    console.print(_total_table(report))
    if report.evaluations:
        console.print(_perplexity_table(report.evaluations))
    trained = [_trained(report.recovery)] if report.recovery else []
    for line in (_calibrated(report), *trained, *(f"Note: {note}." for note in report.notes), _spent(report)):
        console.print(line)
    if out is not None:
        console.print(f"Written to {out}; reopened, logits differ by {report.reload_difference:.2g}.", soft_wrap=True)


def _calibrated(report: Report) -> str:
    """What was used: components and data."""
    used = ", ".join(f"{kind} {choice.partition(':')[0]}" for kind, choice in report.components.items())
    if report.calibration is None:
        return f"Used: {used}; no data."
    return f"Used: {used}; {report.samples} windows of {report.seqlen} tokens of {shorten_spec(report.calibration)}."


def _trained(found: RecoveryReport) -> str:
    from cfsp_framework.reporting.metrics import describe_training

    return f"{describe_training(found.model_copy(update={'data': shorten_spec(found.data)}))}."


def _spent(report: Report) -> str:
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items())
    return f"Seconds: {seconds}. Peak memory: {format_bytes(report.peak_memory_bytes)}."


def _name(model: str) -> str:
    """A model's folder by its name alone; a Hub id as it is."""
    return Path(model).name if Path(model).is_dir() else model


def show_plan(plan: PruningPlan, path: Path) -> None:
    """The widths of a plan."""
    from cfsp_framework.reporting.metrics import block_reports

    console = Console(highlight=False, markup=False)
    console.print(_block_table(block_reports(plan), console))
    console.print(f"{plan.achieved_ratio:.2%} of the feed-forward channels go. Written to {path}.", soft_wrap=True)


def show_perplexities(model: str, measured: Sequence[tuple[EvaluationSet, Perplexity]]) -> None:
    """One row per data SPEC."""
    table = Table(title=f"Perplexity of {_name(model)}", title_justify="left")
    table.add_column("data", overflow="fold")
    for heading in ("windows", "perplexity", "nats/token", "bits/byte"):
        table.add_column(heading, justify="right", no_wrap=True)
    for data, found in measured:
        windows, seqlen = data.windows.shape
        table.add_row(
            shorten_spec(data.spec),
            f"{windows} x {seqlen}",
            f"{found.perplexity:.3f}",
            f"{found.nll:.4f}",
            f"{found.bits_per_byte:.4f}",
        )
    Console().print(table)


def show_estimate(found: Estimate) -> None:
    """What a run is made of, and a row for each way of running it."""
    console = Console(highlight=False, markup=False)
    console.print(_shape_table(found))
    console.print(_way_table(found))
    here = ", ".join(hardware.name for hardware in found.hardware if hardware.measured)
    console.print(
        f"{here}: rates measured just now, for a second. *: nominal rates of H100s with 80 GB times assumed shares, "
        "not measured. host: memory of each node. blocks: measuring and cutting them, without loading and saving."
    )
    for note in found.workload.notes:
        console.print(f"Note: {note}.")


def _way_table(found: Estimate) -> Table:
    table = Table(title=f"Pruning {_name(found.model)}, estimated", title_justify="left")
    for heading in ("on", "weights"):
        table.add_column(heading, no_wrap=True)
    for heading in ("blocks", "total", "host", "each GPU"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("bound by", no_wrap=True)
    for way in found.ways:
        table.add_row(
            way.hardware.partition(",")[0] + ("" if way.measured else " *"),
            "stream" if way.streamed else "memory",
            human_seconds(way.collect),
            human_seconds(way.total),
            rough_bytes(way.host_bytes),
            rough_bytes(way.device_bytes) if way.device_bytes else "",
            way.bound if way.fits else "too large",
        )
    return table


def _shape_table(found: Estimate) -> Table:
    shape, told = found.shape, found.describe()
    table = Table(title=f"{_name(found.model)} ({shape.family}, {shape.dtype})", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    for name, value in told.items():
        if isinstance(value, int) and (value or name in ("hidden_state_bytes", "gram_bytes")):
            label = (
                name.replace("_bytes", "")
                .replace("bytes", "weights")
                .replace("feed_forward", "feed-forward")
                .replace("_", " ")
            )
            table.add_row(label, format_bytes(value) if "bytes" in name else _count(value))
    return table


def human_seconds(value: float) -> str:
    """Seconds as people read them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def rough_bytes(value: int) -> str:
    """Bytes in three digits."""
    size, unit = next(
        (size, unit) for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if value >= size or unit == "MB"
    )
    number = value / size
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"


def continuations(folder: Path, prompts: Sequence[str] = ("Return the ", "The class ")) -> list[tuple[str, str]]:
    """What a checkpoint writes after some prompts."""
    from transformers import AutoTokenizer

    from cfsp_framework.modeling.loading import open_model

    model: Any = open_model(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    written = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
        written.append((prompt, tokenizer.decode(output[0], skip_special_tokens=True)))
    return written


def show_continuations(written: Sequence[tuple[str, str]]) -> None:
    """What the pruned model writes."""
    console = Console()
    for _, text in written:
        console.print(f"The pruned model writes: {' '.join(text.split())!r}", soft_wrap=True, markup=False)


def _block_table(blocks: Sequence[BlockReport], console: Console) -> Table:
    table = Table(title="Blocks", title_justify="left")
    from cfsp_framework.reporting.metrics import is_mixed, place

    mixed = is_mixed(blocks)
    for heading in ("block", *(("feed-forward",) if mixed else ()), "importance", "width", "kept", "share"):
        table.add_column(heading, justify="left" if heading == "feed-forward" else "right", no_wrap=True)
    length = min(24, console.width - 52 - (3 + max(len(place(block)) for block in blocks) if mixed else 0))
    drawn = length >= 8 and console.encoding.startswith("utf")
    if drawn:
        table.add_column("", no_wrap=True)
    for block in blocks:
        share = block.width_after / block.width_before
        importance = "" if block.importance is None else f"{block.importance:#.4g}"
        bar = "█" * round(share * length) + "░" * (length - round(share * length))
        row = [
            str(block.block),
            *([place(block)] if mixed else []),
            importance,
            str(block.width_before),
            str(block.width_after),
            f"{share:.1%}",
        ]
        table.add_row(*row, *([bar] if drawn else []))
    return table


def _total_table(report: Report) -> Table:
    table = Table(title=f"Totals of {_name(report.model)} ({report.family}, {report.dtype})", title_justify="left")
    table.add_column("")
    for heading in ("dense", "pruned", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows: list[tuple[str, int, int, Any]] = [
        ("feed-forward channels", report.channels_before, report.channels_after, _count),
        ("parameters", report.dense.parameters, report.pruned.parameters, _count),
        ("weights", report.dense.bytes, report.pruned.bytes, format_bytes),
        ("FLOPs per token", report.dense.flops_per_token, report.pruned.flops_per_token, _count),
    ]
    for name, before, after, form in rows:
        table.add_row(name, form(before), form(after), f"{after / before - 1:+.1%}")
    return table


def _perplexity_table(evaluations: Sequence[Evaluation]) -> Table:
    table = Table(title="Perplexity", title_justify="left")
    table.add_column("data", overflow="fold")
    dense = any(found.dense for found in evaluations)
    recovered = any(found.recovered for found in evaluations)
    known = (*(("dense",) if dense else ()), "pruned", *(("recovered",) if recovered else ()))
    for heading in ("windows", *known, "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for found in evaluations:
        perplexities = [getattr(found, name) for name in known]
        table.add_row(
            shorten_spec(found.data),
            f"{found.windows} x {found.seqlen}",
            *(f"{one.perplexity:.3f}" if one else "" for one in perplexities),
            f"{found.change:+.4f} nats/token",
        )
    return table


def _count(value: int) -> str:
    return f"{value:,}"


_LONG = 16
"""Letters from which on a hash is cut; what is left tells two apart."""
_COLUMNS: tuple[tuple[str, Callable[[Overlap], str]], ...] = (
    ("width", lambda one: str(one.width)),
    ("A", lambda one: str(one.first)),
    ("B", lambda one: str(one.second)),
    ("both", lambda one: str(one.both)),
    ("only A", lambda one: str(one.only_first)),
    ("only B", lambda one: str(one.only_second)),
    ("overlap", lambda one: f"{one.jaccard:.3f}"),
)


def show_comparison(found: Comparison) -> None:
    """The blocks with a total, what else differs, and what it means. Without boxes, so that ten columns fit."""
    console = Console(highlight=False, markup=False)
    console.print(f"A: {found.first}\nB: {found.second}", soft_wrap=True)
    console.print(_comparison_table(found))
    if found.differences:
        console.print(_difference_table(found.differences))
    for note in found.notes:
        console.print(f"Note: {note}.")
    console.print(_verdict(found))


def _comparison_table(found: Comparison) -> Table:
    mixed = len({one.block for one in found.blocks}) < len(found.blocks) or any(b.experts > 1 for b in found.blocks)
    ranked = any(one.importance_first is not None or one.importance_second is not None for one in found.blocks)
    table = Table(title="Channels kept", title_justify="left", show_footer=True, box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("block", "all", justify="right", no_wrap=True)
    if mixed:
        table.add_column("feed-forward", overflow="fold")
    for heading, render in _COLUMNS:
        table.add_column(heading, render(found.total), justify="right", no_wrap=True)
    if ranked:
        for heading in ("imp. A", "imp. B"):
            table.add_column(heading, justify="right", no_wrap=True)
    for one in found.blocks:
        place = [f"{one.path} x {one.experts}" if one.experts > 1 else one.path] if mixed else []
        table.add_row(
            str(one.block), *place, *(render(one) for _, render in _COLUMNS), *(_importance(one) if ranked else [])
        )
    return table


def _importance(one: BlockComparison) -> list[str]:
    return ["" if value is None else f"{value:.3g}" for value in (one.importance_first, one.importance_second)]


def _difference_table(differences: tuple[Difference, ...]) -> Table:
    table = Table(title="What else differs", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for heading in ("A", "B"):
        table.add_column(heading, overflow="fold")
    for one in differences:
        cut = one.name.endswith("fingerprint")
        table.add_row(one.name, *((value or "")[: _LONG if cut else None] for value in (one.first, one.second)))
    return table


def _verdict(found: Comparison) -> str:
    if found.same_cut:
        return "Both plans make the same cut."
    changed = sum(one.only_first + one.only_second > 0 for one in found.blocks)
    total = found.total
    return (
        f"The plans differ in {changed} of {len(found.blocks)} feed-forwards; of the channels either keeps, both keep "
        f"{total.jaccard:.1%}, where chance would give {total.chance:.1%}."
    )


def show_tasks(model: str, found: TaskResults) -> None:
    """A row for each task, their mean, and what else somebody needs to get the same numbers."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"Tasks of {_name(model)}", title_justify="left")
    table.add_column("task", overflow="fold", min_width=12)
    for heading in ("version", "shots", "docs", "acc", "acc_norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.tasks:
        table.add_row(
            one.task, one.version, str(one.fewshot), f"{one.samples:,}", _scored(one.acc), _scored(one.acc_norm)
        )
    if len(found.tasks) > 1 and found.mean_acc is not None and found.mean_acc_norm is not None:
        table.add_section()
        table.add_row("mean", "", "", "", f"{found.mean_acc:.4f}", f"{found.mean_acc_norm:.4f} *")
    console.print(table)
    for one in found.tasks:
        if others := _others(one):
            console.print(f"{one.task}: {others}.")
    starred = " *: acc where a task has no acc_norm." if len(found.tasks) > 1 else ""
    console.print(f"In brackets: standard errors. shots: examples in a prompt.{starred}")
    for one in found.tasks:
        if one.note:
            console.print(f"Note: {one.task}: {one.note}, not as the Hub's data give them.")
    bos = "with" if found.bos else "without"
    limit = "" if found.limit is None else f", the first {found.limit} documents of each task"
    console.print(f"lm-eval {found.harness}{limit}; prompts {bos} a beginning-of-sequence token, no chat template.")


def _scored(metric: Metric | None) -> str:
    if metric is None:
        return ""
    return f"{metric.value:.4f}" if metric.stderr is None else f"{metric.value:.4f} ({metric.stderr:.3f})"


def _others(one: TaskResult) -> str:
    """The metrics that have no column of their own."""
    rest = {name: metric for name, metric in one.metrics.items() if name not in ("acc", "acc_norm")}
    return ", ".join(f"{name} {metric.value:.4g}" for name, metric in rest.items())


def show_benchmark(found: Benchmark, plot: Path | None = None) -> None:
    """What the models are, and a row for each phase, setting and model."""
    console = Console(highlight=False, markup=False)
    console.print(_model_table(found))
    for name in dict.fromkeys(one.phase for one in found.speeds):
        console.print(_speed_table(name, [one for one in found.speeds if one.phase == name], len(found.models) > 1))
    console.print(
        f"{found.device}, {found.threads} thread{'s'[: found.threads > 1]}, {found.dtype}: {found.flops_per_second / 1e9:,.0f} GFLOP/s and "
        f"{found.bytes_per_second / 1e9:,.1f} GB/s in products just now."
    )
    clock = "" if found.workload.clock == "wall" else " Processor seconds, not those on the wall."
    console.print(f"±: half of what lies between the quartiles of the rounds.{clock}")
    if len(found.models) > 1:
        console.print(
            "speed-up: median over rounds in which the models run in turn. ideal: if only products (FLOPs) or reading "
            "the weights (bytes) took time; the bound one is named. reached: the share of it that was measured."
        )
    weights = ", random weights" if found.random_weights else ""
    memory = "" if found.memory == "not measured" else f" peak: weights and what a run adds, {found.memory}."
    console.print(f"{found.workload.repeats} rounds, {found.workload.cache} cache{weights}.{memory}")
    if plot:
        console.print(f"Drawn into {plot}.", soft_wrap=True)


def _model_table(found: Benchmark) -> Table:
    table = Table(title="Models", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", overflow="fold", min_width=8)
    for heading in ("parameters", "weights", "MFLOPs/token", "widths", "peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found.models:
        table.add_row(
            one.name,
            f"{one.parameters:,}",
            format_bytes(one.bytes),
            f"{one.flops_per_token / 1e6:,.1f}",
            _widths(one),
            "" if one.peak_bytes is None else format_bytes(one.peak_bytes),
        )
    return table


def _widths(one: ModelSize) -> str:
    if one.widths == 1:
        return str(one.least_width)
    return f"{one.least_width} to {one.most_width}"


def _speed_table(phase: str, speeds: Sequence[Speed], compared: bool) -> Table:
    unit = "a prompt" if phase == "prefill" else "a token of each sequence"
    table = Table(
        title=f"{phase.capitalize()}, milliseconds for {unit}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("batch", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=8)
    for heading in ("ms", "±", "tokens/s", *(("speed-up", "ideal", "reached") if compared else ())):
        table.add_column(heading, justify="right", no_wrap=True)
    before = None
    for one in speeds:
        setting = f"{one.batch_size} x {one.length}"
        seconds = one.seconds
        row = [
            setting if setting != before else "",
            one.model,
            _milliseconds(seconds.median),
            f"{(seconds.high - seconds.low) / 2 / seconds.median:.0%}",
            f"{one.tokens_per_second:,.0f}" if one.tokens_per_second >= 100 else f"{one.tokens_per_second:.1f}",
        ]
        if one.speed_up and one.ideal and one.reached is not None:
            row += [f"{one.speed_up.median:.2f}", f"{one.ideal.expected:.2f} {one.ideal.bound}", f"{one.reached:.0%}"]
        table.add_row(*row)
        before = setting
    return table


def _milliseconds(seconds: float) -> str:
    value = 1000 * seconds
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def show_upload(upload: Upload) -> None:
    """The files, what was checked, and what the card tells the Hub."""
    console = Console(highlight=False, markup=False)
    table = Table(title=f"To {upload.repository}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("file", overflow="fold")
    table.add_column("bytes", justify="right", no_wrap=True)
    for file in upload.files:
        table.add_row(file.name, f"{file.bytes:,}")
    table.add_section()
    table.add_row(f"{len(upload.files)} files", f"{upload.bytes:,}")
    console.print(table)
    if upload.left_out:
        console.print(f"Left out: {', '.join(upload.left_out)}.", soft_wrap=True)
    for check in upload.checks:
        console.print(f"{check.outcome:6}  {check.what}: {check.detail}", soft_wrap=True)
    told = [f"{key} {_value(upload.card[key])}" for key in _CARD_KEYS if upload.card.get(key)]
    console.print(f"card: {'; '.join(told)}", soft_wrap=True)
    if upload.url:
        console.print(f"Uploaded: {upload.url}", soft_wrap=True)
    else:
        console.print(f"Nothing was uploaded. Commit message: {upload.message}", soft_wrap=True)


_CARD_KEYS = ("base_model", "base_model_relation", "license", "license_name", "language", "datasets", "tags")


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def show_export(made: Exported) -> None:
    """A few lines on what was written."""
    from cfsp_framework.export.export import spread

    console = Console(highlight=False, markup=False)
    before, after = spread(made.widths), spread(made.written_widths)
    widths = f"widths {before}" if before == after else f"widths {before} became {after}"
    named = f" (architecture {made.architecture})" if made.architecture else ""
    console.print(
        f"Written to {made.path}: {made.format}{named}, {widths}, {format_bytes(made.bytes)}.", soft_wrap=True
    )
    if made.difference is not None:
        found = "bit-equal to the pruned model's" if made.difference == 0 else f"off by {made.difference:.2g} at most"
        console.print(f"Opened again: logits are {found}.")
    for note in made.notes:
        console.print(f"Note: {note}.", soft_wrap=True)
