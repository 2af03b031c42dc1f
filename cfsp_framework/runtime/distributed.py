"""Share a run between processes started by torchrun: each measures some windows; sums are added after every block."""

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

VALUES_AT_ONCE = 1 << 22
"""Values of a large sum that are converted to float64 and added at a time."""


@dataclass(frozen=True)
class Ranks:
    """Rank and number of the processes that work on a run; one process unless torchrun started several."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return the numbers of the windows, of ``count``, that this process measures.

        Raises:
            ConfigError: there are fewer windows than processes.
        """
        if count < self.world:
            raise ConfigError(f"{count} windows cannot be shared out over {self.world} processes; give more --samples.")
        return range(self.rank, count, self.world)

    def add(self, sums: dict[str, Tensor]) -> None:
        """Replace every sum in place by the total over all processes, added in float64."""
        if self.world == 1:
            return
        for name in sorted(sums):
            total = sums[name].contiguous()
            for part in total.view(-1).split(VALUES_AT_ONCE):
                exact = part.double()
                distributed.all_reduce(exact)
                part.copy_(exact)
            sums[name] = total

    def total(self, values: Iterable[int]) -> list[int]:
        """Add whole numbers over all processes."""
        counts = torch.tensor(list(values), dtype=torch.int64, device=self._device)
        if self.world > 1:
            distributed.all_reduce(counts)
        return [int(value) for value in counts.tolist()]

    def gather(self, values: Tensor) -> Tensor:
        """Return the rows ``(n, ...)`` of all processes, rank after rank, on the CPU."""
        if self.world == 1:
            return values.cpu()
        gathered: list[Tensor] = [values.new_empty(0)] * self.world
        distributed.all_gather_object(gathered, values.cpu())
        return torch.cat(gathered)

    def agree(self, value: T) -> T:
        """Return the first process's value in every process."""
        if self.world == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, device=self._device)
        return values[0]

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world > 1:
            distributed.barrier()

    @property
    def _device(self) -> torch.device:
        nccl = self.world > 1 and distributed.get_backend() == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


SOLO = Ranks()


def join_ranks(device: str) -> Ranks:
    """Join the other processes that torchrun started, if any: over nccl for a GPU, else gloo."""
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
