"""The host: how plugins are found, and what it says when one is broken."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from cfsp_framework import BlockStatistics, FeedForward, Statistic
from cfsp_framework.errors import CfspError, ConfigError, PluginError, PluginWarning, did_you_mean
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.registry import Origin, Plugins
from cfsp_framework.statistics import ANGULAR_DISTANCE, DOWN_INPUT_SQUARES
from helpers.plugins import install_distribution

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "cfsp-peak" / "src" / "cfsp_peak" / "__init__.py"
SHELVES = {"cfsp_criteria", "cfsp_allocators", "cfsp_plugins"}
BUILT_IN = ("cfsp-allocators", "cfsp-criteria", "cfsp-defaults")
NO_BUILT_IN = tuple(f"no:{name}" for name in BUILT_IN)

CRITERION = """
from cfsp_framework import Criterion, hookimpl

class Mine(Criterion):
    name = "{name}"

    def score(self, feed_forward, statistics):
        return feed_forward.down.sum(0)

@hookimpl
def cfsp_criteria():
    return [Mine]
"""


@pytest.fixture(autouse=True)
def _forget_imported_plugins() -> Iterator[None]:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("example_", "_cfsp_plugin_")):
            del sys.modules[name]


def plugin_file(folder: Path, source: str, name: str = "broken.py") -> str:
    path = folder / name
    path.write_text(source, encoding="utf-8")
    return str(path)


def config(model_type: str) -> PreTrainedConfig:
    return cast("PreTrainedConfig", SimpleNamespace(model_type=model_type))


def refused_message(source: str, folder: Path) -> str:
    """Return the message that refuses a plugin file; it names the file."""
    spec = plugin_file(folder, source)
    with pytest.raises(PluginError) as caught:
        load_plugins([spec])
    message = str(caught.value)
    assert f"plugin {spec!r}" in message
    assert "\n" not in message
    return message


# --- finding ---------------------------------------------------------------------------------------------------------


def test_the_built_ins_are_ordinary_entry_points() -> None:
    plugins = load_plugins()
    for name in BUILT_IN:
        assert plugins.origins[name] == Origin(name, "cfsp-framework", version("cfsp-framework"))
    assert set(plugins.criteria) >= {"cfsp", "flap", "magnitude", "random", "wanda-l2", "wanda-sp"}
    assert {"cfsp", "global-zscore", "uniform"} <= set(plugins.allocators)
    assert {"none", "bias"} <= set(plugins.compensators)
    assert "none" in plugins.recovery_schedulers


def test_every_statistic_a_built_in_component_requires_has_exactly_one_collector() -> None:
    plugins = load_plugins()
    for registry in plugins.registries:
        for name in registry:
            required = registry.create(name, {}).component.required()
            provided = [chosen.component.provides for chosen in plugins.collectors_for(required)]
            assert provided == sorted(required), name


def test_a_single_file_is_a_plugin() -> None:
    spec = str(FIXTURES / "down_norm.py")
    plugins = load_plugins([spec])
    chosen = plugins.criteria.create("down-norm", {})
    down = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    scores = chosen.component.score(FeedForward(0, "mlp", torch.ones(2, 2), down, "silu"), BlockStatistics({}, 0))
    assert scores.tolist() == [5.0, 1.0]
    assert str(chosen) == f"criterion 'down-norm' (plugin {spec!r})"


def test_a_file_may_bring_a_statistic_its_collector_and_an_option() -> None:
    plugins = load_plugins([str(EXAMPLE)])
    criterion = plugins.criteria.create("peak", {"exponent": 2}).component
    (collector,) = plugins.collectors_for(criterion.required())
    running = collector.component.start()
    for window in (torch.tensor([[1.0, -3.0]]), torch.tensor([[-2.0, 0.5]])):
        running.update(window, window)
    statistics = BlockStatistics({collector.component.provides: running.value(2)}, 2)
    feed_forward = FeedForward(0, "mlp", torch.ones(2, 2), torch.eye(2), "silu")
    assert criterion.score(feed_forward, statistics).tolist() == [4.0, 9.0]


def test_an_importable_module_is_a_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin_file(tmp_path, CRITERION.format(name="from-module"), "example_module.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(["example_module"])
    assert plugins.criteria.origin("from-module") == Origin("example_module")


def test_a_third_party_distribution_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CRITERION.format(name="theirs")
    install_distribution(tmp_path, "acme-pruning", {"acme": "example_acme"}, {"example_acme": source})
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins()
    assert plugins.criteria.origin("theirs") == Origin("acme", "acme-pruning", "1.0")
    assert str(plugins.criteria.create("theirs", {})) == "criterion 'theirs' (plugin 'acme' of acme-pruning 1.0)"
    assert "cfsp" in plugins.criteria


def test_no_name_blocks_an_entry_point_before_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_distribution(tmp_path, "acme", {"acme": "example_boom"}, {"example_boom": "raise RuntimeError('imported')"})
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins = load_plugins(["no:acme"])
    assert "acme" not in plugins.origins
    assert "example_boom" not in sys.modules


def test_a_built_in_shelf_can_be_blocked_and_replaced(tmp_path: Path) -> None:
    spec = plugin_file(tmp_path, CRITERION.format(name="cfsp"), "own.py")
    plugins = load_plugins(["no:cfsp-criteria", spec])
    assert list(plugins.criteria) == ["cfsp"]
    assert plugins.criteria.origin("cfsp") == Origin(spec)


def test_the_same_plugin_asked_for_twice_is_loaded_once() -> None:
    spec = str(FIXTURES / "down_norm.py")
    assert "down-norm" in load_plugins([spec, spec]).criteria


def test_two_loads_do_not_share_plugins() -> None:
    assert "down-norm" in load_plugins([str(FIXTURES / "down_norm.py")]).criteria
    assert "down-norm" not in load_plugins().criteria


def test_blocking_a_name_that_no_plugin_has_suggests_one_that_exists() -> None:
    with pytest.raises(ConfigError, match=r"-p no:cfsp-criterias names no plugin\. Did you mean 'cfsp-criteria'\?"):
        load_plugins(["no:cfsp-criterias"])


def test_without_the_built_ins_the_registries_are_empty_and_create_says_so() -> None:
    plugins = load_plugins(NO_BUILT_IN)
    assert [len(registry) for registry in plugins.registries] == [0] * 6
    with pytest.raises(ConfigError, match=r"^Unknown criterion 'cfsp'\. Available: none\.$"):
        plugins.criteria.create("cfsp", {})
    assert plugins.architecture(config("llama")) is None
    assert plugins.collectors_for([]) == ()


# --- plugins that cannot be loaded -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import example_that_is_not_there", "ModuleNotFoundError: No module named 'example_that_is_not_there'."),
        ("raise ValueError('two\\nlines')", "ValueError: two lines."),
        ("def (", "SyntaxError: invalid syntax (broken.py, line 1)."),
    ],
)
def test_a_file_that_fails_to_import(source: str, cause: str, tmp_path: Path) -> None:
    message = refused_message(source, tmp_path)
    assert f"could not be loaded: {cause} It was given with -p " in message


def test_an_entry_point_whose_module_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_distribution(tmp_path, "acme", {"acme": "example_gone"}, {})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"plugin 'acme' of acme 1\.0 could not be loaded.*-p no:acme"):
        load_plugins()


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("nowhere/plugin.py", ConfigError, "-p nowhere/plugin.py: "),
        ("example_not_installed", PluginError, "No module named 'example_not_installed'. It was given with -p"),
        ("cfsp_criteria", PluginError, "is loaded already, as plugin 'cfsp-criteria' of cfsp-framework"),
    ],
)
def test_a_plugin_that_cannot_be_found(spec: str, error: type[CfspError], message: str) -> None:
    with pytest.raises(error) as caught:
        load_plugins([spec])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_distributions_with_one_entry_point_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        source = CRITERION.format(name=name)
        install_distribution(tmp_path, f"acme-{name}", {"acme": f"example_{name}"}, {f"example_{name}": source})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError, match=r"^Two plugins are called 'acme': ") as caught:
        load_plugins()
    assert "plugin 'acme' of acme-first 1.0" in str(caught.value)
    assert "plugin 'acme' of acme-second 1.0" in str(caught.value)
    assert "acme" not in load_plugins(["no:acme"]).origins


# --- plugins that offer something unusable ---------------------------------------------------------------------------


def test_a_misspelt_hook(tmp_path: Path) -> None:
    source = "from cfsp_framework import hookimpl\n@hookimpl\ndef cfsp_criterions():\n    return []\n"
    message = refused_message(source, tmp_path)
    assert "implements an unknown hook, cfsp_criterions(). Did you mean 'cfsp_criteria'?" in message


def test_a_forgotten_hookimpl(tmp_path: Path) -> None:
    message = refused_message("def cfsp_criteria():\n    return []\n", tmp_path)
    assert "implements no hook; was @hookimpl forgotten? Hooks: cfsp_collectors," in message


def test_a_hook_with_an_argument_it_does_not_have(tmp_path: Path) -> None:
    source = "from cfsp_framework import hookimpl\n@hookimpl\ndef cfsp_criteria(model):\n    return []\n"
    message = refused_message(source, tmp_path)
    assert "cfsp_criteria(model)" in message


@pytest.mark.parametrize("kind", ["wrapper", "hookwrapper"])
@pytest.mark.parametrize("hook", ["cfsp_criteria", "cfsp_run_finished"])
def test_a_wrapper_is_refused_because_the_host_would_not_run_it(hook: str, kind: str, tmp_path: Path) -> None:
    source = f"from cfsp_framework import hookimpl\n@hookimpl({kind}=True)\ndef {hook}():\n    return (yield)\n"
    assert f"wraps {hook}(), which cannot be wrapped" in refused_message(source, tmp_path)


HEAD = "from cfsp_framework import Collector, Criterion, Site, Statistic, hookimpl\n"
SCORE = "    def score(self, feed_forward, statistics):\n        return None\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    raise RuntimeError('not today')", "failed in cfsp_criteria(): RuntimeError: not today."),
        ("    yield 1 / 0", "failed in cfsp_criteria(): ZeroDivisionError: division by zero."),
        ("    pass", "cfsp_criteria() returned None; it must return a list of classes."),
        (
            "    return Criterion",
            "cfsp_criteria() returned <class 'cfsp_framework.api.components.Criterion'>; it must return a list",
        ),
        ("    return ['cfsp']", "cfsp_criteria() offered 'cfsp', which is not a subclass of Criterion."),
        ("    return [int]", "cfsp_criteria() offered <class 'int'>, which is not a subclass of Criterion."),
        ("    return [Collector]", "which is not a subclass of Criterion."),
    ],
)
def test_a_hook_that_raises_or_returns_no_classes(body: str, message: str, tmp_path: Path) -> None:
    assert message in refused_message(f"{HEAD}@hookimpl\ndef cfsp_criteria():\n{body}\n", tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (SCORE, "cfsp_criteria() offered Mine, which does not set `name`."),
        ("    name = 'mine'\n", "cfsp_criteria() offered Mine, which does not define score()."),
        ("    name = 3\n" + SCORE, "cfsp_criteria() offered Mine, which sets `name` to 3, not to a str."),
        (
            "    name: str = 'mine'\n" + SCORE,
            "cfsp_criteria() offered Mine, which declares `name` as an option; leave out its annotation or make it a",
        ),
        (
            "    name = 'mine'\n    requires = frozenset({'down_input_squares'})\n" + SCORE,
            "cfsp_criteria() offered Mine, which requires 'down_input_squares', which is not a Statistic.",
        ),
        (
            "    name = 'mine'\n    requires = Statistic('x')\n" + SCORE,
            "cfsp_criteria() offered Mine, which sets `requires` to Statistic(",
        ),
    ],
)
def test_a_criterion_that_is_not_finished(body: str, message: str, tmp_path: Path) -> None:
    source = f"{HEAD}class Mine(Criterion):\n{body}\n@hookimpl\ndef cfsp_criteria():\n    return [Mine]\n"
    assert message in refused_message(source, tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    site = Site.BLOCK\n", "which does not set `provides`."),
        ("    provides = Statistic('x')\n", "which does not set `site`."),
        ("    provides = 'x'\n    site = Site.BLOCK\n", "which sets `provides` to 'x', not to a Statistic."),
        ("    provides = Statistic('x')\n    site = 'block'\n", "which sets `site` to 'block', not to a Site."),
        (
            "    provides = Statistic('x')\n    site = Site.BLOCK\n",
            "which neither sets `accumulator` nor defines start().",
        ),
    ],
)
def test_a_collector_that_is_not_finished(body: str, message: str, tmp_path: Path) -> None:
    source = (
        f"{HEAD}class Mine(Collector):\n    name = 'mine'\n{body}@hookimpl\ndef cfsp_collectors():\n    return [Mine]\n"
    )
    assert f"cfsp_collectors() offered Mine, {message}" in refused_message(source, tmp_path)


def test_two_plugins_that_offer_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = CRITERION.format(name="wanda-sp")
    install_distribution(tmp_path, "acme-pruning", {"acme": "example_acme"}, {"example_acme": source})
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(PluginError) as caught:
        load_plugins()
    message = str(caught.value)
    assert message.startswith("Criterion 'wanda-sp' is offered by both plugin 'acme' of acme-pruning 1.0 and plugin ")
    assert "'cfsp-criteria' of cfsp-framework" in message
    assert message.endswith(": -p no:acme.")
    assert load_plugins(["no:acme"]).criteria.origin("wanda-sp").plugin == "cfsp-criteria"


def test_one_plugin_that_offers_one_name_twice(tmp_path: Path) -> None:
    source = CRITERION.format(name="twin").replace("return [Mine]", "return [Mine, type('Other', (Mine,), {})]")
    assert "cfsp_criteria() offered two classes called 'twin', Mine and Other." in refused_message(source, tmp_path)


# --- choosing --------------------------------------------------------------------------------------------------------


def test_an_unknown_component_name_suggests_the_closest() -> None:
    plugins = load_plugins()
    with pytest.raises(
        ConfigError, match=r"^Unknown criterion 'wanda-sq'\. Did you mean 'wanda-sp'\? Available: cfsp, "
    ):
        plugins.criteria.create("wanda-sq", {})
    with pytest.raises(ConfigError, match=r"^Unknown allocator 'unifrom'\. Did you mean 'uniform'\?"):
        plugins.allocators.create("unifrom", {})


def test_registries_are_mappings() -> None:
    criteria = load_plugins().criteria
    assert "cfsp" in criteria
    assert "no-such-criterion" not in criteria
    assert list(criteria) == sorted(criteria)
    assert criteria["cfsp"].name == "cfsp"
    assert len(list(criteria.values())) == len(criteria)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"varient": "act"}, "'varient' (did you mean 'variant'?)"),
        ({"b": "much"}, "b: "),
        ({"b": float("nan")}, "b: "),
        ({"variant": "printed"}, "variant: "),
    ],
)
def test_an_unknown_or_ill_typed_option(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_plugins().criteria.create("cfsp", options)
    message = str(caught.value)
    assert message.startswith("Bad options for criterion 'cfsp' (plugin 'cfsp-criteria' of cfsp-framework ")
    assert problem in message
    assert message.endswith("Its options: variant, b, c.")


def test_a_component_that_fails_to_take_its_options(tmp_path: Path) -> None:
    source = CRITERION.format(name="mine").replace(
        "    def score", "    def model_post_init(self, context):\n        raise OSError('no licence')\n\n    def score"
    )
    spec = plugin_file(tmp_path, source)
    with pytest.raises(PluginError, match=r"criterion 'mine' \(plugin .* failed to take its options: OSError: no lic"):
        load_plugins([spec]).criteria.create("mine", {})


def test_options_are_frozen() -> None:
    component = load_plugins().criteria.create("cfsp", {}).component
    with pytest.raises(ValueError, match="frozen"):
        component.b = 2.0  # type: ignore[attr-defined]


def test_only_what_is_required_is_collected_in_a_stable_order() -> None:
    plugins = load_plugins()
    one = plugins.collectors_for([DOWN_INPUT_SQUARES, ANGULAR_DISTANCE, DOWN_INPUT_SQUARES])
    other = plugins.collectors_for({ANGULAR_DISTANCE, DOWN_INPUT_SQUARES})
    assert [chosen.component.name for chosen in one] == ["angular-distance", "down-input-squares"]
    assert one == other


def test_a_required_statistic_that_nobody_collects() -> None:
    with pytest.raises(
        PluginError, match=r"No collector provides the statistic 'down_input_square'\. Did you mean 'down"
    ):
        load_plugins().collectors_for([Statistic("down_input_square")])
    with pytest.raises(
        PluginError, match=r"No collector provides the statistic 'angular_distance'\. Available: none\."
    ):
        load_plugins(NO_BUILT_IN).collectors_for([ANGULAR_DISTANCE])


def test_a_required_statistic_that_two_collectors_claim(tmp_path: Path) -> None:
    source = (
        f"{HEAD}class Mine(Collector):\n    name = 'mine'\n    provides = Statistic('angular_distance')\n"
        "    site = Site.BLOCK\n    def start(self):\n        return None\n"
        "@hookimpl\ndef cfsp_collectors():\n    return [Mine]\n"
    )
    spec = plugin_file(tmp_path, source)
    plugins = load_plugins([spec])
    assert plugins.collectors_for([DOWN_INPUT_SQUARES])
    with pytest.raises(PluginError) as caught:
        plugins.collectors_for([ANGULAR_DISTANCE])
    message = str(caught.value)
    assert message.startswith("Two collectors provide the statistic 'angular_distance': 'angular-distance' (plugin ")
    assert f"'mine' (plugin {spec!r})" in message
    assert message.endswith("-p no:cfsp-defaults.")


# --- the hooks that are not registries -------------------------------------------------------------------------------


def test_the_built_in_architectures_answer_for_their_families_only() -> None:
    plugins = load_plugins()
    llama, phi3 = plugins.architecture(config("llama")), plugins.architecture(config("phi3"))
    assert llama is not None
    assert (llama.family, [layout.fused for layout in llama.feed_forwards]) == ("llama", [False])
    assert phi3 is not None
    assert [layout.fused for layout in phi3.feed_forwards] == [True]
    assert plugins.architecture(config("no-such-family")) is None


def test_a_plugin_takes_a_family_over_because_the_built_ins_answer_last() -> None:
    plugins = load_plugins([str(FIXTURES / "own_architecture.py")])
    families = [plugins.architecture(config(name)) for name in ("llama", "toy", "qwen2")]
    assert [found.family for found in families if found] == ["mine", "mine", "qwen2"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("    return 'mlp'", r"cfsp_architecture\(\) returned 'mlp', not an Architecture or None\.$"),
        ("    return config.no_such_key", r"failed in cfsp_architecture\(\): AttributeError: .*no_such_key"),
    ],
)
def test_an_architecture_hook_that_raises_or_returns_something_else(body: str, message: str, tmp_path: Path) -> None:
    source = f"from cfsp_framework import hookimpl\n@hookimpl\ndef cfsp_architecture(config):\n{body}\n"
    spec = plugin_file(tmp_path, source)
    plugins = load_plugins([spec])
    with pytest.raises(PluginError, match=message) as caught:
        plugins.architecture(config("llama"))
    assert f"plugin {spec!r}" in str(caught.value)


OBSERVER = """
from cfsp_framework import hookimpl

seen = []

@hookimpl
def cfsp_run_finished({arguments}):
    seen.append({value})
"""


@pytest.mark.parametrize(
    ("arguments", "value", "expected"),
    [("result", "result", "a result"), ("result=None", "result", "a result"), ("", "'nothing'", "nothing")],
)
def test_an_observer_gets_the_arguments_it_names(
    arguments: str, value: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin_file(tmp_path, OBSERVER.format(arguments=arguments, value=value), "example_observer.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    plugins: Plugins = load_plugins(["example_observer"])
    plugins.run_finished(cast("Any", "a result"))
    assert importlib.import_module("example_observer").seen == [expected]


def test_an_observer_that_fails_is_named(tmp_path: Path) -> None:
    spec = plugin_file(tmp_path, OBSERVER.format(arguments="result", value="1 / 0"))
    plugins = load_plugins([spec])
    with pytest.warns(PluginWarning, match=r"failed in cfsp_run_finished\(\): ZeroDivisionError.* The run goes on\.$"):
        plugins.run_finished(cast("Any", None))


# --- the host and the shelves ----------------------------------------------------------------------------------------


def test_the_host_loads_plugins_without_shelves_and_torch(tmp_path: Path) -> None:
    source = "from cfsp_framework import hookimpl\n@hookimpl\ndef cfsp_architecture(config):\n    return None\n"
    script = (
        "import json, sys\n"
        "import cfsp_framework.config, cfsp_framework.api.events, cfsp_framework.host.observers\n"
        "import cfsp_framework.host.manager as manager, cfsp_framework.pruning.planning\n"
        f"manager.load_plugins({(*NO_BUILT_IN, plugin_file(tmp_path, source))!r})\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "cfsp_framework" in loaded
    assert not loaded & (SHELVES | {"torch", "transformers"})


def test_did_you_mean_lists_what_there_is() -> None:
    assert did_you_mean("bios", ["none", "bias"]) == " Did you mean 'bias'? Available: bias, none."
    assert did_you_mean("x", ["none", "bias"]) == " Available: bias, none."
    assert did_you_mean("x", []) == " Available: none."
