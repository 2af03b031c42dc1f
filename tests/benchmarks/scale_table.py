"""Print the estimates of docs/scale.md: Llama-3 shapes on machines with GPUs, 128 windows of 2048 tokens.

    python tests/benchmarks/scale_table.py

Nothing is measured: every rate is nominal, times an assumed efficiency (`cfsp_framework/benchmark/hardware.py`).
"""

from __future__ import annotations

import tempfile
from typing import Any

from transformers import LlamaConfig

from cfsp_framework.benchmark.hardware import NOMINAL
from cfsp_framework.cli.tables import human_seconds, rough_bytes
from cfsp_framework.config import RunConfig, layered
from cfsp_framework.estimate.estimate import Way, estimate, plan_workload
from cfsp_framework.estimate.model_shape import ModelShape, measure_shape
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.selection import select
from cfsp_framework.modeling.loading import build_from_config

SHAPES: dict[str, dict[str, Any]] = {
    "8B": {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64},
    "405B": {"hidden_size": 16384, "num_hidden_layers": 126, "intermediate_size": 53248, "num_attention_heads": 128},
}
COMMON: dict[str, Any] = {
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
    "architectures": ["LlamaForCausalLM"],
}
HEADINGS = (
    "model", "on", "weights", "load", "collect", "cut", "save, verify", "total", "host", "each GPU", "bound by",
)  # fmt: skip


def open_shape(size: str, preset: str) -> tuple[RunConfig, ModelShape]:
    """Return a run's configuration and the shape of a Llama of which only the configuration exists."""
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**SHAPES[size], **COMMON).save_pretrained(folder)
        config = layered(preset, None, {"model": folder, "samples": 128, "seqlen": 2048})
        return config, measure_shape(*build_from_config(config))


def row(size: str, way: Way) -> list[str]:
    """Format one way of running it."""
    seconds = way.seconds
    finish = seconds.get("save", 0) + seconds["verify"]
    times = (seconds["load"], seconds["collect"], seconds["cut"], finish, way.total)
    memory = (rough_bytes(way.host_bytes), rough_bytes(way.device_bytes))
    weights = "streamed" if way.streamed else "in memory"
    return [size, way.hardware, weights, *map(human_seconds, times), *memory, way.bound]


def print_shapes() -> None:
    print("| model | parameters | weights | a block | FLOPs per token | hidden states | Gram of a block | written |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for size in SHAPES:
        _, shape = open_shape(size, "cfsp")
        block, hidden = shape.blocks[0], 128 * 2048 * shape.hidden * shape.element_size
        written = shape.bytes - sum(f.parameters for b in shape.blocks for f in b.feed_forwards)  # half of two bytes
        counted = [rough_bytes(n) for n in (shape.bytes, block.bytes, hidden, 4 * shape.widest**2, written)]
        sizes = [f"{shape.parameters / 1e9:.2f} G", *counted[:2], f"{shape.flops_per_token(2048) / 1e9:.0f} G"]
        print(f"| {' | '.join([size, *sizes, *counted[2:]])} |")


def print_ways(preset: str) -> None:
    print(f"| {' | '.join(HEADINGS)} |\n|---|---|---|{'---:|' * 7}---|")
    too_large: dict[str, list[str]] = {}
    for size in SHAPES:
        config, shape = open_shape(size, preset)
        workload = plan_workload(config, select(config, load_plugins()), shape.context)
        for hardware in NOMINAL:
            for way in estimate(shape, workload, hardware):
                if way.fits:
                    print(f"| {' | '.join(row(size, way))} |")
                else:
                    how = f"{size} {'streamed' if way.streamed else 'in memory'}"
                    too_large.setdefault(how, []).append(f"{rough_bytes(way.device_bytes)} ({way.hardware})")
    for how, peaks in too_large.items():
        print(f"\n{how} does not fit: a GPU would need {', '.join(peaks)}.")


def main() -> None:
    print_shapes()
    for preset in ("cfsp", "cfsp-closed-form"):
        print(f"\n`{preset}`:\n")
        print_ways(preset)


if __name__ == "__main__":
    main()
