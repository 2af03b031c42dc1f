"""Hash values, so that two of them can be compared by name."""

from __future__ import annotations

import hashlib
import json

from torch import Tensor


def hash_json(value: object) -> str:
    """Return the SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_windows(windows: Tensor) -> str:
    """Return the SHA-256 of windows ``(N, T)`` int64, in hexadecimal."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()
