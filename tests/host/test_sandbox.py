"""Defects of plugins: each is named, and none changes the result of a run or the host silently."""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest
import torch
from click.testing import CliRunner

from cfsp_framework import RunConfig, prune
from cfsp_framework.api import hookspecs
from cfsp_framework.api.components import API_VERSION
from cfsp_framework.cli.main import cli
from cfsp_framework.errors import (
    CfspError,
    ConfigError,
    ModelError,
    PluginDeprecationWarning,
    PluginError,
    PluginWarning,
    deprecation,
)
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.sandbox import PluginUsage, find_tensor_problem, sandboxed, warn_on_error
from helpers.plugins import install_distribution

ORIGIN = "plugin 'acme' of acme-pruning 1.0"

# A distribution that implements every kind of component, each method correct until a test replaces its body.
METHODS = {
    "start": "return Sums()",
    "update": "self.sums['s'] = self.sums['s'] + inputs.double().square().sum(0)",
    "value": "return self.sums['s']",
    "score": "return statistics[ACME]",
    "required": "return frozenset({ACME})",
    "allocate": "return [1 - budget.ratio for _ in summaries]",
    "curve": "return None",
    "importance": "return [1.0 for _ in summaries]",
    "stream": "return Stream.PRUNED",
    "target_mix": "return 0.5",
    "compensate": "return Update(down=feed_forward.down[:, kept] * 1.0)",
    "schedule": "return None",
    "observe": "pass",
    "hook": "return [Acme]",
    "module": "pass",
}
SOURCE = """
import random, sys, time
import torch
from cfsp_framework import *

ACME = Statistic("acme", heavy=False)
HEAVY = Statistic("acme_heavy", heavy=True)

{module}

class Sums:
    def __init__(self):
        self.sums = {{"s": 0}}
    def update(self, inputs, outputs):
        {update}
    def value(self, tokens):
        {value}

class Acme(Criterion):
    name = "acme"
    requires = frozenset({{ACME}})
    def required(self):
        {required}
    def score(self, feed_forward, statistics):
        {score}

class AcmeCollector(Collector):
    name = "acme"
    provides = ACME
    site = Site.DOWN_PROJECTION
    def start(self):
        {start}

class AcmeHeavy(Collector):
    name = "acme-heavy"
    provides = HEAVY
    site = Site.DOWN_PROJECTION
    def start(self):
        return Sums()

class AcmeAllocator(Allocator):
    name = "acme"
    def curve(self):
        {curve}
    def importance(self, summaries):
        {importance}
    def allocate(self, summaries, budget):
        {allocate}

class AcmeCompensator(Compensator):
    name = "acme"
    requires = frozenset({{HEAVY}})
    def stream(self):
        {stream}
    def target_mix(self):
        {target_mix}
    def compensate(self, feed_forward, kept, statistics):
        {compensate}

class AcmeRecovery(RecoveryScheduler):
    name = "acme"
    def schedule(self, summaries, plan, blocks):
        {schedule}

class AcmeObserver(Observer):
    name = "acme"
    def start(self):
        def observe(event):
            {observe}
        return observe

@hookimpl
def cfsp_criteria():
    {hook}

@hookimpl
def cfsp_collectors():
    return [AcmeCollector, AcmeHeavy]

@hookimpl
def cfsp_allocators():
    return [AcmeAllocator]

@hookimpl
def cfsp_compensators():
    return [AcmeCompensator]

@hookimpl
def cfsp_recovery_schedulers():
    return [AcmeRecovery]

@hookimpl
def cfsp_observers():
    return [AcmeObserver]
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """``install(method=body)``: acme-pruning 1.0 on the path as pip would leave it, with some methods replaced."""
    folder = tmp_path / "site"
    monkeypatch.syspath_prepend(str(folder))

    def put(**bodies: str) -> None:
        assert bodies.keys() <= METHODS.keys()
        source = SOURCE.format(**{**METHODS, **bodies})
        module = "example_acme_resilience"
        install_distribution(folder, "acme-pruning", {"acme": module}, {module: source})

    yield put
    sys.modules.pop("example_acme_resilience", None)


@pytest.fixture
def run(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path, install: Install
) -> Callable[..., Path]:
    """``run(method=body)``: a whole run with acme's component of every kind, into a folder."""

    def start(**bodies: str) -> Path:
        install(**bodies)
        config = RunConfig.build(
            model=str(make_model("llama")), calibration=str(calibration_text), samples=2, seqlen=16, round_to=8,
            criterion="acme", allocator="acme", compensator="acme", recovery="acme", observer=("acme",), device="cpu",
        )  # fmt: skip
        prune(config, tmp_path / "out")
        return tmp_path / "out"

    return start


def failure(run: Callable[..., Path], tmp_path: Path, **bodies: str) -> str:
    """Return the message of a run that fails; it leaves no files."""
    with pytest.raises(PluginError) as caught:
        run(**bodies)
    assert not list(tmp_path.glob("*out*"))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_acme_is_correct_as_it_is(run: Callable[..., Path]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = run()
    report = json.loads((out / "report.json").read_text())
    assert {"criterion acme", "allocator acme", "compensator acme", "collector acme", "observer acme"} <= set(
        report["component_seconds"]
    )


FAILING = [name for name in METHODS if name not in ("observe", "module")]
CALLED = {"hook": "cfsp_criteria()"}


@pytest.mark.parametrize("method", FAILING)
@pytest.mark.parametrize(
    ("body", "words"),
    [("raise KeyError('no such thing')", "KeyError: 'no such thing'"), ("sys.exit(0)", "SystemExit: 0")],
)
def test_an_error_of_a_method_names_it(
    method: str, body: str, words: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    message = failure(run, tmp_path, **{method: body})
    assert ORIGIN in message
    assert f"failed in {CALLED.get(method, method + '()')}" in message
    assert message.endswith(words + ".")


@pytest.mark.parametrize(
    ("body", "words"), [("1 / 0", "ZeroDivisionError"), ("sys.exit(1)", "SystemExit: 1"), ("import no_such", "no_such")]
)
def test_an_import_that_fails_names_the_distribution_and_the_remedy(body: str, words: str, install: Install) -> None:
    install(module=body)
    with pytest.raises(PluginError) as caught:
        load_plugins()
    assert str(caught.value).startswith(f"{ORIGIN} could not be loaded: ")
    assert words in str(caught.value)
    assert str(caught.value).endswith("Disable it with -p no:acme.")
    assert caught.value.__cause__ is not None


BAD_RESULTS = [
    ("start", "return None", "returned a NoneType, which has no `sums`"),
    ("start", "return {}", "returned a dict, which has no `sums`"),
    ("value", "return 3.0", "is a float, not a tensor; acme has the shape (F,)"),
    ("value", "return self.sums['s'][:-1]", "has shape (63,), not (64,)"),
    ("value", "return self.sums['s'] * float('nan')", "value() is not finite"),
    ("value", "return self.sums['s'].to('meta')", "is on the meta device"),
    ("value", "return self.sums['s'] + 0j", "is complex"),
    ("score", "return None", "is a NoneType, not a tensor"),
    ("score", "return statistics[ACME].tolist()", "is a list, not a tensor"),
    ("score", "return statistics[ACME][None]", "has shape (1, 64), not (64,)"),
    ("score", "return statistics[ACME][1:]", "has shape (63,), not (64,)"),
    ("score", "return statistics[ACME] / 0", "not finite: inf at [0], 64 of 64"),
    ("score", "return statistics[ACME].to('meta')", "is on the meta device"),
    ("score", "return statistics[ACME].to_sparse()", "is sparse"),
    ("score", "return statistics[ACME] + 0j", "is complex"),
    ("score", "return statistics[ACME].double() * 1e300", "not finite in float32"),
    ("required", "return [1]", "required() returned 1, which is not a Statistic"),
    ("required", "return None", "failed in required(): TypeError"),
    ("allocate", "return [0.5]", "returned 1 shares for 3 blocks"),
    ("allocate", "return [0.5] * 4", "returned 4 shares for 3 blocks"),
    ("allocate", "import itertools; return itertools.repeat(0.5)", "shares for 3 blocks"),
    ("allocate", "return None", "failed in allocate(): TypeError"),
    ("allocate", "return [0.5, float('nan'), 0.5]", "the share nan for block 1"),
    ("allocate", "return [0.5, 1.5, 0.5]", "the share 1.5 for block 1"),
    ("allocate", "return [0.5, 0.5, -0.1]", "the share -0.1 for block 2"),
    ("allocate", "return ['a', 'b', 'c']", "failed in allocate(): ValueError"),
    ("curve", "return 'steep'", "curve() returned 'steep'"),
    ("importance", "return [1.0]", "returned 1 importances for 3 blocks"),
    ("importance", "return [1.0, float('inf'), 1.0]", "the importance inf for block 1"),
    ("stream", "return 'pruned'", "stream() returned 'pruned'"),
    ("target_mix", "return float('nan')", "target_mix() returned nan"),
    ("target_mix", "return None", "target_mix() returned None"),
    ("compensate", "return feed_forward.down[:, kept]", "returned Tensor, not an Update"),
    ("compensate", "return Update(down=feed_forward.down)", "`down` at block 0 has shape (32, 64), not (32, 32)"),
    ("compensate", "return Update(down=feed_forward.down[:, kept] / 0)", "`down` at block 0 has values that are not"),
    ("compensate", "return Update(down=feed_forward.down[:, kept].to('meta'))", "`down` at block 0 is on the meta device"),
    ("compensate", "return Update(down_bias=[0.0])", "`down_bias` at block 0 is a list"),
    ("compensate", "return Update(error='low')", "`error` at block 0 is 'low'"),
    ("schedule", "return {'rank': 8}", "schedule() returned a dict, not a RecoveryPlan or None"),
    ("hook", "return None", "returned None; it must return a list of classes"),
    ("hook", "return [Acme()]", "which is not a subclass of Criterion"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "body", "words"), BAD_RESULTS)
def test_a_bad_result_of_a_method_names_it(
    method: str, body: str, words: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    message = failure(run, tmp_path, **{method: body})
    assert ORIGIN in message
    assert words in message


@pytest.mark.filterwarnings("ignore:.*whether gradients are recorded")
def test_results_are_detached_from_their_graph(run: Callable[..., Path]) -> None:
    run(
        value="return self.sums['s'].float().requires_grad_() * torch.ones((), requires_grad=True)",
        score="torch.set_grad_enabled(True); return statistics[ACME].clone().requires_grad_() * 2.0",
        compensate="return Update(down=feed_forward.down[:, kept].clone().requires_grad_())",
    )


WRITES = [
    ("update", "inputs.abs_(); self.sums['s'] = inputs.double().sum(0)", "wrote to `inputs` in update()"),
    ("update", "outputs.mul_(2); self.sums['s'] = inputs.double().sum(0)", "wrote to `outputs` in update()"),
    ("score", "feed_forward.down.mul_(0); return statistics[ACME]", "wrote to `down` in score() at block 0, mlp"),
    ("score", "feed_forward.up[0] = 1; return statistics[ACME]", "wrote to `up` in score() at block 0, mlp"),
    ("score", "return statistics[ACME].sqrt_()", "wrote to `acme` in score() at block 0, mlp"),
    ("allocate", "summaries[1].scores.zero_(); return [0.5] * 3", "wrote to `block 1 mlp scores` in allocate()"),
    ("importance", "summaries[2].scores.zero_(); return None", "wrote to `block 2 mlp scores` in importance()"),
    ("compensate", "feed_forward.down.add_(1); return Update()", "wrote to `down` in compensate() at block 0, mlp"),
    ("compensate", "kept.add_(0); return Update()", "wrote to `kept` in compensate() at block 0, mlp"),
]


@pytest.mark.parametrize(("method", "body", "words"), WRITES)
def test_a_method_that_writes_to_its_input_is_named(
    method: str, body: str, words: str, run: Callable[..., Path], tmp_path: Path
) -> None:
    message = failure(run, tmp_path, **{method: body})
    assert ORIGIN in message
    assert words in message
    assert "work on a clone()" in message


CHANGES = [
    ("torch.set_default_dtype(torch.float64)", torch.get_default_dtype, "the default dtype"),
    ("torch.set_num_threads(3)", torch.get_num_threads, "the number of threads"),
    ("torch.set_grad_enabled(not torch.is_grad_enabled())", torch.is_grad_enabled, "whether gradients are recorded"),
    ("torch.use_deterministic_algorithms(True)", torch.get_deterministic_debug_mode, "the deterministic mode"),
    ("torch.set_float32_matmul_precision('medium')", torch.get_float32_matmul_precision, "the precision of products"),
    ("torch.manual_seed(7)", lambda: torch.get_rng_state().tolist(), "torch's global random numbers"),
    ("torch.rand(3)", lambda: torch.get_rng_state().tolist(), "torch's global random numbers"),
]
QUIET = ("start", "score", "allocate", "importance", "curve", "stream", "compensate", "schedule", "required", "value")


@pytest.mark.parametrize(("change", "setting", "words"), CHANGES)
@pytest.mark.parametrize("method", ["score", "allocate", "update"])
def test_settings_that_a_method_changes_are_restored_with_one_warning(
    method: str, change: str, setting: Callable[[], Any], words: str, run: Callable[..., Path]
) -> None:
    torch.manual_seed(0)  # as a run does, so that its own seeding changes nothing
    before = setting()
    with pytest.warns(PluginWarning, match=words) as caught:
        run(**{method: f"{change}; {METHODS[method]}"})
    if not (method == "update" and "random" in words):  # checked once per block
        assert setting() == before
    messages = [str(one.message) for one in caught if issubclass(one.category, PluginWarning)]
    assert 1 <= len(messages) <= (1 if method != "update" else 2)  # two collectors share the class that is fed
    assert all(ORIGIN in message and f" in {method}()" in message for message in messages)


@pytest.mark.parametrize("method", [*QUIET, "update", "target_mix", "hook", "module", "observe"])
def test_settings_changed_by_any_method_are_restored(method: str, run: Callable[..., Path]) -> None:
    with pytest.warns(PluginWarning, match=r"plugin 'acme'.*the default dtype"):
        run(**{method: f"torch.set_default_dtype(torch.float64); {METHODS[method]}"})
    assert torch.get_default_dtype() == torch.float32


def test_settings_are_restored_after_a_failure(run: Callable[..., Path], tmp_path: Path) -> None:
    failure(run, tmp_path, score="torch.set_default_dtype(torch.float64); torch.set_num_threads(3); raise KeyError")
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (torch.float32, 1)


def test_global_random_numbers_never_reach_the_result(run: Callable[..., Path]) -> None:
    """A criterion that draws from them gives every run the same scores, whatever was drawn before."""
    with pytest.warns(PluginWarning, match="global random numbers"):
        out = run(score="return torch.rand(feed_forward.width)")
    plan = json.loads((out / "pruning_plan.json").read_text())
    torch.manual_seed(0)
    expected = torch.rand(64).topk(32).indices.sort().values.tolist()
    assert plan["blocks"][0]["kept"] == expected


def test_what_plugins_print_leaves_json_whole(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path, install: Install
) -> None:
    methods = [*QUIET, "update", "target_mix", "hook", "module", "observe"]
    install(**{method: f"print('said in {method}'); {METHODS[method]}" for method in methods})
    arguments = ["prune", str(make_model("llama")), str(tmp_path / "out"), "--json", "--samples", "2", "--seqlen", "16"]
    arguments += ["--round-to", "8", "--device", "cpu", "--calibration", str(calibration_text), "--recovery", "acme"]
    arguments += ["--criterion", "acme", "--allocator", "acme", "--compensator", "acme", "--observer", "acme"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["format"] == "cfsp-report"
    for method in methods:
        assert f"said in {method}" in done.stderr


def test_the_command_line_shows_warnings_in_one_line_and_goes_on(
    make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path, install: Install
) -> None:
    install(score="torch.rand(1); return statistics[ACME]", observe="raise OSError('disk full')")
    arguments = ["prune", str(make_model("llama")), str(tmp_path / "out"), "-q", "--samples", "2", "--seqlen", "16"]
    arguments += ["--round-to", "8", "--calibration", str(calibration_text), "--criterion", "acme", "--device", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = CliRunner().invoke(cli, [*arguments, "--observer", "acme"])
    assert done.exit_code == 0, done.output
    lines = done.stderr.splitlines()
    assert [line for line in lines if "RunStarted" in line] == [
        f"Warning: observer 'acme' ({ORIGIN}) failed in RunStarted: OSError: disk full. The run goes on."
    ]
    [drawn] = [line for line in lines if "random" in line]
    assert drawn.startswith(
        f"Warning: criterion 'acme' ({ORIGIN}) changed torch's global random numbers in score() at "
    )
    assert len(lines) == 2


def test_the_exit_code_says_that_a_plugin_failed(
    make_model: Callable[..., Path], tmp_path: Path, install: Install
) -> None:
    install(module="raise RuntimeError('broken')")
    done = CliRunner().invoke(cli, ["prune", str(make_model("llama")), str(tmp_path / "out")])
    assert done.exit_code == 3
    assert done.stderr.startswith(f"Error: {ORIGIN} could not be loaded: RuntimeError: broken.")
    assert done.stdout == ""


def test_the_report_has_the_time_of_each_component(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = time.perf_counter
    monkeypatch.setattr(time, "skipped", 0.0, raising=False)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + getattr(time, "skipped"))  # noqa: B009
    out = run(score=f"time.skipped += 1000; {METHODS['score']}")
    report = json.loads((out / "report.json").read_text())
    assert next(iter(report["component_seconds"])) == "criterion acme"
    assert 3000 <= report["component_seconds"]["criterion acme"] < 3100  # three blocks
    [note] = [note for note in report["notes"] if "took" in note]
    assert note.startswith(f"criterion 'acme' ({ORIGIN}) took 30")


def test_ctrl_c_says_whose_code_was_running(install: Install, run: Callable[..., Path]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(allocate="raise KeyboardInterrupt")
    assert caught.value.__notes__ == [f"in allocate() of allocator 'acme' ({ORIGIN})"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        ConfigError("mine"),
        ModelError(),
        KeyboardInterrupt(),
    ],
)
def test_errors_that_are_not_of_the_component_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, sandboxed("me", "score()"):
        raise error
    assert caught.value is error


# --- the sandbox alone  -------------------------------------------------------------------------------------------


def test_time_adds_up_and_views_share_what_is_written_to() -> None:
    usage, weight = PluginUsage(), torch.zeros(4, 4)
    with (
        pytest.raises(PluginError, match=r"^me wrote to `rows` in"),
        sandboxed("me", "score()", usage=usage, read_only_inputs={"rows": weight[1:].detach(), "none": None}),
    ):
        weight.add_(1)
    with sandboxed("me", "score()", usage=usage, read_only_inputs={"rows": weight}):
        weight.clone().add_(1)
    assert usage.seconds > 0


def test_tensors_of_inference_mode_are_not_watched() -> None:
    with torch.inference_mode():
        weight = torch.zeros(2)
    with sandboxed("me", "score()", read_only_inputs={"weight": weight}):
        pass


def test_a_tolerated_failure_is_warned_about_once() -> None:
    usage, messages = PluginUsage(), list[list[str]]()
    for _ in range(3):
        with warnings.catch_warnings(record=True) as caught, warn_on_error(usage):
            warnings.simplefilter("always")
            raise CfspError("boom")
        messages.append([str(warning.message) for warning in caught])
    assert messages == [["boom The run goes on."], [], []]
    with pytest.raises(KeyboardInterrupt), warn_on_error():
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("value", "shape", "problem"),
    [
        (torch.ones(2, 3), (2, None), None),
        (torch.ones(()), (), None),
        (torch.tensor([True, False]), (2,), None),
        (torch.arange(3), (3,), None),
        (torch.ones(2, 3), (3, None), "has shape (2, 3), not (3, any)"),
        (torch.tensor(float("nan")), (), "has values that are not finite: nan, 1 of 1"),
        (torch.tensor([0.0, -float("inf")]), (2,), "has values that are not finite: -inf at [1], 1 of 2"),
        ("text", (1,), "is a str, not a tensor"),
    ],
)
def test_what_is_wrong_with_a_tensor(value: object, shape: tuple[int | None, ...], problem: str | None) -> None:
    assert find_tensor_problem(value, shape) == problem


# --- the version of the plugin API -----------------------------------------------------------------------------------


@pytest.mark.parametrize("declared", ["", f"cfsp_api = {API_VERSION}", "cfsp_api = None"])
def test_a_plugin_for_this_version_or_of_none_loads(declared: str, install: Install) -> None:
    install(module=declared or "pass")
    assert "acme" in load_plugins().criteria


def test_a_plugin_for_a_later_version_is_refused_with_both_versions_and_the_remedy(install: Install) -> None:
    install(module=f"cfsp_api = {API_VERSION + 1}")
    with pytest.raises(PluginError) as caught:
        load_plugins()
    message = str(caught.value)
    assert message.startswith(f"{ORIGIN} is written for version {API_VERSION + 1} of the plugin API; ")
    assert message.endswith(
        f"has version {API_VERSION}. Upgrade cfsp-framework, or install an older acme-pruning. Disable it with -p no:acme."
    )
    assert "acme" not in load_plugins(["no:acme"]).criteria


@pytest.mark.parametrize("declared", ["'1'", "1.0", "0", "True", "[1]"])
def test_a_version_that_is_not_a_positive_integer_is_refused(declared: str, install: Install) -> None:
    install(module=f"cfsp_api = {declared}")
    with pytest.raises(
        PluginError, match=r"declares `cfsp_api = .*`; it must be a version of the plugin API, 1 or more"
    ):
        load_plugins()


def test_deprecations_name_the_versions_and_what_to_do_instead() -> None:
    """Through pluggy, as hookspecs.py would use it for a hook and for an argument."""
    spec = pluggy.HookspecMarker(hookspecs.NAMESPACE)
    old = deprecation("cfsp_old()", since="0.2", until="0.4", instead="offer cfsp_new()")
    argument = deprecation("the argument `text`", since="0.2", until="0.4", instead="read `value`")

    class Specs:
        @spec(warn_on_impl=old)
        def cfsp_old(self) -> None: ...

        @spec(warn_on_impl_args={"text": argument})
        def cfsp_both(self, text: str, value: str) -> None: ...

    manager = pluggy.PluginManager(hookspecs.NAMESPACE)
    manager.add_hookspecs(Specs)
    plugins = {
        r"^cfsp_old\(\) is deprecated since cfsp-framework 0\.2 and will be removed in 0\.4: offer cfsp_new\(\)\.$": (
            SimpleNamespace(cfsp_old=hookspecs.hookimpl(lambda: None))
        ),
        r"^the argument `text` is deprecated since cfsp-framework 0\.2 and will be removed in 0\.4: read `value`\.$": (
            SimpleNamespace(cfsp_both=hookspecs.hookimpl(lambda text: None))
        ),
    }
    for message, plugin in plugins.items():
        with pytest.warns(PluginDeprecationWarning, match=message):
            manager.register(plugin)
    with warnings.catch_warnings(record=True) as seen:  # what Python does by default: users do not see it
        warnings.resetwarnings()
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.warn(old, stacklevel=1)
    assert seen == []
