"""``cfsp export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from cfsp_framework.cli.options import OUT, Output, given, output_options, overwrite_option
from cfsp_framework.config import RunConfig

FORMATS = ("padded", "gguf", "onnx")
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")
_FORMATS_OF_OPTIONS = {"width": "padded", "type": "gguf", "pre_tokenizer": "gguf"}


@click.command()
@click.argument("pruned")
@click.argument("out", type=OUT)
@click.option(
    "--format",
    "form",
    type=click.Choice(FORMATS),
    required=True,
    help="padded: a plain Transformers checkpoint of one width. gguf: a file for llama.cpp. onnx: for ONNX Runtime.",
)
@click.option(
    "--width",
    type=click.IntRange(min=1),
    metavar="N",
    help="padded: the width of all blocks. [default: the widest block's]",
)
@click.option(
    "--type",
    type=click.Choice(TYPES),
    help="gguf: the type of the matrices; auto: the checkpoint's own. [default: auto]",
)
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="gguf: llama.cpp's name for how the tokenizer splits text, if it cannot be detected.",
)
@overwrite_option
@output_options()
def export(
    pruned: str, out: Path, form: str, overwrite: bool, plugins: tuple[str, ...], output: Output, **options: Any
) -> None:
    """Write PRUNED to OUT for programs that do not open its checkpoint: a folder, or a .gguf file."""
    for name in given(options):
        if _FORMATS_OF_OPTIONS[name] != form:
            flag = "--" + name.replace("_", "-")
            raise click.UsageError(f"{flag} is for --format {_FORMATS_OF_OPTIONS[name]}, not {form}.")
    from cfsp_framework.cli.tables import show_export
    from cfsp_framework.export import export as exports

    config = RunConfig.build(model=pruned, device="cpu", plugins=plugins)
    if form == "padded":
        exported = exports.export_padded(config, out, width=options["width"], overwrite=overwrite)
    elif form == "gguf":
        kind, pre_tokenizer = options["type"] or "auto", options["pre_tokenizer"]
        exported = exports.export_gguf(config, out, kind=kind, pre_tokenizer=pre_tokenizer, overwrite=overwrite)
    else:
        exported = exports.export_onnx(config, out, overwrite=overwrite)
    output.show(exported.to_dict(), lambda: show_export(exported))
