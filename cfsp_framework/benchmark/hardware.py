"""Rates at which machines compute, read and write: measured for this machine, nominal for others.

Rates are FLOP/s and bytes/s; a multiplication with an addition counts as two FLOPs.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

BATCH_TOKENS = {"cpu": 512, "cuda": 16384}
"""Tokens of one batch in a run."""


@dataclass(frozen=True)
class Hardware:
    """Rates and memory of one or more equal machines ("nodes"), each with the same GPUs, or without."""

    name: str
    flops: Mapping[str, float]
    """FLOP/s of matrix products on one device, by dtype; an absent dtype counts as float32."""
    disk_read: float
    """Bytes/s per node of safetensors that are not in the page cache."""
    disk_write: float
    cached_read: float
    """Bytes/s of files in the page cache."""
    hashing: float
    """Bytes/s of SHA-256 on one core."""
    cores: int
    """Per node."""
    host_memory: int
    """Bytes per node."""
    measured: bool
    """Whether rates were measured; else they are nominal rates times an assumed efficiency."""
    device_memory: int = 0
    """Bytes per GPU; 0: the CPU computes."""
    to_device: float = float("inf")
    """Bytes/s between the memories of host and GPU."""
    link: float = float("inf")
    """Bytes/s of each process in an all-reduce."""
    devices: int = 1
    """GPUs per node, with one process each."""
    nodes: int = 1

    @property
    def processes(self) -> int:
        return self.devices * self.nodes

    @property
    def has_gpu(self) -> bool:
        return self.device_memory > 0

    @property
    def batch_tokens(self) -> int:
        """Tokens per batch by default."""
        return BATCH_TOKENS["cuda" if self.has_gpu else "cpu"]

    def rate(self, dtype: str) -> float:
        """Return the FLOP/s of one device in ``dtype``."""
        return self.flops.get(dtype, self.flops["float32"])


_ONE_GPU = Hardware(
    name="1 GPU",
    # Data sheet of the H100 SXM, dense products, on tensor cores where the dtype has them.
    flops={"bfloat16": 0.4 * 989e12, "float16": 0.4 * 989e12, "float32": 0.7 * 67e12, "float64": 0.3 * 67e12},
    disk_read=0.7 * 7e9,  # one PCIe 4.0 solid-state drive
    disk_write=0.5 * 5e9,
    cached_read=8e9,
    hashing=1.8e9,
    cores=16,
    host_memory=256 * 10**9,
    measured=False,
    device_memory=80 * 10**9,
    to_device=0.4 * 64e9,  # PCIe 5.0 x16, from memory that is not pinned
)
_EIGHT_GPUS = replace(
    _ONE_GPU,
    name="8 GPUs",
    disk_read=0.4 * 50e9,  # eight drives striped
    disk_write=0.4 * 25e9,
    cached_read=40e9,  # by eight processes together
    cores=128,
    host_memory=2 * 10**12,
    link=0.7 * 450e9,  # NVLink 4, one direction
    devices=8,
)
_FOUR_NODES = replace(_EIGHT_GPUS, name="4x8 GPUs", link=0.7 * 50e9, nodes=4)  # one 400 Gb/s adapter for each GPU
NOMINAL = (_ONE_GPU, _EIGHT_GPUS, _FOUR_NODES)
"""Machines with H100 GPUs of 80 GB: nominal rates times assumed efficiencies, not measured."""


def this_machine(device: torch.device, dtypes: Collection[str], folder: Path | None = None) -> Hardware:
    """Measure this machine for about a second; its rates scatter.

    ``dtypes`` are those of the products; files are written to ``folder``, by default that of temporary files.
    """
    import torch

    gpu = device.type == "cuda"
    write, cold, cached = disk_rates(folder, megabytes=64)
    threads = torch.get_num_threads()
    return Hardware(
        name="this GPU" if gpu else f"this CPU, {threads} thread{'s'[: threads > 1]}",
        flops={dtype: product_rate(dtype, device, seconds=0.15) for dtype in sorted({*dtypes, "float32"})},
        disk_read=cold,
        disk_write=write,
        cached_read=cached,
        hashing=hash_rate(),
        cores=os.cpu_count() or 1,
        host_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        measured=True,
        device_memory=torch.cuda.get_device_properties(device).total_memory if gpu else 0,
        to_device=copy_rate(device) if gpu else float("inf"),
    )


def product_rate(dtype: str, device: torch.device, *, hidden: int = 1024, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of a gated feed-forward, ``D -> 3 D -> D``, on one batch; matrix products alone in float64."""
    import torch
    from torch.nn.functional import linear, silu

    hidden = 4 * hidden if device.type == "cuda" else hidden
    width, tokens = 3 * hidden, BATCH_TOKENS.get(device.type, 4096)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device).to(getattr(torch, dtype))

    inputs, gate, up, down = draw(tokens, hidden), draw(width, hidden), draw(width, hidden), draw(hidden, width)

    @torch.no_grad()
    def run() -> None:
        if dtype == "float64":
            linear(linear(inputs, up), down)
        else:
            linear(silu(linear(inputs, gate)) * linear(inputs, up), down)

    products = 2 if dtype == "float64" else 3
    return 2.0 * products * tokens * hidden * width / _time(run, device, seconds)


def read_rate(dtype: str, device: torch.device, *, hidden: int = 4096, seconds: float = 1.0) -> float:
    """Measure the bytes/s of multiplying a matrix larger than the caches with one vector, as in decoding."""
    import torch
    from torch.nn.functional import linear

    rows = 4 * hidden if device.type == "cpu" else 16 * hidden
    weight = torch.ones(rows, hidden, device=device, dtype=getattr(torch, dtype))  # 256 MB in float32 on a CPU
    inputs = torch.ones(1, hidden, device=device, dtype=getattr(torch, dtype))
    return weight.numel() * weight.element_size() / _time(lambda: linear(inputs, weight), device, seconds)


def gram_rate(device: torch.device, *, width: int = 4096, tokens: int = 512, seconds: float = 1.0) -> float:
    """Measure the FLOP/s of adding the products of ``tokens`` activations ``(T, F)`` to a Gram matrix ``(F, F)``."""
    import torch

    inputs, gram = torch.randn(tokens, width, device=device), torch.zeros(width, width, device=device)
    return 2.0 * tokens * width**2 / _time(lambda: gram.addmm_(inputs.mT, inputs), device, seconds)


def disk_rates(folder: Path | None = None, *, megabytes: int = 512) -> tuple[float, float, float]:
    """Measure the bytes/s of writing safetensors to the disk, of reading them uncached, and of reading them cached.

    The page cache is asked to drop the file before the first read; a virtual disk may still cache it.
    """
    import torch
    from safetensors.torch import save_file

    size = megabytes * 10**6
    with tempfile.TemporaryDirectory(prefix="cfsp-rates-", dir=folder) as scratch:
        path = Path(scratch, "weights.safetensors")
        weights = {f"{i}": torch.randint(0, 255, (size // 8,), dtype=torch.uint8) for i in range(8)}
        start = time.perf_counter()
        save_file(weights, path)
        sync(path)
        write = size / (time.perf_counter() - start)
        forget(path)
        return write, size / _read(path), size / _read(path)


def sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def forget(path: Path) -> None:
    """Ask the system to drop a file from the page cache; a system without such a call is left alone."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> float:
    """Return the seconds of copying every tensor of a file to memory."""
    from safetensors import safe_open

    start = time.perf_counter()
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a mapping)
            file.get_tensor(name).clone()
    return time.perf_counter() - start


def hash_rate(megabytes: int = 32) -> float:
    """Measure the bytes/s of SHA-256, the hash of a model's fingerprint."""
    content = bytes(megabytes * 10**6)
    start = time.perf_counter()
    hashlib.sha256(content)
    return len(content) / (time.perf_counter() - start)


def copy_rate(device: torch.device, megabytes: int = 256) -> float:
    """Measure the bytes/s from host memory that is not pinned to a GPU."""
    import torch

    content = torch.ones(megabytes * 10**6, dtype=torch.uint8)
    return len(content) / _time(lambda: content.to(device), device, 0.2)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _time(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Return the mean seconds of ``run``, repeated for ``seconds`` after two calls that warm up."""
    for _ in range(2):
        run()
    synchronize(device)
    start, count, passed = time.perf_counter(), 0, 0.0
    while not count or passed < seconds:
        run()
        synchronize(device)
        count, passed = count + 1, time.perf_counter() - start
    return passed / count
