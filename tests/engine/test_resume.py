"""A killed run resumes and ends with the same bits as an undisturbed one; incomplete files are never used."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from cfsp_framework import Criterion, RunConfig, Statistic, Update
from cfsp_framework.engine.cache import MeasurementCache
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import Batch, ForwardOptions
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.pipeline import plan_only, prune
from cfsp_framework.pruning import compensation
from cfsp_framework.pruning.compensation import UpdateCache
from cfsp_framework.runtime.progress import Progress
from cfsp_framework.statistics import ANGULAR_DISTANCE, DOWN_INPUT_GRAM, DOWN_INPUT_SQUARES
from helpers.families import tensors_of
from helpers.types import MakeModel, OpenTiny

BLOCKS = 9
LIMIT = 100.0
"""Seconds after which a command is taken to hang."""

# --- killed runs ------------------------------------------------------------------------------------------------------

# Forks a process for each line of its input. The child runs a command and kills itself at a given moment, or is killed
# after some seconds; it writes how often it passed each moment.
SERVER = """
import collections, functools, json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import safetensors.torch
import transformers.modeling_utils
import transformers.models.llama.modeling_llama
from pathlib import Path
from cfsp_framework import pipeline
from cfsp_framework.pruning import compensation
from cfsp_framework.pruning import cut
from cfsp_framework.run import steps
from cfsp_framework.modeling import streaming
from cfsp_framework.engine import collect
from cfsp_framework.cli.main import cli

passed = collections.Counter()
deadly = None

def moment(name):
    passed[name] += 1
    if deadly is not None and (name, passed[name]) == tuple(deadly):
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, attribute, name):
    original = getattr(owner, attribute)
    def wrapped(*arguments, **options):
        moment(f"{name}, before")
        result = original(*arguments, **options)
        moment(f"{name}, after")
        return result
    setattr(owner, attribute, wrapped)

def around_writing(owner, attribute, name=None):
    original = getattr(owner, attribute)
    def wrapped(tensors, path, *arguments, **options):
        called = name or ("hidden" if "hidden_" in str(path) else "block" if "collection-" in str(path) else "answers")
        moment(f"{called}, before")
        original(tensors, path, *arguments, **options)
        if deadly is not None and deadly[0] == f"{called}, half" and passed[f"{called}, half"] + 1 == deadly[1]:
            os.truncate(path, os.path.getsize(path) // 2)
        moment(f"{called}, half")
        moment(f"{called}, after")
    setattr(owner, attribute, wrapped)

steps.MeasurementCache = functools.partial(steps.MeasurementCache, share=float('inf'))  # keep all hidden states
around(collect, "measure_block", "measuring")
around(collect, "embed", "embedding")
around_writing(safetensors.torch, "save_file")  # what --resume keeps
around(os, "replace", "replacing")
around(compensation, "measure_block", "measuring again")
around(compensation, "compensate", "compensating")
around(cut, "cut_block", "cutting")
around_writing(streaming, "save_file", "shard")
around_writing(transformers.modeling_utils, "safe_save_file", "weights")
around(pipeline, "save_model", "saving")
around(pipeline, "verify", "verifying")
around(steps, "perplexity", "evaluating")
around(pipeline, "write_report", "reporting")
around(Path, "rename", "renaming")

for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        passed.clear()
        deadly = job["deadly"]
        try:
            cli(job["words"])
        except SystemExit as left:
            Path(job["passed"]).write_text(json.dumps(passed))
            os._exit(left.code or 0)
        finally:
            os._exit(99)
    print(0, flush=True)  # running
    until = time.monotonic() + job["seconds"]
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Server:
    """Run commands in processes that may be killed."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, words: Sequence[object], deadly: tuple[str, int] | None = None, seconds: float = LIMIT) -> None:
        """Start a command, which is killed when it passes a moment the n-th time, or after some seconds."""
        job: dict[str, object] = {"words": list(map(str, words)), "deadly": deadly, "seconds": seconds}
        job |= {"log": str(self.folder / "log.txt"), "passed": str(self.folder / "passed.json")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.end()

    def end(self) -> int:
        """Wait for the command and return its exit code, or minus the signal that killed it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server of this test broke"
        return int(line)

    def run(self, words: Sequence[object], deadly: tuple[str, int] | None = None) -> int:
        self.start(words, deadly)
        return self.end()

    @property
    def log(self) -> str:
        return (self.folder / "log.txt").read_text()

    @property
    def passed(self) -> dict[str, int]:
        """How often the last command that ended by itself passed each moment."""
        return cast("dict[str, int]", json.loads((self.folder / "passed.json").read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """One process that has everything imported, so that its children start at once."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield Server(process, tmp_path_factory.mktemp("server"))
        assert process.stdin is not None
        process.stdin.close()


CLOSED_FORM = ("--preset", "cfsp-closed-form", "--compensator", "least-squares-bias")
# Options of a command, and the moments at whose n-th passing it is killed in turn.
STORIES: dict[str, tuple[tuple[str, ...], tuple[tuple[str, int], ...]]] = {
    "cfsp": (
        (),
        (
            ("embedding, after", 1), ("block, before", 1), ("block, half", 2), ("measuring, after", 1),
            ("hidden, half", 1), ("hidden, before", 2), ("block, after", 1), ("replacing, after", 2),
            ("evaluating, after", 1), ("cutting, before", 3), ("saving, before", 1), ("weights, half", 1),
            ("verifying, before", 1), ("reporting, after", 1), ("renaming, before", 1), ("renaming, after", 1),
        ),
    ),
    "second pass": (
        CLOSED_FORM,
        (
            ("hidden, after", 2), ("measuring, before", 4), ("answers, before", 1), ("answers, half", 2),
            ("measuring again, after", 1), ("compensating, after", 2), ("answers, after", 2), ("cutting, after", 6),
            ("saving, after", 1),
        ),
    ),
    "streamed": (
        (*CLOSED_FORM, "--stream"),
        (
            ("measuring, after", 3), ("hidden, half", 2), ("block, half", 2), ("shard, before", 2), ("shard, half", 1),
            ("answers, half", 2), ("shard, after", 5), ("compensating, before", 2), ("shard, half", 9),
            ("verifying, after", 1), ("renaming, before", 1),
        ),
    ),
}  # fmt: skip
RANDOM_KILLS = 6


@pytest.fixture(scope="module")
def deep(make_model: MakeModel) -> Path:
    """A model of enough blocks to be killed in."""
    return make_model("llama", num_hidden_layers=BLOCKS)


@dataclass(frozen=True)
class Written:
    """The files of a finished run."""

    plan: str
    tensors: Mapping[str, Tensor]
    evaluations: Any
    files: frozenset[str]

    @classmethod
    def read(cls, out: Path) -> Written:
        names = frozenset(path.name for path in out.iterdir())
        report = json.loads((out / "report.json").read_text())
        return cls((out / "pruning_plan.json").read_text(), tensors_of(out), report["evaluations"], names)


def check_finished(out: Path, expected: Written) -> None:
    """Compare a checkpoint with that of an undisturbed run, to the last bit."""
    actual = Written.read(out)
    assert actual.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in actual.tensors.items())
    assert (actual.plan, actual.evaluations, actual.files) == (expected.plan, expected.evaluations, expected.files)


Words = Callable[..., tuple[object, ...]]


@pytest.fixture
def words(deep: Path, calibration_text: Path, tmp_path: Path) -> Words:
    """``words(*options, out=...)``: a command line; with ``--resume`` by default."""

    def command(*options: object, out: str = "out", resume: bool = True) -> tuple[object, ...]:
        data = "--calibration", calibration_text, "--samples", 24, "--seqlen", 32, "--batch-size", 5
        evaluation = "--evaluate", calibration_text, "--evaluate-windows", 2
        kept = ("--resume", tmp_path / "state") if resume else ()
        return "prune", deep, tmp_path / out, "-q", "--round-to", 8, *data, *evaluation, *options, *kept

    return command


@pytest.fixture
def undisturbed(server: Server, words: Words, tmp_path: Path) -> Callable[..., Written]:
    """``undisturbed(*options)``: the files of the command when it is not killed and nothing is cached."""

    def whole(*options: object) -> Written:
        assert server.run(words(*options, out="whole", resume=False)) == 0, server.log
        written = Written.read(tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole")
        return written

    return whole


@pytest.mark.parametrize("name", STORIES)
def test_a_run_that_is_killed_repeatedly_ends_with_the_same_files(
    name: str, server: Server, words: Words, undisturbed: Callable[..., Written], tmp_path: Path
) -> None:
    (options, kills), out = STORIES[name], tmp_path / "out"
    whole = undisturbed(*options)
    command = words(*options)
    for moment in kills:
        assert server.run(command, moment) == -signal.SIGKILL, f"never at {moment}: {server.log}"
        assert out.exists() is (moment[0] == "renaming, after"), "the folder appears once it is complete"
        left = {path.stem for path in tmp_path.iterdir()} - {"out", "state"}  # a folder, and its lock of the same name
        assert len(left) <= 1, "only the last killed run left files"
    if out.exists():
        check_finished(out, whole)
        assert server.run(command) == 2, "it exists"
    else:
        assert server.run(command) == 0, server.log
    check_finished(out, whole)
    files = {
        path.name for path in tmp_path.iterdir() if path.suffix != ".lock"
    }  # left when it is killed at the very end
    assert files == {"out", "state"}
    kept = [path.name for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert {name.partition("_")[0] for name in kept} == {"block"}, "neither hidden states nor anything unfinished"
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(out)(ids).logits.std() > 0.1


def test_a_resumed_run_does_not_repeat_finished_blocks(
    server: Server, words: Words, undisturbed: Callable[..., Written]
) -> None:
    command = words(*CLOSED_FORM)
    undisturbed(*CLOSED_FORM)
    whole = server.passed
    assert (whole["measuring, before"], whole["measuring again, before"]) == (BLOCKS, whole["compensating, before"])
    assert whole["compensating, before"] > 5, "every block that loses channels"
    assert server.run(command, ("measuring, after", 6)) == -signal.SIGKILL
    assert server.run(command, ("compensating, after", 4)) == -signal.SIGKILL
    assert server.run(command) == 0
    assert "measuring, before" not in server.passed
    assert server.passed["compensating, before"] == whole["compensating, before"] - 3, "three were compensated and kept"


def test_kills_at_random_times_leave_no_incomplete_checkpoint(
    server: Server, words: Words, undisturbed: Callable[..., Written], tmp_path: Path
) -> None:
    out, options, draw = tmp_path / "out", (*CLOSED_FORM, "--stream"), random.Random(0)
    start = time.monotonic()
    whole = undisturbed(*options)
    takes = time.monotonic() - start
    kills = 0
    while kills < RANDOM_KILLS:
        seconds = draw.uniform(0.05, 0.9) * takes
        until = time.monotonic() + seconds
        server.start(words(*options), seconds=seconds)
        while time.monotonic() < until:
            if out.exists():
                check_finished(out, whole)
            time.sleep(0.005)
        code = server.end()
        assert code in (0, -signal.SIGKILL), server.log
        kills += code == -signal.SIGKILL
        if out.exists():  # start again without any files
            check_finished(out, whole)
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "state")
    assert server.run(words(*options)) == 0, server.log
    check_finished(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "state"}


def test_a_killed_replacement_leaves_the_old_or_the_new_checkpoint(
    server: Server, words: Words, undisturbed: Callable[..., Written], tmp_path: Path
) -> None:
    out, command = tmp_path / "out", words("--overwrite")
    old, new = undisturbed("--ratio", 0.25), undisturbed()
    assert server.run(words("--ratio", 0.25)) == 0, server.log
    for moment in (("weights, half", 1), ("renaming, before", 1)):
        assert server.run(command, moment) == -signal.SIGKILL
        check_finished(out, old)
    assert server.run(command, ("renaming, after", 1)) == -signal.SIGKILL, "both are moved aside"
    assert not out.exists()
    (aside,) = tmp_path.glob(".out.*.old")
    check_finished(aside, old)
    assert server.run(command, ("renaming, after", 1)) == -signal.SIGKILL
    check_finished(out, new)
    assert server.run(command, ("renaming, after", 2)) == -signal.SIGKILL, "before the old one is removed"
    check_finished(out, new)
    assert server.run(command) == 0
    check_finished(out, new)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "state"}


# --- one collection ---------------------------------------------------------------------------------------------------


class Marks(Criterion):
    """Read light and heavy statistics, and stop in one block."""

    name: ClassVar[str] = "marks"
    stop: ClassVar[int | None] = None
    scored: ClassVar[list[int]] = []

    requires: ClassVar[frozenset[Statistic]] = frozenset(
        {ANGULAR_DISTANCE, DOWN_INPUT_GRAM.relative(), DOWN_INPUT_SQUARES}
    )

    def score(self, feed_forward: Any, statistics: Any) -> Tensor:
        if feed_forward.block == Marks.stop:
            raise KeyboardInterrupt
        Marks.scored.append(feed_forward.block)
        total = sum(value.sum().item() for value in statistics.values())
        return cast("Tensor", total + feed_forward.down.float().abs().sum(0))


WINDOWS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))
Measurements = Sequence[FeedForwardMeasurement]


@dataclass
class Collection:
    """Collect on one model with ``--resume``, and record the forward passes of its blocks."""

    decoder: Decoder
    folder: Path
    forwards: list[int]

    def run(
        self, share: float = float("inf"), *, stop: int | None = None, only_until: int = 99, windows: Tensor = WINDOWS
    ) -> Measurements:
        """Collect, or be interrupted in block ``stop``; hidden states are kept up to block ``only_until``."""
        Marks.stop = stop
        Marks.scored.clear()
        self.forwards.clear()
        return self._collect(windows, CacheUntil(only_until, self.folder, "key", share=share))

    def plain(self) -> Measurements:
        """Collect without a cache."""
        Marks.stop = None
        return self._collect(WINDOWS, None)

    def interrupted(self, stop: int, **options: Any) -> None:
        """Be interrupted in block ``stop``."""
        with pytest.raises(KeyboardInterrupt):
            self.run(stop=stop, **options)

    def _collect(self, windows: Tensor, cache: MeasurementCache | None) -> Measurements:
        criterion = ConfiguredComponent[Criterion](Marks(), Origin("test"))
        collectors = load_plugins().collectors_for(Marks.requires)
        return collect(
            self.decoder,
            windows,
            {"criterion": criterion},
            collectors,
            curves={"criterion": ("criterion", "compensated")},
            forward_options=ForwardOptions(batch_size=2),
            seed=0,
            progress=Progress(),
            cache=cache,
        )

    @property
    def files(self) -> Path:
        """Folder of the only collection."""
        (folder,) = self.folder.iterdir()
        return folder


class CacheUntil(MeasurementCache):
    """Keep no hidden states after some block."""

    def __init__(self, last: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._last = last

    def store(self, index: int, measurements: list[FeedForwardMeasurement], batches: Sequence[Batch]) -> None:
        super().store(index, measurements, batches if index <= self._last else ())


@pytest.fixture
def collection(
    request: pytest.FixtureRequest, make_model: MakeModel, open_tiny: OpenTiny, tmp_path: Path
) -> Collection:
    """A fresh model of six blocks whose forward passes are counted; parametrised by the model's name."""
    _, decoder = open_tiny(make_model(getattr(request, "param", "llama"), num_hidden_layers=6))
    collection = Collection(decoder, tmp_path / "state", [])
    for index, block in enumerate(decoder.blocks):
        attention = block.get_submodule("self_attn")  # a stub in place of a block does not run it
        attention.register_forward_hook(partial(lambda at, *_: collection.forwards.append(at), index))
    return collection


def check_same(actual: Measurements, expected: Measurements) -> None:
    """Compare measurements to the last bit."""
    assert len(actual) == len(expected)
    for left, right in zip(actual, expected, strict=True):
        assert (left.block, left.path, left.width) == (right.block, right.path, right.width)
        for name in ("tokens", "held_out_tokens", "unseen"):
            assert getattr(left.statistics, name) == getattr(right.statistics, name)
        for kind in ("statistics", "scores", "curves"):
            tensors, others = dict(getattr(left, kind)), dict(getattr(right, kind))
            assert tensors.keys() == others.keys() != set()
            assert all(torch.equal(value, others[key]) for key, value in tensors.items())
            assert all(value.dtype == others[key].dtype for key, value in tensors.items())


@pytest.mark.parametrize(("stop", "only_until", "entering"), [(4, 99, 4), (4, 1, 2), (5, 0, 1), (3, -1, 0), (0, 99, 0)])
def test_a_collection_resumes_from_the_hidden_states_that_were_kept(
    stop: int, only_until: int, entering: int, collection: Collection
) -> None:
    expected = collection.plain()
    collection.interrupted(stop, only_until=only_until)
    assert Marks.scored == list(range(stop))
    check_same(collection.run(), expected)
    assert Marks.scored == list(range(stop, 6))
    assert Counter(collection.forwards) == dict.fromkeys(range(entering, 6), 3), "three batches each"
    assert sorted(path.name for path in collection.files.iterdir()) == [f"block_{n}.safetensors" for n in range(6)]
    check_same(collection.run(), expected)
    assert (Marks.scored, collection.forwards) == ([], []), "every block was kept"


def test_without_a_share_of_the_time_no_hidden_states_are_kept(collection: Collection) -> None:
    collection.interrupted(5, share=0.0)
    assert {path.name for path in collection.files.iterdir()} == {f"block_{n}.safetensors" for n in range(5)}
    collection.run(0.0)
    assert Counter(collection.forwards) == dict.fromkeys(range(6), 3)


@pytest.mark.parametrize("collection", ["mixtral"], indirect=True)
def test_experts_that_share_statistics_resume(collection: Collection) -> None:
    expected = collection.plain()
    collection.interrupted(3)
    check_same(collection.run(), expected)
    assert len(expected) == 24
    assert set(collection.forwards) == {3, 4, 5}


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "foreign": lambda path: save_file({"other": torch.ones(3)}, path),
    "no header": lambda path: save_file(load_file(path), path),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_incomplete_hidden_states_are_not_used(damage: str, collection: Collection) -> None:
    expected = collection.plain()
    collection.interrupted(4)
    DAMAGES[damage](collection.files / "hidden_0.safetensors")
    check_same(collection.run(), expected)
    assert Marks.scored == [4, 5]
    assert set(collection.forwards) == set(range(6))


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_block_whose_file_is_incomplete_is_measured_again(block: int, damage: str, collection: Collection) -> None:
    expected = collection.plain()
    collection.interrupted(4)  # the hidden states that were kept enter block 4, behind the damaged one
    DAMAGES[damage](collection.files / f"block_{block}.safetensors")
    check_same(collection.run(), expected)
    assert Marks.scored == list(range(block, 6))
    check_same(collection.run(), expected)
    assert Marks.scored == []


def test_hidden_states_of_other_shapes_are_not_used(collection: Collection) -> None:
    expected = collection.plain()
    collection.interrupted(4)
    path = collection.files / "hidden_0.safetensors"
    kept = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({**kept, "2": kept["2"].repeat(2, 1, 1)}, path, metadata)
    check_same(collection.run(), expected)
    assert set(collection.forwards) == set(range(6))


def test_hidden_states_of_a_run_killed_after_its_last_block_are_removed(collection: Collection) -> None:
    collection.interrupted(5)
    hidden = collection.files / "hidden_0.safetensors"
    kept = hidden.read_bytes()
    collection.run()
    hidden.write_bytes(kept)  # as if it had been killed between the last block and the removal
    collection.run()
    assert not hidden.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "magnitude", "allocator": "uniform"},  # scores without statistics
        {"criterion": "taylor", "samples": 3, "seqlen": 16},  # a statistic that is the score
    ],
)
def test_cached_scores_give_the_same_plan(
    options: dict[str, object], make_model: MakeModel, calibration_text: Path, tmp_path: Path
) -> None:
    options |= {"model": str(make_model("llama")), "calibration": str(calibration_text), "round_to": 8, "device": "cpu"}
    cached = RunConfig.build(**options, resume=tmp_path)
    assert plan_only(RunConfig.build(**options)) == plan_only(cached) == plan_only(cached)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3


# --- keys of the cache ------------------------------------------------------------------------------------------------

PLUGIN = """
import torch
from cfsp_framework import Criterion, Statistic, hookimpl

class Squares(Criterion):
    name = "squares"
    requires = frozenset({Statistic("down_input_squares")})

    def score(self, feed_forward, statistics):
        return statistics[Statistic("down_input_squares")] * FACTOR

@hookimpl
def cfsp_criteria():
    return [Squares]
"""


@pytest.fixture
def config(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> dict[str, object]:
    """Options of a run whose collection is kept."""
    (tmp_path / "squares.py").write_text(PLUGIN.replace("FACTOR", "1.0"))
    return {
        "model": str(make_model("llama")),
        "calibration": str(calibration_text),
        "samples": 6,
        "seqlen": 32,
        "round_to": 8,
        "device": "cpu",
        "criterion": "cfsp",
        "plugins": [str(tmp_path / "squares.py")],
        "resume": tmp_path / "state",
    }


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Generator[list[LlamaMLP]]:
    """List every feed-forward that runs, except to compare replay with the model."""
    ran: list[LlamaMLP] = []
    original: Callable[..., Any] = LlamaMLP.forward

    def forward(self: LlamaMLP, hidden: Tensor) -> Tensor:
        ran.append(self)
        return cast("Tensor", original(self, hidden))

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", forward)
        patch.setattr("cfsp_framework.run.context.check_replay", lambda *_: None)
        yield ran


def _other_model(config: dict[str, object], folder: Path) -> None:
    shutil.copytree(str(config["model"]), folder / "model")
    path = folder / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] += 1e-3
    save_file(weights, path, {"format": "pt"})
    config["model"] = str(folder / "model")


def _other_data(config: dict[str, object], folder: Path) -> None:
    text = Path(str(config["calibration"])).read_text()
    (folder / "other.txt").write_text(text.replace("quick", "quiet"))
    config["calibration"] = str(folder / "other.txt")


def _edited_plugin(config: dict[str, object], folder: Path) -> None:
    (folder / "squares.py").write_text(PLUGIN.replace("FACTOR", "(1.0 + 1.0)"))


def _option(**values: object) -> Callable[[dict[str, object], Path], None]:
    def change(config: dict[str, object], folder: Path) -> None:
        config |= values

    return change


CHANGES = {
    "model": _other_model,
    "data": _other_data,
    "another number of windows": _option(samples=5),
    "longer windows": _option(seqlen=33),
    "seed": _option(seed=1),
    "criterion": _option(criterion="wanda-sp"),
    "an option of the criterion": _option(criterion="cfsp:b=2"),
    "an allocator that reads another statistic": _option(allocator="cfsp:distance=mse"),
    "another kind of curve": _option(allocator="error-curve:compensated=false"),
    "dtype": _option(dtype="bfloat16"),
    "batch size": _option(batch_size=2),
    "tokens that count": _option(skip_bos=True),
    "attention that was dropped": _option(drop_attention=1),
}
SAME = {
    "ratio": _option(ratio=0.25),
    "rounding": _option(round_to=16, rebalance=False),
    "budget": _option(budget="parameters", ratio=0.1),
    "an option of the allocator": _option(allocator="cfsp:a=3"),
    "streaming": _option(stream=True),
    "spilling": _option(spill=Path("spill")),
    "compensation": _option(compensator="none"),
}


@pytest.mark.parametrize("name", [*CHANGES, "the source of a plugin", "versions"])
def test_a_change_that_decides_a_measurement_measures_again(
    name: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "the source of a plugin":
        config["criterion"] = "squares"
    if name == "another kind of curve":
        config["allocator"] = "error-curve"
    plan_only(RunConfig.build(**config))
    (before,) = (tmp_path / "state").iterdir()
    if name == "versions":
        monkeypatch.setattr("cfsp_framework.run.cache_keys.library_versions", lambda: {"python": "3.0.0"})
    CHANGES.get(name, _edited_plugin if name == "the source of a plugin" else _option())(config, tmp_path)
    with counting(monkeypatch) as ran:
        plan = plan_only(RunConfig.build(**config))
    assert len(set(ran)) == 3, "every block ran"
    assert len(list((tmp_path / "state").iterdir())) == 2
    assert len(list(before.iterdir())) == 3, "the other cache stays"
    assert plan == plan_only(RunConfig.build(**{**config, "resume": None}))


@pytest.mark.parametrize("name", SAME)
def test_a_change_that_decides_no_measurement_runs_no_block(
    name: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan_only(RunConfig.build(**config))
    SAME[name](config, tmp_path)
    if "spill" in config:
        config["spill"] = tmp_path / "spill"
    with counting(monkeypatch) as ran:
        plan = plan_only(RunConfig.build(**config))
    assert ran == []
    assert len(list((tmp_path / "state").iterdir())) == 1
    assert plan == plan_only(RunConfig.build(**{**config, "resume": None}))


COMPENSATION = {
    "ratio": _option(ratio=0.25),
    "seed": _option(seed=1),
    "an option of the compensator": _option(compensator="least-squares:damping=0.1"),
    "another number of windows": _option(samples=17),
    "windows that are used twice": _option(reuse_windows=False),
    "batch size": _option(batch_size=2),
}


@pytest.mark.parametrize("name", [*COMPENSATION, "versions"])
def test_a_change_that_decides_compensation_compensates_again(
    name: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"compensator": "least-squares", "samples": 20}
    compensated: list[int] = []
    original = compensation.compensate

    def counted(compensator: Any, feed_forward: Any, *rest: Any) -> Any:
        compensated.append(feed_forward.block)
        return original(compensator, feed_forward, *rest)

    monkeypatch.setattr(compensation, "compensate", counted)
    prune(RunConfig.build(**config), tmp_path / "first")
    assert compensated == [0, 1, 2]
    compensated.clear()
    prune(RunConfig.build(**config), tmp_path / "second")
    assert compensated == [], "all updates are read"
    COMPENSATION.get(name, _option())(config, tmp_path)
    if name == "versions":
        monkeypatch.setattr("cfsp_framework.run.cache_keys.library_versions", lambda: {"python": "3.0.0"})
    third = prune(RunConfig.build(**config), tmp_path / "third")
    assert compensated == [block.block for block in third.plan.blocks if len(block.kept) < block.width] != []


def test_incomplete_updates_are_not_used(tmp_path: Path) -> None:
    cache = UpdateCache(tmp_path, "key")
    cache.store(0, [Update(down=torch.ones(3, 4), error=0.5, error_plain=1.0), Update()])
    updates = cache.load(0, 2)
    assert updates is not None
    assert torch.equal(cast("Tensor", updates[0].down), torch.ones(3, 4))
    assert (updates[0].error, updates[0].error_plain, updates[1]) == (0.5, 1.0, Update())
    (path,) = (tmp_path / "key").iterdir()
    DAMAGES["truncated"](path)
    assert cache.load(0, 2) is None


# --- the cost of keeping hidden states --------------------------------------------------------------------------------


class Clock:
    """A clock that a test advances, in place of the module ``time``."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@dataclass
class Disk:
    """Take so many seconds to write hidden states, and record when they are written."""

    clock: Clock
    seconds: float
    written: list[float] = field(default_factory=list)

    def save(self, path: Path, *_: object) -> None:
        if "hidden" in path.name:
            self.clock.seconds += self.seconds
            self.written.append(self.clock.seconds)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk(Clock(), 0.0)
    monkeypatch.setattr("cfsp_framework.engine.cache.time", disk.clock)
    monkeypatch.setattr("cfsp_framework.engine.cache.save_tensors", disk.save)
    return disk


@pytest.mark.parametrize("block", [0.01, 1.0, 60.0])
@pytest.mark.parametrize("speed", [1e7, 2e8, 5e9])
def test_keeping_hidden_states_takes_less_than_a_twentieth_of_the_time(
    block: float, speed: float, disk: Disk, tmp_path: Path
) -> None:
    batches = [Batch(torch.zeros(2, 2**18), ()), Batch(torch.zeros(2, 2**18), ())]
    disk.seconds = sum(batch.hidden.nbytes for batch in batches) / speed
    cache = MeasurementCache(tmp_path, "key")
    count = 20_000 if block < 1 else 200
    cache.load(count)
    cache.resume(batches)
    start = disk.clock.seconds
    for index in range(count):
        disk.clock.seconds += block
        cache.store(index, [], batches)
    spent, total = len(disk.written) * disk.seconds, disk.clock.seconds - start
    assert spent < 0.05 * total
    assert total == pytest.approx(count * block + spent)
    possible = 0.05 * count * block / disk.seconds
    assert len(disk.written) >= min(count - 1, 0.8 * possible - 1), "and not much more rarely than that"


def test_the_first_cost_is_estimated_and_the_next_is_that_of_the_last(disk: Disk, tmp_path: Path) -> None:
    batches = [Batch(torch.zeros(10**7), ())]  # 0.2 seconds at the estimated speed

    def stored(cache: MeasurementCache, *delays: float) -> list[bool]:
        """Store a block after each delay and return whether hidden states were written."""
        results: list[bool] = []
        for index, delay in enumerate(delays):
            disk.clock.seconds += delay
            before = len(disk.written)
            cache.store(index, [], batches)
            results.append(len(disk.written) > before)
        return results

    cache = MeasurementCache(tmp_path, "key")
    cache.load(100)
    disk.seconds = 10.0  # a slow disk
    assert stored(cache, 0.0, 3.9, 0.2) == [False, False, True]
    assert stored(cache, 4.1, 195.0, 1.0) == [False, False, True]
    never = MeasurementCache(tmp_path, "key", share=0.0)
    never.load(100)
    assert stored(never, 1e9) == [False]
