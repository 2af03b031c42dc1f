"""What the commands print for people: tables on stdout."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .api import Collector, Component
from .errors import ConfigError
from .plugins import Plugins, did_you_mean

if TYPE_CHECKING:
    from .evaluation import EvaluationSet, Perplexity
    from .planning import PruningPlan
    from .report import BlockReport, Report

_BAR = 24


def show_report(report: Report, out: Path | None) -> None:
    """The final table of a run."""
    console = Console()
    console.print(_block_table(report.blocks))
    console.print(_total_table(report))
    for note in report.notes:
        console.print(f"Note: {note}.", soft_wrap=True)
    seconds = "  ".join(f"{phase} {value:.1f}" for phase, value in report.seconds.items())
    console.print(f"Seconds: {seconds}   peak memory {_bytes(report.peak_memory_bytes)}", soft_wrap=True)
    if out is not None:
        console.print(f"Written to {out}; reopened, logits differ by {report.reload_difference:.2g}.", soft_wrap=True)


def show_plan(plan: PruningPlan, path: Path) -> None:
    """The widths of a plan."""
    from .report import block_reports

    console = Console()
    console.print(_block_table(block_reports(plan)))
    console.print(f"{plan.achieved_ratio:.2%} of the feed-forward channels go. Written to {path}.", soft_wrap=True)


def show_perplexities(model: str, measured: Sequence[tuple[EvaluationSet, Perplexity]]) -> None:
    """One row per data SPEC."""
    table = Table(title=model)
    for heading in ("data", "tokens a window", "windows", "perplexity", "nats/token", "bits/byte"):
        table.add_column(heading, justify="left" if heading == "data" else "right")
    for data, found in measured:
        windows, seqlen = data.windows.shape
        table.add_row(
            data.spec,
            str(seqlen),
            str(windows),
            f"{found.perplexity:.3f}",
            f"{found.nll:.4f}",
            f"{found.bits_per_byte:.4f}",
        )
    Console().print(table)


def continuations(folder: Path, prompts: Sequence[str] = ("Return the ", "The class ")) -> list[tuple[str, str]]:
    """What a checkpoint writes after some prompts."""
    from transformers import AutoTokenizer

    from .models import open_model

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


def component_rows(plugins: Plugins) -> list[dict[str, Any]]:
    """Every component of every registry."""
    return [
        _row(registry.kind, name, cls, plugins) for registry in plugins.registries for name, cls in registry.items()
    ]


def show_components(rows: Sequence[dict[str, Any]]) -> None:
    """The list of components."""
    console = Console()
    if not rows:
        console.print("No plugin offers anything. Is the package installed, and not left out with -p no:NAME?")
        return
    table = Table()
    for heading in ("kind", "name", "plugin (-p no:)", "distribution", "statistics", "summary"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        statistics = ", ".join(row["requires"]) or row.get("provides", "")
        table.add_row(row["kind"], row["name"], row["plugin"], row["distribution"] or "", statistics, row["summary"])
    console.print(table)


def component_details(plugins: Plugins, name: str) -> list[dict[str, Any]]:
    """Everything about the components called ``name``: one name may stand for a criterion and an allocator.

    Raises:
        ConfigError: nobody offers the name.
    """
    found = [
        {**_row(registry.kind, name, registry[name], plugins), **_details(registry[name])}
        for registry in plugins.registries
        if name in registry
    ]
    if not found:
        known = [known for registry in plugins.registries for known in registry]
        raise ConfigError(f"Unknown component {name!r}.{did_you_mean(name, known)}")
    return found


def show_details(found: Sequence[dict[str, Any]]) -> None:
    """Each component's description and options."""
    console = Console()
    for details in found:
        console.print(f"[bold]{details['kind']} {details['name']}[/bold]  plugin {details['plugin']}", highlight=False)
        console.print(details["description"], markup=False, highlight=False)
        console.print(
            f"statistics: {', '.join(details['requires']) or details.get('provides') or 'none'}", markup=False
        )
        console.print(f"defined in: {details['defined_in']}", markup=False, soft_wrap=True)
        if details["options"]:
            table = Table(show_edge=False)
            for heading in ("option", "type", "default", "description"):
                table.add_column(heading)
            for name, option in details["options"].items():
                table.add_row(name, option["type"], str(option["default"]), option["description"])
            console.print(table)
        console.print()


def _row(kind: str, name: str, cls: type[Component], plugins: Plugins) -> dict[str, Any]:
    origin = next(registry for registry in plugins.registries if registry.kind == kind).origin(name)
    row: dict[str, Any] = {
        "kind": kind,
        "name": name,
        "plugin": origin.plugin,
        "distribution": f"{origin.distribution} {origin.version}" if origin.distribution else None,
        "requires": sorted(statistic.name for statistic in _required(cls)),
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
    }
    if issubclass(cls, Collector):
        row["provides"] = cls.provides.name
    return row


def _required(cls: type[Component]) -> frozenset[Any]:
    """What the component requires with its default options."""
    try:
        return cls().required()
    except Exception:  # noqa: BLE001  (an option without a default, or a third party's mistake)
        return cls.requires


def _details(cls: type[Component]) -> dict[str, Any]:
    schema = cls.model_json_schema()
    return {
        "description": inspect.getdoc(cls) or "",
        "defined_in": f"{inspect.getsourcefile(cls)}:{inspect.getsourcelines(cls)[1]}",
        "options": {
            name: {
                "type": str(field.annotation).replace("typing.", "")
                if not isinstance(field.annotation, type)
                else field.annotation.__name__,
                "default": schema["properties"][name].get("default"),
                "description": field.description or "",
            }
            for name, field in cls.model_fields.items()
        },
    }


def _block_table(blocks: Sequence[BlockReport]) -> Table:
    table = Table(title="Blocks")
    for heading in ("block", "importance", "width", "kept"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for block in blocks:
        share = block.width_after / block.width_before
        importance = "" if block.importance is None else f"{block.importance:.4f}"
        bar = "█" * round(share * _BAR) + "░" * (_BAR - round(share * _BAR))
        table.add_row(
            str(block.block), importance, str(block.width_before), str(block.width_after), f"{bar} {share:4.0%}"
        )
    return table


def _total_table(report: Report) -> Table:
    table = Table(title="Totals")
    for heading in ("", "dense", "pruned", "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows: list[tuple[str, int, int, Any]] = [
        ("feed-forward channels", report.channels_before, report.channels_after, _count),
        ("parameters", report.dense.parameters, report.pruned.parameters, _count),
        ("weights", report.dense.bytes, report.pruned.bytes, _bytes),
        ("FLOPs per token", report.dense.flops_per_token, report.pruned.flops_per_token, _count),
    ]
    for name, before, after, form in rows:
        table.add_row(name, form(before), form(after), f"{after / before - 1:+.1%}")
    for found in report.evaluations:
        table.add_row(
            f"perplexity on {found.data}, {found.windows} windows of {found.seqlen}",
            f"{found.dense.perplexity:.3f}",
            f"{found.pruned.perplexity:.3f}",
            f"{found.excess_nll:+.4f} nats/token",
        )
    return table


def _count(value: int) -> str:
    return f"{value:,}"


def _bytes(value: int) -> str:
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
