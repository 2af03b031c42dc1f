"""Everything that can go wrong for a user, one family. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class CfspError(Exception):
    """A run failed. The message says what was wrong, where, and what to do."""

    exit_code: ClassVar[int] = 1


class InputError(CfspError):
    """What the user gave cannot be used; nothing was written."""

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
    """This machine does not have the memory that was asked for."""


class PluginError(CfspError):
    """A plugin could not be loaded, or failed, or returned something unusable."""

    exit_code = 3


class PluginWarning(UserWarning):
    """A plugin did what it should not; the run goes on and its result stands."""


class PluginDeprecationWarning(DeprecationWarning):
    """A plugin uses what a later version takes away. For its author: hidden from users, shown by pytest."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this machine's memory ran out, or a GPU's; PyTorch has a class of its own for the one and bare words for the other."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; its class is named unless it is a ``CfspError``."""
    text = " ".join(str(error).split())
    return text if isinstance(error, CfspError) else f"{type(error).__name__}: {text}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the closest known one, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return (f" Did you mean {close[0]!r}?" if close else "") + f" Available: {', '.join(sorted(known)) or 'none'}."


def deprecation(what: str, *, since: str, until: str, instead: str) -> PluginDeprecationWarning:
    """The warning about ``what``, deprecated ``since`` one version of this package and gone in ``until``.

    Give it to ``warnings.warn`` where the old thing is used. For a hook, give it to ``@hookspec(warn_on_impl=...)``, for
    an argument of one to ``warn_on_impl_args={"argument": ...}``; pluggy then warns at the implementation's own line.
    """
    return PluginDeprecationWarning(
        f"{what} is deprecated since cfsp-framework {since} and will be gone in {until}: {instead}."
    )
