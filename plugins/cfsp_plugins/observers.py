"""Log a run as lines of JSON, or to TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from cfsp_framework import (
    BlockFinished,
    Event,
    Observer,
    PhaseFinished,
    PhaseStarted,
    RunFailed,
    RunFinished,
    RunStarted,
)
from cfsp_framework.errors import ConfigError


class Jsonl(Observer):
    """Append a line of JSON to a file for every event."""

    name: ClassVar[str] = "jsonl"
    path: str = Field(default="run.jsonl", description="The file; existing lines stay.")

    def start(self) -> Callable[[Event], None]:
        path = Path(self.path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a", encoding="utf-8").close()
        except OSError as error:
            raise ConfigError(f"--observer jsonl: {path} cannot be written: {error.strerror}.") from error

        def write(event: Event) -> None:
            line = {"time": datetime.now(UTC).isoformat(), "event": type(event).__name__, **_fields(event)}
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

        return write


def _fields(event: Event) -> dict[str, Any]:
    """Return an event's fields as JSON values."""
    match event:
        case RunStarted(config):
            return {"config": config.to_json_options()}
        case PhaseStarted(phase):
            return {"phase": phase}
        case PhaseFinished(phase, seconds):
            return {"phase": phase, "seconds": round(seconds, 3)}
        case BlockFinished(phase, block, of):
            return {"phase": phase, "block": block, "of": of}
        case RunFinished(plan, report, folder):
            summary = report.model_dump(mode="json", exclude={"blocks"}) if report else None
            return {"folder": str(folder) if folder else None, "widths": plan.widths, "report": summary}
        case RunFailed(error):
            return {"error": f"{type(error).__name__}: {error}".rstrip(": ")}


class TensorBoard(Observer):
    """Write seconds of every phase, finished blocks, widths, importance and perplexities for TensorBoard."""

    name: ClassVar[str] = "tensorboard"
    folder: str = Field(default="runs", description="Every run writes a file of its own into this folder.")

    def start(self) -> Callable[[Event], None]:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            message = "--observer tensorboard needs TensorBoard: pip install 'cfsp-framework[tensorboard]'."
            raise ConfigError(message) from error
        writer: Any = SummaryWriter(self.folder)

        def write(event: Event) -> None:
            _draw(writer, event)
            if isinstance(event, RunFinished | RunFailed):
                writer.close()
            else:
                writer.flush()

        return write


def _draw(writer: Any, event: Event) -> None:
    match event:
        case RunStarted(config):
            writer.add_text("config", f"```json\n{json.dumps(config.to_json_options(), indent=2)}\n```")
        case PhaseFinished(phase, seconds):
            writer.add_scalar(f"seconds/{phase}", seconds)
        case BlockFinished(phase, block):
            writer.add_scalar(f"blocks/{phase}", block + 1, block)
        case RunFinished(plan, report, _):
            for number, entry in enumerate(plan.blocks):  # every expert of a mixture has an entry
                writer.add_scalar("kept/share", len(entry.kept) / entry.width, number)
                if entry.importance is not None:
                    writer.add_scalar("kept/importance", entry.importance, number)
            for evaluation in report.evaluations if report else ():
                name = f"perplexity/{evaluation.data.replace(':', '/')}"
                for step, measured in enumerate((evaluation.dense, evaluation.pruned, evaluation.recovered)):
                    if measured is not None:
                        writer.add_scalar(name, measured.perplexity, step)
        case RunFailed(error):
            writer.add_text("error", str(error))
        case PhaseStarted():
            pass
