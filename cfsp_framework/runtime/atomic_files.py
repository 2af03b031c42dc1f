"""Writing files and folders so that they are there whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cfsp_framework.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""What a checkpoint carries along from the model it is made from, by pattern."""
_USERS_PROBLEM = frozenset(
    {
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.ENAMETOOLONG,
        errno.EFBIG,
    }
)


@contextmanager
def staged_folder(folder: Path) -> Generator[Path]:
    """A folder beside ``folder`` to write into; renamed to it at the end, removed if anything fails.

    What killed runs left there is removed.

    Raises:
        OutputError: the place is not writable or full.
    """
    with ExitStack() as stack:
        with _writing(folder):
            aside = stack.enter_context(_aside(folder))
        with _writing(folder, aside):
            yield aside
            _make_readable(aside)
            _put_in_place(aside, folder)
            _sweep(folder)


@contextmanager
def staged_file(path: Path) -> Generator[Path]:
    """A file in a folder beside ``path`` to write; renamed to it at the end, removed if anything fails.

    Raises:
        OutputError: the place is not writable or full.
    """
    with ExitStack() as stack:
        with _writing(path):
            aside = stack.enter_context(_aside(path))
        with _writing(path, aside):
            yield aside / path.name
            _make_readable(aside)
            os.replace(aside / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OutputError: the place is not writable or full.
    """
    with _writing(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.absolute().parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise


def save_aside(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write safetensors whole or not at all, so that whoever finds the file can trust it.

    Raises:
        OutputError: the place is not writable or full.
    """
    from safetensors.torch import save_file

    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _aside(
            path
        ) as aside:  # a folder, because safetensors writes into a file of its own beside the one it makes
            save_file(dict(tensors), aside / path.name, dict(metadata))
            _make_readable(aside)
            os.replace(aside / path.name, path)


def licence_files(folder: Path) -> list[Path]:
    """The files of ``folder`` that state terms of use."""
    return sorted({path for pattern in LICENCE_FILES for path in folder.glob(pattern) if path.is_file()})


def check_parent(path: Path) -> None:
    """Refuse, before any work is done, a path that cannot be made.

    Raises:
        OutputError: the folder it is to lie in does not exist or is not writable.
    """
    parent = path.absolute().parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{path} cannot be made: {parent} is no folder one can write to.")


@contextmanager
def _writing(path: Path, inside: Path | None = None) -> Generator[None]:
    """Turn what the file system refuses into an OutputError; safetensors hides it in an exception of its own.

    With ``inside``, trouble with a file that is named and lies elsewhere is somebody else's.
    """
    try:
        yield
    except OSError as error:
        elsewhere = inside is not None and error.filename and not Path(error.filename).is_relative_to(inside)
        if elsewhere or error.errno not in _USERS_PROBLEM:
            raise
        raise OutputError(f"{path} cannot be written: {error.strerror}.") from error
    except Exception as error:
        hidden = re.search(r"\(os error (\d+)\)", str(error))
        if hidden is None or int(hidden[1]) not in _USERS_PROBLEM:
            raise
        raise OutputError(f"{path} cannot be written: {os.strerror(int(hidden[1]))}.") from error


@contextmanager
def _aside(path: Path) -> Generator[Path]:
    """A folder beside ``path`` to write into, with a lock on it that the system takes away when this process ends.

    While it is made the folder around it is locked: nobody sweeps what is there but not locked yet.
    """
    parent = path.absolute().parent
    handle = os.open(parent, os.O_RDONLY)
    try:
        if _locked(handle, fcntl.LOCK_EX):
            _sweep(path)
        aside = Path(tempfile.mkdtemp(".partial", f".{path.name}.", parent))
        lock = os.open(aside, os.O_RDONLY)
        _locked(lock, fcntl.LOCK_EX)
    finally:
        os.close(handle)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(lock)


def _sweep(path: Path) -> None:
    """Remove what killed processes left beside ``path``: unfinished things, and what a finished one has replaced."""
    names = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(partial|old)")
    for left in path.absolute().parent.iterdir():
        found = names.fullmatch(left.name)
        if found and (path.exists() if found[1] == "old" else _abandoned(left)):
            _remove(left)


def _abandoned(path: Path) -> bool:
    """Whether nobody alive is writing here, as far as the file system can tell."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _locked(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)


def _locked(handle: int, how: int) -> bool:
    """Lock what is open; False where somebody else has it, or the file system knows no locks."""
    try:
        fcntl.flock(handle, how)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    if not folder.exists():
        aside.rename(folder)
        return
    old = aside.with_suffix(".old")
    folder.rename(old)
    try:
        aside.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    _remove(old)


def _make_readable(folder: Path) -> None:
    """Give files the mode others expect: safetensors and mkdtemp keep theirs to the owner."""
    umask = _umask()
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def human_bytes(value: int) -> str:
    """Bytes as people read them."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.2f} MB"
