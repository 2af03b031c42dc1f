"""A device that is not the CPU, for machines that have none: tensors remember where they are said to be.

Arithmetic is done on the CPU all the same, so that values can be read and branched on. What a GPU would refuse is refused:
two tensors on different devices in one operation, unless one is a CPU scalar, or an index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
"""What tensors elsewhere give as their device."""
_MARK = "_cfsp_elsewhere"
_GETTERS: dict[Any, Callable[[bool], object]] = {
    Tensor.device.__get__: lambda away: DEVICE if away else torch.device("cpu"),
    Tensor.is_cuda.__get__: lambda away: away,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: lambda away: not away,  # type: ignore[attr-defined]
    Tensor.get_device: lambda away: 0 if away else -1,
}
_MAY_MIX = (Tensor.__getitem__, Tensor.__setitem__, Tensor.copy_, Tensor.set_)


class DeviceMismatchError(RuntimeError):
    """A GPU would have refused this."""


class Elsewhere(TorchFunctionMode):
    """While open, tensors moved to ``DEVICE`` behave as if they were there."""

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return _GETTERS[func](is_away(args[0]))
        if func in (Tensor.cpu, Tensor.cuda):
            return _placed(args[0].detach(), func is Tensor.cuda)
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func is Tensor.numpy and is_away(args[0]):
            raise DeviceMismatchError("numpy() on a tensor that is not on the CPU")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        away = any(map(is_away, tensors))
        if kwargs.get("device") is not None:
            away = torch.device(kwargs["device"]).type != "cpu"
            kwargs["device"] = "cpu"
        elif away:
            _check(func, args, tensors)
        generator = kwargs.get("generator")
        if away and isinstance(generator, torch.Generator):
            raise DeviceMismatchError(f"{_name(func)}() elsewhere with a generator of the CPU")
        result = func(*args, **kwargs)
        if any(result is tensor for tensor in tensors):  # done in place
            return result
        return tree_map_only(Tensor, lambda tensor: _mark(tensor, away), result)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        away, rest = is_away(tensor), list[Any]()
        for value in (*args, kwargs.pop("device", None)):
            if isinstance(value, str | torch.device):
                away = torch.device(value).type != "cpu"
            elif isinstance(value, Tensor):
                away = is_away(value)
                rest.append(value.dtype)
            elif value is not None:
                rest.append(value)
        if "other" in kwargs:
            other = kwargs.pop("other")
            away, kwargs["dtype"] = is_away(other), other.dtype
        result = Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        return _placed(result, away)


def is_away(tensor: Tensor) -> bool:
    """Whether a tensor is said to be elsewhere."""
    return bool(getattr(tensor, _MARK, False))


def sent(tensor: Tensor) -> Tensor:
    """A copy that is said to be elsewhere."""
    return _mark(tensor.detach().clone(), True)


def _placed(tensor: Tensor, away: bool) -> Tensor:
    """The same tensor where it is there already, else another one of the same values."""
    return tensor if is_away(tensor) == away else _mark(tensor.view_as(tensor), away)


def _mark(tensor: Tensor, away: bool) -> Tensor:
    setattr(tensor, _MARK, away)
    return tensor


def _check(func: Any, args: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    if func in _MAY_MIX and is_away(args[0]):
        return
    here = [tensor for tensor in tensors if not is_away(tensor) and tensor.ndim]
    if here:
        raise DeviceMismatchError(
            f"{_name(func)}() of a tensor that is where the inputs are and one on the CPU, of shape {tuple(here[0].shape)}"
        )


def _name(func: Any) -> str:
    return str(getattr(func, "__name__", func)).strip("_")
