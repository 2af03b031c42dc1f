"""A sweep's results on disk, written as they are made: an SQLite file that other programs can query too."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cfsp_framework.ablation.results import CellResult
from cfsp_framework.errors import OutputError

FILE = "results.sqlite"
PLANS = "plans"
COLLECTIONS = "collections"

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


class Store:
    """The cells of a sweep by their keys, whole in ``cells.result`` (JSON) and in columns; and what is known beside them.

    A cell that failed is kept too, until it succeeds. Every write is a transaction of its own.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with _readable(folder):
            self._connection = sqlite3.connect(folder / FILE, isolation_level=None)
            self._connection.executescript(_TABLES)

    def close(self) -> None:
        """Let go of the file."""
        self._connection.close()

    def get(self, key: str) -> CellResult | None:
        """The cell called ``key``, finished or failed."""
        found = self._connection.execute("SELECT result FROM cells WHERE key = ?", (key,)).fetchone()
        return CellResult.model_validate_json(found[0]) if found else None

    def put(self, cell: CellResult) -> None:
        """Keep a cell, in the place of an earlier result of it."""
        columns: dict[str, Any] = {
            **cell.model_dump(
                include={
                    "key",
                    "status",
                    "error",
                    "channel_ratio",
                    "parameter_ratio",
                    "parameters",
                    "seconds",
                    "command",
                }
            ),
            **cell.spec.model_dump(),
            "result": cell.model_dump_json(),
        }
        names, places = ", ".join(f'"{name}"' for name in columns), ", ".join("?" * len(columns))
        with self._transaction() as connection:
            connection.execute(f"INSERT OR REPLACE INTO cells ({names}) VALUES ({places})", [*columns.values()])
            connection.execute("DELETE FROM qualities WHERE key = ?", (cell.key,))
            connection.executemany(
                "INSERT INTO qualities VALUES (?, ?, ?, ?, ?, ?, ?)",
                [(cell.key, *one.model_dump().values()) for one in cell.qualities],
            )

    def recall(self, name: str) -> Any:
        """What was noted under ``name``, or None."""
        found = self._connection.execute("SELECT value FROM sweep WHERE name = ?", (name,)).fetchone()
        return json.loads(found[0]) if found else None

    def note(self, name: str, value: Any) -> None:
        """Keep a value that JSON can hold."""
        with self._transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO sweep VALUES (?, ?)", (name, json.dumps(value)))

    @contextmanager
    def _transaction(self) -> Generator[sqlite3.Connection]:
        with _readable(self._folder), self._connection:
            self._connection.execute("BEGIN")
            yield self._connection


@contextmanager
def open_store(folder: Path) -> Generator[Store]:
    """The store in ``folder``, which is made if need be, for one sweep at a time.

    Raises:
        OutputError: the folder holds something else, cannot be written, or another sweep is at work in it.
    """
    check_folder(folder)
    with _readable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{folder}: another sweep is at work there; wait for it, or give another folder."
            ) from None
        except OSError:  # this file system knows no locks
            pass
        store = Store(folder)
        try:
            yield store
        finally:
            store.close()
    finally:
        os.close(handle)


def check_folder(folder: Path) -> None:
    """Refuse, before any work is done, a folder that holds something else than a sweep.

    Raises:
        OutputError: it does.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / FILE).is_file()):
        raise OutputError(f"{folder} exists and holds no sweep; give another folder.")


@contextmanager
def _readable(folder: Path) -> Generator[None]:
    """Turn what SQLite and the file system refuse into an OutputError."""
    try:
        yield
    except (sqlite3.Error, PermissionError, FileNotFoundError, NotADirectoryError) as error:
        told = getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{folder / FILE} cannot be used: {told}.") from error
