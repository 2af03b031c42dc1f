"""Finding and opening a model: a folder, a Hub id, or ``demo``. Only safetensors, no code it brings along."""

from __future__ import annotations

import hashlib
import json
import re
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
from cfsp_framework.errors import CfspError, ConfigError, ModelError
from cfsp_framework.modeling.meta_init import without_weights
from cfsp_framework.runtime.atomic_files import LICENCE_FILES
from cfsp_framework.runtime.distributed import SOLO, Ranks

_CHUNK = 1 << 22
_HASHES_AT_ONCE = 4
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHECKPOINT_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py", "README.md", *LICENCE_FILES)


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, where both came from, and the device it is for.

    With ``--stream`` the model's parameters are not there yet.
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
        ModelError: it cannot be found, is no causal LM, has no safetensors, or needs code that was not allowed.
    """
    quiet()
    folder = resolve(config.model.source)
    device = pick_device(config.model.device)
    check_checkpoint(folder, trust_remote_code=config.model.trust_remote_code)
    with _opening(f"model {config.model.source!r}"):
        if config.model.stream:
            model = open_skeleton(folder, config.model.dtype, trust_remote_code=config.model.trust_remote_code)
        elif config.model.device_map == "auto":
            model = open_spread(folder, config.model.dtype, trust_remote_code=config.model.trust_remote_code)
        else:
            model = open_model(
                folder, config.model.dtype, device=device, trust_remote_code=config.model.trust_remote_code
            )
        identity = ranks.agree(fingerprint(folder) if ranks.first else "")
    with _opening(f"the tokenizer of model {config.model.source!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.model.trust_remote_code)
    return LoadedModel(model, tokenizer, config.model.source, folder, identity, device)


@contextmanager
def _opening(what: str) -> Generator[None]:
    """Turn whatever Transformers raises on files that are wrong, which has no common class, into a ModelError."""
    try:
        yield
    except (CfspError, MemoryError, torch.OutOfMemoryError):
        raise
    except SafetensorError as error:
        reason = _one_line(error).rstrip(".")
        raise ModelError(f"{what}: its safetensors are damaged ({reason}); fetch or write them again.") from error
    except Exception as error:
        raise ModelError(f"{what} cannot be opened: {_one_line(error)}") from error


def open_model(
    folder: Path, dtype: str = "auto", *, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The checkpoint in ``folder``, in evaluation mode; every parameter comes from it or it is refused."""
    opened: Any = _from_pretrained(folder, dtype, trust_remote_code).to(device)  # type: ignore[arg-type]
    model: PreTrainedModel = opened.eval()
    return model


def open_spread(folder: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The checkpoint in ``folder`` where accelerate puts it, on all GPUs there are.

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


def open_skeleton(folder: Path, dtype: str = "auto", *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a checkpoint without its parameters, which are on the meta device; buffers are there."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    wanted = stored_dtype(config) if dtype == "auto" else getattr(torch, dtype)
    auto = _auto_class(config, own_code=trust_remote_code and hasattr(config, "auto_map"))
    with without_weights():
        model: PreTrainedModel = auto.from_config(config, dtype=wanted, trust_remote_code=trust_remote_code).eval()
    return model


def stored_dtype(config: Any) -> torch.dtype:
    """The dtype a checkpoint's configuration says its weights have."""
    named = config.dtype or getattr(config.get_text_config(), "dtype", None)
    dtype: torch.dtype = getattr(torch, named) if isinstance(named, str) else named or torch.float32
    return dtype


def _from_pretrained(folder: Path, dtype: str, trust_remote_code: bool, **more: Any) -> PreTrainedModel:
    """Transformers re-initialises what a checkpoint lacks and only logs it; here that is an error."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    auto = _auto_class(config, own_code=trust_remote_code and hasattr(config, "auto_map"))
    loaded: Any = auto.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True, **more
    )
    model, told = loaded
    wrong = [*told["missing_keys"], *told["mismatched_keys"], *told["unexpected_keys"]]
    if wrong:
        raise ModelError(f"the weights in {folder} do not fit the model, first of {len(wrong)}: {wrong[0]}.")
    opened: PreTrainedModel = model
    return opened


def _auto_class(config: Any, *, own_code: bool) -> Any:
    """A causal LM's, or that of a model that also sees, whose text decoder is the one to prune."""
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForImageTextToText if sees and not own_code else AutoModelForCausalLM


def sketch_model(config: RunConfig) -> tuple[PreTrainedModel, torch.dtype]:
    """``config.model.source`` without its weights, on the meta device, and the dtype they are stored in.

    A configuration is enough: ``config.model.source`` may also be its file, or a folder that holds nothing else.

    Raises:
        ModelError: it cannot be found, is no causal LM, or needs code that was not allowed.
    """
    quiet()
    given = Path(config.model.source).expanduser()
    path = given if given.is_file() else resolve(config.model.source, ("config.json",))
    check_config(path, trust_remote_code=config.model.trust_remote_code)
    trusted: dict[str, Any] = {"trust_remote_code": config.model.trust_remote_code}
    with _opening(f"model {config.model.source!r}"):
        settings: Any = AutoConfig.from_pretrained(path, **trusted)
        stored = stored_dtype(settings)
        auto = _auto_class(settings, own_code=config.model.trust_remote_code and hasattr(settings, "auto_map"))
        with torch.device("meta"):
            dtype = stored if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
            model: PreTrainedModel = auto.from_config(settings, dtype=dtype, **trusted)
    return model, stored


def resolve(source: str, files: Sequence[str] = _CHECKPOINT_FILES) -> Path:
    """The local folder of a model; of a Hub id the ``files`` that fit these patterns are downloaded.

    Raises:
        ModelError: there is no such folder, and the Hub does not have it or cannot be reached.
    """
    if source == "demo":
        from cfsp_framework.data.demo import MODEL_FOLDER

        return MODEL_FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"model {source!r}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # whatever the network and the Hub raise
        raise ModelError(f"model {source!r}: there is no such folder, and {_hub_refusal(error)}") from error


def _hub_refusal(error: Exception) -> str:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    match error:
        case GatedRepoError():
            return "the Hub gives it only to those who accepted its terms; do so, then `hf auth login`."
        case RepositoryNotFoundError():
            return "the Hub has no model of that name; a private one needs `hf auth login`."
        case LocalEntryNotFoundError() | OfflineModeIsEnabled() | ConnectionError():
            return "the Hub cannot be reached."
        case _:
            return f"the Hub does not give it: {_one_line(error)}"


def check_checkpoint(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse, before anything is loaded, what is no causal LM in safetensors or needs code that was not allowed."""
    check_config(folder, trust_remote_code=trust_remote_code)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no safetensors. Pickled weights can run code when they are opened and are refused; "
            "convert them with save_pretrained first."
        )


def check_config(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuse a folder, or a configuration file, that is of no causal LM or needs code that was not allowed."""
    path = folder if folder.is_file() else folder / "config.json"
    if not path.exists():
        raise ModelError(f"{folder} is no model: it has no config.json.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model: its config.json cannot be read: {_one_line(error)}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{folder} is no model: its config.json holds no settings.")
    family, names = config.get("model_type"), config.get("architectures") or []
    heads = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    if not (any(name.endswith(heads) for name in names) if names else family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        found = f"a {', '.join(names)}" if names else f"of the family {family!r}"
        raise ModelError(f"{folder} is {found}, not a causal language model.")
    if family not in CONFIG_MAPPING and not (trust_remote_code and config.get("auto_map")):
        if config.get("auto_map"):
            raise ModelError(f"{folder} needs the Python code it brings along; read it, then give --trust-remote-code.")
        raise ModelError(f"{folder}: Transformers {transformers.__version__} does not know the family {family!r}.")


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is a GPU where there is one."""
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
    """SHA-256 over the configuration and the SHA-256 of every file of weights, whatever the files are called."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    with ThreadPoolExecutor(_HASHES_AT_ONCE) as pool:  # hashing lets go of the interpreter's lock
        for digest in pool.map(_file_hash, sorted(folder.glob("*.safetensors"))):
            total.update(bytes.fromhex(digest))
    return total.hexdigest()


def _file_hash(path: Path) -> str:
    """SHA-256 of a file, which the Hub's cache has in the name of what the file links to."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def context_length(model: PreTrainedModel) -> int | None:
    """The longest sequence the model was built for, where its configuration says."""
    values = model.config.get_text_config().to_dict()
    length = values.get("max_position_embeddings") or values.get("n_positions")
    return int(length) if length else None


def quiet() -> None:
    """Keep Transformers' own bars and advice off the terminal; errors still come as exceptions."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def _one_line(error: Exception) -> str:
    """The first sentence of an error, with its class where it has hardly any words."""
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z])", " ".join(str(error).split()))[0].rstrip(".")
    named = sentence if sentence.count(" ") > 1 else f"{type(error).__name__}: {sentence}".rstrip(": ")
    return f"{named[:300]}."
