"""Everything that can go wrong for a user, one family. Anything else that escapes is a bug and keeps its traceback."""

from __future__ import annotations

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
