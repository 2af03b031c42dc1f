"""What a collection finds out, kept block by block, so that a killed run goes on and another ratio needs no forward."""

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
from cfsp_framework.engine.collect import FeedForwardMeasurement
from cfsp_framework.engine.replay import Batch
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.runtime.atomic_files import save_aside
from cfsp_framework.runtime.distributed import SOLO, Ranks

HIDDEN_SHARE = 0.05
"""The share of the time that may go into keeping hidden states."""
_BYTES_PER_SECOND = 2e8
"""Writing speed assumed before one was measured."""
_NOT_WHOLE = (FileNotFoundError, SafetensorError, KeyError, ValueError)
"""What reading raises where nothing was written, or not all of it survived."""


class MeasurementCache:
    """Measurements of finished blocks in a folder, and the hidden states some block left, filed under a key.

    The key is a hash of all that decides a measurement: another model, data, seed, plugin or option finds nothing.
    Hidden states are written so rarely that it costs less than a twentieth of the time. A block without scores under
    one of the ``labels`` counts as not finished.
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
        """The measurements of the first blocks of ``count``, as far as there are any without a gap."""
        self._count = count
        found: list[list[FeedForwardMeasurement]] = []
        while self._ranks.first and len(found) < count:
            measured = _read(self._path(len(found)), len(found))
            if measured is None or any(not self._labels <= one.scores.keys() for one in measured):
                break
            found.append(measured)
        found = self._ranks.agree(found)
        self._measured = len(found)
        if self._measured == count:
            self._hidden.unlink(missing_ok=True)  # left by a run that was killed when it had measured everything
        return found

    def resume(self, batches: Sequence[Batch]) -> int:
        """Bring the batches as far as their hidden states were kept, and return the block they enter there.

        What is not whole, or enters a block behind one that has to be measured again, is not used.
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
        except _NOT_WHOLE:
            return 0
        return entering

    def store(self, index: int, measured: list[FeedForwardMeasurement], batches: Sequence[Batch]) -> None:
        """Keep what block ``index`` measured; the batches have passed it."""
        if self._ranks.first:
            _write(self._path(index), measured)
        if batches and index + 1 < self._count and self._ranks.agree(self._worth_it(batches)):
            start = time.monotonic()
            tensors = {str(number): batch.hidden.contiguous().cpu() for number, batch in enumerate(batches)}
            save_aside(self._hidden, tensors, {"entering": str(index + 1)})
            self._since = time.monotonic()
            self._cost = self._since - start
        elif index + 1 == self._count:
            self._hidden.unlink(missing_ok=True)

    def _worth_it(self, batches: Sequence[Batch]) -> bool:
        size = sum(batch.hidden.numel() * batch.hidden.element_size() for batch in batches)
        cost = size / _BYTES_PER_SECOND if self._cost is None else self._cost
        return cost <= self._share * (time.monotonic() - self._since)

    def _path(self, index: int) -> Path:
        return self._folder / f"block_{index}.safetensors"


def identity_of(chosen: ConfiguredComponent[Component]) -> dict[str, str]:
    """What decides how a component behaves: its options, the version of its distribution, and its source."""
    component = chosen.component
    source = inspect.getsourcefile(type(component))
    digest = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source and Path(source).exists() else ""
    return {
        "name": f"{component.kind}:{component.name}",
        "options": component.model_dump_json(),
        "distribution": f"{chosen.origin.distribution} {chosen.origin.version}",
        "source": digest,
    }


def _write(path: Path, measured: Sequence[FeedForwardMeasurement]) -> None:
    tensors: dict[str, Tensor] = {}
    told: list[dict[str, object]] = []
    for number, one in enumerate(measured):
        # Cloned: some are the same tensors, such as experts' statistics of their block; safetensors refuses those.
        tensors |= {f"{number}/statistics/{s.name}": value.clone() for s, value in one.statistics.items()}
        tensors |= {f"{number}/scores/{label}": value.clone() for label, value in one.scores.items()}
        tensors |= {f"{number}/curves/{label}": value.clone() for label, value in one.curves.items()}
        seen = one.statistics
        tokens = 0 if seen.unseen else seen.tokens
        told.append({"path": one.path, "width": one.width, "tokens": tokens, "held_out": seen.held_out_tokens})
    save_aside(path, tensors, {"feed_forwards": json.dumps(told)})


def _read(path: Path, block: int) -> list[FeedForwardMeasurement] | None:
    """What was measured of ``block``; None where it was not, or the file is not whole."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads((file.metadata() or {})["feed_forwards"])
            kinds: list[dict[str, dict[str, Tensor]]] = [{"statistics": {}, "scores": {}, "curves": {}} for _ in told]
            for key in file.keys():  # noqa: SIM118  (not a mapping)
                number, kind, name = key.split("/", 2)
                kinds[int(number)][kind][name] = file.get_tensor(key)
    except _NOT_WHOLE:
        return None
    return [
        FeedForwardMeasurement(
            block,
            one["path"],
            one["width"],
            BlockStatistics(
                {Statistic(name): value for name, value in found["statistics"].items()}, one["tokens"], one["held_out"]
            ),
            found["scores"],
            found["curves"],
        )
        for one, found in zip(told, kinds, strict=True)
    ]
