"""Keep a sweep's results on disk as they arrive: an SQLite file that other programs can query too."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cfsp_framework.ablation.results import CellResult
from cfsp_framework.errors import OutputError

FILE = "results.sqlite"
PLANS = "plans"
COLLECTIONS = "collections"
_LOCK = ".lock"

_TABLES = """
CREATE TABLE IF NOT EXISTS cells (
    key TEXT PRIMARY KEY, status TEXT NOT NULL, error TEXT, "row" TEXT NOT NULL,
    criterion TEXT NOT NULL, allocator TEXT NOT NULL, compensator TEXT NOT NULL, recovery TEXT NOT NULL,
    ratio REAL NOT NULL, samples INTEGER NOT NULL, seed INTEGER NOT NULL,
    channel_ratio REAL, parameter_ratio REAL, parameters INTEGER, seconds REAL NOT NULL,
    command TEXT NOT NULL, result TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS qualities (
    key TEXT NOT NULL REFERENCES cells (key), data TEXT NOT NULL, windows INTEGER NOT NULL, seqlen INTEGER NOT NULL,
    perplexity REAL NOT NULL, nll REAL NOT NULL, bits_per_byte REAL NOT NULL, PRIMARY KEY (key, data));
CREATE TABLE IF NOT EXISTS sweep (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_COLUMNS = {"key", "status", "error", "channel_ratio", "parameter_ratio", "parameters", "seconds", "command"}


class Store:
    """The cells of a sweep by their keys, as JSON in ``cells.result`` and in columns, and notes by name.

    A failed cell is kept too, until it succeeds. Every write is one transaction.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _readable(folder):
            self._connection = sqlite3.connect(folder / FILE, isolation_level=None)
            self._connection.executescript(_TABLES)

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def get(self, key: str) -> CellResult | None:
        """Return the cell of a key, finished or failed; None for an unknown one."""
        row = self._connection.execute("SELECT result FROM cells WHERE key = ?", (key,)).fetchone()
        return CellResult.model_validate_json(row[0]) if row else None

    def put(self, cell: CellResult) -> None:
        """Write a cell; it replaces an earlier result."""
        columns: dict[str, Any] = {
            **cell.model_dump(include=_COLUMNS),
            **cell.spec.model_dump(),
            "result": cell.model_dump_json(),
        }
        names, places = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
        with self._transaction() as connection:
            connection.execute(f"INSERT OR REPLACE INTO cells ({names}) VALUES ({places})", [*columns.values()])
            connection.execute("DELETE FROM qualities WHERE key = ?", (cell.key,))
            connection.executemany(
                "INSERT INTO qualities VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(cell.key, *quality.model_dump().values()) for quality in cell.qualities],
            )

    def read_note(self, name: str) -> Any:
        """Return the note of a name, or None."""
        row = self._connection.execute("SELECT value FROM sweep WHERE name = ?", (name,)).fetchone()
        return json.loads(row[0]) if row else None

    def write_note(self, name: str, value: Any) -> None:
        """Write a value that JSON can hold under a name."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO sweep VALUES (?, ?)", (name, json.dumps(value)))

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with _readable(self._folder), self._connection:
            self._connection.execute("BEGIN")
            yield self._connection


@contextmanager
def open_store(folder: Path) -> Generator[Store]:
    """Open the store of ``folder``, made if missing, for one sweep at a time.

    Raises:
        OutputError: the folder holds something else, cannot be written, or another sweep uses it.
    """
    check_folder(folder)
    with _readable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / _LOCK, blocking=False, is_singleton=False)
        try:
            lock.acquire()
        except Timeout:
            raise OutputError(
                f"{folder}: another sweep is at work there; wait for it, or give another folder."
            ) from None
        except NotImplementedError:  # a file system without locks
            pass
    try:
        with closing(Store(folder)) as store:
            yield store
    finally:
        lock.release()


def check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else than a sweep.

    Raises:
        OutputError: the folder has other files, or is a file.
    """
    foreign = folder.is_dir() and not (folder / FILE).is_file() and any(path.name != _LOCK for path in folder.iterdir())
    if folder.is_file() or foreign:
        raise OutputError(f"{folder} exists and holds no sweep; give another folder.")


@contextmanager
def _readable(folder: Path) -> Generator[None]:
    """Raise errors of SQLite and the file system as an OutputError."""
    try:
        yield
    except (sqlite3.Error, PermissionError, FileNotFoundError, NotADirectoryError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{folder / FILE} cannot be used: {reason}.") from error
