"""Find the safetensors files of a checkpoint, and refuse any other kind of file in their place."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

from cfsp_framework.errors import ModelError, one_line

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def weight_files(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that hold a checkpoint's weights, in the folder.

    The one file comes first, as for Transformers; other safetensors beside it are not the model's.

    Raises:
        ModelError: there is neither the file nor its index, or the index cannot be read or names a file outside.
    """
    if (folder / SINGLE_FILE).exists():
        return (SINGLE_FILE,)
    return tuple(sorted({*read_index(folder).values()}))


def read_index(folder: Path) -> dict[str, str]:
    """Return the file of every tensor from the index of a checkpoint in shards.

    Raises:
        ModelError: it is missing, or cannot be read, or names what is not a safetensors file in the folder.
    """
    path = folder / INDEX_FILE
    if not path.exists():
        raise ModelError(
            f"{folder} has no safetensors: neither {SINGLE_FILE} nor {INDEX_FILE}. Pickled weights can run code when "
            "they are opened and are refused; convert them with save_pretrained first."
        )
    try:
        index: Any = json.loads(path.read_text(encoding="utf-8"))
        names: dict[str, str] = dict(index["weight_map"])
        files = {str(name) for name in names.values()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} is not an index of weights: {one_line(error)}") from error
    for name in sorted(files):
        if not name.endswith(".safetensors"):
            raise ModelError(f"{path} names {name!r}, which is not safetensors; other weights are refused.")
        parts = PurePosixPath(name.replace("\\", "/"))
        if parts.is_absolute() or ".." in parts.parts or ":" in name:
            raise ModelError(f"{path} names {name!r}, which lies outside of the checkpoint's folder.")
    return {str(key): str(name) for key, name in names.items()}


def open_weights(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        ModelError: it is missing, damaged, or something else.
    """
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch or write it again.") from error


def check_weights(folder: Path) -> None:
    """Open the header of every file of weights, before anything else reads one.

    Raises:
        ModelError: a file is missing, damaged, or not safetensors.
    """
    for name in weight_files(folder):
        with open_weights(folder / name):
            pass
