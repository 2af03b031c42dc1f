"""Several processes give the same as one; the first writes and prints."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from cfsp_framework.api.records import PruningPlan
from cfsp_framework.cli.options import is_first
from cfsp_framework.engine.replay import ForwardOptions
from cfsp_framework.errors import ConfigError
from cfsp_framework.evaluation.perplexity import EvaluationSet, perplexity
from cfsp_framework.runtime.distributed import SOLO, Ranks, join_ranks
from cfsp_framework.runtime.progress import Progress
from helpers.runs import invoke
from helpers.types import MakeModel

WORLD = 2

# Every process runs all commands and prints the outcome of each, with the files it wrote itself.
WORKER = """
import json, os, sys, traceback
from pathlib import Path
import torch
torch.set_num_threads(1)
from click.testing import CliRunner
from cfsp_framework.cli.main import cli

commands, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
written = []

def watch(event, arguments):
    if event in ("os.mkdir", "os.rename", "os.remove") or event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        written.append(f"{event} {arguments[0]}")

sys.addaudithook(watch)
for name, words in commands.items():
    written.clear()
    result = CliRunner().invoke(cli, words)
    inside = [entry for entry in written if f"{folder}/" in entry]
    kept = [entry for entry in inside if f"{folder}/kept" in entry]  # each process has its own hidden states
    error = "" if isinstance(result.exception, SystemExit | None) else "".join(traceback.format_exception(result.exception))
    outcome = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr, "error": error}
    outcome |= {"written": [entry for entry in inside if entry not in kept], "kept": kept}
    print("\\nOUTCOME " + json.dumps([int(os.environ["RANK"]), name, outcome]), flush=True)
"""


# Stop a run when two blocks are measured; only the first process keeps its hidden states.
STOP = """
from cfsp_framework import CfspError, hookimpl
from cfsp_framework.engine.cache import MeasurementCache

original = MeasurementCache.store

def store(self, index, measured, batches):
    self._is_cheap = lambda _: True
    original(self, index, measured, batches)
    if index == 1:
        MeasurementCache.store = original  # for the next command
        if not self._ranks.first:
            self._hidden.unlink()
        raise CfspError("stopped")

MeasurementCache.store = store

@hookimpl
def cfsp_run_finished(result):
    pass
"""


@dataclass(frozen=True)
class Outcome:
    """Outcome of one command in one process."""

    code: int
    stdout: str
    stderr: str
    error: str
    written: list[str]
    kept: list[str]
    """Files written in the folders of ``--resume``."""


Outcomes = Mapping[str, tuple[Outcome, Outcome]]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def torchrun(*words: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run two processes on this machine."""
    head = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", WORLD, "--master-port", free_port()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    command = [str(word) for word in (*head, *words)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, env=environment, stdout=pipe, stderr=pipe) as running:
        try:
            out, errors = running.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:  # one process waits for the other
            running.terminate()  # torchrun passes it on
            out, errors = running.communicate()
    return subprocess.CompletedProcess(command, running.returncode, out, errors)


def run(*words: object) -> str:
    """Run the command line in this process alone; return its stdout."""
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    return result.stdout


@dataclass(frozen=True)
class Case:
    """A run of ``cfsp prune`` to compare."""

    model: str
    options: tuple[object, ...] = ()
    tolerance: float = 0.0
    """Tolerance of the weights: those only cut are the same to the last bit, those computed from sums are not."""


CASES = {
    "llama": Case("llama"),
    "mixtral": Case("mixtral"),
    "closed form": Case("llama", ("--preset", "cfsp-closed-form"), tolerance=1e-4),
    "closed form, streamed": Case("llama", ("--preset", "cfsp-closed-form", "--stream"), tolerance=1e-4),
    "mixtral, streamed, closed form": Case("mixtral", ("--preset", "cfsp-closed-form", "--stream"), tolerance=1e-4),
    "gradients": Case("llama", ("--criterion", "taylor")),
    "search": Case("llama", ("--allocator", "search:evaluations=6,windows=4")),
    "without the first token": Case("llama", ("--skip-bos", "--criterion", "variance-weighted")),
}
REFUSED: dict[str, tuple[tuple[object, ...], tuple[str, str]]] = {
    "one window": (("--samples", 1), ("1 windows", "give more --samples")),
    "an order": (("--preset", "flap-released"), ("down-input-fluctuation", "run one process")),
    "kept tokens": (("--compensator", "local-reconstruction"), ("feed-forward-inputs", "run one process")),
}


@pytest.fixture(scope="module")
def small(calibration_text: Path) -> tuple[object, ...]:
    """Options of a run whose processes measure different numbers of windows, some of them held out."""
    return "--calibration", calibration_text, "--samples", 45, "--seqlen", 32, "--round-to", 8, "--device", "cpu"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that several processes write to."""
    return tmp_path_factory.mktemp("ranks")


Words = Mapping[str, tuple[object, ...]]


@pytest.fixture(scope="module")
def prune_words(
    make_model: MakeModel, small: tuple[object, ...], calibration_text: Path
) -> Callable[[str, Path], tuple[object, ...]]:
    """``prune_words(name, folder)``: the command of a case, which writes into ``folder``."""

    def words(name: str, folder: Path) -> tuple[object, ...]:
        case = CASES[name]
        evaluation = "--evaluate", calibration_text, "--evaluate-windows", 7, "--json"
        kept = "--keep-statistics", "--resume", folder / "kept" / name
        return "prune", make_model(case.model), folder / name, *small, *case.options, *evaluation, *kept

    return words


@pytest.fixture(scope="module")
def commands(
    prune_words: Callable[[str, Path], tuple[object, ...]],
    make_model: MakeModel,
    small: tuple[object, ...],
    calibration_text: Path,
    folder: Path,
) -> Words:
    """Every command run by several processes, by name."""
    data = "--data", calibration_text, "--seqlen", 32, "--evaluate-windows", 7, "--json"
    model = make_model("llama")

    def again(name: str, kept: str = "stopped") -> tuple[object, ...]:
        """Return the plain case with another output folder and ``--resume`` folder."""
        changed = {folder / "llama": folder / name, folder / "kept" / "llama": folder / "kept" / kept}
        return tuple(
            changed.get(word, word) if isinstance(word, Path) else word for word in prune_words("llama", folder)
        )

    return {
        **{name: prune_words(name, folder) for name in CASES},
        **{name: ("prune", model, folder / name, *small, *options) for name, (options, _) in REFUSED.items()},
        "stopped": (*again("stopped"), "-p", folder / "stop.py"),
        "going on": again("going on"),
        "another ratio": (*again("another ratio", "llama"), "--ratio", 0.25),
        "plan": ("plan", model, folder / "plan.json", *small),
        "evaluate": ("evaluate", model, *data),
        "evaluate, streamed": ("evaluate", model, *data, "--stream"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(commands: Words, folder: Path) -> Outcomes:
    """Outcomes of every command in both processes."""
    (folder / "commands.json").write_text(json.dumps({name: list(map(str, words)) for name, words in commands.items()}))
    (folder / "worker.py").write_text(WORKER)
    (folder / "stop.py").write_text(STOP)
    done = torchrun(folder / "worker.py", folder / "commands.json", folder)
    assert done.returncode == 0, done.stderr
    by_rank: dict[str, dict[int, Outcome]] = {name: {} for name in commands}
    for line in done.stdout.splitlines():
        if line.startswith("OUTCOME "):
            rank, name, values = json.loads(line.removeprefix("OUTCOME "))
            by_rank[name][rank] = Outcome(**values)
    return {name: (ranks[0], ranks[1]) for name, ranks in by_rank.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_the_same_as_one(
    name: str,
    outcomes: Outcomes,
    prune_words: Callable[[str, Path], tuple[object, ...]],
    folder: Path,
    tmp_path: Path,
) -> None:
    assert [outcome.error for outcome in outcomes[name]] == ["", ""]
    expected, report = json.loads(run(*prune_words(name, tmp_path))), json.loads(outcomes[name][0].stdout)
    assert (expected["processes"], report["processes"]) == (1, 2)
    places = tmp_path / name, folder / name
    plans = [PruningPlan.from_json((place / "pruning_plan.json").read_text()) for place in places]
    assert [block.kept for block in plans[0].blocks] == [block.kept for block in plans[1].blocks]
    assert plans[0].calibration == plans[1].calibration
    _same((_tensors(place, "statistics.safetensors") for place in places), 1e-6)
    kept = [_tensors(place / "kept" / name, "collection-*/block_*") for place in (tmp_path, folder)]
    assert len(kept[0]) >= 3
    _same(kept, 1e-6)
    _same((_tensors(place, "model*.safetensors") for place in places), CASES[name].tolerance)
    for alone, shared in zip(expected["evaluations"], report["evaluations"], strict=True):
        assert shared["windows"] == alone["windows"] == 7
        assert shared["dense"] == pytest.approx(alone["dense"], rel=1e-9)
        assert shared["pruned"] == pytest.approx(alone["pruned"], rel=max(1e-9, CASES[name].tolerance))
    assert report["reload_difference"] < 1e-5
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(folder / name)(torch.arange(3, 20)[None]).logits.isfinite().all()


def _tensors(folder: Path, pattern: str) -> dict[str, torch.Tensor]:
    """Return all tensors of some files by file and name; those of a checkpoint by name alone, sharded or not."""
    return {
        key if key.startswith(("model.", "lm_head.", "blocks.")) else f"{path.name} {key}": value
        for path in sorted(folder.glob(pattern))
        for key, value in load_file(path).items()
    }


def _same(pair: Iterable[Mapping[str, torch.Tensor]], tolerance: float) -> None:
    left, right = pair
    assert left.keys() == right.keys()
    for key, value in left.items():
        scale = value.abs().max().item()
        assert torch.allclose(value, right[key], rtol=tolerance, atol=tolerance * scale), key


@pytest.mark.parametrize("name", [*CASES, "plan", "evaluate", "evaluate, streamed"])
def test_one_process_writes_and_prints(name: str, outcomes: Outcomes) -> None:
    first, other = outcomes[name]
    assert (first.code, other.code) == (0, 0)
    assert first.stdout
    assert other.stdout == ""
    assert bool(first.written) is not name.startswith("evaluate")
    assert other.written == []


def test_nothing_else_is_left(outcomes: Outcomes, folder: Path) -> None:
    outputs = {*CASES, "going on", "another ratio", "kept", "plan.json"}
    assert {path.name for path in folder.iterdir()} == outputs | {"commands.json", "worker.py", "stop.py"}
    assert outcomes.keys() > CASES.keys()


def test_another_ratio_measures_nothing(outcomes: Outcomes) -> None:
    assert all(outcome.kept for outcome in outcomes["llama"])
    for outcome in outcomes["another ratio"]:
        assert outcome.code == 0
        assert not [entry for entry in outcome.kept if not entry.startswith("os.remove")]
    assert json.loads(outcomes["another ratio"][0].stdout)["channel_ratio"] == 0.25


def test_a_run_goes_on_from_what_each_process_kept(outcomes: Outcomes, folder: Path) -> None:
    assert [(outcome.code, outcome.stderr) for outcome in outcomes["stopped"]] == [(1, "Error: stopped\n")] * 2
    (kept,) = (folder / "kept" / "stopped").iterdir()
    assert {path.name for path in kept.iterdir()} == {f"block_{block}.safetensors" for block in range(3)}
    assert [outcome.code for outcome in outcomes["going on"]] == [0, 0]
    for pattern in ("model*.safetensors", "statistics.safetensors"):
        _same((_tensors(folder / name, pattern) for name in ("llama", "going on")), 0.0)
    _same((_tensors(folder / "kept" / name, "*/block_*") for name in ("llama", "stopped")), 0.0)
    reports = [json.loads(outcomes[name][0].stdout) for name in ("llama", "going on")]
    assert reports[0]["evaluations"] == reports[1]["evaluations"]


@pytest.mark.parametrize("name", REFUSED)
def test_work_that_cannot_be_shared_is_refused(name: str, outcomes: Outcomes, folder: Path) -> None:
    for outcome in outcomes[name]:
        assert (outcome.code, outcome.error, outcome.stdout) == (2, "", "")
        assert all(words in outcome.stderr for words in REFUSED[name][1])
        assert outcome.stderr.count("\n") == 1
    assert not (folder / name).exists()


def test_one_plan_is_written(outcomes: Outcomes, commands: Words, folder: Path, tmp_path: Path) -> None:
    head, model, _, *rest = commands["plan"]
    run(head, model, tmp_path / "plan.json", *rest, "-q")
    plans = [PruningPlan.from_json(path.read_text()) for path in (tmp_path / "plan.json", folder / "plan.json")]
    assert plans[0].widths == plans[1].widths
    assert [block.kept for block in plans[0].blocks] == [block.kept for block in plans[1].blocks]


@pytest.mark.parametrize("name", ["evaluate", "evaluate, streamed"])
def test_evaluation_is_the_same(name: str, outcomes: Outcomes, commands: Words) -> None:
    (alone,) = json.loads(run(*commands[name]))["evaluations"]
    (shared,) = json.loads(outcomes[name][0].stdout)["evaluations"]
    assert (alone.pop("data"), alone.pop("windows")) == (shared.pop("data"), shared.pop("windows"))
    assert shared == pytest.approx(alone, rel=1e-9)


def test_the_command_line_itself_under_torchrun(
    make_model: MakeModel, small: tuple[object, ...], tmp_path: Path
) -> None:
    done = torchrun("-m", "cfsp_framework", "prune", make_model("llama"), tmp_path / "out", *small, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["processes"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- Ranks itself -----------------------------------------------------------------------------------------------------

# Three processes: the sum of two float32 numbers is the same in any precision.
TOGETHER = """
import multiprocessing, os, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from cfsp_framework.errors import ConfigError
from cfsp_framework.runtime import distributed as ranks
from cfsp_framework.cli.options import is_first
from cfsp_framework.runtime.distributed import join_ranks

def work(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="3", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    ranks.VALUES_AT_ONCE = 7  # several parts
    us = join_ranks("cpu")
    assert (us.rank, us.world, us.first, is_first()) == (rank, 3, rank == 0, rank == 0)
    assert join_ranks("cpu") == us
    sums = {
        "matrix": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T * (rank + 1),  # not contiguous, as a sum may be
        "digits": torch.tensor([1.0 if (place + rank) % 3 == 0 else 2.0**-24 for place in range(120)]),
        "scalar": torch.tensor(float(rank)),
        "exact": torch.tensor([2.0**60, 1.0], dtype=torch.float64),
    }
    us.add(sums)
    assert torch.equal(sums["matrix"], 6 * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).T)
    assert sums["digits"].dtype == torch.float32
    assert (sums["digits"] == 1 + 2.0**-23).all(), "added in float32 the small ones are lost where the one is first"
    assert sums["scalar"].shape == () and sums["scalar"] == 3
    assert torch.equal(sums["exact"], torch.tensor([3 * 2.0**60, 3.0], dtype=torch.float64))
    assert us.total([rank, 10**15, 0]) == [3, 3 * 10**15, 0]
    gathered = us.gather(torch.full((rank + 1, 2), float(rank), dtype=torch.float64))
    assert gathered.dtype == torch.float64
    assert gathered[:, 0].tolist() == [0, 1, 1, 2, 2, 2]
    assert us.gather(torch.arange(float(rank == 1))).tolist() == [0.0]
    assert us.agree({"plan": rank, "tensor": torch.tensor([rank])}) == {"plan": 0, "tensor": torch.tensor([0])}
    assert us.agree(None) is None
    shares = [None] * 3
    torch.distributed.all_gather_object(shares, list(us.share(7)))
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    try:
        us.share(2)
    except ConfigError as error:
        assert "2 windows cannot be shared out over 3 processes" in str(error)
    else:
        raise AssertionError("2 windows for 3 processes")
    if rank == 2:
        time.sleep(0.3)
        Path(folder, "late").touch()
    us.wait()
    assert Path(folder, "late").exists()
    Path(folder, str(rank)).touch()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, *sys.argv[1:])) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
"""


def test_sums_and_values_are_exchanged(tmp_path: Path) -> None:
    (tmp_path / "together.py").write_text(TOGETHER)
    command = [sys.executable, str(tmp_path / "together.py"), str(tmp_path), str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {"0", "1", "2"} <= {path.name for path in tmp_path.iterdir()}


def test_one_process_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("RANK", raising=False)
    assert join_ranks("cpu") is SOLO
    assert is_first()
    assert SOLO.first
    assert list(SOLO.share(3)) == [0, 1, 2]
    sums = {"a": torch.tensor([1.0])}
    SOLO.add(sums)
    assert sums == {"a": torch.tensor([1.0])}
    assert SOLO.total([1, 2]) == [1, 2]
    assert SOLO.gather(torch.tensor([1.0])).tolist() == [1.0]
    assert SOLO.agree("plan") == "plan"
    with pytest.raises(ConfigError, match="0 windows"):
        SOLO.share(0)


@pytest.mark.parametrize("count", [4, 7, 8])
def test_every_window_is_measured_once(count: int) -> None:
    shares = [list(Ranks(rank, 4).share(count)) for rank in range(4)]
    assert sorted(number for share in shares for number in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


class _Second(Ranks):
    """The second of two processes; the first had the only window."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        assert len(values) == 0
        return torch.tensor([1.5], dtype=torch.float64)


def test_a_process_without_a_window_to_evaluate(make_model: MakeModel) -> None:
    model = AutoModelForCausalLM.from_pretrained(make_model("llama"))
    data = EvaluationSet("text", torch.arange(3, 35)[None], 1.0)
    result = perplexity(model, data, Progress(), ForwardOptions(ranks=_Second(1, 2)))
    assert result.nll == 1.5
