"""Read text and rows named by a data SPEC.

| SPEC | text |
|---|---|
| ``demo`` | Docstrings of the Python standard library (``cfsp_framework.data.demo.corpus``). |
| ``wikitext2``, ``ptb``, ``c4``, ``fineweb-edu`` | A data set of the Hub, split and joined as papers do (``WELL_KNOWN``). |
| ``hf:REPO[:CONFIG][:SPLIT][:COLUMN]`` | A data set of the Hub. |
| ``PATH[:COLUMN]`` | A .txt, .jsonl, .json, .parquet or .csv file, or a folder with a data set. |
| ``A=0.7,B=0.3`` | A mixture of the above, by weight. |

Calibration and evaluation read different splits. Training reads calibration's; ``demo`` has a larger one for it.
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

from cfsp_framework.errors import DataError, did_you_mean, one_line

Role = Literal["calibration", "evaluation", "training"]

STREAM_CHARACTERS = 8_000_000
"""Characters read of a corpus too large to be read whole: about two million tokens."""


@dataclass(frozen=True)
class HubCorpus:
    """A data set on the Hugging Face Hub and how papers join its rows into one text."""

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
    """Rows that evaluation skips where calibration reads the same split."""


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


def parse_mixture(spec: str) -> list[tuple[str, float]]:
    """Return the parts of a SPEC with their weights; a plain SPEC is one part of weight 1.

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


def apportion(weights: Sequence[float], total: int) -> list[int]:
    """Split ``total`` in proportion to ``weights`` by largest remainder; the first wins a tie."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: (counts[i] - exact[i], i))
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def read_text(spec: str, role: Role, characters: int | None = None) -> str:
    """Return the text of one part of a SPEC.

    Of a corpus too large to be read whole, read about ``characters``, by default ``STREAM_CHARACTERS``.

    Raises:
        DataError: it cannot be found or read, or holds no text.
    """
    documents, joint = _read(spec, role, characters)
    text = joint.join(documents)
    if not text.strip():
        raise DataError(f"data {spec!r} holds no text.")
    return text


def read_documents(spec: str, role: Role) -> list[str]:
    """Return the documents of one part of a SPEC, without empty ones; blank lines separate those of a .txt file.

    Raises:
        DataError: it cannot be found or read, or holds no text.
    """
    texts, _ = _read(spec, role)
    if len(texts) == 1:
        texts = re.split(r"\n\s*\n", texts[0])
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"data {spec!r} holds no text.")
    return documents


def read_rows(spec: str) -> Sequence[Mapping[str, Any]]:
    """Return all columns of the rows to train on, from one local file or folder or one data set of the Hub.

    Raises:
        DataError: they cannot be found or read.
    """
    if spec.startswith("hf:"):
        corpus = _parse_hub(spec)
        with _reading(spec, " from the Hub"), silenced_datasets():
            return list(_load_hub(corpus, "training"))
    path = Path(spec)
    if not path.exists():
        raise DataError(f"data {spec!r}: no such file or folder.")
    with _reading(spec, _kind(path)), silenced_datasets():
        return list(_load_local(path, "training"))


def shorten_spec(spec: str) -> str:
    """Return a data SPEC for a table: files by their names alone."""
    if spec.startswith("hf:"):
        return spec
    return ",".join(part.rstrip("/").rpartition("/")[2] for part in spec.split(","))


def _read(spec: str, role: Role, characters: int | None = None) -> tuple[list[str], str]:
    """Return the documents of one part of a SPEC, and what separates two of them in a joint text."""
    if spec == "demo":
        from cfsp_framework.data.demo import corpus

        return corpus.documents(_DEMO_SPLITS[role]), "\n\n"
    if spec in WELL_KNOWN or spec.startswith("hf:"):
        source = WELL_KNOWN.get(spec) or _parse_hub(spec)
        limit = (characters or STREAM_CHARACTERS) if source.streamed else None
        with _reading(spec, " from the Hub"), silenced_datasets():
            texts = _column_texts(spec, _load_hub(source, role), source.column, limit)
        return texts, source.evaluation_joint if role == "evaluation" else source.calibration_joint
    path, column = Path(spec), "text"
    if not path.exists() and ":" in spec:
        path, column = Path(spec.rpartition(":")[0]), spec.rpartition(":")[2]
    if not path.exists():
        raise DataError(f"data {spec!r}: no such file or name.{did_you_mean(spec, ['demo', *WELL_KNOWN])}")
    with _reading(spec, _kind(path)):
        if path.suffix == ".txt":
            if column != "text":
                raise DataError(f"data {spec!r}: a .txt file has no columns; give {path}.")
            return [path.read_text(encoding="utf-8")], ""
        with silenced_datasets():
            return _column_texts(spec, _load_local(path, role), column), "\n\n"


def _parse_hub(spec: str) -> HubCorpus:
    repository, *rest = spec.removeprefix("hf:").split(":")
    if not repository or len(rest) > 3:
        raise DataError(f"data {spec!r}: expected hf:REPO[:CONFIG][:SPLIT][:COLUMN].")
    config, split, column = [*rest, "", "", ""][:3]
    return HubCorpus(repository, config or None, split or "train", split or "test", column or "text")


def _load_hub(corpus: HubCorpus, role: Role) -> Any:
    """Return the rows of a data set of the Hub."""
    from datasets import load_dataset

    split = corpus.evaluation_split if role == "evaluation" else corpus.calibration_split
    rows = load_dataset(
        corpus.repository, corpus.config, split=split, streaming=corpus.streamed, revision=corpus.revision
    )
    return rows.skip(corpus.evaluation_skip) if role == "evaluation" and corpus.evaluation_skip else rows


def _load_local(path: Path, role: Role) -> Any:
    """Return the rows of a local file or folder; of a data set with splits, the one for the role."""
    from datasets import Dataset, load_dataset, load_from_disk

    if path.is_dir():
        saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
        loaded = load_from_disk(str(path)) if saved else load_dataset(str(path))
    elif path.suffix not in _LOADERS:
        raise DataError(f"data {str(path)!r}: expected .txt, {', '.join(_LOADERS)} or a folder with a data set.")
    elif not path.stat().st_size:
        raise DataError(f"data {str(path)!r} holds no rows: the file is empty.")
    else:
        loaded = load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    if isinstance(loaded, Dataset):
        return loaded
    preferred = ("test", "validation") if role == "evaluation" else ("train",)
    return loaded[next((name for name in preferred if name in loaded), next(iter(loaded)))]


def _column_texts(spec: str, rows: Any, column: str, characters: int | None = None) -> list[str]:
    """Return the texts of a column in order, up to about ``characters``; empty values are left out."""
    names = rows.column_names
    if names is not None and column not in names:
        raise DataError(f"data {spec!r} has no column {column!r}.{did_you_mean(column, names)}")
    if characters is None:
        return list(_only_texts(spec, column, rows[column][:]))
    texts, length = list[str](), 0
    for text in islice(_only_texts(spec, column, (row.get(column) for row in rows)), characters):
        texts.append(text)
        length += len(text)
        if length >= characters:
            break
    return texts


def _only_texts(spec: str, column: str, values: Iterable[object]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            yield value
        elif value is not None:
            raise DataError(f"data {spec!r}: column {column!r} holds {type(value).__name__}, not text.")


@contextmanager
def _reading(spec: str, source: str = "") -> Generator[None]:
    """Raise a DataError for the errors of ``datasets``, its file systems and its parsers, which have no common class."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"data {spec!r} is not UTF-8 text: byte {error.start} cannot be decoded.") from error
    except ConnectionError as error:
        raise DataError(f"data {spec!r}: the Hub cannot be reached; give a local file, or `demo`.") from error
    except Exception as error:
        hidden = type(error).__name__ == "DatasetGenerationError" and error.__cause__  # says only that one occurred
        raise DataError(f"data {spec!r} cannot be read{source}: {one_line(hidden or error)}") from error


def _kind(path: Path) -> str:
    return " as a data set" if path.is_dir() else ""


@contextmanager
def silenced_datasets(level: int = logging.CRITICAL, *libraries: str) -> Generator[None]:
    """Keep progress bars and log messages of ``datasets``, and those of other libraries, off the terminal.

    Messages of ``level`` and above still appear, and errors still raise.
    """
    import datasets

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub", *libraries)]
    levels, shown = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(level)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, previous in zip(loggers, levels, strict=True):
            logger.setLevel(previous)
        if shown:
            datasets.enable_progress_bars()
