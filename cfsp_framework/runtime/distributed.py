"""Several processes, started by torchrun: each measures its share of the windows, and sums meet at every block's end."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

from cfsp_framework.errors import ConfigError

T = TypeVar("T")

_ROWS = 1 << 22
"""Values of a large sum that are added in float64 at a time."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that work on a run; alone unless torchrun started several."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Which of ``count`` windows this process takes.

        Raises:
            ConfigError: there are fewer windows than processes.
        """
        if count < self.world:
            raise ConfigError(f"{count} windows cannot be shared out over {self.world} processes; give more --samples.")
        return range(self.rank, count, self.world)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Replace every sum by the total over all processes, added in float64."""
        if self.world == 1:
            return
        for name in sorted(sums):
            total = sums[name].contiguous()
            for part in total.view(-1).split(_ROWS):
                exact = part.double()
                distributed.all_reduce(exact)
                part.copy_(exact)
            sums[name] = total

    def total(self, values: Iterable[int]) -> list[int]:
        """Whole numbers, added over all processes."""
        counts = torch.tensor(list(values), dtype=torch.int64, device=self._device)
        if self.world > 1:
            distributed.all_reduce(counts)
        return [int(value) for value in counts.tolist()]

    def gather(self, values: Tensor) -> Tensor:
        """The rows ``(n, ...)`` of every process, rank after rank, on the CPU."""
        if self.world == 1:
            return values.cpu()
        found: list[Tensor] = [values.new_empty(0)] * self.world
        distributed.all_gather_object(found, values.cpu())
        return torch.cat(found)

    def agree(self, value: T) -> T:
        """The first process's value, in every process."""
        if self.world == 1:
            return value
        told = [value]
        distributed.broadcast_object_list(told, device=self._device)
        return told[0]

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.world > 1:
            distributed.barrier()

    @property
    def _device(self) -> torch.device:
        nccl = self.world > 1 and distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


SOLO = Ranks()


def is_first() -> bool:
    """Whether this process writes and prints: torchrun numbers them."""
    return os.environ.get("RANK", "0") == "0"


def join_ranks(device: str) -> Ranks:
    """Meet the other processes torchrun started, if it did; ``device`` decides between gloo and nccl."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return SOLO
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if on_gpu else "gloo")
        atexit.register(distributed.destroy_process_group)
    return Ranks(distributed.get_rank(), world)
