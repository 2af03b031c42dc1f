"""Run a checkpoint larger than memory: read its blocks from the safetensors one at a time, and write them so.

Transformers names and stacks some tensors differently on disk than in its modules (renamed heads, one key per expert).
``Conversions`` applies Transformers' own conversions to one block. They are internal to Transformers: without them,
families whose keys are those of the modules still work.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import sys
from collections.abc import Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp_framework.errors import ModelError
from cfsp_framework.modeling.weight_files import INDEX_FILE, SINGLE_FILE, open_weights, read_index

_IGNORED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Buffers that old checkpoints hold and models compute."""


class WeightLoading(Protocol):
    """Load the parameters of one block at a time."""

    device: torch.device | None
    """Device that blocks run on; None: the model's."""

    def __call__(self, index: int) -> AbstractContextManager[None]:
        """Return a context in which block ``index`` is in memory, to be run, read and changed."""
        ...


class InMemory:
    """Keep every block in memory all the time."""

    device: torch.device | None = None

    def __call__(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()


class Streamed:
    """Read each block from the checkpoint when it is needed, and drop it afterwards.

    On a GPU the next block is read and moved while the current one computes: two blocks are in memory.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, blocks: str, device: torch.device, *, ahead: bool | None = None
    ) -> None:
        self.device: torch.device | None = device
        self._model = model
        self._shards = Shards(folder)
        self._conversions = Conversions(model)
        self._targets = self._conversions.map_keys(self._shards.files)
        unexpected = self._conversions.unexpected(self._targets)
        if unexpected:
            raise ModelError(
                f"the weights in {folder} do not fit the model, first of {len(unexpected)}: {unexpected[0]}."
            )
        self._blocks = blocks
        self._count = len(list(model.get_submodule(blocks).children()))
        self._on_gpu = device.type == "cuda"
        self._reader = ThreadPoolExecutor(1) if (self._on_gpu if ahead is None else ahead) else None
        self._coming: tuple[int, Future[None]] | None = None
        self._load_outside()

    @contextmanager
    def __call__(self, index: int) -> Generator[None]:
        """Keep block ``index`` in memory, as the checkpoint has it, while the context is open."""
        self._wait_for(index)
        if self._reader is not None and index + 1 < self._count:
            self._coming = index + 1, self._reader.submit(self._load_block, index + 1)
        try:
            yield
        finally:
            if self._on_gpu:
                torch.cuda.current_stream(self.device).synchronize()  # the block may still be computing
            self._drop(index)

    def close(self) -> None:
        """Drop everything that was read."""
        if self._reader is not None:
            self._reader.shutdown()
        _move_to_meta(self._model)

    def _wait_for(self, index: int) -> None:
        """Load block ``index``, or wait until the reader has."""
        if self._coming is not None:
            coming, reading = self._coming
            self._coming = None
            reading.result()
            if coming == index:
                return
            self._drop(coming)
        self._load_block(index)

    def _load_block(self, index: int) -> None:
        prefix = f"{self._blocks}.{index}"
        keys = [key for key, target in self._targets.items() if target.startswith(f"{prefix}.")]
        if self._on_gpu:
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                self._load(keys)
            stream.synchronize()
        else:
            self._load(keys)
        missing = [n for n, p in self._model.get_submodule(prefix).named_parameters() if p.is_meta]
        if missing:
            raise ModelError(f"the checkpoint has no {prefix}.{missing[0]} ({len(missing)} are missing).")

    def _load_outside(self) -> None:
        """Load embeddings, norms and head, and move all buffers."""
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._load([key for key, target in self._targets.items() if not target.startswith(f"{self._blocks}.")])
        self._model.tie_weights()
        parameters = self._model.named_parameters()
        missing = [name for name, p in parameters if p.is_meta and not name.startswith(f"{self._blocks}.")]
        if missing:
            raise ModelError(f"the checkpoint has no {missing[0]}, and nothing may be made up for it.")

    def _load(self, keys: Iterable[str]) -> None:
        with _load_in_this_thread() if self._on_gpu else nullcontext():
            self._conversions.load(self._shards.slices(keys), self.device)

    def _drop(self, index: int) -> None:
        """Free a block's parameters; their shapes, narrower if the block was cut, stay."""
        _move_to_meta(self._model.get_submodule(f"{self._blocks}.{index}"))
        return_memory()


class Shards:
    """Tensors of a checkpoint folder by key, sharded or not; values are read when they are used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, str] = {}
        if (folder / SINGLE_FILE).exists():  # other safetensors beside it are not the model's
            with open_weights(folder / SINGLE_FILE) as file:
                self.files = dict.fromkeys(file.keys(), SINGLE_FILE)
        else:
            self.files = read_index(folder)

    def slices(self, keys: Iterable[str]) -> dict[str, Any]:
        """Return the safetensors slices of some tensors by key."""
        keys = sorted(keys)
        files = {name: open_weights(self._folder / name) for name in {self.files[key] for key in keys}}
        return {key: files[self.files[key]].get_slice(key) for key in keys}


def _move_to_meta(module: nn.Module) -> None:
    """Keep the shapes of parameters alone; tied parameters stay tied."""
    moved: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in moved:
                moved[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            setattr(part, name, moved[id(parameter)])


def return_memory() -> None:
    """Return freed memory to the system: the C library of GNU systems keeps it, for each thread that reads blocks."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _load_in_this_thread() -> Generator[None]:
    """Make Transformers read tensors in the calling thread: a CUDA stream belongs to a thread."""
    previous = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if previous is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = previous


class Conversions:
    """Convert tensors of a checkpoint as ``from_pretrained`` does, for some of the keys.

    In a version of Transformers that keeps its conversions elsewhere, keys must be those of the modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping

            self._mapping: list[Any] | None = get_model_conversion_mapping(model)
        except ImportError:
            self._mapping = None

    def map_keys(self, keys: Iterable[str]) -> dict[str, str]:
        """Return the parameter that each key of the checkpoint ends up in."""
        if self._mapping is None:
            return {key: key for key in keys}
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        known = self._model.state_dict()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        prefix = self._model.base_model_prefix

        def map_key(key: str) -> str:
            renamed: str = rename_source_key(key, renamings, converters, prefix, known)[0]
            if renamed in known or key not in known:
                return renamed
            return str(rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)[0])

        return {key: map_key(key) for key in keys}

    def unexpected(self, targets: Mapping[str, str]) -> list[str]:
        """Return the keys of the checkpoint that the model has no parameter for and does not ignore."""
        if self._mapping is None:
            return []
        known = self._model.state_dict().keys()
        ignored = [*(self._model._keys_to_ignore_on_load_unexpected or ()), *_IGNORED]
        return [
            key
            for key, target in targets.items()
            if target not in known and not any(re.search(pattern, target) for pattern in ignored)
        ]

    def load(self, tensors: Mapping[str, Any], device: torch.device | None) -> None:
        """Load tensors of the checkpoint, or slices of them, into the modules they belong to.

        Raises:
            ModelError: Transformers has no conversions here and a key is not a module's.
        """
        model, dtype = self._model, self._model.dtype
        if self._mapping is None:
            _load_unconverted(model, tensors, device)
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            weight_mapping=self._mapping,  # the same objects each time: they remember which of them were used
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device or "cpu"},
        )
        parameters = inspect.signature(convert_and_load_state_dict_in_model).parameters
        extra = {"tp_plan": None} if "tp_plan" in parameters else {}
        convert_and_load_state_dict_in_model(model=model, state_dict=dict(tensors), load_config=options, **extra)


def _load_unconverted(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device | None) -> None:
    known = model.state_dict().keys()
    foreign = [key for key in tensors if key not in known]
    if foreign:
        raise ModelError(
            f"this version of Transformers cannot convert {foreign[0]} alone; update it, or leave out --stream."
        )
    whole = {key: value[:].to(device or "cpu", model.dtype) for key, value in tensors.items()}
    model.load_state_dict(whole, strict=False, assign=True)


class ShardWriter:
    """Write a model's blocks as they are finished, one shard each, and the rest at the end."""

    def __init__(self, model: PreTrainedModel, blocks: str, folder: Path) -> None:
        self._model = model
        self._blocks = blocks
        self._folder = folder
        self._count = len(list(model.get_submodule(blocks).children())) + 1
        self._files: dict[str, str] = {}
        self._bytes = 0

    def write_block(self, index: int) -> None:
        """Write block ``index``, which must be in memory."""
        prefix = f"{self._blocks}.{index}"
        state = self._model.get_submodule(prefix).state_dict()
        self._write({f"{prefix}.{name}": tensor for name, tensor in state.items()}, index + 1)

    def write_rest(self) -> None:
        """Write everything that is not written yet, and the index of all shards."""
        tied = getattr(self._model, "all_tied_weights_keys", {})
        parameters = dict(self._model.named_parameters())
        rest = {
            name: tensor
            for name, tensor in self._model.state_dict().items()
            # A block's buffers stay in memory when the block is dropped; they were written with it.
            if not (tensor.is_meta or name in tied or (name.startswith(f"{self._blocks}.") and name not in parameters))
        }
        self._write(rest, self._count)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
        (self._folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write(self, tensors: Mapping[str, Tensor], number: int) -> None:
        stored = {key: t.detach().contiguous().cpu() for key, t in _convert_back(self._model, tensors).items()}
        name = f"model-{number:05d}-of-{self._count:05d}.safetensors"
        save_file(_unshare(stored), self._folder / name, metadata={"format": "pt"})
        self._files |= dict.fromkeys(stored, name)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def _convert_back(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors under the names, and in the layout, of a checkpoint."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted


def _unshare(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with another or are part of a larger storage, which safetensors refuses."""
    storages: set[int] = set()
    separate: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in storages or storage.nbytes() != tensor.numel() * tensor.element_size()
        separate[key] = tensor.clone() if shared and tensor.numel() else tensor
        storages.add(storage.data_ptr())
    return separate
