"""``cfsp export``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from cfsp_framework.cli.options import json_option, plugin_option, quiet_option, traceback_option
from cfsp_framework.config import RunConfig

FORMATS = ("padded", "gguf", "onnx")
TYPES = ("auto", "f32", "f16", "bf16", "q8_0")


@click.command()
@click.argument("pruned")
@click.argument("out", type=click.Path(path_type=Path))
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
    help="padded: the width all blocks get. [default: the widest block's]",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(TYPES),
    default=None,
    help="gguf: the type of the matrices; auto: the checkpoint's own. [default: auto]",
)
@click.option(
    "--pre-tokenizer",
    metavar="NAME",
    help="gguf: llama.cpp's name for how the tokenizer splits text, where it cannot be told.",
)
@click.option("--overwrite", is_flag=True, help="Replace what is at OUT.")
@plugin_option
@quiet_option
@json_option
@traceback_option
def export(
    pruned: str,
    out: Path,
    form: str,
    width: int | None,
    kind: str | None,
    pre_tokenizer: str | None,
    overwrite: bool,
    plugins: tuple[str, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Write PRUNED to OUT for programs that do not open its checkpoint: a folder, or a .gguf file."""
    _check_options(form, {"--width": width, "--type": kind, "--pre-tokenizer": pre_tokenizer})
    from cfsp_framework.cli.tables import show_export
    from cfsp_framework.export import export as exports

    config = RunConfig.build(model=pruned, device="cpu", plugins=plugins)
    if form == "padded":
        made = exports.export_padded(config, out, width=width, overwrite=overwrite)
    elif form == "gguf":
        made = exports.export_gguf(config, out, kind=kind or "auto", pre_tokenizer=pre_tokenizer, overwrite=overwrite)
    else:
        made = exports.export_onnx(config, out, overwrite=overwrite)
    if as_json:
        click.echo(json.dumps(made.to_dict(), indent=2))
    elif not quiet:
        show_export(made)


_BELONGS = {"--width": "padded", "--type": "gguf", "--pre-tokenizer": "gguf"}


def _check_options(form: str, options: dict[str, object]) -> None:
    """Refuse an option of another format."""
    for name, value in options.items():
        if value is not None and _BELONGS[name] != form:
            raise click.UsageError(f"{name} is for --format {_BELONGS[name]}, not {form}.")
