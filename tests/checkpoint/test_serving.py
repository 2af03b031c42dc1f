"""Checkpoints in serving engines with a Transformers backend, and widths that several processes can share.

The engines themselves are not run here. vLLM's documents ask for ``AutoModel`` in ``auto_map``, a base model that builds
on the meta device, attention that can be replaced and gets the engine's arguments, and a plan for tensor parallelism.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework import RunConfig
from cfsp_framework.api.data import Budget
from cfsp_framework.api.records import PruningPlan
from cfsp_framework.checkpoint.save import save_model
from cfsp_framework.errors import ConfigError, PlanError
from cfsp_framework.pipeline import plan_only, prune
from cfsp_framework.pruning.cut import cut_model
from cfsp_framework.pruning.planning import check_shared, round_widths, width_step
from cfsp_framework.runtime.atomic_files import staged_folder
from helpers import families
from helpers.compensation import GivenUpdates
from helpers.runs import invoke
from helpers.types import MakeModel, MakePlan, OpenTiny

WIDTHS = (48, 40, 56)
FAMILIES = ("llama", "qwen2", "mistral", "phi3")

ENGINE = """
import json, sys
sys.modules["cfsp_framework"] = None  # as if it were not installed
import torch
torch.set_num_threads(1)
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM, logging
from transformers.integrations.sdpa_attention import sdpa_attention_forward
logging.set_verbosity_error()
logging.disable_progress_bar()
calls = []

def engine_attention(module, query, key, value, attention_mask, attention_instances=None, **kwargs):
    calls.append(attention_instances[module.layer_idx])
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

AttentionInterface.register("engine", engine_attention)
IDS = torch.randint(3, 300, (1, 14), generator=torch.Generator().manual_seed(5))  # shorter than a sliding window

class Replaced(nn.Module):
    "A linear layer as an engine makes it: of the sizes of the one it finds."
    def __init__(self, old):
        super().__init__()
        self.sizes = old.in_features, old.out_features
        self.weight, self.bias = old.weight, old.bias
    def forward(self, x):
        assert (x.shape[-1], *self.weight.shape) == (self.sizes[0], *self.sizes[::-1])
        return nn.functional.linear(x, self.weight, self.bias)

@torch.no_grad()
def describe(pruned, dense):
    config = AutoConfig.from_pretrained(pruned, trust_remote_code=True)
    config._attn_implementation = "engine"
    with torch.device("meta"):
        base = AutoModel.from_config(config, trust_remote_code=True)
    native = AutoModelForCausalLM.from_pretrained(dense)
    with torch.device("meta"):
        native_base = AutoModel.from_config(AutoConfig.from_pretrained(dense))
    result = {
        "auto_map": sorted(config.auto_map),
        "meta": all(p.is_meta for p in base.parameters()),
        "down": [block.mlp.down_proj.in_features for block in base.layers],
        "attention": base.config._attn_implementation,
        "backend": [bool(type(base)._supports_attention_backend), bool(base.is_backend_compatible())],
        "plans": [base.config.base_model_tp_plan, native.config.base_model_tp_plan],
        "pipeline": [base.config.base_model_pp_plan == native.config.base_model_pp_plan, bool(base._pp_plan)],
        "tensor": base._tp_plan == native_base._tp_plan and bool(base._tp_plan),
        "no_split": list(base._no_split_modules) == list(native._no_split_modules),
        "config": type(config).__module__.startswith("transformers.models."),
    }
    model = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    expected = model(IDS).logits
    base = AutoModel.from_pretrained(pruned, trust_remote_code=True, attn_implementation="engine")
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear):
            base.set_submodule(name, Replaced(module))
    hidden = base(IDS, use_cache=False, attention_instances={0: "a", 1: "b", 2: "c"})[0]
    result["replaced"] = torch.equal(model.lm_head(hidden), expected)
    result["calls"] = list(calls)
    calls.clear()
    return result

print(json.dumps({name: describe(*folders) for name, folders in json.loads(sys.argv[1]).items()}))
"""

PROCESS = """
import os, sys, json
own_code = sys.argv[2] == "remote"
if own_code:
    sys.modules["cfsp_framework"] = None
else:
    import cfsp_framework
import torch
import torch.distributed as dist
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, logging
from transformers.distributed import DistributedConfig
logging.set_verbosity_error()
logging.disable_progress_bar()
dist.init_process_group("gloo")
options = {"trust_remote_code": own_code}
ids = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(5))
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto"), **options)
    shared = model(ids).logits
    if dist.get_rank() == 0:
        expected = AutoModelForCausalLM.from_pretrained(sys.argv[1], **options)(ids).logits
        local = [block.mlp.down_proj.weight.to_local().shape[1] for block in model.model.layers]
        print(json.dumps({"local": local, "difference": (shared - expected).abs().max().item()}))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, make_model: MakeModel, open_tiny: OpenTiny, make_plan: MakePlan
) -> dict[str, Path]:
    """Prune a model of each family to widths that differ."""
    folders = {name: tmp_path_factory.mktemp("serving") / name for name in FAMILIES}
    for name, out in folders.items():
        loaded, decoder = open_tiny(make_model(name))
        cut_model(decoder, make_plan(decoder, WIDTHS), GivenUpdates(families.add_biases(decoder, ())))
        with staged_folder(out) as folder:
            save_model(decoder, loaded, folder)
    return folders


@pytest.fixture(scope="module")
def engine(checkpoints: dict[str, Path], make_model: MakeModel) -> dict[str, dict[str, Any]]:
    """Describe every checkpoint as an engine without this package opens it."""
    request = {name: [str(folder), str(make_model(name))] for name, folder in checkpoints.items()}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, json.dumps(request)], capture_output=True, check=False, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    results: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return results


@pytest.mark.parametrize("name", FAMILIES)
def test_an_engine_can_use_the_checkpoint(name: str, engine: dict[str, dict[str, Any]]) -> None:
    result = engine[name]
    assert "AutoModel" in result["auto_map"]
    assert result["config"], "the configuration is the family's own class, so engines know its attributes"
    assert result["meta"]
    assert result["down"] == list(WIDTHS)
    assert result["attention"] == "engine"
    assert result["backend"] == [True, True]
    assert result["no_split"]
    pruned, native = result["plans"]
    assert pruned == native
    assert any("down_proj" in path for path in pruned)
    assert result["tensor"]
    assert all(result["pipeline"])
    assert result["calls"] == ["a", "b", "c"], "each block passes on what only the engine's attention knows"
    assert result["replaced"]


@pytest.mark.parametrize("way", ["import", "remote"])
def test_two_processes_share_the_model(way: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(checkpoints["llama"]), way],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "HF_HOME": str(tmp_path / str(rank))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], outputs
    result = json.loads(outputs[0][0])
    assert result["local"] == [width // 2 for width in WIDTHS]
    assert result["difference"] < 1e-4


# --- widths -----------------------------------------------------------------------------------------------------------


def config(model: Path, **options: Any) -> RunConfig:
    chosen = {"criterion": "magnitude", "allocator": "uniform", "round_to": 4} | options
    return RunConfig.build(model=str(model), device="cpu", **chosen)


@given(
    st.integers(1, 64),
    st.integers(1, 8),
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.05, 1)), min_size=1, max_size=6),
    st.floats(0.1, 0.6),
)
def test_every_width_is_a_multiple_of_both(
    round_to: int, processes: int, blocks: list[tuple[int, float]], ratio: float
) -> None:
    step = width_step(round_to, processes)
    widths = [step * count for count, _ in blocks]
    budget = Budget(ratio, step)
    try:
        rounded = round_widths([share for _, share in blocks], widths, budget)
    except ConfigError:
        return  # no such total exists
    assert all(width % processes == 0 and width % round_to == 0 for width in rounded)
    check_shared([(index, "mlp", width) for index, width in enumerate(rounded)], processes)


@given(st.integers(1, 200), st.integers(1, 9))
def test_a_width_that_processes_cannot_share_is_refused_by_name(width: int, processes: int) -> None:
    places = [(0, "mlp", 0), (7, "mlp.experts.3", width)]
    if width % processes == 0:
        check_shared(places, processes)
    else:
        with pytest.raises(PlanError, match=f"--tensor-parallel {processes}.* block 7, mlp.experts.3 has {width} "):
            check_shared(places, processes)


def test_plan_and_report_say_how_many_processes_can_share_the_model(make_model: MakeModel, tmp_path: Path) -> None:
    plan = plan_only(config(make_model("llama"), tensor_parallel=4, round_to=6, ratio=0.4))
    assert (plan.round_to, plan.tensor_parallel) == (6, 4)
    assert all(width % 12 == 0 or width == 64 for width in plan.widths)
    assert PruningPlan.from_json(plan.to_json()) == plan
    older = json.loads(plan.to_json())
    del older["tensor_parallel"]
    assert PruningPlan.from_json(json.dumps(older)).tensor_parallel == 1
    result = prune(config(make_model("llama"), tensor_parallel=4), tmp_path / "out")
    assert result.report.tensor_parallel == result.plan.tensor_parallel == 4


def test_a_model_that_cannot_be_shared_is_refused_before_it_is_measured(make_model: MakeModel) -> None:
    with pytest.raises(ConfigError, match="4 attention heads"):
        plan_only(config(make_model("llama"), tensor_parallel=3))
    with pytest.raises(PlanError, match="block 0, mlp has 66 channels"):
        plan_only(config(make_model("llama", intermediate_size=66), tensor_parallel=4))


def test_a_plan_made_for_fewer_processes_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model("llama")
    plan = plan_only(config(model, round_to=2, ratio=0.28))
    assert any(width % 4 for width in plan.widths)
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = "prune", model, tmp_path / "out", "--plan", tmp_path / "plan.json", "--device", "cpu"
    refused = invoke(*command, "--tensor-parallel", "4")
    assert refused.exit_code == 2
    assert "--tensor-parallel 4: block" in refused.output
    assert invoke(*command, "--tensor-parallel", "2", "-q").exit_code == 0
    written = PruningPlan.from_json((tmp_path / "out" / "pruning_plan.json").read_text())
    assert written.tensor_parallel == 2
