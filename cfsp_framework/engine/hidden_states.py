"""Allocate the hidden states of all windows, in memory or in a memory-mapped file."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import psutil
import torch
from torch import Tensor

from cfsp_framework.errors import OutputError, ResourceError
from cfsp_framework.runtime.atomic_files import format_bytes


def allocate(shape: tuple[int, ...], like: Tensor, spill: Path | None) -> Tensor:
    """Return an uninitialised tensor of ``shape`` with the dtype of ``like``, on its device or in the folder ``spill``.

    A tensor that would take more than half of a GPU's free memory is allocated on the host. The file in ``spill`` is
    unlinked when this returns, so that it disappears with the tensor, even if the process is killed.

    Raises:
        ResourceError: the tensor does not fit into memory and no folder is given.
        OutputError: the folder cannot be written to.
    """
    size = math.prod(shape) * like.element_size()
    if like.device.type == "cuda" and size > torch.cuda.mem_get_info(like.device)[0] // 2:
        like = like.new_empty(0, device="cpu")  # blocks and their activations need the GPU's memory
    if spill is None:
        if like.device.type == "cpu" and size > psutil.virtual_memory().available:
            raise ResourceError(
                f"the hidden states of all windows take {format_bytes(size)} and "
                f"{format_bytes(psutil.virtual_memory().available)} are free; give --spill FOLDER, or fewer --samples."
            )
        return like.new_empty(shape)
    try:
        spill.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=spill, prefix="hidden-states-", delete=False) as file:
            try:
                mapped = torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=like.dtype)
            finally:
                os.unlink(file.name)  # before it takes room, so that a killed run leaves nothing
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error here, not a crash later
            return mapped.view(shape)
    except OSError as error:
        raise OutputError(f"hidden states cannot be spilled to {spill}: {error.strerror}.") from error
