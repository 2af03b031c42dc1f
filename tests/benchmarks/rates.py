"""Measure the rates behind `cfsp plan --estimate` on this machine, for longer than the command does.

    python tests/benchmarks/rates.py [--seconds 1] [--megabytes 1024] [--folder FOLDER] [--json]

FLOP/s of a block's feed-forward on 512 tokens (16384 on a GPU) by dtype, hidden size and threads, of a Gram matrix,
and bytes/s of the disk. Files are written to FOLDER, by default that of temporary files.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from cfsp_framework.benchmark.hardware import copy_rate, disk_rates, gram_rate, hash_rate, product_rate
from common import make_parser


def compute_rates(device: torch.device, seconds: float) -> dict[str, float]:
    """Measure FLOP/s by dtype, size and threads."""
    rates: dict[str, float] = {}
    for threads in (1, 2) if device.type == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        for dtype in ("float32", "bfloat16", "float64"):
            for hidden in (1024, 1536, 2048) if dtype != "float64" else (1024,):
                name = f"{dtype}, D {hidden if device.type == 'cpu' else 4 * hidden}, threads {threads}"
                rates[name] = product_rate(dtype, device, hidden=hidden, seconds=seconds)
        for width in (2048, 4096):
            rates[f"Gram float32, F {width}, threads {threads}"] = gram_rate(device, width=width, seconds=seconds)
    return rates


def byte_rates(device: torch.device, folder: Path | None, megabytes: int) -> dict[str, float]:
    """Measure bytes/s of the disk, the median of three, of SHA-256 and of copies to a GPU."""
    rounds = [disk_rates(folder, megabytes=megabytes) for _ in range(3)]
    write, cold, cached = (sorted(values)[1] for values in zip(*rounds, strict=True))
    rates = {"write": write, "read": cold, "read again": cached, "SHA-256": hash_rate(512)}
    return rates | ({"to device": copy_rate(device, 1024)} if device.type == "cuda" else {})


def main() -> None:
    options = make_parser(__doc__, seconds=1.0, megabytes=1024, folder=None, json=False).parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = compute_rates(device, options.seconds)
    moved = byte_rates(device, options.folder and Path(options.folder), options.megabytes)
    if not options.json:
        print("| product | GFLOP/s |\n|---|---:|")
        print("\n".join(f"| {name} | {rate / 1e9:.0f} |" for name, rate in flops.items()))
        print("\n| transfer | GB/s |\n|---|---:|")
        print("\n".join(f"| {name} | {rate / 1e9:.2f} |" for name, rate in moved.items()), end="\n\n")
    print(json.dumps({"device": device.type, "cores": os.cpu_count(), "flops": flops, "bytes": moved}, indent=2))


if __name__ == "__main__":
    main()
