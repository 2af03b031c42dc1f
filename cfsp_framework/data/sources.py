"""Data SPECs: where text comes from.

A SPEC is ``demo``, a well-known name, a local file or folder (``PATH`` or ``PATH:COLUMN``),
``hf:REPO[:CONFIG][:SPLIT][:COLUMN]``, or a mixture ``A=0.7,B=0.3``. Calibration and evaluation take different splits;
training takes calibration's, but for ``demo``, which has a larger one for it.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from cfsp_framework.errors import DataError, did_you_mean

Role = Literal["calibration", "evaluation", "training"]

STREAM_CHARACTERS = 8_000_000
"""How much is read of a corpus too large to be read whole: about two million tokens."""


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the Hugging Face Hub and how the field joins its rows into one text."""

    repository: str
    config: str | None = None
    calibration_split: str = "train"
    evaluation_split: str = "test"
    column: str = "text"
    calibration_joint: str = "\n\n"
    evaluation_joint: str = "\n\n"
    streamed: bool = False
    revision: str | None = None
    evaluation_skip: int = 0
    """Rows the evaluation skips where both roles read one split."""


WELL_KNOWN: dict[str, HubCorpus] = {
    "wikitext2": HubCorpus("Salesforce/wikitext", "wikitext-2-raw-v1", calibration_joint=" "),
    "ptb": HubCorpus(
        "ptb-text-only/ptb_text_only", column="sentence", calibration_joint=" ", evaluation_joint=" ",
        revision="refs/convert/parquet",
    ),
    "c4": HubCorpus("allenai/c4", "en", evaluation_split="validation", streamed=True),
    "fineweb-edu": HubCorpus(
        "HuggingFaceFW/fineweb-edu", "sample-10BT", evaluation_split="train", streamed=True, evaluation_skip=100_000
    ),
}  # fmt: skip

_DEMO_SPLITS: dict[Role, Literal["train", "calibration", "test"]] = {
    "calibration": "calibration",
    "evaluation": "test",
    "training": "train",
}
_LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def mixture(spec: str) -> list[tuple[str, float]]:
    """The parts of a SPEC with their weights; a plain SPEC is one part of weight 1.

    Raises:
        DataError: a weight is missing or not positive.
    """
    if "=" not in spec or Path(spec).exists():
        return [(spec, 1.0)]
    parts: list[tuple[str, float]] = []
    for part in spec.split(","):
        name, _, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not (name and 0 < value < math.inf):
            raise DataError(
                f"data {spec!r}: a mixture is NAME=WEIGHT,NAME=WEIGHT with positive weights; found {part!r}."
            )
        parts.append((name.strip(), value))
    return parts


def shares(weights: Sequence[float], total: int) -> list[int]:
    """``total`` split in proportion to ``weights``, by largest remainder; the first on a tie."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@dataclass(frozen=True)
class Documents:
    """The documents of one part of a SPEC, and what stands between two of them in a joint text."""

    texts: tuple[str, ...]
    joint: str


def read_text(spec: str, role: Role, characters: int | None = None) -> str:
    """The text of one part of a SPEC; of a corpus too large to be read whole, about so many ``characters``, by
    default ``STREAM_CHARACTERS``.

    Raises:
        DataError: it cannot be found or read, or holds no text.
    """
    found = _read(spec, role, characters)
    text = found.joint.join(found.texts)
    if not text.strip():
        raise DataError(f"data {spec!r} holds no text.")
    return text


def read_documents(spec: str, role: Role) -> list[str]:
    """The documents of one part of a SPEC, empty ones left out; those of a .txt file have blank lines between.

    Raises:
        DataError: it cannot be found or read, or holds no text.
    """
    texts = _read(spec, role).texts
    if len(texts) == 1:
        texts = tuple(re.split(r"\n\s*\n", texts[0]))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"data {spec!r} holds no text.")
    return documents


def read_rows(spec: str) -> Sequence[Mapping[str, Any]]:
    """The rows of one local file or folder, or of one data set of the Hub, that training takes: all their columns.

    Raises:
        DataError: they cannot be found or read.
    """
    if spec.startswith("hf:"):
        corpus = _hub_corpus(spec)
        with _from_hub(spec):
            return list(_hub_rows(corpus, "training"))
    path = Path(spec)
    if not path.exists():
        raise DataError(f"data {spec!r}: there is no such file or folder.")
    with _from_disk(spec, path), _silent_datasets():
        return list(_load_local(path, "training"))


def _read(spec: str, role: Role, characters: int | None = None) -> Documents:
    if spec == "demo":
        from cfsp_framework.data.demo import corpus

        return Documents(tuple(corpus.documents(_DEMO_SPLITS[role])), "\n\n")
    if spec in WELL_KNOWN:
        return _read_hub(spec, WELL_KNOWN[spec], role, characters)
    if spec.startswith("hf:"):
        return _read_hub(spec, _hub_corpus(spec), role, characters)
    return _read_local(spec, role)


def _hub_corpus(spec: str) -> HubCorpus:
    repository, *rest = spec.removeprefix("hf:").split(":")
    if not repository or len(rest) > 3:
        raise DataError(f"data {spec!r}: expected hf:REPO[:CONFIG][:SPLIT][:COLUMN].")
    config, split, column = [*rest, "", "", ""][:3]
    calibration, evaluation = (split, split) if split else ("train", "test")
    return HubCorpus(repository, config or None, calibration, evaluation, column or "text")


def _read_hub(spec: str, corpus: HubCorpus, role: Role, characters: int | None) -> Documents:
    joint = corpus.evaluation_joint if role == "evaluation" else corpus.calibration_joint
    with _from_hub(spec):
        return _collect(spec, _hub_rows(corpus, role), corpus.column, joint, _stream_length(corpus, characters))


def _stream_length(corpus: HubCorpus, characters: int | None) -> int | None:
    return (characters or STREAM_CHARACTERS) if corpus.streamed else None


def _hub_rows(corpus: HubCorpus, role: Role) -> Any:
    from datasets import load_dataset

    split = corpus.evaluation_split if role == "evaluation" else corpus.calibration_split
    rows = load_dataset(
        corpus.repository, corpus.config, split=split, streaming=corpus.streamed, revision=corpus.revision
    )
    return rows.skip(corpus.evaluation_skip) if role == "evaluation" and corpus.evaluation_skip else rows


@contextmanager
def _from_hub(spec: str) -> Generator[None]:
    """Turn whatever datasets, its file systems and its parsers raise into a DataError."""
    try:
        with _silent_datasets():
            yield
    except (DataError, MemoryError):
        raise
    except ConnectionError as error:
        raise DataError(f"data {spec!r}: the Hub cannot be reached; give a local file, or `demo`.") from error
    except Exception as error:
        raise DataError(f"data {spec!r} cannot be read from the Hub: {_one_line(error)}") from error


def _read_local(spec: str, role: Role) -> Documents:
    path, column = Path(spec), "text"
    if not path.exists() and ":" in spec:
        path, column = Path(spec.rpartition(":")[0]), spec.rpartition(":")[2]
    if not path.exists():
        raise DataError(f"data {spec!r}: there is no such file or name.{did_you_mean(spec, ['demo', *WELL_KNOWN])}")
    with _from_disk(spec, path):
        if path.suffix == ".txt":
            return Documents((path.read_text(encoding="utf-8"),), "")
        with _silent_datasets():
            return _collect(spec, _load_local(path, role), column, "\n\n")


@contextmanager
def _from_disk(spec: str, path: Path) -> Generator[None]:
    """Turn whatever reading a local file or folder raises into a DataError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"data {spec!r} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:
        kind = " as a data set" if path.is_dir() else ""
        raise DataError(f"data {spec!r} cannot be read{kind}: {_one_line(error)}") from error


def _load_local(path: Path, role: Role) -> Any:
    """The rows of a local file or folder; of a data set with splits, the one for the role."""
    from datasets import Dataset, load_dataset, load_from_disk

    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
    elif path.suffix in _LOADERS:
        if not path.stat().st_size:
            raise DataError(f"data {str(path)!r} holds no rows: the file is empty.")
        loaded = load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    else:
        raise DataError(f"data {str(path)!r}: expected .txt, {', '.join(_LOADERS)} or a folder with a data set.")
    if isinstance(loaded, Dataset):
        return loaded
    wanted = ("test", "validation") if role == "evaluation" else ("train",)
    name = next((name for name in wanted if name in loaded), next(iter(loaded)))
    return loaded[name]


def _collect(spec: str, rows: Any, column: str, joint: str, characters: int | None = None) -> Documents:
    """The rows' texts in order, up to about ``characters``."""
    names = rows.column_names
    if names is not None and column not in names:
        raise DataError(f"data {spec!r} has no column {column!r}.{did_you_mean(column, names)}")
    values = rows[column][:] if characters is None else (row.get(column) for row in rows)
    texts = _texts(spec, column, values)
    return Documents(tuple(texts if characters is None else _take(texts, characters)), joint)


def _texts(spec: str, column: str, values: Iterable[object]) -> Iterator[str]:
    """The values that are there; anything but text means that the column was a mistake."""
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise DataError(f"data {spec!r}: column {column!r} holds {type(value).__name__}, not text.")


def _take(texts: Iterable[str], characters: int) -> list[str]:
    taken, length = [], 0
    for text in islice(texts, characters):
        taken.append(text)
        length += len(text)
        if length >= characters:
            break
    return taken


@contextmanager
def _silent_datasets() -> Generator[None]:
    """Keep the library's bars and messages off the terminal while it reads; errors still come as exceptions."""
    import datasets

    loggers = [logging.getLogger("datasets"), logging.getLogger("huggingface_hub")]
    levels, shown = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


def _one_line(error: BaseException) -> str:
    """An error's first line; datasets' own "an error occurred" gives way to what occurred."""
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300].rstrip(".") + "."


def short(spec: str) -> str:
    """A data SPEC as a table can hold it: files by their names alone."""
    if spec.startswith("hf:"):
        return spec
    return ",".join(part.rstrip("/").rpartition("/")[2] for part in spec.split(","))
