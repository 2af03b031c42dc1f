"""The one place where code of plugins runs: what they do wrong is named, and touches nothing beyond them.

What a plugin raises becomes a PluginError that names it. What it prints goes to stderr, so that ``--json`` stays whole.
Settings of torch that it changes are put back, with a warning. Tensors that it was lent and wrote to are an error, since
everything computed from them afterwards would be wrong. How long it took is added up.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from cfsp_framework.errors import CfspError, PluginError, PluginWarning, is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_DRAWN = "torch's global random numbers"


@dataclass
class PluginUsage:
    """How a component behaved so far."""

    seconds: float = 0.0
    """In its own code; what a GPU was asked to do counts where it was waited for."""
    warned: set[str] = field(default_factory=set[str])
    """What was complained about already."""


@contextmanager
def sandboxed(
    who: object,
    action: str,
    *,
    usage: PluginUsage | None = None,
    read_only_inputs: Mapping[str, Tensor | None] | None = None,
    thorough: bool = True,
    failed: str | None = None,
    remedy: str = "",
) -> Generator[None]:
    """Run a plugin's code as ``who`` doing ``action``; ``read_only_inputs`` are tensors it may read but not write to.

    Unless ``thorough``, random numbers are not looked after, which is what takes longest: for calls in the inmost loop.

    Raises:
        PluginError: the code raised something, or wrote to what it was lent.
    """
    usage = usage or PluginUsage()
    settings = _settings_now(thorough)
    versions = {name: _version(tensor) for name, tensor in (read_only_inputs or {}).items()}
    start = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):
            yield
    except (CfspError, MemoryError):
        raise
    except KeyboardInterrupt as error:
        error.add_note(f"in {action} of {who}")
        raise
    except (Exception, SystemExit) as error:
        if is_out_of_memory(error):
            raise
        raise PluginError(f"{who} {failed or f'failed in {action}'}: {cause(error)}{remedy}") from error
    finally:
        usage.seconds += time.perf_counter() - start
        changed = _put_back(settings)
    for name, tensor in (read_only_inputs or {}).items():
        if _version(tensor) != versions[name]:
            raise PluginError(f"{who} wrote to `{name}` in {action}, which it may only read; work on a clone().")
    for name in changed:
        if name not in usage.warned:
            usage.warned.add(name)
            advice = " Draw from feed_forward.generator(), or from a generator of your own." if name == _DRAWN else ""
            warnings.warn(PluginWarning(f"{who} changed {name} in {action}; put back.{advice}"), stacklevel=3)


@contextmanager
def warn_on_error(usage: PluginUsage | None = None) -> Generator[None]:
    """Run what nothing depends on: whatever it raises becomes a warning, one for each ``usage``, and the run goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (a plugin's)
        warned = usage.warned if usage else set[str]()
        if "failed" not in warned:
            warned.add("failed")
            warnings.warn(PluginWarning(f"{error} The run goes on."), stacklevel=3)


def cause(error: BaseException) -> str:
    """An exception in one line, also where it is one of the longer ones of pluggy, pydantic and torch."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}".rstrip(": .") + "."


def tensor_problem(
    value: object, shape: tuple[int | None, ...], dtype: torch.dtype | None = None, *, finite: bool = True
) -> str | None:
    """What keeps a plugin's answer from being a finite tensor of this shape; None where nothing does.

    A size None may be any. With a ``dtype`` the values have to be finite in it, too.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.is_meta or value.layout is not torch.strided or value.is_complex():
        kind = "on the meta device" if value.is_meta else "complex" if value.is_complex() else "sparse"
        return f"is {kind}, not a dense tensor of real numbers"
    if len(value.shape) != len(shape) or any(b not in (a, None) for a, b in zip(value.shape, shape, strict=True)):
        return f"has shape {tuple(value.shape)}, not {str(shape).replace('None', 'any')}"
    if not finite:
        return None
    bad = value.to(dtype or value.dtype).isfinite().logical_not().nonzero()
    if not len(bad):
        return None
    first: float = value[tuple(bad[0].tolist())].item()
    within = f" in {str(dtype).removeprefix('torch.')}" if dtype and math.isfinite(first) else ""
    place = f" at {bad[0].tolist()}" if value.ndim else ""
    return f"has values that are not finite{within}: {first}{place}, {len(bad)} of {value.numel()}"


def _version(tensor: Tensor | None) -> int:
    """How often a tensor, or anything it is a view of, was written to."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


Setting = tuple[str, Callable[[], Any], Callable[[Any], Any]]


@cache
def _settings() -> tuple[Setting, ...]:
    """Settings of torch that hold for the whole process: name, how to read it, how to set it."""
    import torch

    return (
        ("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        ("the number of threads", torch.get_num_threads, torch.set_num_threads),
        ("whether gradients are recorded", torch.is_grad_enabled, torch.set_grad_enabled),
        ("the deterministic mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        ("the precision of products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (
            _DRAWN,
            lambda: torch.get_rng_state().numpy().tobytes(),
            lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        ),
    )


def _settings_now(thorough: bool) -> list[tuple[Setting, Any]]:
    """Nothing where torch is not there yet: `cfsp plugins list` may do without it."""
    settings = _settings() if "torch" in sys.modules else ()
    return [(setting, setting[1]()) for setting in (settings if thorough else settings[:-1])]


def _put_back(settings: list[tuple[Setting, Any]]) -> list[str]:
    """Set what differs to what it was, and name it."""
    changed: list[str] = []
    for (name, read, write), before in settings:
        if read() != before:
            write(before)
            changed.append(name)
    return changed
