"""Compare estimates with measurements: two random Llamas, pruned in memory and streamed, on this machine's CPU.

    OMP_NUM_THREADS=1 python tests/benchmarks/scale_check.py [--presets cfsp cfsp-closed-form] [--rounds 3]

Every run is a fresh process that estimates, prunes, and estimates again, since the speed of a shared machine changes:
the estimate shown is the mean of both. The median round counts, by the ratio of the two. Memory is the peak since the
first estimate. Drawing the calibration windows is part of neither.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import make_parser, reset_peak, status_bytes

SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "large": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 7, "num_attention_heads": 16},
}
HEADINGS = (
    "weights", "preset", "run", "blocks estimated", "measured", "all estimated", "measured", "memory estimated",
    "measured",
)  # fmt: skip


def make_model(size: str, folder: Path) -> None:
    """Write a random Llama in float32 with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from cfsp_framework.modeling.loading import resolve

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=2048, max_position_embeddings=1024, tie_word_embeddings=True, **SIZES[size])  # type: ignore[arg-type]
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("demo")).save_pretrained(folder)


def run_once(folder: Path, preset: str, streamed: bool) -> dict[str, float]:
    """Return the seconds and bytes, estimated and measured, of one run in this process."""
    from cfsp_framework.benchmark.hardware import forget, sync
    from cfsp_framework.config import layered
    from cfsp_framework.estimate.estimate import estimate_run
    from cfsp_framework.pipeline import prune

    options: dict[str, Any] = {"model": str(folder), "samples": 16, "seqlen": 256, "device": "cpu", "stream": streamed}
    config = layered(preset, None, options)
    for path in folder.glob("*.safetensors"):
        sync(path)
        forget(path)
    before = estimate_run(config)
    reset_peak()  # that of the estimate
    report = prune(config, folder.parent / "out", overwrite=True).report
    peak = status_bytes("VmHWM")
    ways = [costs.ways[streamed] for costs in (before, estimate_run(config))]
    seconds = report.seconds
    return {
        "bytes": before.shape.bytes,
        "blocks_estimated": sum(way.collect for way in ways) / 2,
        "blocks": sum(seconds.get(phase, 0) for phase in ("collect", "plan", "cut", "compensate")),
        "estimated": sum(way.total for way in ways) / 2,
        "measured": sum(seconds.values()) - seconds["calibrate"],
        "memory_estimated": ways[0].host_bytes,
        "memory": peak,
    }


def measure(folder: Path, preset: str, streamed: bool, rounds: int) -> dict[str, float]:
    """Return the median of some runs, each in a process of its own."""
    command = [sys.executable, __file__, "--one", str(folder), preset, "stream" if streamed else "memory"]
    texts = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
    runs: list[dict[str, float]] = [json.loads(text.splitlines()[-1]) for text in texts]
    return sorted(runs, key=lambda run: run["measured"] / run["estimated"])[rounds // 2]


def main() -> None:
    parser = make_parser(__doc__, presets=["cfsp", "cfsp-closed-form"], rounds=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, preset, how = options.one
        print(json.dumps(run_once(Path(folder), preset, how == "stream")))
        return
    print(f"| {' | '.join(HEADINGS)} |\n|---:|---|---|{'---:|' * 6}")
    with tempfile.TemporaryDirectory(prefix="cfsp-scale-") as scratch:
        for size in SIZES:
            make_model(size, Path(scratch, size))
        for size in SIZES:
            for preset in options.presets:
                for streamed in (False, True):
                    run = measure(Path(scratch, size), preset, streamed, options.rounds)
                    times = [f"{run[k]:.1f} s" for k in ("blocks_estimated", "blocks", "estimated", "measured")]
                    memory = [f"{run[k] / 1e6:.0f} MB" for k in ("memory_estimated", "memory")]
                    cells = [f"{run['bytes'] / 1e6:.0f} MB", f"`{preset}`", "streamed" if streamed else "in memory"]
                    print(f"| {' | '.join([*cells, *times, *memory])} |", flush=True)


if __name__ == "__main__":
    main()
