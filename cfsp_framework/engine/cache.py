"""Cache of a collection's measurements, block by block: a killed run goes on, and another ratio needs no forward."""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cfsp_framework.api.components import Component
from cfsp_framework.api.data import BlockStatistics, Statistic
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import Batch
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.runtime.atomic_files import save_tensors
from cfsp_framework.runtime.distributed import SOLO, Ranks

HIDDEN_SHARE = 0.05
"""Largest share of the time that may go into writing hidden states."""
_BYTES_PER_SECOND = 2e8
"""Writing speed assumed before one was measured."""
_INCOMPLETE = (FileNotFoundError, SafetensorError, KeyError, ValueError)
"""Errors of reading a file that was not written, or not completely."""


class MeasurementCache:
    """Keep the measurements of finished blocks, and the hidden states after one of them, in a folder under a key.

    The key is a hash of everything that decides a measurement: another model, data, seed, plugin or option has another
    folder. Hidden states are written so rarely that it costs less than ``share`` of the time. A block that lacks scores
    under one of the ``labels`` counts as unfinished.
    """

    def __init__(
        self,
        folder: Path,
        key: str,
        ranks: Ranks = SOLO,
        share: float = HIDDEN_SHARE,
        labels: frozenset[str] = frozenset(),
    ) -> None:
        self._labels = labels
        self._folder = folder / f"collection-{key[:32]}"
        self._ranks = ranks
        self._share = share
        self._hidden = self._folder / f"hidden_{ranks.rank}.safetensors"
        self._since = time.monotonic()
        self._cost: float | None = None
        self._count = 0
        self._measured = 0

    def load(self, count: int) -> Sequence[list[FeedForwardMeasurement]]:
        """Return the measurements of the first blocks of ``count``, up to the first that is missing."""
        self._count = count
        blocks: list[list[FeedForwardMeasurement]] = []
        while self._ranks.first and len(blocks) < count:
            block = _read(self._path(len(blocks)), len(blocks))
            if block is None or any(not self._labels <= measurement.scores.keys() for measurement in block):
                break
            blocks.append(block)
        blocks = self._ranks.agree(blocks)
        self._measured = len(blocks)
        if self._measured == count:
            self._hidden.unlink(missing_ok=True)  # of a run that was killed when it had measured everything
        return blocks

    def resume(self, batches: Sequence[Batch]) -> int:
        """Load the kept hidden states into ``batches`` and return the block they enter; 0 if there are none.

        Hidden states that are incomplete, or that enter a block behind one that must be measured, are not used.
        """
        self._since = time.monotonic()
        try:
            with safe_open(self._hidden, framework="pt") as file:
                entering = int((file.metadata() or {})["entering"])
                shapes = [file.get_slice(str(number)).get_shape() for number in range(len(batches))]
                if entering > self._measured or shapes != [list(batch.hidden.shape) for batch in batches]:
                    return 0
                for number, batch in enumerate(batches):
                    batch.hidden.copy_(file.get_tensor(str(number)))
        except _INCOMPLETE:
            return 0
        return entering

    def store(self, index: int, measurements: list[FeedForwardMeasurement], batches: Sequence[Batch]) -> None:
        """Keep the measurements of block ``index``, and the hidden states after it if that is cheap enough."""
        if self._ranks.first:
            _write(self._path(index), measurements)
        if batches and index + 1 < self._count and self._ranks.agree(self._is_cheap(batches)):
            start = time.monotonic()
            tensors = {str(number): batch.hidden.contiguous().cpu() for number, batch in enumerate(batches)}
            save_tensors(self._hidden, tensors, {"entering": str(index + 1)})
            self._since = time.monotonic()
            self._cost = self._since - start
        elif index + 1 == self._count:
            self._hidden.unlink(missing_ok=True)

    def replace(self, index: int, measurements: Sequence[FeedForwardMeasurement]) -> None:
        """Keep more measurements of block ``index``, which is finished."""
        if self._ranks.first:
            _write(self._path(index), measurements)

    def _is_cheap(self, batches: Sequence[Batch]) -> bool:
        size = sum(batch.hidden.numel() * batch.hidden.element_size() for batch in batches)
        cost = size / _BYTES_PER_SECOND if self._cost is None else self._cost
        return cost <= self._share * (time.monotonic() - self._since)

    def _path(self, index: int) -> Path:
        return self._folder / f"block_{index}.safetensors"


def identity_of(configured: ConfiguredComponent[Component]) -> dict[str, str]:
    """Return what decides how a component behaves: its options, the version of its distribution, its source."""
    component = configured.component
    source = inspect.getsourcefile(type(component))
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source and Path(source).exists() else ""
    return {
        "name": f"{component.kind}:{component.name}",
        "options": component.model_dump_json(),
        "distribution": f"{configured.origin.distribution} {configured.origin.version}",
        "source": digest,
    }


def _write(path: Path, measurements: Sequence[FeedForwardMeasurement]) -> None:
    tensors: dict[str, Tensor] = {}
    headers: list[dict[str, object]] = []
    for number, measurement in enumerate(measurements):
        statistics = measurement.statistics
        # Cloned: some are the same tensors, such as experts' statistics of their block; safetensors refuses those.
        tensors |= {f"{number}/statistics/{s.name}": value.clone() for s, value in statistics.items()}
        tensors |= {f"{number}/scores/{label}": value.clone() for label, value in measurement.scores.items()}
        tensors |= {f"{number}/curves/{label}": value.clone() for label, value in measurement.curves.items()}
        headers.append(
            {
                "path": measurement.path,
                "width": measurement.width,
                "tokens": 0 if statistics.unseen else statistics.tokens,
                "held_out": statistics.held_out_tokens,
                "sensitivities": dict(measurement.sensitivities),
            }
        )
    save_tensors(path, tensors, {"feed_forwards": json.dumps(headers)})


def _read(path: Path, block: int) -> list[FeedForwardMeasurement] | None:
    """Return the measurements of ``block``; None if they were not kept or the file is incomplete."""
    try:
        with safe_open(path, framework="pt") as file:
            headers = json.loads((file.metadata() or {})["feed_forwards"])
            contents: list[dict[str, dict[str, Tensor]]] = [
                {"statistics": {}, "scores": {}, "curves": {}} for _ in headers
            ]
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                number, kind, name = key.split("/", 2)
                contents[int(number)][kind][name] = file.get_tensor(key)
    except _INCOMPLETE:
        return None
    return [
        FeedForwardMeasurement(
            block,
            header["path"],
            header["width"],
            BlockStatistics(
                {Statistic(name): value for name, value in content["statistics"].items()},
                header["tokens"],
                header["held_out"],
            ),
            content["scores"],
            content["curves"],
            header.get("sensitivities", {}),
        )
        for header, content in zip(headers, contents, strict=True)
    ]
