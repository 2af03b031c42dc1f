"""Compare memory and time with and without --stream: one random sharded Llama is pruned both ways.

    python tests/benchmarks/streaming.py [--gigabytes 1.3] [--samples 16] [--seqlen 256] [--dtype float32] [--rounds 1]

Each run is a fresh process that first prunes the demo model, so that the memory of the interpreter and its libraries
is known; printed is the peak of anonymous memory (which, unlike file pages, the system cannot drop) over that. The two
plans and every tensor of the two checkpoints have to be the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cfsp_framework import pipeline
from cfsp_framework.config import RunConfig
from cfsp_framework.data.demo import MODEL_FOLDER
from cfsp_framework.modeling.streaming import Shards
from common import make_parser, reset_peak, status_bytes

BLOCKS = 16


def make_model(folder: Path, gigabytes: float, dtype: torch.dtype) -> int:
    """Write a random sharded Llama with the demo model's tokenizer and return its bytes."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER)
    weights = gigabytes * 1e9 / dtype.itemsize / BLOCKS  # of a block: about 11 D² with F = 8/3 D and 8 of 32 kv heads
    hidden = max(256, round((weights / 10.5) ** 0.5 / 256) * 256)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=round(hidden * 8 / 3 / 128) * 128,
        num_hidden_layers=BLOCKS,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 256,
        max_position_embeddings=4096,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size="200MB")
    tokenizer.save_pretrained(folder)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class MemoryWatch:
    """Peak of this process's anonymous memory, sampled every 5 ms."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done.set()
        self._thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self._done.is_set():
            self.peak = max(self.peak, status_bytes("RssAnon"))
            time.sleep(0.005)


def measure(options: argparse.Namespace, model: Path, out: Path) -> dict[str, float]:
    """Measure the seconds of one run, and its memory over the interpreter's."""
    given = {"samples": options.samples, "seqlen": options.seqlen, "device": "cpu", "stream": options.stream}
    pipeline.prune(RunConfig.build(model="demo", **given | {"samples": 2}), out.with_name(f"{out.name}-demo"))
    reset_peak()
    before, watch, start, busy = status_bytes("RssAnon"), MemoryWatch(), time.perf_counter(), time.process_time()
    result = pipeline.prune(RunConfig.build(model=str(model), ratio=0.5, **given), out)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - busy
    phases = {f"{name}_seconds": value for name, value in result.report.seconds.items()}
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "interpreter_bytes": before,
        "added_bytes": watch.stop() - before,
        **phases,
    }


def same(left: Path, right: Path) -> bool:
    """Return whether two checkpoints hold equal tensors under equal names, and follow the same plan."""
    plans = [json.loads((folder / "pruning_plan.json").read_text())["blocks"] for folder in (left, right)]
    first, second = Shards(left), Shards(right)
    return (
        plans[0] == plans[1]
        and first.files.keys() == second.files.keys()
        and all(torch.equal(first.slices([key])[key][:], second.slices([key])[key][:]) for key in first.files)
    )


def main() -> None:
    defaults = {"gigabytes": 1.3, "samples": 16, "seqlen": 256, "dtype": "float32", "rounds": 1, "stream": False}
    parser = make_parser(__doc__, **defaults)
    parser.add_argument("--run", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(measure(options, *options.run)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model")
        size = make_model(model, options.gigabytes, getattr(torch, options.dtype))
        runs: dict[str, list[dict[str, float]]] = {"memory": [], "stream": []}
        for number in range(options.rounds):
            for way, flags in (("memory", []), ("stream", ["--stream"])):
                out = Path(scratch, f"{way}-{number}")
                command = [sys.executable, *sys.argv, *flags, "--run", str(model), str(out)]
                runs[way].append(
                    json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
                )
        middle = {
            way: {name: statistics.median(run[name] for run in rounds) for name in rounds[0]}
            for way, rounds in runs.items()
        }
        figures = {
            "model_bytes": size,
            "threads": torch.get_num_threads(),
            **middle,
            "same": same(Path(scratch, "memory-0"), Path(scratch, "stream-0")),
            "added_over_model": {way: run["added_bytes"] / size for way, run in middle.items()},
            "time_ratio": middle["stream"]["seconds"] / middle["memory"]["seconds"],
            "cpu_ratio": middle["stream"]["cpu_seconds"] / middle["memory"]["cpu_seconds"],
        }
        print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
