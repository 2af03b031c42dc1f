"""A device beside the CPU for machines without a GPU: tensors record the device they are said to be on.

All arithmetic runs on the CPU, so that values can be read. As on a GPU, an operation refuses tensors on different devices
unless one of them is a scalar on the CPU or an index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAKE_DEVICE = torch.device("cuda", 0)
"""The device that tensors on the fake device report."""
_MARK = "_cfsp_on_fake_device"
_GETTERS: dict[Any, Callable[[bool], object]] = {
    Tensor.device.__get__: lambda fake: FAKE_DEVICE if fake else torch.device("cpu"),
    Tensor.is_cuda.__get__: lambda fake: fake,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda fake: not fake,  # type: ignore[attr-defined]
    Tensor.get_device: lambda fake: 0 if fake else -1,
}
_MAY_MIX = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, Tensor.set_)


class DeviceMismatchError(RuntimeError):
    """An operation that a GPU refuses."""


class FakeDevice(TorchFunctionMode):
    """While open, tensors moved to ``cuda`` behave as if they were there."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func](is_fake(args[0]))
        if func in (Tensor.cpu, Tensor.cuda):
            return _place(args[0].detach(), func is Tensor.cuda)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.numpy and is_fake(args[0]):
            raise DeviceMismatchError("numpy() of a tensor on a device other than the CPU")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        fake = any(map(is_fake, tensors))
        if kwargs.get("device") is not None:
            fake = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = "cpu"
        elif fake:
            _check_devices(func, args, tensors)
        if fake and isinstance(kwargs.get("generator"), torch.Generator):
            raise DeviceMismatchError(f"{_name(func)}() on another device with a generator of the CPU")
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in tensors):  # in place
            return result
        return tree_map_only(Tensor, lambda tensor: _mark(tensor, fake), result)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        fake, others = is_fake(tensor), list[Any]()
        for value in (*args, kwargs.pop("device", None), kwargs.pop("other", None)):
            if isinstance(value, str | torch.device):
                fake = torch.device(value).type != "cpu"
            elif isinstance(value, Tensor):
                fake = is_fake(value)
                others.append(value.dtype)
            elif value is not None:
                others.append(value)
        return _place(Tensor.to(tensor, *others, **kwargs) if others or kwargs else tensor, fake)


def is_fake(tensor: Tensor) -> bool:
    """Return whether a tensor is said to be on the fake device."""
    return bool(getattr(tensor, _MARK, False))


def _place(tensor: Tensor, fake: bool) -> Tensor:
    """Return the tensor if it is on that device, else a view of it that is."""
    return tensor if is_fake(tensor) == fake else _mark(tensor.view_as(tensor), fake)


def _mark(tensor: Tensor, fake: bool) -> Tensor:
    setattr(tensor, _MARK, fake)
    return tensor


def _check_devices(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    if func in _MAY_MIX and is_fake(args[0]):
        return
    on_cpu = [tensor for tensor in tensors if not is_fake(tensor) and tensor.ndim]
    if on_cpu:
        raise DeviceMismatchError(
            f"{_name(func)}() of tensors on different devices, one of them of shape {tuple(on_cpu[0].shape)} on the CPU"
        )


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).strip("_")
