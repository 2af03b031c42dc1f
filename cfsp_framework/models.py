"""Finding and opening a model: a folder, a Hub id, or ``demo``. Only safetensors, no code it brings along."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from .config import RunConfig
from .errors import ConfigError, ModelError

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
    check_checkpoint(folder)
    try:
        model = open_model(folder, config.dtype, device=device, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelError(f"model {config.model!r} cannot be opened: {_one_line(error)}") from error
    return LoadedModel(model, tokenizer, config.model, folder, fingerprint(folder))


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
        raise ModelError(
            f"model {source!r}: there is no such folder, and the Hub does not give it: {_one_line(error)}"
        ) from error


def check_checkpoint(folder: Path) -> None:
    """Refuse what is no causal LM in safetensors, before anything is loaded."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} is no model: config.json cannot be read ({_one_line(error)}).") from error
    names = config.get("architectures") or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        raise ModelError(f"{folder} is no causal language model: config.json names the architectures {names}.")
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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: this PyTorch sees no GPU here.")
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
    logging.getLogger("datasets").setLevel(logging.ERROR)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
