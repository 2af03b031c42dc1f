"""The rates that `cfsp plan --estimate` starts from, on this machine, measured for longer than it does.

    python tests/benchmarks/rates.py [--seconds 1] [--megabytes 1024] [--folder FOLDER] [--json]

FLOP/s of a block's feed-forward on 512 tokens (16384 on a GPU) by dtype, hidden size and threads, of a Gram matrix,
and bytes/s of the disk. Files are written to FOLDER, else where temporary files go.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import torch

from cfsp_framework.benchmark.hardware import copy_rate, disk_rates, gram_rate, hash_rate, product_rate


def compute_rates(device: torch.device, seconds: float) -> dict[str, float]:
    """FLOP/s by what computes them."""
    found: dict[str, float] = {}
    for threads in (1, 2) if device.type == "cpu" else (torch.get_num_threads(),):
        torch.set_num_threads(threads)
        for dtype in ("float32", "bfloat16", "float64"):
            for hidden in (1024, 1536, 2048) if dtype != "float64" else (1024,):
                name = f"{dtype}, D {hidden if device.type == 'cpu' else 4 * hidden}, threads {threads}"
                found[name] = product_rate(dtype, device, hidden=hidden, seconds=seconds)
        for width in (2048, 4096):
            found[f"Gram float32, F {width}, threads {threads}"] = gram_rate(device, width=width, seconds=seconds)
    return found


def byte_rates(device: torch.device, folder: Path | None, megabytes: int) -> dict[str, float]:
    """Bytes/s by what moves them; of the disk the middle of three."""
    rounds = [disk_rates(folder, megabytes=megabytes) for _ in range(3)]
    write, cold, cached = (sorted(rates)[1] for rates in zip(*rounds, strict=True))
    found = {"write": write, "read": cold, "read again": cached, "SHA-256": hash_rate(512)}
    return found | ({"to device": copy_rate(device, 1024)} if device.type == "cuda" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement of compute")
    parser.add_argument("--megabytes", type=int, default=1024, help="of the file that is written and read")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = compute_rates(device, options.seconds)
    moved = byte_rates(device, options.folder, options.megabytes)
    if not options.json:
        print("| what | GFLOP/s |\n|---|---:|")
        print("\n".join(f"| {name} | {rate / 1e9:.0f} |" for name, rate in flops.items()))
        print("\n| what | GB/s |\n|---|---:|")
        print("\n".join(f"| {name} | {rate / 1e9:.2f} |" for name, rate in moved.items()), end="\n\n")
    print(json.dumps({"device": device.type, "cores": os.cpu_count(), "flops": flops, "bytes": moved}, indent=2))


if __name__ == "__main__":
    main()
