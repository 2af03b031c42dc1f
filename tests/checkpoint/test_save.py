"""A written checkpoint opens with this package, or with the code in its folder; without both it raises an error."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cfsp_framework import PruningPlan, RunConfig, prune
from cfsp_framework.checkpoint.save import PLAN_FILE, REPORT_FILE, save_model
from cfsp_framework.errors import ModelError, OutputError
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.surgery import added_biases, drop_attention, dropped_attention
from cfsp_framework.runtime.atomic_files import staged_folder
from helpers import families
from helpers.compensation import GivenUpdates
from helpers.types import MakeModel, MakePlan, OpenTiny

Way = Literal["plain", "import", "remote"]
Opened = Callable[[Way], dict[str, dict[str, Any]]]
IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """A pruned checkpoint to open in every way; ``biases`` a compensator gave it, ``dropped`` its blocks without attention."""

    model: str
    widths: tuple[int, ...] = (40, 24, 64)
    settings: Mapping[str, Any] = field(default_factory=dict)
    biases: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    max_shard_size: str = "5GB"

    @property
    def ordinary(self) -> bool:
        return len(set(self.widths)) == 1 and not self.biases and not self.dropped


CASES = {
    "llama": Case("llama"),
    "qwen2 tied, bfloat16, sharded": Case(
        "qwen2", settings={"tie_word_embeddings": True, "dtype": "bfloat16"}, max_shard_size="20KB"
    ),
    "gemma2": Case("gemma2"),
    "phi3": Case("phi3"),
    "llama without change": Case("llama", (64, 64, 64)),
    "llama of equal widths": Case("llama", (32, 32, 32)),
    "phi3 of equal widths": Case("phi3", (32, 32, 32)),
    "mistral with biases": Case("mistral", biases=("down_bias",)),
    "llama of equal widths with biases": Case("llama", (32, 32, 32), biases=("down_bias",)),
    "llama that had biases": Case("llama-bias", biases=("down_bias",)),
    "gemma2 without some attention": Case("gemma2", dropped=(1,)),
    "llama of equal widths without some attention": Case("llama", (32, 32, 32), dropped=(1, 2)),
    "phi3 with biases everywhere": Case("phi3", biases=("down_bias", "up_bias")),
}

SCRIPT = """
import json, sys, traceback
way, cases, again = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
if way == "import":
    import cfsp_framework
else:
    sys.modules["cfsp_framework"] = None  # as if it were not installed
import torch
torch.set_num_threads(1)
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging
logging.set_verbosity_error()
logging.disable_progress_bar()
options = {"trust_remote_code": True} if way == "remote" else {}

@torch.no_grad()
def describe(folder):
    expected = load_file(folder + ".expected")
    ids = expected["ids"]
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    changed = ids.clone()
    changed[:, -1] = 7
    result = {
        "logits": torch.equal(model(ids).logits, expected["logits"]),
        "complete": not any(loading[kind] for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")),
        "dtype": str(model.dtype),
        "base": torch.equal(AutoModel.from_pretrained(folder, **options)(ids)[0], expected["hidden"]),
        "generated": torch.equal(model.generate(ids[:1], do_sample=False), expected["generated"]),
        "causal": torch.equal(model(changed).logits[:, :-1], expected["logits"][:, :-1]),
        "hidden_states": len(model(ids, output_hidden_states=True).hidden_states),
        "class": type(model).__name__,
        "tokens": tokenizer("hello world").input_ids,
    }
    resaved = again + "/" + way + " " + folder.rpartition("/")[2]
    model.save_pretrained(resaved)
    reloaded = AutoModelForCausalLM.from_pretrained(resaved, **options)
    result["resaved"] = torch.equal(reloaded(ids).logits, expected["logits"])
    model.set_attn_implementation("eager")
    configs = {id(m.config): m.config._attn_implementation for m in model.modules() if hasattr(m, "config")}
    result["attention"] = sorted(set(configs.values()))
    difference = (model(ids).logits - expected["logits"]).float().abs().max().item()
    result["eager"] = difference < (0.1 if model.dtype == torch.bfloat16 else 1e-3)
    return result

results = {}
for name, folder in cases.items():
    try:
        results[name] = describe(folder)
    except Exception as error:
        results[name] = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    if way == "plain" and "error" in results[name]:  # a user who forces it
        try:
            AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
        except Exception as error:
            results[name]["forced"] = type(error).__name__
print(json.dumps(results))
"""


def write(loaded: LoadedModel, decoder: Decoder, out: Path, **options: Any) -> None:
    """Save a cut model, and what it computes beside it."""
    with staged_folder(out) as folder:
        save_model(decoder, loaded, folder, **options)
    with torch.no_grad():
        expected = {
            "ids": IDS,
            "logits": decoder.model(IDS).logits,
            "hidden": decoder.base(IDS)[0],
            "generated": cast("Any", decoder.model).generate(IDS[:1], do_sample=False),
        }
    save_file(expected, f"{out}.expected")


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> dict[str, Path]:
    """Every case's folder."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, case in CASES.items():
        loaded, decoder = open_tiny(make_model(case.model, **case.settings))
        drop_attention(decoder, case.dropped)
        cut_model(decoder, make_plan(decoder, case.widths), GivenUpdates(families.add_biases(decoder, case.biases)))
        write(loaded, decoder, folder / name, max_shard_size=case.max_shard_size)
    return {name: folder / name for name in CASES}


@pytest.fixture(scope="module")
def opened(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Opened:
    """Describe every checkpoint in a fresh process, by the way it opens them."""
    again = tmp_path_factory.mktemp("resaved")
    request = json.dumps({name: str(folder) for name, folder in checkpoints.items()})
    running = {
        way: subprocess.Popen(
            [sys.executable, "-c", SCRIPT, way, request, str(again)],
            cwd=again,
            env={**os.environ, "HF_HOME": f"{os.environ['HF_HOME']}/{way}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in ("plain", "import", "remote")
    }
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for way, process in running.items():
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        results[way] = json.loads(output)
    return results.__getitem__


def check_opened(result: dict[str, Any], case: Case) -> None:
    """Check that a process computed what the model in memory did, and that the model can be used and saved."""
    assert "error" not in result, result["trace"]
    for check in ("complete", "logits", "base", "generated", "causal", "resaved", "eager", "tokens"):
        assert result[check], check
    assert result["hidden_states"] == 4
    assert result["dtype"] == f"torch.{case.settings.get('dtype', 'float32')}"
    assert result["attention"] == ["eager"]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["import", "remote"])
def test_a_checkpoint_opens_with_this_package_or_with_its_own_code(way: Way, name: str, opened: Opened) -> None:
    check_opened(opened(way)[name], CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_without_both_only_an_ordinary_checkpoint_opens(name: str, opened: Opened) -> None:
    result = opened("plain")[name]
    if CASES[name].ordinary:
        check_opened(result, CASES[name])
    else:
        assert result["error"] == result["forced"] == "AmbiguousGlobalPerLayerAttributeError"
        assert "intermediate_size" in result["message"]


@pytest.mark.parametrize("name", CASES)
def test_only_a_checkpoint_that_needs_code_has_some(name: str, checkpoints: dict[str, Path]) -> None:
    case, folder = CASES[name], checkpoints[name]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == case.model.partition("-")[0]
    assert len(config["architectures"]) == 1
    if case.ordinary:
        assert not config.keys() & {"auto_map", "per_layer_config", "added_biases", "dropped_attention"}
        assert not list(folder.glob("*.py"))
        assert config["intermediate_size"] == case.widths[0]
    else:
        assert set(config["auto_map"]) == {"AutoModel", "AutoModelForCausalLM"}
        assert [path.name for path in folder.glob("*.py")] == ["modeling_pruned.py"]
        assert config["intermediate_size"] == 64
        assert {block: own["intermediate_size"] for block, own in config["per_layer_config"].items()} == {
            str(block): width for block, width in enumerate(case.widths) if width != 64
        }
    assert not list(folder.glob("*.bin"))
    shards = list(folder.glob("*.safetensors"))
    assert len(shards) == 1 if case.max_shard_size == "5GB" else len(shards) > 1
    assert ("lm_head.weight" in {key for shard in shards for key in load_file(shard)}) == (
        not config["tie_word_embeddings"]
    )


def test_the_code_does_not_import_this_package(checkpoints: dict[str, Path]) -> None:
    code = (checkpoints["llama"] / "modeling_pruned.py").read_text()
    assert {line for line in code.splitlines() if line.startswith(("import", "from"))} == {
        "from __future__ import annotations",
        "from typing import Any",
        "import torch",
        "from torch import nn",
        "from transformers.models.llama.modeling_llama import LlamaModel as _LlamaModel",
        "from transformers.models.llama.modeling_llama import LlamaForCausalLM as _LlamaForCausalLM",
    }


def test_an_ordinary_model_is_not_affected_once_pruned_ones_were_opened(
    checkpoints: dict[str, Path], make_model: MakeModel
) -> None:
    dense = make_model("llama")
    pruned = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model = AutoModelForCausalLM.from_pretrained(dense)
    assert {layer.mlp.down_proj.in_features for layer in model.model.layers} == {64}
    assert {id(module.config) for module in model.modules() if hasattr(module, "config")} == {id(model.config)}
    with torch.no_grad():
        expected = load_file(f"{checkpoints['llama without change']}.expected")["logits"]
        assert torch.equal(model(IDS).logits, expected)
        for either in (model, pruned):
            copy = pickle.loads(pickle.dumps(either))
            assert torch.equal(copy(IDS).logits, either(IDS).logits)
    built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(dense))
    assert type(built) is type(model) is type(pruned)


def test_padded_windows_give_the_same_logits_after_reopening(
    checkpoints: dict[str, Path], make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> None:
    _, decoder = open_tiny(make_model("gemma2"))
    cut_model(decoder, make_plan(decoder, CASES["gemma2"].widths), GivenUpdates(families.add_biases(decoder, ())))
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    with torch.no_grad():
        expected = decoder.model(IDS, attention_mask=mask).logits
        actual = AutoModelForCausalLM.from_pretrained(checkpoints["gemma2"])(IDS, attention_mask=mask).logits
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("trust_remote_code", [False, True])
def test_opens_with_a_device_map_and_in_another_dtype(trust_remote_code: bool, checkpoints: dict[str, Path]) -> None:
    for name in ("llama", "phi3 with biases everywhere"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoints[name], device_map={"": "cpu"}, dtype=torch.bfloat16, trust_remote_code=trust_remote_code
        )
        expected = load_file(f"{checkpoints[name]}.expected")["logits"]
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            torch.testing.assert_close(model(IDS).logits.float(), expected, rtol=0.1, atol=0.2)


def test_a_model_class_outside_transformers_cannot_get_different_widths(
    make_model: MakeModel,
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    loaded, decoder = open_tiny(make_model("llama"))
    cut_model(decoder, make_plan(decoder, (40, 24, 64)), GivenUpdates(families.add_biases(decoder, ())))
    for cls in type(decoder.model).__mro__:
        if cls.__module__.startswith("transformers.models."):
            monkeypatch.setattr(cls, "__module__", "transformers_modules.acme.modeling_acme")
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .*--allocator uniform"):
        save_model(decoder, loaded, tmp_path / "out")
    assert not (tmp_path / "out").exists()


AGAIN: dict[str, tuple[str, tuple[int, ...], bool]] = {
    "other widths": ("llama", (16, 24, 8), False),
    "equal widths": ("phi3", (24, 24, 24), False),
    "equal, then other widths": ("llama of equal widths", (16, 24, 8), False),
    "biases once more": ("mistral with biases", (16, 24, 8), True),
    "biases kept by a plain cut": ("mistral with biases", (16, 16, 16), False),
    "biases only now": ("gemma2", (16, 24, 8), True),
    "no attention where there was none": ("gemma2 without some attention", (16, 16, 16), False),
    "biases everywhere kept": ("phi3 with biases everywhere", (16, 24, 8), False),
}


@pytest.mark.parametrize("trust_remote_code", [False, True])
@pytest.mark.parametrize("story", AGAIN)
def test_a_pruned_checkpoint_can_be_pruned_again(
    story: str,
    trust_remote_code: bool,
    checkpoints: dict[str, Path],
    open_tiny: OpenTiny,
    make_plan: MakePlan,
    calibration_text: Path,
    tmp_path: Path,
) -> None:
    name, widths, biased = AGAIN[story]
    loaded, before = open_tiny(checkpoints[name])
    plan = make_plan(before, widths, loaded.fingerprint)
    config = RunConfig.build(
        model=str(checkpoints[name]),
        criterion="magnitude",
        allocator="uniform",
        compensator="bias" if biased else "none",
        calibration=str(calibration_text),
        samples=2,
        seqlen=16,
        device="cpu",
        trust_remote_code=trust_remote_code,
    )
    result = prune(config, tmp_path / "out", plan=plan)
    assert result.report.reload_difference == 0

    _, after = open_tiny(tmp_path / "out")
    assert after.widths == widths
    had = added_biases(before.config)
    assert added_biases(after.config) == (had or (["mlp.down_proj"] if biased else []))
    assert dropped_attention(after.config) == dropped_attention(before.config)
    ordinary = len(set(widths)) == 1 and not had and not biased and not CASES[name].dropped
    assert (tmp_path / "out/modeling_pruned.py").exists() == (not ordinary)
    assert ("auto_map" in json.loads((tmp_path / "out/config.json").read_text())) == (not ordinary)
    assert after.config.is_heterogeneous == (not ordinary)
    with torch.no_grad():
        if not biased:
            for index, block in enumerate(plan.blocks):
                removed = sorted(set(range(block.width)) - set(block.kept))
                before.blocks[index].get_parameter("mlp.down_proj.weight")[:, removed] = 0
            torch.testing.assert_close(after.model(IDS).logits, before.model(IDS).logits, rtol=1e-4, atol=1e-5)
        remote = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not ordinary)
        assert torch.equal(remote(IDS).logits, after.model(IDS).logits)


def data_free(model: Path, **options: object) -> RunConfig:
    """Configure a run with different widths that needs no data."""
    chosen: dict[str, object] = {"criterion": "magnitude", "allocator": "log-increase", "round_to": 8, **options}
    return RunConfig.build(model=str(model), ratio=0.4, device="cpu", **chosen)


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Read everything under a folder, hidden files too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_generation_settings_and_tokenizer_are_carried_over(make_model: MakeModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in make_model("llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    settings = json.loads((source / "generation_config.json").read_text())
    settings.update(
        temperature=0.9, top_p=0.6, repetition_penalty=1.1
    )  # sampling options without do_sample: published so
    (source / "generation_config.json").write_text(json.dumps(settings))
    (source / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    prune(data_free(source), tmp_path / "out")

    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == settings
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the quick brown fox, ähem, <s> jumps 12 times"
    assert after(text).input_ids == before(text).input_ids
    assert after.special_tokens_map == before.special_tokens_map
    assert after.model_max_length == before.model_max_length == 128
    assert after.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"


def test_a_checkpoint_has_plan_and_report_and_the_modes_others_expect(make_model: MakeModel, tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        result = prune(data_free(make_model("llama")), tmp_path / "out")
    finally:
        os.umask(old)
    assert PruningPlan.from_json((tmp_path / "out" / PLAN_FILE).read_text()) == result.plan
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["reload_difference"] == 0
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o644)
    assert "model.safetensors" in modes
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


FAILURES: dict[str, tuple[BaseException, type[BaseException]]] = {
    "bug": (ZeroDivisionError("oh"), ZeroDivisionError),
    "interrupt": (KeyboardInterrupt(), KeyboardInterrupt),
    "full disk": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), OutputError),
    "full disk in safetensors": (RuntimeError("I/O error: No space left on device (os error 28)"), OutputError),
}
MOMENTS = {
    "in the middle of saving": "cfsp_framework.pipeline.save_model",
    "while verifying": "cfsp_framework.pipeline.verify",
    "once all is written": "pathlib.Path.chmod",
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("failure", FAILURES)
def test_a_run_that_fails_leaves_everything_as_it_was(
    failure: str,
    moment: str,
    overwrite: bool,
    make_model: MakeModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    if overwrite:
        out.mkdir()
        (out / "pruning_plan.json").write_text("{}")
        (out / "model.safetensors").write_bytes(b"old")
    before = snapshot(tmp_path)
    raised, expected = FAILURES[failure]
    failed: list[bool] = []

    def fail(*arguments: Any, **_: Any) -> None:
        if moment == "in the middle of saving":
            save_model(*arguments)
            assert snapshot(tmp_path) != before, "something was written"
        failed.append(True)
        raise raised

    monkeypatch.setattr(MOMENTS[moment], fail)
    with pytest.raises(expected) as caught:
        prune(data_free(make_model("llama")), out, overwrite=overwrite)
    assert failed
    assert snapshot(tmp_path) == before
    if expected is OutputError:
        assert f"{out} cannot be written" in str(caught.value)


def test_overwriting_replaces_the_whole_folder(make_model: MakeModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "pruning_plan.json").write_text("{}")
    (out / "model-00001-of-00002.safetensors").write_bytes(b"old")
    prune(data_free(make_model("llama")), out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    assert AutoModelForCausalLM.from_pretrained(out).config.is_heterogeneous


def test_overwriting_never_removes_what_the_run_uses(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    prune(data_free(make_model("llama")), out)
    for name, content in (("text.txt", "words " * 50), ("plugin.py", "")):
        (out / name).write_text(content)
    (out / "inside").mkdir()
    (tmp_path / "link").symlink_to(out)
    model, before = str(make_model("llama")), snapshot(tmp_path)
    used: list[dict[str, object]] = [
        {"model": str(out)},
        {"model": str(tmp_path / "link")},
        {"model": model, "calibration": str(out / "text.txt")},
        {"model": model, "evaluate": (f"demo=1,{out / 'text.txt'}=1",)},
        {"model": model, "calibration": f"{out / 'text.txt'}:body"},
        {"model": model, "plugins": (str(out / "plugin.py"),)},
    ]
    for options in used:
        config = RunConfig.build(criterion="magnitude", allocator="uniform", ratio=0.5, round_to=8, **options)
        with pytest.raises(OutputError, match="would be replaced"):
            prune(config, out, overwrite=True)
    monkeypatch.chdir(out / "inside")
    with pytest.raises(OutputError, match="would be replaced"):
        prune(data_free(Path(model)), out, overwrite=True)
    assert snapshot(tmp_path) == before


def test_an_output_folder_that_cannot_be_used_is_refused_before_the_model_is_opened(tmp_path: Path) -> None:
    config = data_free(tmp_path / "no-such-model")
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/config.json").write_text("{}")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("...")
    (tmp_path / "file").write_text("...")
    before = snapshot(tmp_path)
    for name in ("checkpoint", "thesis", "file"):
        with pytest.raises(OutputError, match=f"{name} exists"):
            prune(config, tmp_path / name)
    for name in ("checkpoint", "thesis", "file"):
        with pytest.raises(OutputError, match=f"{name} exists .*--overwrite does not remove it"):
            prune(config, tmp_path / name, overwrite=True)
    with pytest.raises(OutputError, match="no/such is not a writable directory"):
        prune(config, tmp_path / "no/such/parent")
    assert snapshot(tmp_path) == before
