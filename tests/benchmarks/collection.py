"""Compare a run with a plain forward: seconds and memory of collect + plan + cut, and their ratio.

    python tests/benchmarks/collection.py MODEL DATA [--samples 64] [--seqlen 512] [--rounds 5] [--dtype float32] [--preset cfsp]

The forward of the base model (no head) and the run alternate in one process, so that a drifting machine drifts for
both; the ratio is the median of the rounds' ratios. Memory is measured in a fresh child process: its peak over what it
held when everything but the model and the windows was imported.
"""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from cfsp_framework.config import RunConfig, layered
from cfsp_framework.engine.replay import tokens_per_batch
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.run import steps
from cfsp_framework.run.context import RunContext, sequence_length, set_up
from cfsp_framework.runtime.progress import Progress
from common import make_parser, reset_peak, status_bytes


@torch.no_grad()
def plain_forward(context: RunContext, batch_size: int) -> float:
    """Return the seconds of the base model over the calibration windows."""
    assert context.windows is not None
    start = time.perf_counter()
    for ids in context.windows.split(batch_size):  # (B, T)
        context.decoder.base(ids.to(context.decoder.model.device), use_cache=False)
    return time.perf_counter() - start


def run(context: RunContext) -> float:
    """Return the seconds of collect + plan + cut, compensation included, on a copy of the model."""
    model = copy.deepcopy(context.decoder.model)
    context = replace(context, decoder=Decoder(model, context.decoder.architecture))
    start = time.perf_counter()
    run_in_place(context)
    return time.perf_counter() - start


def run_in_place(context: RunContext) -> None:
    """Collect, plan and cut the model itself."""
    measurements = steps.measure(context)
    steps.cut(context, steps.make_plan(context, measurements), measurements, folder=Path())  # nothing is written


def measure_time(config: RunConfig, rounds: int) -> dict[str, float]:
    context = set_up(config, Progress())
    seqlen = sequence_length(config, context.loaded)
    batch_size = config.calibration.batch_size or max(1, tokens_per_batch(context.decoder.device) // seqlen)
    forwards, runs = [], []
    for _ in range(rounds + 1):
        forwards.append(plain_forward(context, batch_size))
        runs.append(run(context))
    ratios = [after / before for before, after in zip(forwards[1:], runs[1:], strict=True)]  # the first round warms up
    return {
        "forward_seconds": statistics.median(forwards[1:]),
        "run_seconds": statistics.median(runs[1:]),
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
    }


def measure_memory(config: RunConfig) -> dict[str, float]:
    """Measure the peak of one run over the interpreter's memory, beside the model and the hidden states."""
    context = set_up(config.replace(samples=1), Progress())  # imports, the tokenizer, the text
    vocabulary = context.decoder.config.vocab_size
    seqlen = sequence_length(config, context.loaded)
    model = sum(p.numel() * p.element_size() for p in context.decoder.model.parameters())
    width = context.decoder.feed_forwards(0)[0].hidden
    hidden = config.calibration.samples * seqlen * width * context.decoder.model.dtype.itemsize
    run(context)  # one window: the code pages of what runs belong to the interpreter
    windows = torch.randint(
        vocabulary, (config.calibration.samples, seqlen), generator=torch.Generator().manual_seed(0)
    )
    context = replace(context, windows=windows)
    reset_peak()  # freed memory would hide what the run takes
    before = status_bytes("VmRSS") - model
    run_in_place(context)
    peak = status_bytes("VmHWM") - before
    return {"model_bytes": model, "hidden_bytes": hidden, "peak_bytes": peak, "peak_over_both": peak / (model + hidden)}


def main() -> None:
    defaults = {"samples": 64, "seqlen": 512, "rounds": 5, "dtype": "auto", "preset": "cfsp", "memory": False}
    options = make_parser(__doc__, "model", "data", **defaults).parse_args()
    given = {name: getattr(options, name) for name in ("model", "samples", "seqlen", "dtype")}
    config = layered(options.preset, None, {**given, "calibration": options.data})
    if options.memory:
        print(json.dumps(measure_memory(config)))
        return
    figures = measure_time(config, options.rounds)
    child = subprocess.run([sys.executable, *sys.argv, "--memory"], capture_output=True, text=True, check=True)
    figures |= json.loads(child.stdout)
    settings = {"threads": torch.get_num_threads(), "preset": options.preset, "dtype": options.dtype}
    print(json.dumps({**settings, **figures}, indent=2))


if __name__ == "__main__":
    main()
