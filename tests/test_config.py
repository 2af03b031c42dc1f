"""Options: the text form of a component, presets, a YAML file, and what wins over what."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cfsp_framework.config import CHOICES, OPTIONS, PRESETS, Choice, RunConfig, layered, parse_choice, read_yaml
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.manager import load_plugins

untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure


def yaml_file(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- NAME:option=value -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("cfsp", "cfsp", {}),
        ("cfsp:", "cfsp", {}),
        (" wanda-sp ", "wanda-sp", {}),
        ("cfsp:variant=act", "cfsp", {"variant": "act"}),
        ("cfsp:variant=eq8,b=2,c=0.5", "cfsp", {"variant": "eq8", "b": 2, "c": 0.5}),
        ("cfsp: a = 2 , released = true ", "cfsp", {"a": 2, "released": True}),
        ("cfsp:temperature=null", "cfsp", {"temperature": None}),
        ("cfsp:a=-1.5,", "cfsp", {"a": -1.5}),
        ("mine:url=http://host:80/x=y", "mine", {"url": "http://host:80/x=y"}),
        ("mine:text='1'", "mine", {"text": "1"}),
    ],
)
def test_a_choice_is_a_name_and_yaml_options(text: str, name: str, options: dict[str, object]) -> None:
    choice = Choice.model_validate(text)
    assert (choice.name, choice.options) == (name, options)
    assert parse_choice(text) == {"name": name, "options": options}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfsp:act", r"^'cfsp:act': expected NAME:option=value,option=value, found 'act'\.$"),
        ("cfsp:b=1,act", r"found 'act'\.$"),
        ("cfsp:=3", r"found '=3'\.$"),
        ("cfsp:b=[1", r"^'cfsp:b=\[1': the value of 'b' cannot be read: '\[1'\.$"),
        ("cfsp:b=@x", r"the value of 'b' cannot be read"),
    ],
)
def test_a_choice_that_cannot_be_read_is_quoted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.build(model="m", criterion=text)


SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@untimed
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), SCALARS, max_size=4))
def test_a_choice_reads_back_what_it_prints(options: dict[str, object]) -> None:
    choice = Choice(name="wanda-sp", options=options)
    assert Choice.model_validate(str(choice)) == choice


def test_a_choice_is_also_a_mapping_without_extra_keys() -> None:
    config = RunConfig.build(model="m", criterion={"name": "cfsp", "options": {"b": 2}})
    assert config.components.criterion == Choice(name="cfsp", options={"b": 2})
    with pytest.raises(ConfigError, match=r"criterion\.variant: Extra inputs are not permitted"):
        RunConfig.build(model="m", criterion={"name": "cfsp", "variant": "act"})


# --- values ----------------------------------------------------------------------------------------------------------


def test_the_defaults_need_a_model_only() -> None:
    config = RunConfig.build(model="demo")
    assert (config.budget.ratio, config.budget.unit, config.budget.round_to, config.run.seed) == (
        0.5,
        "channels",
        128,
        0,
    )
    assert [str(getattr(config.components, kind)) for kind in CHOICES] == ["cfsp", "cfsp", "none", "none"]
    with pytest.raises(ConfigError, match=r"^model: Field required"):
        RunConfig.build()


def test_every_option_is_described_or_is_a_choice() -> None:
    assert all(option.field.description for option in OPTIONS.values())


@pytest.mark.parametrize("ratio", [0, 0.0, 0.2, 0.999999])
def test_a_ratio_in_range_is_accepted(ratio: float) -> None:
    assert RunConfig.build(model="m", ratio=ratio).budget.ratio == ratio


@pytest.mark.parametrize("ratio", [float("nan"), float("inf"), float("-inf"), 1, 1.0, -0.1, 50, "half", None])
def test_a_ratio_out_of_range_is_refused(ratio: object) -> None:
    with pytest.raises(ConfigError, match=r"^ratio: .* \(given: "):
        RunConfig.build(model="m", ratio=ratio)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("round_to", 0),
        ("samples", 0),
        ("seqlen", 1),
        ("batch_size", 0),
        ("seed", -1),
        ("budget", "heads"),
        ("dtype", "float8"),
        ("rebalance", "perhaps"),
        ("samples", 1.5),
        ("evaluate_windows", 0),
    ],
)
def test_an_impossible_value_is_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(model="m", **{option: value})
    assert str(caught.value).startswith(f"{option}: ")
    assert f"(given: {value!r})" in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"ratio: .*; samples: "):
        RunConfig.build(model="m", ratio=2, samples=0)


def test_an_unknown_option_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"^Unknown option 'ration'\. Did you mean 'ratio'\? Available: allocator, "):
        RunConfig.build(model="m", ration=0.5)


@pytest.mark.parametrize("option", ["evaluate", "plugins"])
def test_one_of_a_list_may_stand_alone(option: str) -> None:
    assert OPTIONS[option].read(RunConfig.build(model="m", **{option: "one"})) == ("one",)
    assert OPTIONS[option].read(RunConfig.build(model="m", **{option: ["one", "two"]})) == ("one", "two")


def test_a_configuration_is_frozen_and_survives_json() -> None:
    config = layered("flap-released", None, {"model": "m", "evaluate": ["demo"], "plugins": ["no:x"]})
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.budget.ratio = 0.1


# --- presets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_names_components_and_options_that_exist(preset: str) -> None:
    config = layered(preset, None, {"model": "m"})
    plugins = load_plugins()
    plugins.criteria.create(config.components.criterion.name, config.components.criterion.options)
    plugins.allocators.create(config.components.allocator.name, config.components.allocator.options)
    plugins.compensators.create(config.components.compensator.name, config.components.compensator.options)
    plugins.recovery_schedulers.create(config.components.recovery.name, config.components.recovery.options)


def test_the_preset_cfsp_is_the_default() -> None:
    assert layered("cfsp", None, {"model": "m"}) == layered(None, None, {"model": "m"})


def test_an_unknown_preset_suggests_the_closest() -> None:
    with pytest.raises(
        ConfigError, match=r"^Unknown preset 'cfsp-release'\. Did you mean 'cfsp-released'\? Available: "
    ):
        layered("cfsp-release", None, {"model": "m"})


# --- layers ----------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: from-file\nratio: 0.3\nseed: 4\nrebalance: true\n")
    config = layered("cfsp-released", path, {"ratio": 0.2})
    assert (config.model.source, config.budget.ratio, config.run.seed, config.budget.rebalance) == (
        "from-file",
        0.2,
        4,
        True,
    )
    assert config.components.criterion.options == {"variant": "act"}


def test_the_same_component_keeps_its_options_and_gains_the_new_ones(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "allocator: cfsp:a=2,distance=mae\n")
    config = layered("cfsp-released", path, {"model": "m", "allocator": "cfsp:distance=mse"})
    assert config.components.allocator == Choice(name="cfsp", options={"released": True, "a": 2, "distance": "mse"})


def test_another_component_replaces_the_one_before_with_its_options() -> None:
    config = layered("cfsp-released", None, {"model": "m", "criterion": "wanda-sp", "allocator": "global-zscore"})
    assert config.components.criterion == Choice(name="wanda-sp")
    assert config.components.allocator == Choice(name="global-zscore")


def test_a_component_may_be_a_mapping_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\ncriterion:\n  name: cfsp\n  options:\n    b: 2\n")
    assert layered(None, path, {}).components.criterion == Choice(name="cfsp", options={"b": 2})
    merged = layered("cfsp-released", path, {"criterion": "cfsp:c=0"}).components.criterion
    assert merged == Choice(name="cfsp", options={"variant": "act", "b": 2, "c": 0})


def test_layering_leaves_the_presets_as_they_were() -> None:
    layered("cfsp-released", None, {"model": "m", "allocator": "cfsp:a=3", "criterion": "cfsp:b=3"})
    assert PRESETS["cfsp-released"]["allocator"] == "cfsp:released=true"


def test_the_file_may_name_the_preset_and_the_command_line_another(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\npreset: magnitude-released\n")
    assert layered(None, path, {}).components.criterion.name == "magnitude"
    assert layered("wanda-sp-released", path, {}).components.criterion.name == "wanda-sp"


@pytest.mark.parametrize("preset", ["[cfsp]", "3", "nothing"])
def test_a_preset_in_the_file_that_does_not_exist(preset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Unknown preset .* Available: cfsp, "):
        layered(None, yaml_file(tmp_path, f"model: m\npreset: {preset}\n"), {})


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("value", ["3", "[cfsp]", "null"])
def test_a_component_that_is_neither_text_nor_mapping(value: str, kind: str, tmp_path: Path) -> None:
    path = yaml_file(tmp_path, f"model: m\n{kind}: {value}\n")
    for preset in (None, "cfsp", "flap-released"):
        with pytest.raises(ConfigError, match=rf"^{kind}: Input should be a valid dictionary"):
            layered(preset, path, {})


def test_options_that_are_no_mapping_are_refused_not_dropped(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\ncriterion: {name: cfsp, options: [b]}\n")
    with pytest.raises(ConfigError, match=r"^criterion\.options: Input should be a valid dictionary"):
        layered("cfsp", path, {})


def test_options_without_a_name_are_refused(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\ncriterion: {options: {b: 2}}\n")
    with pytest.raises(ConfigError, match=r"^criterion\.name: Field required"):
        layered(None, path, {})


# --- the YAML file ---------------------------------------------------------------------------------------------------


def test_dashes_in_option_names_are_underscores(tmp_path: Path) -> None:
    assert layered(None, yaml_file(tmp_path, "model: m\nround-to: 16\nbatch_size: 2\n"), {}).budget.round_to == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: [", r"run\.yaml cannot be read: .*line 1"),
        ("a: 1\n b: 2\n", r"run\.yaml cannot be read: .*line 2"),
        ("- model\n- ratio\n", r"run\.yaml must hold options as `name: value` lines\.$"),
        ("just text", r"run\.yaml must hold options"),
        ("", r"run\.yaml must hold options"),
        ("model: !!python/object:os.system {}\n", r"run\.yaml cannot be read: "),
    ],
)
def test_a_file_that_holds_no_options(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(yaml_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read: .*No such file"):
        layered(None, tmp_path / "missing.yaml", {})
    with pytest.raises(ConfigError, match=r"cannot be read"):
        layered(None, tmp_path, {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"binary\.yaml cannot be read"):
        read_yaml(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ratio: .nan", r"^ratio: Input should be a finite number"),
        ("ratio: 1", r"^ratio: .*less than 1"),
        ("ratio: -0.1", r"^ratio: .*greater than or equal to 0"),
        ("rato: 0.5", r"^Unknown option 'rato'\. Did you mean 'ratio'\?"),
        ("3: 4", r"^Unknown option '3'"),
    ],
)
def test_a_wrong_line_in_the_file(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        layered(None, yaml_file(tmp_path, f"model: m\n{line}\n"), {})
