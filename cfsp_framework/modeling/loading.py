"""Find and open a model: a folder, a Hub id, or ``demo``. Only safetensors, and no code of the checkpoint by default."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils import logging as transformers_logging

from cfsp_framework.config import RunConfig
from cfsp_framework.errors import CfspError, ConfigError, ModelError, one_line
from cfsp_framework.modeling.meta_init import without_weights
from cfsp_framework.modeling.weight_files import check_weights
from cfsp_framework.runtime.atomic_files import LICENCE_FILES
from cfsp_framework.runtime.distributed import SOLO, Ranks
from cfsp_framework.runtime.hashing import hash_file

_HASHES_AT_ONCE = 4
_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py", "README.md", *LICENCE_FILES)


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, where both came from, and the device to run on.

    With ``--stream`` the model's parameters are on the meta device.
    """

    model: PreTrainedModel
    tokenizer: Any
    source: str
    folder: Path
    fingerprint: str
    device: torch.device


def load_model(config: RunConfig, ranks: Ranks = SOLO) -> LoadedModel:
    """Open ``config.model.source`` on the chosen device, in the chosen dtype.

    Raises:
        ModelError: it cannot be found, is not a causal LM, has no safetensors, or needs code that was not allowed.
    """
    silence_transformers()
    options = config.model
    folder = resolve(options.source)
    device = pick_device(options.device)
    check_checkpoint(folder, trust_remote_code=options.trust_remote_code)
    with _opening(f"model {options.source!r}"):
        if options.stream:
            model = open_on_meta(folder, options.dtype, trust_remote_code=options.trust_remote_code)
        elif options.device_map == "auto":
            model = open_spread(folder, options.dtype, trust_remote_code=options.trust_remote_code)
        else:
            model = open_model(folder, options.dtype, device=device, trust_remote_code=options.trust_remote_code)
        identity = ranks.agree(fingerprint(folder) if ranks.first else "")
    with _opening(f"the tokenizer of model {options.source!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=options.trust_remote_code)
    return LoadedModel(model, tokenizer, options.source, folder, identity, device)


@contextmanager
def _opening(subject: str) -> Generator[None]:
    """Raise a ModelError for the errors of Transformers on wrong files, which have no common class."""
    try:
        yield
    except (CfspError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        reason = one_line(error)
        raise ModelError(f"{subject}: its safetensors are damaged ({reason}); fetch or write them again.") from error
    except Exception as error:
        raise ModelError(f"{subject} cannot be opened: {one_line(error)[:300]}") from error


def open_model(
    folder: Path, dtype: str = "auto", *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Open the checkpoint in ``folder``, in evaluation mode.

    Raises:
        ModelError: the checkpoint lacks a parameter, or has one that does not fit.
    """
    opened: Any = _from_pretrained(folder, dtype, trust_remote_code).to(device)  # type: ignore[arg-type]
    model: PreTrainedModel = opened.eval()
    return model


def open_spread(folder: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Open the checkpoint in ``folder`` spread over all GPUs by accelerate.

    Raises:
        ModelError: they do not hold it.
    """
    model: PreTrainedModel = _from_pretrained(folder, dtype, trust_remote_code, device_map="auto").eval()
    offloaded = sum(parameter.is_meta for parameter in model.parameters())
    if offloaded:
        raise ModelError(
            f"--device-map auto: {offloaded} parameters do not fit on the devices; give --stream, "
            "which reads one block at a time."
        )
    return model


def open_on_meta(path: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the model of a checkpoint, or of a ``config.json``, with parameters on the meta device; buffers are real."""
    config, auto = _read_config(path, trust_remote_code)
    torch_dtype = stored_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    with without_weights():
        model: PreTrainedModel = auto.from_config(config, dtype=torch_dtype, trust_remote_code=trust_remote_code).eval()
    model.tie_weights()  # moving parameters to the meta device one by one unties them
    return model


def build_from_config(config: RunConfig) -> tuple[PreTrainedModel, torch.dtype]:
    """Build ``config.model.source`` on the meta device; return it and the dtype its weights are stored in.

    A configuration is enough: the source may also be its file, or a folder that holds nothing else.

    Raises:
        ModelError: it cannot be found, is not a causal LM, or needs code that was not allowed.
    """
    silence_transformers()
    options = config.model
    given = Path(options.source).expanduser()
    path = given if given.is_file() else resolve(options.source, ("config.json",))
    check_config(path, trust_remote_code=options.trust_remote_code)
    with _opening(f"model {options.source!r}"):
        stored = stored_dtype(_read_config(path, options.trust_remote_code)[0])
        return open_on_meta(path, options.dtype, trust_remote_code=options.trust_remote_code), stored


def stored_dtype(config: Any) -> torch.dtype:
    """Return the dtype that a checkpoint's configuration names for its weights."""
    named = config.dtype or getattr(config.get_text_config(), "dtype", None)
    dtype: torch.dtype = getattr(torch, named) if isinstance(named, str) else named or torch.float32
    return dtype


def _read_config(path: Path, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a checkpoint's configuration and the Auto class that builds its model.

    Of a vision-language model the text decoder is pruned.
    """
    config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    own_code = trust_remote_code and hasattr(config, "auto_map")
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return config, AutoModelForImageTextToText if sees and not own_code else AutoModelForCausalLM


def _from_pretrained(folder: Path, dtype: str, trust_remote_code: bool, **options: Any) -> PreTrainedModel:
    """Open a checkpoint; refuse missing weights, which Transformers initialises at random and only logs."""
    _, auto = _read_config(folder, trust_remote_code)
    options |= {"dtype": dtype, "use_safetensors": True, "trust_remote_code": trust_remote_code}
    opened: tuple[PreTrainedModel, Any] = auto.from_pretrained(folder, output_loading_info=True, **options)
    model, info = opened
    wrong = [*info["missing_keys"], *info["mismatched_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ModelError(f"the weights in {folder} do not fit the model, first of {len(wrong)}: {wrong[0]}.")
    return model


def resolve(source: str, files: Sequence[str] = _CHECKPOINT_FILES) -> Path:
    """Return the local folder of a model; of a Hub id, download the ``files`` that match these patterns.

    Raises:
        ModelError: the folder does not exist, and the Hub does not have it or cannot be reached.
    """
    if source == "demo":
        from cfsp_framework.data.demo import MODEL_FOLDER

        return MODEL_FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"model {source!r}: no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # the network and the Hub raise many classes
        raise ModelError(f"model {source!r}: no such folder, and {_explain_hub_error(error)}") from error


def _explain_hub_error(error: Exception) -> str:
    from huggingface_hub import errors

    match error:
        case errors.GatedRepoError():
            return "the Hub gives it only to those who accepted its terms; do so, then `hf auth login`."
        case errors.RepositoryNotFoundError():
            return "the Hub has no model of that name; a private one needs `hf auth login`."
        case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() | ConnectionError():
            return "the Hub cannot be reached."
        case _:
            return f"the Hub does not give it: {one_line(error)}"


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse, before loading, a folder without a causal LM in safetensors, or with code that was not allowed.

    Raises:
        ModelError: it is one of these, or a file of weights is damaged or lies elsewhere.
    """
    check_config(folder, trust_remote_code=trust_remote_code)
    check_weights(folder)


def check_config(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder, or a configuration file, that is not of a causal LM or needs code that was not allowed.

    Raises:
        ModelError: it is one of these, or cannot be read.
    """
    path = folder if folder.is_file() else folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} is not a model: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is not a model: its config.json cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder} is not a model: its config.json holds no settings.")
    family, names = config.get("model_type"), config.get("architectures") or []
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if not (any(name.endswith(heads) for name in names) if names else family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = f"a {', '.join(names)}" if names else f"of the family {family!r}"
        raise ModelError(f"{folder} is {kind}, not a causal language model.")
    if family in CONFIG_MAPPING or (trust_remote_code and config.get("auto_map")):
        return
    if config.get("auto_map"):
        raise ModelError(f"{folder} needs the Python code it brings along; read it, then give --trust-remote-code.")
    raise ModelError(f"{folder}: Transformers {transformers.__version__} does not know the family {family!r}.")


def pick_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` is a GPU if this machine has one.

    Raises:
        ConfigError: it is not a device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"--device {name}: not supported; use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: this PyTorch sees {torch.cuda.device_count() or 'no'} GPU here.")
    return device


def fingerprint(folder: Path) -> str:
    """Return SHA-256 over the configuration and the SHA-256 of every file of weights, whose names do not count."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    with ThreadPoolExecutor(_HASHES_AT_ONCE) as pool:  # hashing releases the GIL
        for digest in pool.map(hash_file, sorted(folder.glob("*.safetensors"))):
            total.update(bytes.fromhex(digest))
    return total.hexdigest()


def silence_transformers() -> None:
    """Keep Transformers' progress bars and advice off the terminal; errors still raise."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
