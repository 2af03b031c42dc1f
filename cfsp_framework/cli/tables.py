"""What the commands print for people: tables on stdout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from cfsp_framework.runtime.atomic_files import human_bytes

if TYPE_CHECKING:
    from cfsp_framework.estimate.estimate import Estimate
    from cfsp_framework.evaluation.perplexity import EvaluationSet, Perplexity
    from cfsp_framework.pruning.planning import PruningPlan
    from cfsp_framework.reporting.metrics import BlockReport, Evaluation, RecoveryReport, Report


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
    return f"Used: {used}; {report.samples} windows of {report.seqlen} tokens of {short(report.calibration)}."


def _trained(found: RecoveryReport) -> str:
    from cfsp_framework.reporting.metrics import describe_training

    return f"{describe_training(found.model_copy(update={'data': short(found.data)}))}."


def _spent(report: Report) -> str:
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items())
    return f"Seconds: {seconds}. Peak memory: {human_bytes(report.peak_memory_bytes)}."


def short(spec: str) -> str:
    """A data SPEC as a table can hold it: files by their names alone."""
    if spec.startswith("hf:"):
        return spec
    return ",".join(part.rstrip("/").rpartition("/")[2] for part in spec.split(","))


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
            short(data.spec),
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
            table.add_row(label, human_bytes(value) if "bytes" in name else _count(value))
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
        ("weights", report.dense.bytes, report.pruned.bytes, human_bytes),
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
            short(found.data),
            f"{found.windows} x {found.seqlen}",
            *(f"{one.perplexity:.3f}" if one else "" for one in perplexities),
            f"{found.change:+.4f} nats/token",
        )
    return table


def _count(value: int) -> str:
    return f"{value:,}"
