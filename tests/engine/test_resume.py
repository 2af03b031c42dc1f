"""A run that was killed goes on where it was and ends as if nothing had happened; nothing half-written is ever trusted."""

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
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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

from cfsp_framework import Criterion, RunConfig, Update
from cfsp_framework.engine.cache import MeasurementCache
from cfsp_framework.engine.collect import collect
from cfsp_framework.engine.measurements import FeedForwardMeasurement
from cfsp_framework.engine.replay import Batch, ForwardOptions
from cfsp_framework.errors import OutputError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import ConfiguredComponent
from cfsp_framework.modeling.decoder import Decoder
from cfsp_framework.modeling.loading import LoadedModel
from cfsp_framework.pipeline import plan_only, prune
from cfsp_framework.pruning import compensation
from cfsp_framework.pruning.compensation import UpdateCache
from cfsp_framework.runtime.atomic_files import save_tensors, staged_folder
from cfsp_framework.runtime.progress import Progress

MakeModel = Callable[..., Path]
Open = Callable[..., tuple[LoadedModel, Decoder]]
BLOCKS = 9
LIMIT = 100.0
"""Seconds after which a command hangs."""

# --- killed runs ------------------------------------------------------------------------------------------------------

# Forks a process for every line it reads. That one runs a command line and kills itself at the moment it is told, or is
# killed after some seconds; it tells how often it came past each of the moments.
SERVER = """
import collections, json, os, signal, sys, time
import torch
torch.set_num_threads(1)
import safetensors.torch
import transformers.modeling_utils
import transformers.models.llama.modeling_llama
from pathlib import Path
from cfsp_framework import pipeline
from cfsp_framework.runtime import atomic_files as files
from cfsp_framework.pruning import compensation
from cfsp_framework.pruning import cut
from cfsp_framework.run import steps
from cfsp_framework.modeling import streaming
from cfsp_framework.engine import cache as resume
from cfsp_framework.engine import collect
from cfsp_framework.cli.main import cli

passed = collections.Counter()
deadly = None

def moment(name):
    passed[name] += 1
    if deadly is not None and (name, passed[name]) == tuple(deadly):
        os.kill(os.getpid(), signal.SIGKILL)

def around(owner, attribute, name):
    own = getattr(owner, attribute)
    def wrapped(*arguments, **options):
        moment(f"{name}, before")
        result = own(*arguments, **options)
        moment(f"{name}, after")
        return result
    setattr(owner, attribute, wrapped)

def around_writing(owner, attribute, name=None):
    own = getattr(owner, attribute)
    def wrapped(tensors, path, *arguments, **options):
        called = name or ("hidden" if "hidden_" in str(path) else "block" if "collection-" in str(path) else "answers")
        moment(f"{called}, before")
        own(tensors, path, *arguments, **options)
        if deadly is not None and deadly[0] == f"{called}, half" and passed[f"{called}, half"] + 1 == deadly[1]:
            os.truncate(path, os.path.getsize(path) // 2)
        moment(f"{called}, half")
        moment(f"{called}, after")
    setattr(owner, attribute, wrapped)

resume.MeasurementCache._is_cheap = lambda *_: True
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
    print(0, flush=True)  # it runs
    until = time.monotonic() + job["seconds"]
    found, status = 0, 0
    while not found and time.monotonic() < until:
        found, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.002)
    if not found:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass
class Server:
    """Runs commands in processes that may be killed."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, words: Sequence[object], deadly: tuple[str, int] | None = None, seconds: float = LIMIT) -> None:
        """Begin a command, which is killed when it passes a moment the n-th time, or after some seconds."""
        job: dict[str, object] = {"words": list(map(str, words)), "deadly": deadly, "seconds": seconds}
        job |= {"log": str(self.folder / "log.txt"), "passed": str(self.folder / "passed.json")}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        self.end()

    def end(self) -> int:
        """Wait for the command; its exit code, or minus the signal that killed it."""
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
        """How often the last command that was not killed passed each moment."""
        return cast("dict[str, int]", json.loads((self.folder / "passed.json").read_text()))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Generator[Server]:
    """One process that has everything imported; its children start at once."""
    pipe = subprocess.PIPE
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        yield Server(process, tmp_path_factory.mktemp("server"))
        assert process.stdin is not None
        process.stdin.close()


@dataclass(frozen=True)
class Story:
    """A command that is killed again and again: at its n-th passing of each of these moments in turn."""

    options: tuple[object, ...]
    kills: tuple[tuple[str, int], ...]


CLOSED_FORM = ("--preset", "cfsp-closed-form", "--compensator", "least-squares-bias")
STORIES = {
    "cfsp": Story(
        (),
        (
            ("embedding, after", 1), ("block, before", 1), ("block, half", 2), ("measuring, after", 1),
            ("hidden, half", 1), ("hidden, before", 2), ("block, after", 1), ("replacing, after", 2),
            ("evaluating, after", 1), ("cutting, before", 3), ("saving, before", 1), ("weights, half", 1),
            ("verifying, before", 1), ("reporting, after", 1), ("renaming, before", 1), ("renaming, after", 1),
        ),
    ),
    "second pass": Story(
        CLOSED_FORM,
        (
            ("hidden, after", 2), ("measuring, before", 4), ("answers, before", 1), ("answers, half", 2),
            ("measuring again, after", 1), ("compensating, after", 2), ("answers, after", 2), ("cutting, after", 6),
            ("saving, after", 1),
        ),
    ),
    "streamed": Story(
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
class Whole:
    """What a run that nobody disturbed wrote."""

    plan: str
    tensors: Mapping[str, Tensor]
    evaluations: Any
    files: frozenset[str]


def looked_at(out: Path) -> Whole:
    found = {key: value for path in sorted(out.glob("model*.safetensors")) for key, value in load_file(path).items()}
    report = json.loads((out / "report.json").read_text())
    names = frozenset(path.name for path in out.iterdir())
    return Whole((out / "pruning_plan.json").read_text(), found, report["evaluations"], names)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[key]) for key, value in left.items())


def check_finished(out: Path, whole: Whole) -> None:
    """What is there is what a run that nobody disturbed wrote, to the last bit."""
    found = looked_at(out)
    assert same(found.tensors, whole.tensors)
    assert (found.plan, found.evaluations, found.files) == (whole.plan, whole.evaluations, whole.files)


Words = Callable[..., tuple[object, ...]]


@pytest.fixture
def words(deep: Path, calibration_text: Path, tmp_path: Path) -> Words:
    """``words(*options, out=...)``: a command line; with ``--resume`` unless told otherwise."""

    def command(*options: object, out: str = "out", resume: bool = True) -> tuple[object, ...]:
        data = "--calibration", calibration_text, "--samples", 24, "--seqlen", 32, "--batch-size", 5
        evaluation = "--evaluate", calibration_text, "--evaluate-windows", 2
        kept = ("--resume", tmp_path / "state") if resume else ()
        return "prune", deep, tmp_path / out, "-q", "--round-to", 8, *data, *evaluation, *options, *kept

    return command


@pytest.fixture
def undisturbed(server: Server, words: Words, tmp_path: Path) -> Callable[..., Whole]:
    """``undisturbed(*options)``: what the command writes where nobody kills it and nothing is kept."""

    def whole(*options: object) -> Whole:
        assert server.run(words(*options, out="whole", resume=False)) == 0, server.log
        found = looked_at(tmp_path / "whole")
        shutil.rmtree(tmp_path / "whole")
        return found

    return whole


@pytest.mark.parametrize("name", STORIES)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    name: str, server: Server, words: Words, undisturbed: Callable[..., Whole], tmp_path: Path
) -> None:
    story, out = STORIES[name], tmp_path / "out"
    whole = undisturbed(*story.options)
    command = words(*story.options)
    for moment in story.kills:
        assert server.run(command, moment) == -signal.SIGKILL, f"it never came to {moment}: {server.log}"
        assert out.exists() is (moment[0] == "renaming, after"), "it is there once it is whole"
        assert len(set(tmp_path.iterdir()) - {out, tmp_path / "state"}) <= 1, "what the last one left, alone"
    if out.exists():
        check_finished(out, whole)
        assert server.run(command) == 2, "it exists"
    else:
        assert server.run(command) == 0, server.log
    check_finished(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "state"}
    kept = [path.name for path in (tmp_path / "state").rglob("*") if path.is_file()]
    assert {name.partition("_")[0] for name in kept} == {"block"}, "neither hidden states nor anything unfinished"
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(out)(ids).logits.std() > 0.1


def test_a_run_goes_on_and_does_not_begin_again(
    server: Server, words: Words, undisturbed: Callable[..., Whole]
) -> None:
    command = words(*CLOSED_FORM)
    undisturbed(*CLOSED_FORM)
    whole = server.passed
    assert (whole["measuring, before"], whole["measuring again, before"]) == (BLOCKS, whole["compensating, before"])
    assert whole["compensating, before"] > 5, "all that lose channels"
    assert server.run(command, ("measuring, after", 6)) == -signal.SIGKILL
    assert server.run(command, ("compensating, after", 4)) == -signal.SIGKILL
    assert server.run(command) == 0
    assert "measuring, before" not in server.passed
    assert server.passed["compensating, before"] == whole["compensating, before"] - 3, (
        "three were answered and kept before"
    )


def test_kills_at_any_time_leave_nothing_half_finished(
    server: Server, words: Words, undisturbed: Callable[..., Whole], tmp_path: Path
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
        if out.exists():  # and once more from the beginning
            check_finished(out, whole)
            shutil.rmtree(out)
            shutil.rmtree(tmp_path / "state")
    assert server.run(words(*options)) == 0, server.log
    check_finished(out, whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "state"}


def test_replacing_a_checkpoint_leaves_the_old_or_the_new_one(
    server: Server, words: Words, undisturbed: Callable[..., Whole], tmp_path: Path
) -> None:
    out, command = tmp_path / "out", words("--overwrite")
    old, new = undisturbed("--ratio", 0.25), undisturbed()
    assert server.run(words("--ratio", 0.25)) == 0, server.log
    for moment in (("weights, half", 1), ("renaming, before", 1)):
        assert server.run(command, moment) == -signal.SIGKILL
        check_finished(out, old)
    assert server.run(command, ("renaming, after", 1)) == -signal.SIGKILL, "the old one is aside, the new one as well"
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
    """Reads a light and a heavy statistic; stops where it is told to."""

    name: ClassVar[str] = "marks"
    stop: ClassVar[int | None] = None
    scored: ClassVar[list[int]] = []

    def required(self) -> frozenset[Any]:
        from cfsp_framework.statistics import ANGULAR_DISTANCE, DOWN_INPUT_GRAM, DOWN_INPUT_SQUARES

        return frozenset({ANGULAR_DISTANCE, DOWN_INPUT_GRAM, DOWN_INPUT_SQUARES})

    def score(self, feed_forward: Any, statistics: Any) -> Tensor:
        if feed_forward.block == Marks.stop:
            raise KeyboardInterrupt
        Marks.scored.append(feed_forward.block)
        total = sum(value.sum().item() for value in statistics.values())
        return cast("Tensor", total + feed_forward.down.float().abs().sum(0))


WINDOWS = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(1))
Measured = Sequence[FeedForwardMeasurement]


@dataclass
class Collection:
    """``collect`` on one model with ``--resume``, and what ran while it did."""

    decoder: Decoder
    folder: Path
    forwards: list[int]

    def run(
        self, share: float = float("inf"), *, stop: int | None = None, only_until: int = 99, windows: Tensor = WINDOWS
    ) -> Measured:
        """Collect, or be interrupted in block ``stop``; hidden states are kept up to one block only."""
        Marks.stop = stop
        Marks.scored.clear()
        self.forwards.clear()
        finished = _Until(only_until, self.folder, "key", share=share)
        return self._collect(windows, finished)

    def plain(self) -> Measured:
        """The same with nothing kept."""
        Marks.stop = None
        return self._collect(WINDOWS, None)

    def interrupted(self, stop: int, **options: Any) -> None:
        """Be interrupted in block ``stop``."""
        with pytest.raises(KeyboardInterrupt):
            self.run(stop=stop, **options)

    def _collect(self, windows: Tensor, finished: MeasurementCache | None) -> Measured:
        plugins = load_plugins()
        criterion = ConfiguredComponent[Criterion](Marks(), plugins.criteria.origin("cfsp"))
        collectors = plugins.collectors_for(criterion.component.required())
        return collect(
            self.decoder,
            windows,
            {"criterion": criterion},
            collectors,
            curves={"criterion": ("criterion", "compensated")},
            forward_options=ForwardOptions(batch_size=2),
            seed=0,
            progress=Progress(),
            cache=finished,
        )

    @property
    def files(self) -> Path:
        """Where the only collection is."""
        (found,) = self.folder.iterdir()
        return found


class _Until(MeasurementCache):
    """Keeps no hidden states from some block on."""

    def __init__(self, last: int, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._last = last

    def store(self, index: int, measured: list[FeedForwardMeasurement], batches: Sequence[Batch]) -> None:
        if index > self._last:
            self._share = 0.0
        super().store(index, measured, batches)


@pytest.fixture
def collection(make_model: MakeModel, open_tiny: Open, tmp_path: Path) -> Iterator[Collection]:
    """A fresh model of six blocks whose forwards are counted."""
    yield from _collection(make_model("llama", num_hidden_layers=6), open_tiny, tmp_path)


@pytest.fixture
def experts(make_model: MakeModel, open_tiny: Open, tmp_path: Path) -> Iterator[Collection]:
    """The same with experts, of which some share statistics."""
    yield from _collection(make_model("mixtral", num_hidden_layers=6), open_tiny, tmp_path)


def _collection(model: Path, open_tiny: Open, folder: Path) -> Iterator[Collection]:
    _, decoder = open_tiny(model)
    found = Collection(decoder, folder / "state", [])
    for index, block in enumerate(decoder.blocks):
        attention = block.get_submodule("self_attn")  # a stub in place of a block does not run it
        attention.register_forward_hook(partial(lambda at, *_: found.forwards.append(at), index))
    yield found
    Marks.stop = None


def check_same(left: Measured, right: Measured) -> None:
    """To the last bit."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert (one.block, one.path, one.width) == (other.block, other.path, other.width)
        assert (one.statistics.tokens, one.statistics.held_out_tokens, one.statistics.unseen) == (
            other.statistics.tokens,
            other.statistics.held_out_tokens,
            other.statistics.unseen,
        )
        for kind in ("statistics", "scores", "curves"):
            mine, its = dict(getattr(one, kind)), dict(getattr(other, kind))
            assert mine.keys() == its.keys()
            assert mine
            assert all(torch.equal(value, its[key]) and value.dtype == its[key].dtype for key, value in mine.items())


@pytest.mark.parametrize(("stop", "only_until", "entering"), [(4, 99, 4), (4, 1, 2), (5, 0, 1), (3, -1, 0), (0, 99, 0)])
def test_a_collection_goes_on_from_the_hidden_states_that_were_kept(
    stop: int, only_until: int, entering: int, collection: Collection
) -> None:
    expected = collection.plain()
    collection.interrupted(stop, only_until=only_until)
    assert Marks.scored == list(range(stop))
    found = collection.run()
    check_same(found, expected)
    assert Marks.scored == list(range(stop, 6))
    assert Counter(collection.forwards) == dict.fromkeys(range(entering, 6), 3), "three batches each"
    assert sorted(path.name for path in collection.files.iterdir()) == [f"block_{n}.safetensors" for n in range(6)]
    check_same(collection.run(), expected)
    assert (Marks.scored, collection.forwards) == ([], []), "everything is there"


def test_hidden_states_are_never_kept_where_that_may_take_no_time(collection: Collection) -> None:
    collection.interrupted(5, share=0.0)
    assert {path.name for path in collection.files.iterdir()} == {f"block_{n}.safetensors" for n in range(5)}
    collection.run(0.0)
    assert Counter(collection.forwards) == dict.fromkeys(range(6), 3)


def test_experts_go_on_too(experts: Collection) -> None:
    expected = experts.plain()
    experts.interrupted(3)
    check_same(experts.run(), expected)
    assert len(expected) == 24
    assert set(experts.forwards) == {3, 4, 5}


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def _empty(path: Path) -> None:
    os.truncate(path, 0)


def _zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _foreign(path: Path) -> None:
    save_file({"other": torch.ones(3)}, path)


def _no_header(path: Path) -> None:
    save_file(load_file(path), path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _zeros, _foreign, _no_header, Path.unlink])
def test_hidden_states_that_are_not_whole_are_not_used(damage: Callable[[Path], None], collection: Collection) -> None:
    expected = collection.plain()
    collection.interrupted(4)
    damage(collection.files / "hidden_0.safetensors")
    check_same(collection.run(), expected)
    assert Marks.scored == [4, 5]
    assert set(collection.forwards) == set(range(6))


@pytest.mark.parametrize("damage", [_truncate, _empty, _zeros, _foreign, _no_header, Path.unlink])
@pytest.mark.parametrize("block", [0, 2, 3])
def test_a_block_whose_file_is_not_whole_is_measured_again(
    block: int, damage: Callable[[Path], None], collection: Collection
) -> None:
    expected = collection.plain()
    collection.interrupted(4)  # the hidden states that were kept enter block 4, behind what is damaged
    damage(collection.files / f"block_{block}.safetensors")
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
        told = file.metadata()
    save_file({**kept, "2": kept["2"].repeat(2, 1, 1)}, path, told)
    check_same(collection.run(), expected)
    assert set(collection.forwards) == set(range(6))


def test_what_a_run_killed_at_its_last_block_left_goes(collection: Collection) -> None:
    collection.interrupted(5)
    hidden = collection.files / "hidden_0.safetensors"
    kept = hidden.read_bytes()
    collection.run()
    hidden.write_bytes(kept)  # as if it had been killed between the last block and the removal
    collection.run()
    assert not hidden.exists()


def test_without_collectors_scores_are_kept(make_model: MakeModel, tmp_path: Path) -> None:
    config = {"model": str(make_model("llama")), "criterion": "magnitude", "allocator": "uniform", "round_to": 8}
    kept = RunConfig.build(**config, resume=tmp_path)
    plans = [plan_only(RunConfig.build(**config)), plan_only(kept), plan_only(kept)]
    assert plans[0] == plans[1] == plans[2]
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 3


def test_statistics_that_are_scores_are_kept(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> None:
    config = {"model": str(make_model("llama")), "criterion": "taylor", "round_to": 8, "device": "cpu"}
    config |= {"calibration": str(calibration_text), "samples": 3, "seqlen": 16}
    kept = RunConfig.build(**config, resume=tmp_path)
    assert plan_only(RunConfig.build(**config)) == plan_only(kept) == plan_only(kept)


# --- what is used again, and what is not ------------------------------------------------------------------------------

PLUGIN = """
import torch
from cfsp_framework import Criterion, Statistic, hookimpl

class Own(Criterion):
    name = "own"
    requires = frozenset({Statistic("down_input_squares")})

    def score(self, feed_forward, statistics):
        return statistics[Statistic("down_input_squares")] * FACTOR

@hookimpl
def cfsp_criteria():
    return [Own]
"""


@pytest.fixture
def config(make_model: MakeModel, calibration_text: Path, tmp_path: Path) -> dict[str, object]:
    """A run whose collection is kept."""
    (tmp_path / "own.py").write_text(PLUGIN.replace("FACTOR", "1.0"))
    return {
        "model": str(make_model("llama")),
        "calibration": str(calibration_text),
        "samples": 6,
        "seqlen": 32,
        "round_to": 8,
        "device": "cpu",
        "criterion": "cfsp",
        "plugins": [str(tmp_path / "own.py")],
        "resume": tmp_path / "state",
    }


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Generator[list[LlamaMLP]]:
    """Every feed-forward that runs while open."""
    ran: list[LlamaMLP] = []
    own: Callable[..., Any] = LlamaMLP.forward

    def forward(self: LlamaMLP, hidden: Tensor) -> Tensor:
        ran.append(self)
        return cast("Tensor", own(self, hidden))

    with monkeypatch.context() as patch:
        patch.setattr(LlamaMLP, "forward", forward)
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
    (folder / "own.py").write_text(PLUGIN.replace("FACTOR", "(1.0 + 1.0)"))


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
def test_what_decides_a_measurement_finds_nothing_when_it_changes(
    name: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "the source of a plugin":
        config["criterion"] = "own"
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
    assert len(list(before.iterdir())) == 3, "what was kept of the other stays"
    assert plan == plan_only(RunConfig.build(**{**config, "resume": None}))


@pytest.mark.parametrize("name", SAME)
def test_what_decides_no_measurement_runs_no_block(
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
def test_what_decides_compensation_finds_no_answers_when_it_changes(
    name: str, config: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config |= {"compensator": "least-squares", "samples": 20}
    asked: list[int] = []
    own = compensation.compensate

    def counted(compensator: Any, feed_forward: Any, *rest: Any) -> Any:
        asked.append(feed_forward.block)
        return own(compensator, feed_forward, *rest)

    monkeypatch.setattr(compensation, "compensate", counted)
    prune(RunConfig.build(**config), tmp_path / "first")
    assert asked == [0, 1, 2]
    asked.clear()
    prune(RunConfig.build(**config), tmp_path / "second")
    assert asked == [], "all of them are read"
    COMPENSATION.get(name, _option())(config, tmp_path)
    if name == "versions":
        monkeypatch.setattr("cfsp_framework.run.cache_keys.library_versions", lambda: {"python": "3.0.0"})
    third = prune(RunConfig.build(**config), tmp_path / "third")
    assert asked == [block.block for block in third.plan.blocks if len(block.kept) < block.width] != []


def test_answers_that_are_not_whole_are_asked_for_again(tmp_path: Path) -> None:
    kept = UpdateCache(tmp_path, "key")
    kept.store(0, [Update(down=torch.ones(3, 4), error=0.5, error_plain=1.0), Update()])
    found = kept.load(0, 2)
    assert found is not None
    assert torch.equal(cast("Tensor", found[0].down), torch.ones(3, 4))
    assert (found[0].error, found[0].error_plain, found[1]) == (0.5, 1.0, Update())
    (path,) = (tmp_path / "key").iterdir()
    _truncate(path)
    assert kept.load(0, 2) is None


# --- what keeping costs -----------------------------------------------------------------------------------------------


class _Clock:
    """Stands still unless it is told how long something took."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("block", [0.01, 1.0, 60.0])
@pytest.mark.parametrize("speed", [1e7, 2e8, 5e9])
def test_keeping_hidden_states_takes_less_than_a_twentieth_of_the_time(
    block: float, speed: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, written = _Clock(), list[float]()
    size = 4 * 2**20
    batches = [Batch(torch.zeros(2, 2**18), ()), Batch(torch.zeros(2, 2**18), ())]
    assert size == sum(batch.hidden.nbytes for batch in batches)

    def write(path: Path, *_: object) -> None:
        if "hidden" in path.name:
            clock.now += size / speed
            written.append(clock.now)

    monkeypatch.setattr("cfsp_framework.engine.cache.time", clock)
    monkeypatch.setattr("cfsp_framework.engine.cache.save_tensors", write)
    kept = MeasurementCache(tmp_path, "key")
    count = 20_000 if block < 1 else 200
    kept.load(count)
    kept.resume(batches)
    start = clock.now
    for index in range(count):
        clock.now += block
        kept.store(index, [], batches)
    spent = len(written) * size / speed
    assert spent < 0.05 * (clock.now - start)
    possible = 0.05 * count * block / (size / speed)
    assert len(written) >= min(count - 1, 0.8 * possible - 1), "and it is not given up either"
    assert start + count * block + spent == pytest.approx(clock.now)


def test_a_first_writing_is_judged_by_a_guess_and_the_next_by_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = _Clock()
    monkeypatch.setattr("cfsp_framework.engine.cache.time", clock)
    batches = [Batch(torch.zeros(10**7), ())]  # 0.2 seconds at the speed that is guessed
    kept = MeasurementCache(tmp_path, "key")

    def worth(after: float) -> bool:
        clock.now += after
        return kept._is_cheap(batches)

    assert [worth(after) for after in (0.0, 3.9, 0.2)] == [False, False, True]
    kept._cost = 10.0  # as if the disk were slow
    kept._since = clock.now
    assert [worth(after) for after in (4.1, 195.0, 1.0)] == [False, False, True]
    monkeypatch.setattr(kept, "_share", 0.0)
    assert not worth(1e9)


# --- whole or not at all ----------------------------------------------------------------------------------------------


def test_what_is_written_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "block_0.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"told": "first"})
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()

    def fail(tensors: Any, aside: Path, *_: object) -> None:
        assert aside != path
        aside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OutputError, match="No space left on device"):
            save_tensors(path, {"a": torch.zeros(3)}, {"told": "second"})
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    save_tensors(path, {"a": torch.zeros(3)}, {"told": "third"})
    assert torch.equal(load_file(path)["a"], torch.zeros(3))


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_what_the_dead_left_is_removed_and_the_living_are_let_be(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in (".out.abcdefgh.partial", ".out.abcdefgh.old", ".out.v2.abcdefgh.partial", ".other.abcdefgh.partial"):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".out.zyxwvuts.partial").touch()
    with staged_folder(out) as living:
        names = {path.name for path in tmp_path.iterdir()} - {living.name, living.with_suffix(".lock").name}
        assert names == {".out.abcdefgh.old", ".out.v2.abcdefgh.partial", ".other.abcdefgh.partial"}, (
            "a replaced folder stays as long as its successor is missing"
        )
        (living / "weights").write_text("first")
        with staged_folder(out) as other:
            assert living.exists()
            (other / "weights").write_text("second")
        assert out.exists()
        assert living.exists()
    assert (out / "weights").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.v2.abcdefgh.partial", ".other.abcdefgh.partial"}


def test_files_of_the_dead_are_removed_and_those_of_the_living_are_let_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hidden_0.safetensors"
    for name in ("hidden_0", "hidden_1"):
        (tmp_path / f".{name}.safetensors.abcdefgh.partial").mkdir()
        (tmp_path / f".{name}.safetensors.abcdefgh.partial" / ".tmpxyz").write_bytes(b"half")
    own, nested = save_file, list[set[str]]()

    def slow(tensors: Any, aside: Path, metadata: Any) -> None:
        own(tensors, aside, metadata)
        if not nested:
            nested.append({file.name for file in tmp_path.iterdir()})
            save_tensors(path, {"a": torch.zeros(1)}, {})  # another process, at the same time
            assert aside.exists()

    monkeypatch.setattr("safetensors.torch.save_file", slow)
    save_tensors(path, {"a": torch.ones(1)}, {})
    assert len(nested[0]) == 3, "the other file's, and this process's folder and lock"
    assert ".hidden_1.safetensors.abcdefgh.partial" in nested[0]
    assert torch.equal(load_file(path)["a"], torch.ones(1))
    assert {file.name for file in tmp_path.iterdir()} == {path.name, ".hidden_1.safetensors.abcdefgh.partial"}


def test_file_systems_without_locks_keep_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    with staged_folder(tmp_path / "out") as aside:
        (aside / "weights").touch()
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.abcdefgh.partial"}
