"""Options: components as text, presets, the YAML file, and the order in which they override each other."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cfsp_framework.config import CHOICES, OPTIONS, PRESETS, Choice, RunConfig, layered, parse_choice, read_yaml
from cfsp_framework.errors import ConfigError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.selection import select

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
def test_a_component_is_a_name_and_yaml_options(text: str, name: str, options: dict[str, object]) -> None:
    choice = Choice.model_validate(text)
    assert (choice.name, choice.options) == (name, options)
    assert parse_choice(text) == {"name": name, "options": options}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cfsp:act", "'cfsp:act'.* 'act'"),
        ("cfsp:b=1,act", "'act'"),
        ("cfsp:=3", "'=3'"),
        ("cfsp:b=[1", r"'b' .*'\[1'"),
        ("cfsp:b=@x", "'b' .*'@x'"),
    ],
)
def test_a_component_that_cannot_be_parsed_is_quoted(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.build(model="m", criterion=text)


SCALARS = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e3, 1e3).map(lambda x: round(x, 3))


@untimed
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), SCALARS, max_size=4))
def test_a_component_printed_as_text_is_parsed_to_the_same(options: dict[str, object]) -> None:
    choice = Choice(name="wanda-sp", options=options)
    assert Choice.model_validate(str(choice)) == choice


def test_a_component_may_be_a_mapping_without_extra_keys() -> None:
    config = RunConfig.build(model="m", criterion={"name": "cfsp", "options": {"b": 2}})
    assert config.components.criterion == Choice(name="cfsp", options={"b": 2})
    with pytest.raises(ConfigError, match=r"criterion\.variant"):
        RunConfig.build(model="m", criterion={"name": "cfsp", "variant": "act"})


# --- values ----------------------------------------------------------------------------------------------------------


def test_only_the_model_has_no_default() -> None:
    config = RunConfig.build(model="demo")
    defaults = (config.budget.ratio, config.budget.unit, config.budget.round_to, config.run.seed)
    assert defaults == (0.5, "channels", 128, 0)
    assert [str(getattr(config.components, kind)) for kind in CHOICES] == ["cfsp", "cfsp", "none", "none"]
    with pytest.raises(ConfigError, match=r"^model: "):
        RunConfig.build()


def test_every_option_has_a_description() -> None:
    assert all(option.field.description for option in OPTIONS.values())


@pytest.mark.parametrize("ratio", [0, 0.0, 0.2, 0.999999])
def test_a_ratio_in_range_is_accepted(ratio: float) -> None:
    assert RunConfig.build(model="m", ratio=ratio).budget.ratio == ratio


IMPOSSIBLE = [
    *[("ratio", value) for value in (math.nan, math.inf, -math.inf, 1, 1.0, -0.1, 50, "half", None)],
    *[("round_to", 0), ("samples", 0), ("samples", 1.5), ("seqlen", 1), ("batch_size", 0), ("evaluate_windows", 0)],
    *[("seed", -1), ("budget", "heads"), ("dtype", "float8"), ("rebalance", "perhaps")],
]


@pytest.mark.parametrize(("option", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_named(option: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.build(model="m", **{option: value})
    assert str(caught.value).startswith(f"{option}: ")
    assert f"(given: {value!r})" in str(caught.value)


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError, match=r"ratio: .*; samples: "):
        RunConfig.build(model="m", ratio=2, samples=0)


def test_an_unknown_option_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'ration'.*'ratio'.* allocator, "):
        RunConfig.build(model="m", ration=0.5)


@pytest.mark.parametrize("option", ["evaluate", "plugins"])
def test_a_single_value_is_a_list_of_one(option: str) -> None:
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
    described = select(config, load_plugins()).describe()
    assert [description.partition(":")[0] for description in described.values()] == [
        getattr(config.components, kind).name for kind in CHOICES
    ]


def test_the_preset_cfsp_is_the_default() -> None:
    assert layered("cfsp", None, {"model": "m"}) == layered(None, None, {"model": "m"})


def test_an_unknown_preset_suggests_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'cfsp-release'.*'cfsp-released'.* cfsp, "):
        layered("cfsp-release", None, {"model": "m"})


# --- layers ----------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: from-file\nratio: 0.3\nseed: 4\nrebalance: true\n")
    config = layered("cfsp-released", path, {"ratio": 0.2})
    assert (config.model.source, config.budget.ratio, config.run.seed) == ("from-file", 0.2, 4)
    assert config.budget.rebalance
    assert config.components.criterion.options == {"variant": "act"}


def test_a_component_named_again_keeps_its_options(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "allocator: cfsp:a=2,distance=mae\n")
    config = layered("cfsp-released", path, {"model": "m", "allocator": "cfsp:distance=mse"})
    assert config.components.allocator == Choice(name="cfsp", options={"released": True, "a": 2, "distance": "mse"})


def test_another_component_replaces_the_earlier_one_and_its_options() -> None:
    config = layered("cfsp-released", None, {"model": "m", "criterion": "wanda-sp", "allocator": "global-zscore"})
    assert config.components.criterion == Choice(name="wanda-sp")
    assert config.components.allocator == Choice(name="global-zscore")


def test_a_component_may_be_a_mapping_in_the_file(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\ncriterion:\n  name: cfsp\n  options:\n    b: 2\n")
    assert layered(None, path, {}).components.criterion == Choice(name="cfsp", options={"b": 2})
    merged = layered("cfsp-released", path, {"criterion": "cfsp:c=0"}).components.criterion
    assert merged == Choice(name="cfsp", options={"variant": "act", "b": 2, "c": 0})


def test_layering_does_not_change_the_presets() -> None:
    layered("cfsp-released", None, {"model": "m", "allocator": "cfsp:a=3", "criterion": "cfsp:b=3"})
    assert PRESETS["cfsp-released"]["allocator"] == "cfsp:released=true"


def test_the_file_may_name_the_preset_and_the_command_line_another(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "model: m\npreset: magnitude-released\n")
    assert layered(None, path, {}).components.criterion.name == "magnitude"
    assert layered("wanda-sp-released", path, {}).components.criterion.name == "wanda-sp"


@pytest.mark.parametrize("preset", ["[cfsp]", "3", "nothing"])
def test_an_unknown_preset_in_the_file_is_refused(preset: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"preset .* cfsp, "):
        layered(None, yaml_file(tmp_path, f"model: m\npreset: {preset}\n"), {})


@pytest.mark.parametrize("kind", CHOICES)
@pytest.mark.parametrize("value", ["3", "[cfsp]", "null", "{name: cfsp, options: [b]}", "{options: {b: 2}}"])
def test_a_component_that_is_neither_text_nor_a_mapping_of_name_and_options_is_refused(
    value: str, kind: str, tmp_path: Path
) -> None:
    path = yaml_file(tmp_path, f"model: m\n{kind}: {value}\n")
    for preset in (None, "cfsp", "flap-released"):
        with pytest.raises(ConfigError, match=f"^{kind}"):
            layered(preset, path, {})


# --- the YAML file ---------------------------------------------------------------------------------------------------


def test_dashes_in_option_names_are_underscores(tmp_path: Path) -> None:
    assert layered(None, yaml_file(tmp_path, "model: m\nround-to: 16\nbatch_size: 2\n"), {}).budget.round_to == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio: [", "cannot be read: .*line 1"),
        ("a: 1\n b: 2\n", "cannot be read: .*line 2"),
        ("- model\n- ratio\n", "`name: value`"),
        ("just text", "`name: value`"),
        ("", "`name: value`"),
        ("model: !!python/object:os.system {}\n", "cannot be read"),
    ],
)
def test_a_file_without_options_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"run\.yaml .*{message}") as caught:
        read_yaml(yaml_file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "missing.yaml", tmp_path / "binary.yaml", tmp_path):
        with pytest.raises(ConfigError, match=f"{path.name} cannot be read"):
            layered(None, path, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ratio: .nan", "^ratio: "),
        ("ratio: 1", "^ratio: "),
        ("ratio: -0.1", "^ratio: "),
        ("rato: 0.5", "'rato'.*'ratio'"),
        ("3: 4", "'3'"),
    ],
)
def test_a_wrong_line_in_the_file_is_named(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        layered(None, yaml_file(tmp_path, f"model: m\n{line}\n"), {})
