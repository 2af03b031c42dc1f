"""Write files and folders so that they exist whole or not at all.

Everything is written into a staging folder beside its destination and renamed at the end. A lock file marks the staging
folders of live processes: the system releases the lock when a process ends, even by SIGKILL, and the next process that
writes to the same destination removes what dead ones left.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cfsp_framework.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Patterns of the files that a checkpoint takes over from the model it is made from."""
_USER_ERRORS = frozenset({
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR,
    errno.ENAMETOOLONG, errno.EFBIG,
})  # fmt: skip


@contextmanager
def staged_folder(folder: Path) -> Generator[Path]:
    """Yield a folder to write into; rename it to ``folder`` at the end, remove it if anything fails.

    Raises:
        OutputError: the place is not writable or full.
    """
    with _staging(folder) as staging:
        yield staging
        _make_readable(staging)
        _put_in_place(staging, folder)


@contextmanager
def staged_file(path: Path) -> Generator[Path]:
    """Yield a path to write a file to; rename it to ``path`` at the end, remove it if anything fails.

    Raises:
        OutputError: the place is not writable or full.
    """
    with _staging(path) as staging:  # a folder: safetensors writes a temporary file beside the one it makes
        yield staging / path.name
        _make_readable(staging)
        os.replace(staging / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OutputError: the place is not writable or full.
    """
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, and the folders it is to be in.

    Raises:
        OutputError: the place is not writable or full.
    """
    from safetensors.torch import save_file

    with _translate_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staged:
        save_file(dict(tensors), staged, dict(metadata))


def licence_files(folder: Path) -> list[Path]:
    """Return the files of ``folder`` that state terms of use."""
    return sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})


def check_parent(path: Path) -> None:
    """Refuse, before any work is done, a path that cannot be written.

    Raises:
        OutputError: the folder it is to be in does not exist or is not writable.
    """
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be written: {parent} is not a writable directory.")


def check_file(path: Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a file that exists or cannot be made.

    Raises:
        OutputError: the file exists and ``overwrite`` is false, or its folder is not writable.
    """
    check_parent(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists; give another file or --overwrite.")


@contextmanager
def _translate_errors(path: Path, inside: Path | None = None) -> Generator[None]:
    """Raise an OutputError for what the file system refuses; safetensors hides it in an exception of its own.

    With ``inside``, an error about a named file elsewhere passes: it was not about the output.
    """
    try:
        yield
    except OSError as error:
        elsewhere = inside is not None and error.filename and not Path(error.filename).is_relative_to(inside)
        if elsewhere or error.errno not in _USER_ERRORS:
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    except Exception as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if hidden is None or int(hidden[1]) not in _USER_ERRORS:
            raise
        raise OutputError(f"{path} cannot be written: {os.strerror(int(hidden[1]))}.") from error


@contextmanager
def _staging(path: Path) -> Generator[Path]:
    """Yield an empty, locked folder beside ``path``; remove it at the end, and what killed processes left there."""
    with _translate_errors(path):
        staging, lock = _create_locked(path)
    locks_work = lock.is_locked  # else the folders of live processes cannot be known
    try:
        with _translate_errors(path, staging):
            if locks_work:
                _sweep(path)
            yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        _release(lock)
        if locks_work:
            _sweep(path)


def _create_locked(path: Path) -> tuple[Path, FileLock]:
    """Create a staging folder and lock it; on a file system without locks it stays unlocked."""
    while True:
        staging = path.absolute().parent / f".{path.name}.{secrets.token_hex(4)}.partial"
        staging.mkdir(mode=0o700)
        lock = FileLock(staging.with_suffix(".lock"))
        _acquire(lock)
        if staging.exists():  # else another process removed it before it was locked
            return staging, lock
        _release(lock)


def _acquire(lock: FileLock, timeout: float = -1) -> bool:
    """Return whether the lock was acquired: another process may hold it, or the file system may have no locks."""
    try:
        lock.acquire(timeout=timeout)
    except (Timeout, OSError, NotImplementedError):
        return False
    return True


def _release(lock: FileLock) -> None:
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside ``path``: staging folders, and the folder that a finished one replaced."""
    names = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(partial|lock|old)")
    for leftover in path.absolute().parent.iterdir():
        match = names.fullmatch(leftover.name)
        if match and match[1] != "old":
            lock = FileLock(leftover.with_suffix(".lock"))
            if _acquire(lock, timeout=0):
                _remove(leftover.with_suffix(".partial"))
                _release(lock)
        elif match and path.exists():
            _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(staging: Path, folder: Path) -> None:
    if not folder.exists():
        staging.rename(folder)
        return
    old = staging.with_suffix(".old")
    folder.rename(old)
    try:
        staging.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _remove(old)


def _make_readable(folder: Path) -> None:
    """Give files the mode others expect: safetensors and the staging folder keep theirs to the owner."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def format_bytes(value: int) -> str:
    """Return bytes as people read them."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
