"""Finding and opening a model: a folder, a Hub id, or ``demo``. Only safetensors, no code it brings along."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from .config import RunConfig
from .errors import CfspError, ConfigError, ModelError

_CHUNK = 1 << 22


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory, its tokenizer, and where both came from."""

    model: PreTrainedModel
    tokenizer: Any
    source: str
    folder: Path
    fingerprint: str


def load_model(config: RunConfig) -> LoadedModel:
    """Open ``config.model`` on the chosen device, in the chosen dtype.

    Raises:
        ModelError: it cannot be found, is no causal LM, has no safetensors, or needs code that was not allowed.
    """
    quiet()
    folder = resolve(config.model)
    device = pick_device(config.device)
    check_checkpoint(folder, trust_remote_code=config.trust_remote_code)
    with _opening(f"model {config.model!r}"):
        model = open_model(folder, config.dtype, device=device, trust_remote_code=config.trust_remote_code)
        identity = fingerprint(folder)
    with _opening(f"the tokenizer of model {config.model!r}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    return LoadedModel(model, tokenizer, config.model, folder, identity)


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
    """The checkpoint in ``folder``, in evaluation mode; every parameter comes from it or it is refused.

    Transformers re-initialises what a checkpoint lacks and only logs it; here that is an error.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    model, told = loaded
    wrong = [*told["missing_keys"], *told["mismatched_keys"], *told["unexpected_keys"]]
    if wrong:
        raise ModelError(f"the weights in {folder} do not fit the model, first of {len(wrong)}: {wrong[0]}.")
    opened: PreTrainedModel = model.to(device).eval()
    return opened


def resolve(source: str) -> Path:
    """The local folder of a model; a Hub id is downloaded.

    Raises:
        ModelError: there is no such folder, and the Hub does not have it or cannot be reached.
    """
    if source == "demo":
        from .demo import MODEL_FOLDER

        return MODEL_FOLDER
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise ModelError(f"model {source!r}: there is no such folder.")
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py"])
        )
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
    if not (folder / "config.json").exists():
        raise ModelError(f"{folder} is no model: it has no config.json.")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
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
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no safetensors. Pickled weights can run code when they are opened and are refused; "
            "convert them with save_pretrained first."
        )


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
    """SHA-256 over the configuration and every byte of the weights, whatever the shards are called."""
    total = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
    return total.hexdigest()


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
