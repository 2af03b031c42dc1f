"""Test which versions of Transformers open pruned checkpoints, in which way, and whether the logits are equal.

    pip install --no-deps --target tf-5.14.1 transformers==5.14.1 'huggingface_hub<2' 'tokenizers<=0.23.0' httpx httpcore h11
    python tests/benchmarks/transformers_versions.py [--model demo] [--target tf-5.14.1 ...]

One model is pruned with widths that differ and with equal ones, and the first is exported as padded. Every way to open
them is tried in a process of its own with each of the folders put first on the path, and with what is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from cfsp_framework import RunConfig, prune
from cfsp_framework.export.export import export_padded
from cfsp_framework.modeling.loading import open_model, silence_transformers
from common import make_parser

WAYS = ("plain", "import", "remote")
SCRIPT = """
import sys
way, folder, expected = sys.argv[1:]
sys.argv = sys.argv[:1]
if way == "import":
    import cfsp_framework
else:
    sys.modules["cfsp_framework"] = None
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__, logging
logging.set_verbosity_error()
try:
    kept = load_file(expected)
    options = {"trust_remote_code": True} if way == "remote" else {}
    model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    with torch.no_grad():
        difference = (model(kept["ids"]).logits - kept["logits"]).abs().max().item()
    AutoTokenizer.from_pretrained(folder)
    model.generate(kept["ids"][:, :4], max_new_tokens=4)
    print("equal" if difference == 0 else f"off by {difference:.2g}")
except Exception as error:
    print(f"{type(error).__name__}")
print(__version__)
"""


def write_checkpoints(model: str, place: Path) -> dict[str, Path]:
    """Write the checkpoints to open, and beside each its logits."""
    for name, allocator in (("widths differ", "cfsp"), ("equal widths", "uniform")):
        config = RunConfig.build(
            model=model, allocator=allocator, samples=16, seqlen=128, round_to=16, device="cpu", dtype="float32"
        )
        prune(config, place / name)
    export_padded(RunConfig.build(model=str(place / "widths differ"), device="cpu"), place / "padded")
    folders = {name: place / name for name in ("widths differ", "equal widths", "padded")}
    for folder in folders.values():
        opened = open_model(folder)
        ids = torch.randint(3, opened.config.vocab_size, (1, 32), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            save_file({"ids": ids, "logits": opened(ids).logits}, f"{folder}.safetensors")
    return folders


def attempt(way: str, folder: Path, target: Path | None, home: Path) -> tuple[str, str]:
    """Open a checkpoint in another process; return the outcome and the version of Transformers."""
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if target:
        environment["PYTHONPATH"] = str(target.resolve())
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, way, str(folder), f"{folder}.safetensors"]
    done = subprocess.run(command, check=False, env=environment, cwd=home, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:100], "?"
    outcome, version = done.stdout.strip().splitlines()[-2:]
    return outcome, version


def main() -> None:
    """Print a row for each version and checkpoint."""
    parser = make_parser(__doc__, model="demo")
    parser.add_argument("--target", action="append", type=Path, default=[])
    given = parser.parse_args()
    silence_transformers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = write_checkpoints(given.model, Path(folder))
        for target in (None, *given.target):
            for name, checkpoint in checkpoints.items():
                tried = {way: attempt(way, checkpoint, target, Path(folder)) for way in WAYS}
                version = next((version for _, version in tried.values() if version != "?"), "?")
                outcomes = {way: outcome for way, (outcome, _) in tried.items()}
                print(f"{version}, {name}: {json.dumps(outcomes)}", flush=True)


if __name__ == "__main__":
    main()
