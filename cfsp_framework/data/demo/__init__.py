"""The embedded default: a small language model, and the text it was trained and is measured on.

Nothing heavy is imported here. `corpus` is plain standard library; `train` is the script that made `MODEL_FOLDER`
and is the only module of this package that needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final[Path] = Path(__file__).parent / "model"
"""The checkpoint that ships inside the package; `AutoModelForCausalLM.from_pretrained` opens it."""

__all__ = ["MODEL_FOLDER"]
