"""Print results as tables on stdout."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from cfsp_framework.data.sources import shorten_spec
from cfsp_framework.runtime.atomic_files import format_bytes

if TYPE_CHECKING:
    from cfsp_framework.api.records import BlockReport, Evaluation, Perplexity, PruningPlan, Report
    from cfsp_framework.benchmark.timing import BenchmarkReport, Speed
    from cfsp_framework.estimate.estimate import Estimate
    from cfsp_framework.evaluation.perplexity import EvaluationSet
    from cfsp_framework.evaluation.tasks import Metric, TaskResults
    from cfsp_framework.export.export import Exported
    from cfsp_framework.export.hub import Upload
    from cfsp_framework.pruning.plan_diff import Comparison, Overlap

_HASH_LETTERS = 16
"""Letters of a hash that are shown; they distinguish two hashes."""


def make_table(
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    text: Collection[str] = (),
    total: Sequence[str] | None = None,
    compact: bool = False,
) -> Table:
    """Make a table of numbers, aligned to the right, in which the columns named in ``text`` may wrap.

    ``total`` is a last row below a rule. ``compact`` draws no boxes, so that ten columns fit 80 characters.
    """
    style: dict[str, Any] = {"box": box.SIMPLE, "padding": (0, 1, 0, 0), "pad_edge": False} if compact else {}
    table = Table(title=title, title_justify="left", **style)
    for heading in headings:
        if heading in text:
            table.add_column(heading, overflow="fold", min_width=8)
        else:
            table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if total:
        table.add_section()
        table.add_row(*total)
    return table


def _print(*parts: Table | str) -> None:
    """Print tables, and sentences wrapped at the width of the terminal."""
    console = Console(highlight=False, markup=False)
    for part in parts:
        console.print(part)


def _print_line(line: str) -> None:
    """Print a line that holds a path or an address, uncut."""
    Console(highlight=False, markup=False).print(line, soft_wrap=True)


def _notes(notes: Iterable[str]) -> list[str]:
    return [f"Note: {note}." for note in notes]


def _name(model: str) -> str:
    """Return the last part of a model's folder; a Hub id unchanged."""
    return Path(model).name if Path(model).is_dir() else model


# --- numbers ----------------------------------------------------------------------------------------------------------


def human_seconds(value: float) -> str:
    """Format seconds with the unit that suits them."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if value >= 2 * size:
            return f"{value / size:.1f} {unit}"
    return f"{value:.1f} s"


def rough_bytes(value: int) -> str:
    """Format bytes with three digits."""
    unit, size = next(((unit, size) for unit, size in (("TB", 1e12), ("GB", 1e9)) if value >= size), ("MB", 1e6))
    return f"{_three_digits(value / size)} {unit}"


def _three_digits(number: float) -> str:
    return f"{number:.{2 if number < 10 else 1 if number < 100 else 0}f}"


def _count(value: int) -> str:
    return f"{value:,}"


# --- prune, plan and recover ------------------------------------------------------------------------------------------


def show_report(report: Report, out: Path | None) -> None:
    """Print widths, sizes, perplexities and times of a run; ``out`` is the folder that was written, if it is kept."""
    from cfsp_framework.reporting.metrics import describe_training

    used = ", ".join(f"{kind} {choice.partition(':')[0]}" for kind, choice in report.components.items())
    data = f"{report.samples} windows of {report.seqlen} tokens of {shorten_spec(report.calibration or '')}"
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items())
    recovery = report.recovery
    _print(
        _block_table(report.blocks),
        _total_table(report),
        *([_evaluation_table(report.evaluations)] if report.evaluations else []),
        f"Used: {used}; {'no calibration data' if report.calibration is None else data}.",
        *(
            [f"{describe_training(recovery.model_copy(update={'data': shorten_spec(recovery.data)}))}."]
            if recovery
            else []
        ),
        *_notes(report.notes),
        f"Seconds: {seconds}. Peak memory: {format_bytes(report.peak_memory_bytes)}.",
    )
    if out is not None:
        _print_line(f"Written to {out}; reopened, logits differ by {report.reload_difference:.2g}.")


def show_plan(plan: PruningPlan, path: Path) -> None:
    """Print the widths of a plan that was written to ``path``."""
    from cfsp_framework.reporting.metrics import block_reports

    _print(_block_table(block_reports(plan)))
    _print_line(f"{plan.achieved_ratio:.2%} of the feed-forward channels are removed. Written to {path}.")


def _block_table(blocks: Sequence[BlockReport]) -> Table:
    """Make a table of the width of each feed-forward, with bars where there is room for them."""
    from cfsp_framework.reporting.metrics import describe_feed_forward, is_mixed

    console, mixed = Console(), is_mixed(blocks)
    length = min(
        24, console.width - 52 - (3 + max(len(describe_feed_forward(block)) for block in blocks) if mixed else 0)
    )
    drawn = length >= 8 and console.encoding.startswith("utf")
    ranked = any(block.importance is not None for block in blocks)
    names = (["feed-forward"] if mixed else []) + (["importance"] if ranked else [])
    headings = ["block", *names, "width", "kept", "share"]
    rows = []
    for block in blocks:
        share = block.width_after / block.width_before
        bar = "█" * round(share * length) + "░" * (length - round(share * length))
        importance = "" if block.importance is None else f"{block.importance:#.4g}"
        widths = str(block.width_before), str(block.width_after), f"{share:.1%}"
        rows.append(
            [
                str(block.block),
                *([describe_feed_forward(block)] if mixed else []),
                *([importance] if ranked else []),
                *widths,
                *([bar] if drawn else []),
            ]
        )
    return make_table("Blocks", [*headings, *([""] if drawn else [])], rows, text=("feed-forward",))


def _total_table(report: Report) -> Table:
    dense, pruned = report.dense, report.pruned
    sizes: list[tuple[str, int, int, Callable[[int], str]]] = [
        ("feed-forward channels", report.channels_before, report.channels_after, _count),
        ("parameters", dense.parameters, pruned.parameters, _count),
        ("weights", dense.bytes, pruned.bytes, format_bytes),
        ("FLOPs per token", dense.flops_per_token, pruned.flops_per_token, _count),
    ]
    rows = [(name, form(before), form(after), f"{after / before - 1:+.1%}") for name, before, after, form in sizes]
    title = f"Totals of {_name(report.model)} ({report.family}, {report.dtype})"
    return make_table(title, ("", "dense", "pruned", "change"), rows, text=("",))


def _evaluation_table(evaluations: Sequence[Evaluation]) -> Table:
    models = [name for name in ("dense", "pruned", "recovered") if any(getattr(each, name) for each in evaluations)]
    rows = []
    for evaluation in evaluations:
        perplexities: list[Perplexity | None] = [getattr(evaluation, name) for name in models]
        values = [f"{value.perplexity:.3f}" if value else "" for value in perplexities]
        windows = f"{evaluation.windows} x {evaluation.seqlen}"
        rows.append([shorten_spec(evaluation.data), windows, *values, f"{evaluation.change:+.4f} nats/token"])
    return make_table("Perplexity", ("data", "windows", *models, "change"), rows, text=("data",))


# --- estimate ---------------------------------------------------------------------------------------------------------


def show_estimate(estimate: Estimate) -> None:
    """Print the size of a run, and time and memory for each way to run it."""
    here = ", ".join(hardware.name for hardware in estimate.hardware if hardware.measured)
    ways = [
        (
            way.hardware.partition(",")[0] + ("" if way.measured else " *"),
            "stream" if way.streamed else "memory",
            human_seconds(way.collect),
            human_seconds(way.total),
            rough_bytes(way.host_bytes),
            rough_bytes(way.device_bytes) if way.device_bytes else "",
            way.bound if way.fits else "too large",
        )
        for way in estimate.ways
    ]
    shape, name = estimate.shape, _name(estimate.model)
    sizes = [
        (_label(key), format_bytes(value) if "bytes" in key else _count(value))
        for key, value in estimate.describe().items()
        if isinstance(value, int) and (value or key in ("hidden_state_bytes", "gram_bytes"))
    ]
    headings = ("on", "weights", "blocks", "total", "host", "each GPU", "bound by")
    _print(
        make_table(f"{name} ({shape.family}, {shape.dtype})", ("size", "value"), sizes, text=("size",)),
        make_table(f"Pruning {name}, estimated", headings, ways, text=("on", "weights", "bound by")),
        f"{here}: rates measured for about a second. *: nominal rates of H100 GPUs with 80 GB times assumed "
        "efficiencies, not measured. host: memory of each node. blocks: measuring and cutting them, without loading "
        "and saving.",
        *_notes(estimate.workload.notes),
    )


_LABELS = {
    "read_bytes_per_block": "stored weights per block",
    "flops_per_token": "FLOPs per token in the blocks, with attention",
    "hidden_state_bytes": "hidden states of all windows",
    "activation_bytes_cpu": "activations of a batch, CPU",
    "activation_bytes_gpu": "activations of a batch, GPU",
    "gram_bytes": "Gram matrices of a block",
    "written_bytes": "weights written",
}


def _label(key: str) -> str:
    if key in _LABELS:
        return _LABELS[key]
    for part, word in (("_bytes", ""), ("bytes", "weights"), ("feed_forward", "feed-forward"), ("_", " ")):
        key = key.replace(part, word)
    return key


# --- compare ----------------------------------------------------------------------------------------------------------


def show_comparison(comparison: Comparison) -> None:
    """Print the overlap of two plans by block and in total, and the settings that differ."""
    blocks, total = comparison.blocks, comparison.total
    mixed = len({block.block for block in blocks}) < len(blocks) or any(block.experts > 1 for block in blocks)
    ranked = any(block.importance_first is not None or block.importance_second is not None for block in blocks)
    rows = []
    for block in blocks:
        place = f"{block.path} x {block.experts}" if block.experts > 1 else block.path
        importance = ("" if v is None else f"{v:.3g}" for v in (block.importance_first, block.importance_second))
        rows.append([str(block.block), *([place] if mixed else []), *_overlap(block), *(importance if ranked else ())])
    headings = ["block", *(["feed-forward"] if mixed else []), "width", "A", "B", "both", "only A", "only B", "overlap"]
    headings += ["imp. A", "imp. B"] if ranked else []
    last = ["all", *([""] if mixed else []), *_overlap(total)]
    differences = []
    for difference in comparison.differences:
        letters = _HASH_LETTERS if difference.name.endswith("fingerprint") else None
        values = [(value or "")[:letters] for value in (difference.first, difference.second)]
        differences.append([difference.name, *values])
    names = ("setting", "A", "B")
    _print_line(f"A: {comparison.first}\nB: {comparison.second}")
    _print(
        make_table("Channels kept", headings, rows, text=("feed-forward",), total=last, compact=True),
        *([make_table("Settings that differ", names, differences, text=names, compact=True)] if differences else []),
        *_notes(comparison.notes),
    )
    changed = sum(block.only_first + block.only_second > 0 for block in blocks)
    _print(
        "Both plans make the same cut."
        if comparison.same_cut
        else f"The plans differ in {changed} of {len(blocks)} feed-forwards; of the channels that either plan keeps, "
        f"both keep {total.jaccard:.1%}; random plans would share {total.chance:.1%}."
    )


def _overlap(overlap: Overlap) -> list[str]:
    counts = overlap.width, overlap.first, overlap.second, overlap.both, overlap.only_first, overlap.only_second
    return [*map(str, counts), f"{overlap.jaccard:.3f}"]


# --- evaluate ---------------------------------------------------------------------------------------------------------


def show_perplexities(model: str, measured: Sequence[tuple[EvaluationSet, Perplexity]]) -> None:
    """Print the perplexity on each data SPEC."""
    rows = []
    for data, result in measured:
        windows, seqlen = data.windows.shape
        values = f"{result.perplexity:.3f}", f"{result.nll:.4f}", f"{result.bits_per_byte:.4f}"
        rows.append((shorten_spec(data.spec), f"{windows} x {seqlen}", *values))
    headings = ("data", "windows", "perplexity", "nats/token", "bits/byte")
    _print(make_table(f"Perplexity of {_name(model)}", headings, rows, text=("data",)))


def show_tasks(model: str, results: TaskResults) -> None:
    """Print the scores of each task, their means, and the settings needed to reproduce them."""
    rows = [
        (task.task, task.version, str(task.fewshot), _count(task.samples), _format(task.acc), _format(task.acc_norm))
        for task in results.tasks
    ]
    acc, acc_norm, several = results.mean_acc, results.mean_acc_norm, len(results.tasks) > 1
    mean = None if acc is None or acc_norm is None else ("mean", "", "", "", f"{acc:.4f}", f"{acc_norm:.4f} *")
    others = []
    for task in results.tasks:
        rest = [(name, metric) for name, metric in task.metrics.items() if name not in ("acc", "acc_norm")]
        if rest:
            others.append(f"{task.task}: {', '.join(f'{name} {metric.value:.4g}' for name, metric in rest)}.")
    headings = ("task", "version", "shots", "docs", "acc", "acc_norm")
    title = f"Tasks of {_name(model)}"
    limit = "" if results.limit is None else f", the first {results.limit} documents of each task"
    _print(
        make_table(title, headings, rows, text=("task",), total=mean if several else None),
        *others,
        "In brackets: standard errors. shots: examples in a prompt."
        + (" *: acc for a task without acc_norm." if several else ""),
        *_notes(f"{task.task}: {task.note}, not as in the Hub's data" for task in results.tasks if task.note),
        f"lm-eval {results.harness}{limit}; prompts {'with' if results.bos else 'without'} a beginning-of-sequence "
        "token, no chat template.",
    )


def _format(metric: Metric | None) -> str:
    error = "" if metric is None or metric.stderr is None else f" ({metric.stderr:.3f})"
    return "" if metric is None else f"{metric.value:.4f}{error}"


# --- benchmark --------------------------------------------------------------------------------------------------------


def show_benchmark(report: BenchmarkReport, plot: Path | None = None) -> None:
    """Print the sizes of the models, and their speed in each phase and setting."""
    compared, settings = len(report.models) > 1, report.workload
    explanation = (
        "speed-up: median over rounds in which the models run in turn. ideal: if only products (FLOPs) or reading the "
        "weights (bytes) took time, with the one that bounds. reached: measured share of the ideal."
    )
    models = [
        (
            model.name,
            _count(model.parameters),
            format_bytes(model.bytes),
            f"{model.flops_per_token / 1e6:,.1f}",
            f"{model.least_width} to {model.most_width}" if model.widths > 1 else str(model.least_width),
            "" if model.peak_bytes is None else format_bytes(model.peak_bytes),
        )
        for model in report.models
    ]
    headings = ("model", "parameters", "weights", "MFLOPs/token", "widths", "peak")
    weights = ", random weights" if report.random_weights else ""
    memory = "" if report.memory == "not measured" else f" peak: weights and what a run adds, {report.memory}."
    _print(
        make_table("Models", headings, models, text=("model",), compact=True),
        *(
            _speed_table(phase, [speed for speed in report.speeds if speed.phase == phase], compared)
            for phase in dict.fromkeys(speed.phase for speed in report.speeds)
        ),
        f"{report.device}, {report.threads} thread{'s'[: report.threads > 1]}, {report.dtype}: "
        f"{report.flops_per_second / 1e9:,.0f} GFLOP/s and {report.bytes_per_second / 1e9:,.1f} GB/s, measured in "
        "matrix products.",
        "±: half of the interquartile range of the rounds."
        + ("" if settings.clock == "wall" else " Seconds are processor seconds."),
        *([explanation] if compared else []),
        f"{settings.repeats} rounds, {settings.cache} cache{weights}.{memory}",
    )
    if plot:
        _print_line(f"Plotted into {plot}.")


def _speed_table(phase: str, speeds: Sequence[Speed], compared: bool) -> Table:
    rows, last_setting = [], None
    for speed in speeds:
        setting, seconds = f"{speed.batch_size} x {speed.length}", speed.seconds
        rate = speed.tokens_per_second
        row = [
            setting if setting != last_setting else "",
            speed.model,
            _three_digits(1000 * seconds.median),
            f"{(seconds.high - seconds.low) / 2 / seconds.median:.0%}",
            f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}",
        ]
        if speed.speed_up and speed.ideal and speed.reached is not None:
            ideal = f"{speed.ideal.expected:.2f} {speed.ideal.bound}"
            row += [f"{speed.speed_up.median:.2f}", ideal, f"{speed.reached:.0%}"]
        rows.append(row)
        last_setting = setting
    headings = ("batch", "model", "ms", "±", "tokens/s", *(("speed-up", "ideal", "reached") if compared else ()))
    unit = "a prompt" if phase == "prefill" else "a token of each sequence"
    return make_table(f"{phase.capitalize()}, milliseconds for {unit}", headings, rows, text=("model",), compact=True)


# --- export and push --------------------------------------------------------------------------------------------------


def show_export(exported: Exported) -> None:
    """Print what an export wrote and how near it is to the pruned model."""
    from cfsp_framework.export.export import format_range

    before, after = format_range(exported.widths), format_range(exported.written_widths)
    widths = f"widths {before}" if before == after else f"widths {before} became {after}"
    architecture = f" (architecture {exported.architecture})" if exported.architecture else ""
    size = format_bytes(exported.bytes)
    _print_line(f"Written to {exported.path}: {exported.format}{architecture}, {widths}, {size}.")
    if exported.difference is not None:
        equal = "bit-equal to the pruned model's"
        _print(f"Reopened: logits {f'differ by {exported.difference:.2g} at most' if exported.difference else equal}.")
    for note in _notes(exported.notes):
        _print_line(note)


def show_upload(upload: Upload) -> None:
    """Print the files of an upload, the checks, and the metadata of the model card."""
    rows = [(file.name, _count(file.bytes)) for file in upload.files]
    total = f"{len(rows)} files", _count(upload.bytes)
    _print(make_table(f"To {upload.repository}", ("file", "bytes"), rows, text=("file",), total=total, compact=True))
    if upload.left_out:
        _print_line(f"Not uploaded: {', '.join(upload.left_out)}.")
    for check in upload.checks:
        _print_line(f"{check.outcome:6}  {check.what}: {check.detail}")
    keys = ("base_model", "base_model_relation", "license", "license_name", "language", "datasets", "tags")
    card = [(key, value if isinstance(value, list) else [value]) for key in keys if (value := upload.card.get(key))]
    _print_line(f"card: {'; '.join(f'{key} ' + ', '.join(map(str, values)) for key, values in card)}")
    status = f"Uploaded: {upload.url}" if upload.url else f"Nothing was uploaded. Commit message: {upload.message}"
    _print_line(status)
