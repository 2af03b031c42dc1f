"""The context in which all code of plugins runs: errors name the plugin, and its side effects stay inside.

An exception of a plugin becomes a PluginError that names it. Its output goes to stderr, so that ``--json`` stays valid.
Global settings of torch that it changes are restored with a warning. Writing to tensors that it may only read is an
error, because everything computed from them afterwards would be wrong. The time it takes is summed.
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

from cfsp_framework.errors import CfspError, PluginError, PluginWarning, is_out_of_memory, one_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_RANDOM_STATE = "torch's global random numbers"


@dataclass
class PluginUsage:
    """Time that a component took, and the warnings about it."""

    seconds: float = 0.0
    """Time in its own code; work on a GPU counts where the code waits for it."""
    warned: set[str] = field(default_factory=set[str])
    """Subjects of warnings that were given, each once."""


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
    """Run code of the plugin or component ``who`` that does ``action``; it may not write to ``read_only_inputs``.

    Without ``thorough``, for calls in the inmost loop, the random state, which is slow to read, is not checked.

    Raises:
        PluginError: the code raised an exception, or wrote to a read-only input.
    """
    usage = usage or PluginUsage()
    settings = _read_settings(thorough)
    versions = {name: _count_writes(tensor) for name, tensor in (read_only_inputs or {}).items()}
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
        raise PluginError(
            f"{who} {failed or f'failed in {action}'}: {one_line(error).rstrip(': .')}.{remedy}"
        ) from error
    finally:
        usage.seconds += time.perf_counter() - start
        changed = _restore(settings)
    for name, tensor in (read_only_inputs or {}).items():
        if _count_writes(tensor) != versions[name]:
            raise PluginError(f"{who} wrote to `{name}` in {action}, which it may only read; work on a clone().")
    for name in changed:
        if name not in usage.warned:
            usage.warned.add(name)
            advice = " Draw from feed_forward.generator(), or from a torch.Generator of yours." * (
                name == _RANDOM_STATE
            )
            warnings.warn(PluginWarning(f"{who} changed {name} in {action}; it was restored.{advice}"), stacklevel=3)


@contextmanager
def warn_on_error(usage: PluginUsage | None = None) -> Generator[None]:
    """Run code that the result does not depend on: its exceptions become one warning per ``usage``, and the run goes on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (of a plugin)
        warned = usage.warned if usage else set[str]()
        if "failed" not in warned:
            warned.add("failed")
            warnings.warn(PluginWarning(f"{error} The run goes on."), stacklevel=3)


def find_tensor_problem(
    value: object, shape: tuple[int | None, ...], dtype: torch.dtype | None = None, *, finite: bool = True
) -> str | None:
    """Return why ``value`` is not a finite dense tensor of this shape, or None if it is one.

    A size None allows any size. With a ``dtype`` the values have to be finite in it, too.
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
    bad = value.to(dtype or value.dtype).isfinite().logical_not().nonzero()  # (n, dimensions)
    if not len(bad):
        return None
    first: float = value[tuple(bad[0].tolist())].item()
    within = f" in {str(dtype).removeprefix('torch.')}" if dtype and math.isfinite(first) else ""
    place = f" at {bad[0].tolist()}" if value.ndim else ""
    return f"has values that are not finite{within}: {first}{place}, {len(bad)} of {value.numel()}"


def _count_writes(tensor: Tensor | None) -> int:
    """Return PyTorch's count of in-place writes to a tensor and its views."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


Setting = tuple[str, Callable[[], Any], Callable[[Any], Any]]


@cache
def _settings() -> tuple[Setting, ...]:
    """Return name, getter and setter of the settings of torch that hold for the whole process."""
    import torch

    return (
        ("the default dtype", torch.get_default_dtype, torch.set_default_dtype),
        (
            "the default device",
            torch.get_default_device,
            lambda device: torch.set_default_device(None if device.type == "cpu" else device),
        ),
        ("the number of threads", torch.get_num_threads, torch.set_num_threads),
        ("whether gradients are recorded", torch.is_grad_enabled, torch.set_grad_enabled),
        ("the deterministic mode", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
        ("the precision of products", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (
            _RANDOM_STATE,
            lambda: torch.get_rng_state().numpy().tobytes(),
            lambda state: torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        ),
    )


def _read_settings(thorough: bool) -> list[tuple[Setting, Any]]:
    """Read all settings, or none before torch is imported, which `cfsp plugins list` does without."""
    settings = _settings() if "torch" in sys.modules else ()
    return [(setting, setting[1]()) for setting in (settings if thorough else settings[:-1])]


def _restore(settings: list[tuple[Setting, Any]]) -> list[str]:
    """Restore settings that changed, and return their names."""
    changed: list[str] = []
    for (name, read, write), value in settings:
        if read() != value:
            write(value)
            changed.append(name)
    return changed
