"""A checkpoint larger than memory: its blocks are read from the safetensors one at a time, and written so.

Transformers names and stacks some tensors otherwise on disk than in its modules (renamed heads, one key per expert); the
conversions it applies itself when it loads and saves are used here for one block. They are internal to Transformers:
where they are missing, families that need none still work.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cfsp_framework.errors import ModelError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_IGNORED = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")
"""Buffers that old checkpoints hold and models compute."""


class Shards:
    """The tensors of a checkpoint folder by key, sharded or not; nothing is read until it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, str] = {}
        if (folder / _SINGLE).exists():  # other safetensors beside it are none of the model's
            with _open(folder / _SINGLE) as file:
                self.files = dict.fromkeys(file.keys(), _SINGLE)
        elif (folder / _INDEX).exists():
            self.files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        else:
            raise ModelError(f"{folder} has neither {_SINGLE} nor {_INDEX}.")

    def slices(self, keys: Iterable[str]) -> dict[str, Any]:
        """What safetensors calls slices of the tensors called so."""
        opened: dict[str, Any] = {}
        found: dict[str, Any] = {}
        for key in sorted(keys):
            name = self.files[key]
            if name not in opened:
                opened[name] = _open(self._folder / name)
            found[key] = opened[name].get_slice(key)
        return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read ({error}); fetch or write it again.") from error


class Streamed:
    """Residency of a model whose blocks are read from a checkpoint when they are needed, and forgotten afterwards.

    With a GPU the next block is read and moved while the current one computes: two are there then.
    """

    def __init__(
        self, model: PreTrainedModel, folder: Path, blocks: str, device: torch.device, *, ahead: bool | None = None
    ) -> None:
        self.device: torch.device | None = device
        self._model = model
        self._shards = Shards(folder)
        self._conversions = Conversions(model)
        self._targets = self._conversions.targets(self._shards.files)
        unexpected = self._conversions.unexpected(self._targets)
        if unexpected:
            raise ModelError(
                f"the weights in {folder} do not fit the model, first of {len(unexpected)}: {unexpected[0]}."
            )
        self._blocks = blocks
        self._count = len(list(model.get_submodule(blocks).children()))
        self._reader = ThreadPoolExecutor(1) if (device.type == "cuda" if ahead is None else ahead) else None
        self._coming: tuple[int, Future[None]] | None = None
        self._load_around()

    @contextmanager
    def __call__(self, index: int) -> Generator[None]:
        """Block ``index`` is there while the context is open, as the checkpoint has it."""
        self._bring(index)
        if self._reader is not None and index + 1 < self._count:
            self._coming = index + 1, self._reader.submit(self._load_block, index + 1)
        try:
            yield
        finally:
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # the block may still be computing
            self._forget(index)

    def _bring(self, index: int) -> None:
        if self._coming is not None:
            coming, reading = self._coming
            self._coming = None
            reading.result()
            if coming == index:
                return
            self._forget(coming)
        self._load_block(index)

    def _load_block(self, index: int) -> None:
        prefix = f"{self._blocks}.{index}"
        if self.device is not None and self.device.type == "cuda":
            stream = torch.cuda.Stream(self.device)
            with torch.cuda.stream(stream):
                self._load(lambda target: target.startswith(f"{prefix}."))
            stream.synchronize()
        else:
            self._load(lambda target: target.startswith(f"{prefix}."))
        missing = [n for n, p in self._model.get_submodule(prefix).named_parameters() if p.is_meta]
        if missing:
            raise ModelError(f"the checkpoint has no {prefix}.{missing[0]} ({len(missing)} are missing).")

    def _load_around(self) -> None:
        """Embeddings, norms, head: everything that is no block, and the buffers."""
        assert self.device is not None
        for module in self._model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.device))
        self._load(lambda target: not target.startswith(f"{self._blocks}."))
        self._model.tie_weights()
        missing = [name for name, p in around(self._model, self._blocks) if p.is_meta]
        if missing:
            raise ModelError(f"the checkpoint has no {missing[0]}, and nothing may be made up for it.")

    def _load(self, wanted: Callable[[str], bool]) -> None:
        keys = {key for key, target in self._targets.items() if wanted(target)}
        on_gpu = self.device is not None and self.device.type == "cuda"
        with _in_one_thread() if on_gpu else nullcontext():
            self._conversions.load(self._shards.slices(keys), self.device)

    def close(self) -> None:
        """Let go of everything that was read."""
        if self._reader is not None:
            self._reader.shutdown()
        _to_meta(self._model)

    def _forget(self, index: int) -> None:
        """Let go of a block's parameters; their shapes, perhaps narrower by now, stay."""
        _to_meta(self._model.get_submodule(f"{self._blocks}.{index}"))
        return_memory()


def _to_meta(module: nn.Module) -> None:
    """Keep the shapes of parameters alone; what is tied stays tied, and counts once."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            setattr(part, name, made[id(parameter)])


def return_memory() -> None:
    """Give freed memory back to the system: threads that read a block each keep what they freed, and it adds up.

    Only the C library of GNU systems keeps it and can be told.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def _in_one_thread() -> Generator[None]:
    """Have Transformers read tensors in the thread that asks for them: a CUDA stream belongs to a thread."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


def around(model: nn.Module, blocks: str) -> list[tuple[str, nn.Parameter]]:
    """The parameters outside the blocks."""
    return [(name, p) for name, p in model.named_parameters() if not name.startswith(f"{blocks}.")]


class Conversions:
    """What ``from_pretrained`` does to the tensors of a checkpoint on their way into a model, for some of them.

    Without them, in a version of Transformers that has them elsewhere, keys have to be those of the modules.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        try:
            from transformers.conversion_mapping import get_model_conversion_mapping

            self._mapping: list[Any] | None = get_model_conversion_mapping(model)
        except ImportError:
            self._mapping = None

    def targets(self, keys: Iterable[str]) -> dict[str, str]:
        """The parameter every key of the checkpoint ends up in."""
        known = self._model.state_dict()
        if self._mapping is None:
            return {key: key for key in keys}
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        renamings = [one for one in self._mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in self._mapping if isinstance(one, WeightConverter)]
        prefix = self._model.base_model_prefix

        def target(key: str) -> str:
            renamed: str = rename_source_key(key, renamings, converters, prefix, known)[0]
            if renamed in known or key not in known:
                return renamed
            return str(rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=known)[0])

        return {key: target(key) for key in keys}

    def unexpected(self, targets: Mapping[str, str]) -> list[str]:
        """The keys of the checkpoint that the model has no place for and does not say it can do without."""
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
        """Put tensors of the checkpoint into the modules they belong to.

        Raises:
            ModelError: there are no conversions and the keys do not fit as they are.
        """
        model, dtype = self._model, self._model.dtype
        if self._mapping is None:
            _load_plain(model, tensors, device)
            return
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        options = LoadStateDictConfig(
            weight_mapping=self._mapping,  # the same objects every time: they remember which of them were used
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            device_map={"": device or "cpu"},
        )
        parameters = inspect.signature(convert_and_load_state_dict_in_model).parameters
        more = {"tp_plan": None} if "tp_plan" in parameters else {}
        convert_and_load_state_dict_in_model(model=model, state_dict=dict(tensors), load_config=options, **more)


def _load_plain(model: PreTrainedModel, tensors: Mapping[str, Any], device: torch.device | None) -> None:
    known = model.state_dict().keys()
    foreign = [key for key in tensors if key not in known]
    if foreign:
        raise ModelError(
            f"this version of Transformers cannot convert {foreign[0]} alone; update it, or leave out --stream."
        )
    whole = {key: value[:].to(device or "cpu", model.dtype) for key, value in tensors.items()}
    model.load_state_dict(whole, strict=False, assign=True)


def disk_tensors(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names, and in the layout, of a checkpoint."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted


class ShardWriter:
    """Writes a model's blocks as they are finished, one shard each, and the rest at the end."""

    def __init__(self, model: PreTrainedModel, blocks: str, folder: Path) -> None:
        self._model = model
        self._blocks = blocks
        self._folder = folder
        self._count = len(list(model.get_submodule(blocks).children())) + 1
        self._files: dict[str, str] = {}
        self._bytes = 0

    def write_block(self, index: int) -> None:
        """Write block ``index``, which is resident."""
        prefix = f"{self._blocks}.{index}"
        state = self._model.get_submodule(prefix).state_dict()
        self._write({f"{prefix}.{name}": tensor for name, tensor in state.items()}, index + 1)

    def write_rest(self) -> None:
        """Write everything that is not written yet, and the index of all shards."""
        tied = getattr(self._model, "all_tied_weights_keys", {})
        rest = {
            name: tensor
            for name, tensor in self._model.state_dict().items()
            if not tensor.is_meta and name not in tied and not self._written_buffer(name)
        }
        self._write(rest, self._count)
        index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(self._files.items()))}
        (self._folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _written_buffer(self, name: str) -> bool:
        """Whether this is a block's buffer, which stays when the block goes and was written with it."""
        if not name.startswith(f"{self._blocks}."):
            return False
        return name not in dict(self._model.named_parameters())

    def _write(self, tensors: Mapping[str, Tensor], number: int) -> None:
        stored = {key: t.detach().contiguous().cpu() for key, t in disk_tensors(self._model, tensors).items()}
        name = f"model-{number:05d}-of-{self._count:05d}.safetensors"
        save_file(_apart(stored), self._folder / name, metadata={"format": "pt"})
        self._files |= dict.fromkeys(stored, name)
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none sharing memory with another, which safetensors refuses."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size()
        apart[key] = tensor.clone() if shared and tensor.numel() else tensor
        seen.add(storage.data_ptr())
    return apart


class WeightLoading(Protocol):
    """Makes one block's parameters present."""

    device: torch.device | None
    """Where blocks run; None: where the model is."""

    def __call__(self, index: int) -> AbstractContextManager[None]:
        """A context in which block ``index`` can be run, read and changed."""
        ...


class InMemory:
    """Every block is there all the time."""

    device: torch.device | None = None

    def __call__(self, index: int) -> AbstractContextManager[None]:
        return nullcontext()
