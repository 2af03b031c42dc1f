"""``cfsp demo``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import OUT, Output, config_options, given, output_options, overwrite_option
from cfsp_framework.config import RunConfig


@click.command()
@config_options("ratio")
@click.option("--out", type=OUT, help="Keep the pruned checkpoint in this folder.")
@overwrite_option
@output_options(plugins=False)
def demo(out: Path | None, overwrite: bool, output: Output, **options: Any) -> None:
    """Prune the small model inside this package and compare both models on held-out text."""
    from cfsp_framework import pipeline
    from cfsp_framework.cli.tables import show_report

    small = {"samples": 64, "seqlen": 256, "evaluate_windows": 100}
    config = RunConfig.build(model="demo", evaluate=("demo",), **small, **given(options))
    with tempfile.TemporaryDirectory(prefix="cfsp-demo-") as scratch:
        folder = out or Path(scratch, "pruned")
        result = pipeline.prune(config, folder, overwrite=overwrite, progress=output.progress())
        texts = list(_generate(result.folder)) if output.visible else []

    def show() -> None:
        show_report(result.report, out)
        for text in texts:
            click.echo(f"The pruned model writes: {' '.join(text.split())!r}")

    output.show(result.report.to_json(), show)


def _generate(folder: Path, prompts: Sequence[str] = ("Return the ", "The class ")) -> Iterator[str]:
    """Yield the text a checkpoint generates from each prompt."""
    from transformers import AutoTokenizer

    from cfsp_framework.modeling.loading import open_model

    model: Any = open_model(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids  # (1, T)
        generated = model.generate(ids, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
        yield tokenizer.decode(generated[0], skip_special_tokens=True)
