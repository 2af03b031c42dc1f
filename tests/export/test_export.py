"""A padded or ONNX export computes what the pruned model computes, or is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoTokenizer

from cfsp_framework import RunConfig
from cfsp_framework.checkpoint.save import CARD_FILE, CODE_FILE, EXPORT_FILE, PLAN_FILE
from cfsp_framework.errors import CfspError, ConfigError, ModelError, OutputError
from cfsp_framework.export.export import export_onnx, export_padded
from cfsp_framework.export.padded import append_zeros
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.modeling.decoder import Decoder, open_decoder
from cfsp_framework.modeling.loading import open_model
from helpers import families
from helpers.families import FAMILIES, IDS, PRUNED, Reader, agree, digest
from helpers.pruned_checkpoints import write_pruned
from helpers.runs import invoke

PLUGINS = load_plugins()
# A product over 8 channels adds up in another order than one over 24: these models have such small shared experts.
ROUNDED = ("deepseek_v3", "glm4_moe", "dots1", "qwen3_next")
WIDTHS = (48, 40, 56)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A process without this package."""
    with families.reader(tmp_path_factory.mktemp("stranger")) as reader:
        yield reader


def config_for(folder: Path) -> RunConfig:
    return RunConfig.build(model=str(folder), device="cpu")


def cut(name: str, place: Path, plan: Sequence[int] | Callable[[Decoder], Any] = WIDTHS, **changes: Any) -> Path:
    """The checkpoint of a pruned model of a family."""
    return write_pruned(families.write(families.build(name), place / "dense"), place / "pruned", plan, **changes)


def llama(place: Path, **changes: Any) -> Path:
    return cut("llama", place, **changes)


@pytest.mark.parametrize("name", PRUNED)
def test_a_padded_export_is_the_pruned_model_without_any_code(name: str, tmp_path: Path, stranger: Reader) -> None:
    if not FAMILIES[name].known:
        pytest.skip(f"this version of Transformers has no {FAMILIES[name].model_type}")
    pruned = cut(name, tmp_path, lambda decoder: families.random_plan(decoder, 8))
    expected = digest(open_model(pruned), IDS)
    exported = export_padded(config_for(pruned), tmp_path / "padded")
    found = stranger.read(tmp_path / "padded")
    assert not found["own_code"]
    assert not (tmp_path / "padded" / CODE_FILE).exists()
    written = json.loads((tmp_path / "padded" / "config.json").read_text())
    assert "per_layer_config" not in json.dumps(written)
    assert "auto_map" not in written
    assert len(set(exported.written_widths)) <= len({layout.width_key for layout in _layouts(name)}) + 1
    if name in ROUNDED:
        check_close(found, expected)
    else:
        assert agree(found, expected)
        assert exported.difference == 0


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "mixtral", "phi3"])
def test_odd_widths_are_padded_to_the_last_digits(name: str, tmp_path: Path, stranger: Reader) -> None:
    """A product over 43 channels may add up in another order than one over 57."""
    pruned = cut(name, tmp_path, families.random_plan)
    export_padded(config_for(pruned), tmp_path / "padded")
    check_close(stranger.read(tmp_path / "padded"), digest(open_model(pruned), IDS))


def check_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["written"] == expected["written"]
    assert torch.allclose(torch.tensor(found["logits"]), torch.tensor(expected["logits"]), atol=1e-5)


def _layouts(name: str) -> Any:
    return open_decoder(families.build(name), PLUGINS).architecture.feed_forwards


def test_the_dtype_tokenizer_plan_and_card_are_carried_over(tmp_path: Path) -> None:
    pruned = llama(tmp_path)
    model: Any = open_model(pruned)
    model.to(torch.bfloat16).save_pretrained(pruned)
    export_padded(config_for(pruned), tmp_path / "padded")
    assert AutoConfig.from_pretrained(tmp_path / "padded").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "padded")("hello").input_ids
    assert (tmp_path / "padded" / PLAN_FILE).read_text() == (pruned / PLAN_FILE).read_text()
    card = (tmp_path / "padded" / CARD_FILE).read_text()
    assert card.startswith("# A model\n\nWidths differ.\n\n## Padded export\n")
    assert "40 to 56 channels became 56" in card
    note = json.loads((tmp_path / "padded" / EXPORT_FILE).read_text())
    assert (note["format"], note["widths"], note["written_widths"]) == ("padded", list(WIDTHS), [56] * 3)


@pytest.mark.parametrize(("width", "expected"), [(None, 56), (56, 56), (64, 64), (96, 96)])
def test_the_width_can_be_chosen(width: int | None, expected: int, tmp_path: Path) -> None:
    pruned = llama(tmp_path)
    exported = export_padded(config_for(pruned), tmp_path / "padded", width=width)
    assert exported.written_widths == (expected,) * 3
    assert AutoConfig.from_pretrained(tmp_path / "padded").intermediate_size == expected
    assert exported.difference == 0


def test_a_width_that_takes_channels_away_is_refused(tmp_path: Path) -> None:
    pruned = llama(tmp_path)
    with pytest.raises(ConfigError, match=r"--width 48: the widest block has 56 channels"):
        export_padded(config_for(pruned), tmp_path / "padded", width=48)
    assert not (tmp_path / "padded").exists()


def test_one_width_for_a_model_of_several_is_refused(tmp_path: Path) -> None:
    pruned = cut("qwen2_moe", tmp_path, families.random_plan)
    with pytest.raises(ConfigError, match=r"several widths, intermediate_size, moe_intermediate_size, shared_expert"):
        export_padded(config_for(pruned), tmp_path / "padded", width=64)


def test_attention_that_was_dropped_becomes_one_of_zeros(tmp_path: Path, stranger: Reader) -> None:
    pruned = llama(tmp_path, dropped=(1, 2))
    expected = digest(open_model(pruned), IDS)
    exported = export_padded(config_for(pruned), tmp_path / "padded")
    found = stranger.read(tmp_path / "padded")
    assert not found["own_code"]
    assert exported.difference == 0
    assert found == {**expected, "own_code": False}


def test_biases_of_a_compensator_become_the_familys_where_it_has_a_setting(tmp_path: Path, stranger: Reader) -> None:
    pruned = llama(tmp_path, biases=("down_bias", "up_bias"))
    expected = digest(open_model(pruned), IDS)
    export_padded(config_for(pruned), tmp_path / "padded")
    assert AutoConfig.from_pretrained(tmp_path / "padded").mlp_bias is True
    found = stranger.read(tmp_path / "padded")
    assert not found["own_code"]
    check_close(found, expected)  # a product with a bias is another routine than one without


@pytest.mark.parametrize("name", ["mistral", "phi3"])
def test_biases_the_family_has_no_setting_for_are_refused(name: str, tmp_path: Path) -> None:
    pruned = cut(name, tmp_path, biases=("down_bias",))
    with pytest.raises(ModelError, match=rf"biases \(mlp.down_proj\) that no {name} checkpoint has without code"):
        export_padded(config_for(pruned), tmp_path / "padded")
    assert not (tmp_path / "padded").exists()


def test_a_model_of_one_width_stays_as_it_is(tmp_path: Path) -> None:
    pruned = cut("llama", tmp_path, (40, 40, 40))
    exported = export_padded(config_for(pruned), tmp_path / "padded")
    assert exported.written_widths == (40, 40, 40)
    before, after = families.tensors_of(pruned), families.tensors_of(tmp_path / "padded")
    assert before.keys() == after.keys()
    assert all(before[key].equal(after[key]) for key in before)


def test_nothing_is_left_where_the_export_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned = llama(tmp_path)

    def ones(tensor: torch.Tensor, count: int, *, axis: int, parts: int) -> torch.Tensor:
        shape = list(tensor.shape)
        shape[axis] = count
        return torch.cat([tensor, tensor.new_ones(shape)], axis)

    monkeypatch.setattr("cfsp_framework.export.padded.append_zeros", ones)
    with pytest.raises(CfspError, match="does not compute the same"):
        export_padded(config_for(pruned), tmp_path / "padded")
    assert [path.name for path in tmp_path.iterdir() if "padded" in path.name] == []


def test_an_existing_folder_is_not_replaced_unasked(tmp_path: Path) -> None:
    pruned = llama(tmp_path)
    export_padded(config_for(pruned), tmp_path / "padded")
    with pytest.raises(OutputError, match="--overwrite"):
        export_padded(config_for(pruned), tmp_path / "padded")
    assert export_padded(config_for(pruned), tmp_path / "padded", width=64, overwrite=True).written_widths == (64,) * 3


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(0, 4), st.sampled_from([0, 1]))
def test_zeros_come_after_every_part(rows: int, columns: int, parts: int, count: int, axis: int) -> None:
    shape = [rows, columns]
    shape[axis] *= parts
    tensor = torch.arange(1.0, 1 + shape[0] * shape[1]).view(shape)
    longer = append_zeros(tensor, count, axis=axis, parts=parts)
    assert longer.shape[axis] == shape[axis] + parts * count
    for before, after in zip(tensor.chunk(parts, axis), longer.chunk(parts, axis), strict=True):
        kept, zeros = after.split([before.shape[axis], count], axis)
        assert kept.equal(before)
        assert not zeros.any()


def test_the_command_reports_the_export(tmp_path: Path) -> None:
    pruned = llama(tmp_path)
    result = invoke("export", str(pruned), str(tmp_path / "one"), "--format", "padded", "--json")
    assert result.exit_code == 0, result.output
    exported = json.loads(result.stdout)
    assert (exported["written_widths"], exported["difference"]) == ([56, 56, 56], 0)
    shown = invoke("export", str(pruned), str(tmp_path / "two"), "--format", "padded")
    assert "widths 40 to 56 became 56" in shown.output
    assert "bit-equal" in shown.output
    assert invoke("export", str(pruned), str(tmp_path / "3"), "--format", "padded", "-q").output == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "padded", "--type", "f16"], "--type is for --format gguf, not padded"),
        (["--format", "gguf", "--width", "64"], "--width is for --format padded, not gguf"),
        (["--format", "padded", "--pre-tokenizer", "x"], "--pre-tokenizer is for --format gguf"),
        (["--format", "zip"], "'zip'"),
        ([], "--format"),
    ],
)
def test_options_of_another_format_are_refused(options: list[str], message: str, tmp_path: Path) -> None:
    result = invoke("export", str(tmp_path), str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert message in result.output


# ONNX


def test_onnx_computes_the_same_for_any_batch_and_length(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    pruned = llama(tmp_path, dropped=(1,), biases=("down_bias",))
    exported = export_onnx(config_for(pruned), tmp_path / "out")
    assert exported.difference is not None
    assert exported.difference < 1e-4
    session: Any = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    model: Any = open_model(pruned)
    for batch, length in ((1, 2), (4, 1 + 32)):
        ids = torch.randint(3, 300, (batch, length), generator=torch.Generator().manual_seed(batch))
        inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        with torch.no_grad():
            expected = model(ids).logits
        assert torch.allclose(torch.from_numpy(session.run(["logits"], inputs)[0]), expected, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("hello").input_ids
    assert "## ONNX export" in (tmp_path / "out" / CARD_FILE).read_text()


def test_a_model_pytorch_cannot_trace_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package)
    pruned = llama(tmp_path)

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ModelError, match=r"cannot export this llama model as ONNX: .*no such operator"):
        export_onnx(config_for(pruned), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_packages_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    result = invoke("export", str(llama(tmp_path)), str(tmp_path / "out"), "--format", "onnx")
    assert result.exit_code == 2
    assert "pip install 'cfsp-framework[onnx]'" in result.output
