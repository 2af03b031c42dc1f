"""Score seven zero-shot tasks on a dense and a pruned model, in memory and with the harness's command line.

    python tests/benchmarks/tasks.py MODEL TASK_DATA [--limit 200] [--ratio 0.5] [--calibration SPEC] [--check boolq,piqa]

TASK_DATA has a folder for each task (docs/evaluate.md). MODEL is pruned by `cfsp-closed-form` into a temporary
folder. Of the tasks in --check, by default all, the pruned checkpoint is also scored by `python -m lm_eval`, which opens it
with trust_remote_code; the largest difference of any number is printed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from cfsp_framework import RunConfig, prune
from cfsp_framework.config import layered
from cfsp_framework.evaluation.tasks import SEVEN, TaskResults, local_tasks, score
from common import make_parser


def prune_half(model: str, ratio: float, calibration: str, out: Path) -> None:
    """Write a checkpoint whose blocks differ in width."""
    options = {"model": model, "ratio": ratio, "calibration": calibration, "samples": 64, "seqlen": 256}
    prune(layered("cfsp-closed-form", None, options), out)


def score_model(model: str, data: Path, limit: int | None) -> TaskResults:
    """Score a model in memory."""
    return score(RunConfig.build(model=model, batch_size=8), SEVEN, task_data=data, limit=limit)[1]


def harness(
    checkpoint: Path, data: Path, names: list[str], limit: int | None, scratch: Path
) -> dict[str, dict[str, float]]:
    """Score a checkpoint with the command line of lm-evaluation-harness, on the same files."""
    (scratch / "yaml").mkdir()
    local_tasks(names, data, scratch / "yaml")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--batch_size", "8", "--device", "cpu"]
    command += ["--model_args", f"pretrained={checkpoint},trust_remote_code=True", "--tasks", ",".join(names)]
    command += ["--include_path", str(scratch / "yaml"), "--output_path", str(scratch / "scores")]
    command += ["--limit", str(limit)] if limit else []
    subprocess.run(command, check=True, capture_output=True)
    [written] = (scratch / "scores").rglob("results*.json")
    results: dict[str, dict[str, float]] = json.loads(written.read_text())["results"]
    return results


def largest_difference(ours: TaskResults, theirs: dict[str, dict[str, float]]) -> float:
    """Return the largest difference of a metric over the tasks that both scored."""
    return max(
        abs(metric.value - theirs[task.task][f"{name},none"])
        for task in ours.tasks
        if task.task in theirs
        for name, metric in task.metrics.items()
    )


def show(dense: TaskResults, pruned: TaskResults) -> None:
    """Print a row for each task."""
    print("| task | documents | dense acc | acc_norm | pruned acc | acc_norm |\n|---|---:|---:|---:|---:|---:|")
    for before, after in zip(dense.tasks, pruned.tasks, strict=True):
        cells = [
            "" if metric is None else f"{metric.value:.3f} ± {metric.stderr or 0:.3f}"
            for metric in (before.acc, before.acc_norm, after.acc, after.acc_norm)
        ]
        print(f"| {before.task} | {before.samples} | {' | '.join(cells)} |")
    print(
        f"| mean | | {dense.mean_acc:.3f} | {dense.mean_acc_norm:.3f} | {pruned.mean_acc:.3f} | {pruned.mean_acc_norm:.3f} |"
    )


def main() -> None:
    defaults = {"limit": 200, "ratio": 0.5, "calibration": "demo", "check": ",".join(SEVEN)}
    options = make_parser(__doc__, "model", "task_data", **defaults).parse_args()
    options.task_data = Path(options.task_data)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        checkpoint = scratch / "pruned"
        prune_half(options.model, options.ratio, options.calibration, checkpoint)
        dense = score_model(options.model, options.task_data, options.limit)
        pruned = score_model(str(checkpoint), options.task_data, options.limit)
        show(dense, pruned)
        theirs = harness(checkpoint, options.task_data, options.check.split(","), options.limit, scratch)
    print(f"\nlm-eval {pruned.harness}; largest difference from its command line on {options.check}: "
          f"{largest_difference(pruned, theirs):.3g}")  # fmt: skip


if __name__ == "__main__":
    main()
