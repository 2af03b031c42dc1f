"""The demo model that ships with the package, and the text it was trained and is evaluated on.

Nothing heavy is imported here: `corpus` is plain standard library; `train`, the script that made the model, needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

MODEL_FOLDER: Final[Path] = Path(__file__).parent / "model"
"""The checkpoint; `AutoModelForCausalLM.from_pretrained` opens it."""

__all__ = ["MODEL_FOLDER"]
