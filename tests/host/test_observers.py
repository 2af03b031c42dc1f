"""Observers receive the events of a run in order, the built-in ones write them, and none can end a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from click.testing import CliRunner

from cfsp_framework import (
    BlockFinished,
    Event,
    Observer,
    PhaseFinished,
    PhaseStarted,
    PruningPlan,
    RunConfig,
    RunFailed,
    RunFinished,
    RunStarted,
    prune,
)
from cfsp_framework.cli.main import cli
from cfsp_framework.errors import ConfigError, PluginError, PluginWarning
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.observers import start_observing
from cfsp_framework.host.registry import ConfiguredComponent, Origin
from cfsp_framework.pipeline import plan_only
from cfsp_framework.runtime.progress import Progress

LISTENER = """
from cfsp_framework import Observer, hookimpl

heard = []

class Listener(Observer):
    '''Remembers what it hears.'''
    name = "listener"

    def start(self):
        heard.clear()
        return heard.append

@hookimpl
def cfsp_observers():
    return [Listener]

@hookimpl
def cfsp_run_finished(result):
    heard.append(result)
"""


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module whose ``heard`` holds all events; its name is ``example_listener``."""
    (tmp_path / "example_listener.py").write_text(LISTENER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    module: Any = __import__("example_listener")
    yield module
    sys.modules.pop("example_listener", None)


@pytest.fixture
def options(make_model: Callable[..., Path], calibration_text: Path) -> dict[str, Any]:
    """Of a short run that is observed by ``listener``."""
    return {
        "model": str(make_model("llama")),
        "calibration": str(calibration_text),
        "samples": 2,
        "seqlen": 16,
        "round_to": 8,
        "device": "cpu",
        "plugins": ("example_listener",),
        "observer": ("listener",),
    }


def names(heard: Sequence[object]) -> list[str]:
    """Events in short: ``+collect`` started, ``collect 0/3``, ``-collect`` finished."""

    def short(event: object) -> str:
        match event:
            case PhaseStarted(phase):
                return f"+{phase}"
            case PhaseFinished(phase):
                return f"-{phase}"
            case BlockFinished(phase, block, of):
                return f"{phase} {block}/{of}"
            case _:
                return type(event).__name__

    return [short(event) for event in heard]


def blocks(phase: str) -> list[str]:
    return [f"+{phase}", *(f"{phase} {block}/3" for block in range(3)), f"-{phase}"]


def test_an_observer_hears_a_run_from_beginning_to_end(listener: Any, options: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig.build(**options)
    result = prune(config, tmp_path / "out")
    phases = [name for phase in ("load", "calibrate", "evaluate") for name in (f"+{phase}", f"-{phase}")]
    ends = [name for phase in ("save", "verify", "evaluate") for name in (f"+{phase}", f"-{phase}")]
    plan = ["+plan", "-plan"]
    expected = ["RunStarted", *phases, *blocks("collect"), *plan, *blocks("cut"), *ends, "RunFinished", "RunResult"]
    assert names(listener.heard) == expected
    assert listener.heard[0] == RunStarted(config)
    assert listener.heard[-2] == RunFinished(result.plan, result.report, tmp_path / "out")
    assert listener.heard[-1] is result
    seconds: dict[str, float] = {}
    for event in listener.heard:
        if isinstance(event, PhaseFinished):
            seconds[event.phase] = seconds.get(event.phase, 0.0) + event.seconds
    before = {phase: seconds[phase] for phase in ("load", "calibrate", "collect", "plan", "cut", "save", "verify")}
    assert {phase: round(spent, 3) for phase, spent in before.items()} == {
        phase: spent for phase, spent in result.report.seconds.items() if phase in before
    }


def test_a_second_pass_reports_its_blocks_too(listener: Any, options: dict[str, Any], tmp_path: Path) -> None:
    prune(RunConfig.build(**options, compensator="sequential"), tmp_path / "out")
    events = names(listener.heard)
    start = events.index("+compensate")
    assert events[start : start + 5] == blocks("compensate")


def test_resumed_blocks_cause_no_events(listener: Any, options: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        plan_only(RunConfig.build(**options, resume=tmp_path / "kept"))
    assert not any(isinstance(event, BlockFinished) for event in listener.heard)


def test_a_plan_ends_with_the_plan(listener: Any, options: dict[str, Any]) -> None:
    plan = plan_only(RunConfig.build(**options))
    assert listener.heard[-1] == RunFinished(plan)
    assert names(listener.heard)[-3:] == ["+plan", "-plan", "RunFinished"]


@pytest.mark.parametrize("error", [PluginError("broken"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_failed_run_ends_with_its_error(
    error: BaseException, listener: Any, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("cfsp_framework.run.rounds.make_plan", fail)
    with pytest.raises(type(error)):
        prune(RunConfig.build(**options), tmp_path / "out")
    assert listener.heard[-1] == RunFailed(error)
    assert names(listener.heard)[-2] == "-collect"
    assert not (tmp_path / "out").exists()


def test_a_phase_that_fails_is_not_finished() -> None:
    progress, heard = Progress(), list[Event]()
    progress.notify = heard.append
    with pytest.raises(KeyError), progress.phase("collect"):
        raise KeyError
    assert heard == [PhaseStarted("collect")]


class Failing(Observer):
    """Fail at every event, or at the start."""

    name: ClassVar[str] = "failing"
    heard: ClassVar[list[Event]] = []
    at_start: bool = False

    def start(self) -> Callable[[Event], None]:
        if self.at_start:
            raise OSError("no such place")

        def listen(event: Event) -> None:
            self.heard.append(event)
            raise RuntimeError(f"about {type(event).__name__}")

        return listen


class Silent(Observer):
    """Return nothing to call."""

    name: ClassVar[str] = "silent"

    def start(self) -> Callable[[Event], None]:
        return None  # type: ignore[return-value]


def chosen(observer: Observer) -> ConfiguredComponent[Observer]:
    return ConfiguredComponent(observer, Origin("acme", "acme-logs", "2.0"))


def test_an_observer_that_fails_is_named_once_and_receives_later_events() -> None:
    Failing.heard.clear()
    notify = start_observing([chosen(Failing())])
    with pytest.warns(PluginWarning) as caught:
        notify(PhaseStarted("load"))
    notify(PhaseStarted("plan"))  # a second warning would be an error here
    [warning] = caught
    assert str(warning.message) == (
        "observer 'failing' (plugin 'acme' of acme-logs 2.0) failed in PhaseStarted: RuntimeError: about PhaseStarted. "
        "The run goes on."
    )
    assert Failing.heard == [PhaseStarted("load"), PhaseStarted("plan")]


def test_other_observers_receive_an_event_that_one_fails_at() -> None:
    heard: list[Event] = []
    good = chosen(Failing())
    object.__setattr__(good, "component", SimpleNamespace(kind="observer", name="good", start=lambda: heard.append))
    notify = start_observing([chosen(Failing()), good])
    with pytest.warns(PluginWarning):
        notify(PhaseStarted("load"))
    assert heard == [PhaseStarted("load")]


@pytest.mark.parametrize(
    ("observer", "words"),
    [(Failing(at_start=True), r"failed in start\(\): OSError: no such place\."), (Silent(), r"which cannot be called")],
)
def test_an_observer_that_cannot_start_ends_the_run_before_it_began(observer: Observer, words: str) -> None:
    with pytest.raises(PluginError, match=words):
        start_observing([chosen(observer)])


def test_only_the_first_process_is_observed(listener: Any, options: dict[str, Any]) -> None:
    from cfsp_framework.run.context import set_up
    from cfsp_framework.runtime.distributed import Ranks

    config = RunConfig.build(**options)
    listener.heard.clear()
    with pytest.raises(Exception, match="process group"):  # there is no second process; an event would come before
        set_up(config, Progress(), ranks=Ranks(1, 2))
    assert listener.heard == []


# --- the built-in ones -----------------------------------------------------------------------------------------------


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_lines(options: dict[str, Any], calibration_text: Path, tmp_path: Path) -> None:
    path = tmp_path / "logs" / "run.jsonl"
    options |= {"observer": (f"jsonl:path={path}",), "plugins": (), "evaluate": (str(calibration_text),)}
    result = prune(RunConfig.build(**options), tmp_path / "out")
    lines = logged(path)
    assert lines[0]["event"] == "RunStarted"
    assert lines[0]["config"]["ratio"] == 0.5
    assert {"event": "BlockFinished", "phase": "collect", "block": 1, "of": 3}.items() <= lines[8].items() | lines[
        9
    ].items()
    assert lines[-1]["event"] == "RunFinished"
    assert lines[-1]["report"]["evaluations"][0]["pruned"]["nll"] == result.report.evaluations[0].pruned.nll
    assert lines[-1]["widths"] == [len(block.kept) for block in result.plan.blocks]
    assert all(line["time"].endswith("+00:00") for line in lines)
    plan_only(RunConfig.build(**options))
    assert logged(path)[: len(lines)] == lines  # the next run writes to the end
    assert logged(path)[-1]["report"] is None


def test_json_lines_record_a_failure(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    notify = start_observing([load_plugins().observers.create("jsonl", {"path": str(path)})])
    notify(RunFailed(KeyboardInterrupt()))
    notify(RunFailed(ConfigError("no such thing")))
    assert [line["error"] for line in logged(path)] == ["KeyboardInterrupt", "ConfigError: no such thing"]


def test_a_log_that_cannot_be_written_is_refused_before_the_run(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    options |= {"observer": (f"jsonl:path={tmp_path / 'file' / 'run.jsonl'}",), "plugins": ()}
    with pytest.raises(ConfigError, match=r"--observer jsonl: .*run\.jsonl cannot be written"):
        prune(RunConfig.build(**options), tmp_path / "out")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(options: dict[str, Any], calibration_text: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options |= {"observer": (f"tensorboard:folder={tmp_path / 'runs'}",), "plugins": ()}
    options |= {"evaluate": (str(calibration_text),)}
    result = prune(RunConfig.build(**options), tmp_path / "out")
    board = EventAccumulator(str(tmp_path / "runs"))
    board.Reload()
    scalars = {tag: [event.value for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    assert scalars["kept/share"] == pytest.approx([len(b.kept) / b.width for b in result.plan.blocks])
    assert scalars["blocks/collect"] == [1.0, 2.0, 3.0]
    assert len(scalars["seconds/evaluate"]) == 2
    [evaluation] = result.report.evaluations
    assert evaluation.dense is not None
    assert scalars[f"perplexity/{calibration_text}".replace(":", "/")] == pytest.approx(
        [evaluation.dense.perplexity, evaluation.pruned.perplexity], rel=1e-6
    )


def test_without_tensorboard_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", None)
    observer = load_plugins().observers.create("tensorboard", {})
    with pytest.raises(ConfigError, match=r"pip install 'cfsp-framework\[tensorboard\]'"):
        start_observing([observer])


# --- choosing them ---------------------------------------------------------------------------------------------------


def test_observers_are_chosen_like_other_components(tmp_path: Path) -> None:
    config = RunConfig.build(model="demo", observer="jsonl:path=a.jsonl")
    assert [str(choice) for choice in config.run.observers] == ["jsonl:path=a.jsonl"]
    assert RunConfig.build(model="demo", observer={"name": "jsonl"}).run.observers[0].name == "jsonl"
    several = RunConfig.build(model="demo", observer=["jsonl", {"name": "tensorboard", "options": {"folder": "x"}}])
    assert [choice.name for choice in several.run.observers] == ["jsonl", "tensorboard"]


@pytest.mark.parametrize(
    ("observer", "words"),
    [
        ("jsonll", "Unknown observer 'jsonll'. Did you mean 'jsonl'?"),
        ("jsonl:file=x", "Bad options for observer 'jsonl'"),
    ],
)
def test_a_wrong_observer_is_refused(observer: str, words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["prune", "demo", str(tmp_path / "out"), "--observer", observer])
    assert done.exit_code == 2
    assert words in done.stderr


def test_the_command_line_takes_several(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    arguments = [
        "plan",
        str(make_model("llama")),
        str(tmp_path / "plan.json"),
        "-q",
        "--calibration",
        str(calibration_text),
    ]
    arguments += ["--samples", "2", "--seqlen", "16", "--round-to", "8", "--device", "cpu"]
    for name in ("a", "b"):
        arguments += ["--observer", f"jsonl:path={tmp_path / name}.jsonl"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    first, second = (logged(tmp_path / f"{name}.jsonl") for name in "ab")
    assert [line["event"] for line in first] == [line["event"] for line in second]
    made = PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert first[-1]["widths"] == list(made.widths)


def test_an_observer_changes_nothing_of_the_result(options: dict[str, Any], listener: Any) -> None:
    observed = plan_only(RunConfig.build(**options))
    alone = plan_only(RunConfig.build(**{**options, "observer": ()}))
    assert observed == alone


def test_configured_components_compare_without_their_usage() -> None:
    first, second = chosen(Failing()), chosen(Failing())
    first.usage.seconds = 1.0
    assert first == second
    assert replace(first).usage is first.usage
