"""Errors that a user can cause or meet, in one family; any other exception is a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class CfspError(Exception):
    """A run failed. The message says what was wrong, where, and what to do."""

    exit_code: ClassVar[int] = 1


class InputError(CfspError):
    """An input of the user cannot be used; nothing was written."""

    exit_code = 2


class ConfigError(InputError):
    """An option, a preset or a configuration file is wrong."""


class ModelError(InputError):
    """The model cannot be opened or pruned."""


class DataError(InputError):
    """A data SPEC cannot be read, or holds too little text."""


class PlanError(InputError):
    """A plan is impossible, or was made for another model."""


class OutputError(InputError):
    """The output folder cannot be written."""


class ResourceError(InputError):
    """The machine has too little memory for the request."""


class PluginError(CfspError):
    """A plugin could not be loaded, or failed, or returned something unusable."""

    exit_code = 3


class PluginWarning(UserWarning):
    """A plugin misbehaved in a way that does not affect the result; the run goes on."""


class PluginDeprecationWarning(DeprecationWarning):
    """A plugin uses a part of the API that a later version removes. It is hidden from users and shown by pytest."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether the memory of the machine or of a GPU ran out.

    PyTorch raises its own class for GPUs and a plain RuntimeError for the host.
    """
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


LONGEST_MESSAGE = 1000
"""Characters that are shown of the message of an error from elsewhere."""


def printable(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """Escape control characters, which a terminal might obey, and cut what is longer than ``longest`` characters."""
    if len(text) > longest:
        text = f"{text[:longest]}... ({len(text)} characters)"
    return "".join(c if c == "\n" or c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, printable; its class is named unless it is a ``CfspError``."""
    try:
        text = str(error)[: 2 * LONGEST_MESSAGE]
    except Exception as failure:  # noqa: BLE001  (a plugin's own class)
        text = f"its message cannot be read ({type(failure).__name__})"
    text = printable(" ".join(text.split()))
    return text if isinstance(error, CfspError) else f"{type(error).__name__}: {text}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown name: the closest known name, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Available: {', '.join(sorted(known)) or 'none'}."


def deprecation(what: str, *, since: str, until: str, instead: str) -> PluginDeprecationWarning:
    """Return the warning about ``what``, deprecated ``since`` one version of this package and removed in ``until``.

    Give it to ``warnings.warn`` where the old thing is used. For a hook, give it to ``@hookspec(warn_on_impl=...)``, for
    an argument of one to ``warn_on_impl_args={"argument": ...}``; pluggy then warns at the implementation's own line.
    """
    return PluginDeprecationWarning(
        f"{what} is deprecated since cfsp-framework {since} and will be removed in {until}: {instead}."
    )
