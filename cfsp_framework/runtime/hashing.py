"""Hash values, so that two of them can be compared by name."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from torch import Tensor

_SHA256 = re.compile(r"[0-9a-f]{64}")


def hash_json(value: object) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_windows(windows: Tensor) -> str:
    """Return the SHA-256 of windows ``(N, T)`` int64, in hexadecimal."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal; the Hub's cache has it as the name of the file that is linked to."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
