"""``cfsp plugins list`` and ``show`` describe every component, at any width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cfsp_framework.host.manager import load_plugins
from helpers.runs import invoke

PLUGIN = """
from typing import Literal
from pydantic import Field
from cfsp_framework import Allocator, Collector, Criterion, Site, Statistic, Windows, hookimpl

ROWS = Statistic("rows", shape="(n, D)", summary="all inputs", heavy=True)


class Rows(Collector):
    name = "rows"
    provides = ROWS
    site = Site.FEED_FORWARD
    windows = Windows.FITTED
    ordered = True

    def start(self):
        raise NotImplementedError


class Picky(Criterion):
    \"\"\"Takes `options`.

    More about it.
    \"\"\"

    name = "picky"

    must: int = Field(description="has no default", ge=1)
    share: float | None = Field(default=None, gt=0, lt=1, description="of something")
    way: Literal["this", "that"] = Field(default="this", description="which way")
    word: str = Field(default="none", max_length=5, pattern="[a-z]*", description="a word")
    step: int = Field(default=2, multiple_of=2, description="even")

    def required(self):
        return frozenset({ROWS, Statistic("missing")} if self.must > 1 else {ROWS})

    requires = frozenset({ROWS, Statistic("missing")})

    def score(self, feed_forward, statistics):
        raise NotImplementedError


@hookimpl
def cfsp_collectors():
    return [Rows]


@hookimpl
def cfsp_criteria():
    return [Picky]
"""


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    path = tmp_path / "picky.py"
    path.write_text(PLUGIN)
    return path


def read_json(*words: object) -> dict[str, list[dict[str, Any]]]:
    """Run a command of ``cfsp plugins`` and read its JSON."""
    result = invoke("plugins", *words, "--json")
    assert result.exit_code == 0, result.output
    content: dict[str, list[dict[str, Any]]] = json.loads(result.stdout)
    return content


@pytest.mark.parametrize("columns", [80, 120])
def test_a_list_fits_the_width_names_how_to_disable_a_plugin_and_begins_with_criteria(columns: int) -> None:
    text = invoke("plugins", "list", columns=columns).stdout
    assert max(map(len, text.splitlines())) <= columns
    assert text.startswith("criterion: cfsp-criteria of cfsp-framework ")
    titles = [line.split(":")[0] for line in text.splitlines() if " of cfsp-framework " in line]
    assert titles[:4] == ["criterion", "allocator", "compensator", "recovery"]
    assert titles[-1] == "collector"
    for name in ("cfsp-criteria", "cfsp-allocators", "cfsp-defaults"):
        assert f"(-p no:{name})" in text
    assert "…" not in text


def test_the_flag_of_the_list_disables_a_plugin() -> None:
    rows = read_json("list")["plugins"]
    for row in rows:
        option, spec = str(row["leave_out"]).split()
        left = read_json("list", option, spec)["components"]
        assert row["plugin"] not in {one["plugin"] for one in left}
        assert left


def test_a_list_of_one_kind() -> None:
    rows = read_json("list", "--kind", "compensator")["components"]
    assert {row["kind"] for row in rows} == {"compensator"}
    assert len(rows) == len(load_plugins().compensators)
    refused = invoke("plugins", "list", "--kind", "compenstor")
    assert refused.exit_code == 2
    assert "Did you mean 'compensator'?" in refused.stderr


def test_a_plugin_without_components_is_listed(tmp_path: Path) -> None:
    path = tmp_path / "family.py"
    path.write_text(
        "from cfsp_framework import hookimpl\n\n@hookimpl\ndef cfsp_architecture(config):\n    return None\n"
    )
    result = invoke("plugins", "list", "-p", path, columns=200)
    assert f"no component: {path}, cfsp_architecture" in result.stdout
    [row] = [row for row in read_json("list", "-p", path)["plugins"] if row["plugin"] == str(path)]
    assert row == {
        "plugin": str(path), "distribution": None, "leave_out": None, "hooks": ["cfsp_architecture"], "components": 0,
    }  # fmt: skip


def test_without_plugins_there_is_a_hint() -> None:
    text = invoke("plugins", "list", *(f"-pno:{name}" for name in load_plugins().origins)).stdout
    assert "Is the package installed" in text


def test_options_are_shown_with_their_bounds(plugin: Path) -> None:
    [found] = read_json("show", "picky", "-p", plugin)["components"]
    options = found["options"]
    assert isinstance(options, dict)
    assert {name: (one["type"], one["allowed"], one["default"]) for name, one in options.items()} == {
        "must": ("int", ">= 1", None),
        "share": ("float or null", "> 0, < 1", None),
        "way": ("this | that", "", "this"),
        "word": ("str", "like [a-z]*, at most 5 long", "none"),
        "step": ("int", "a multiple of 2", 2),
    }
    assert [name for name, one in options.items() if one["required"]] == ["must"]
    text = invoke("plugins", "show", "picky", "-p", plugin).stdout
    assert "required" in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("Defined in")) <= 80


def test_statistics_are_shown_with_their_cost(plugin: Path) -> None:
    [found] = read_json("show", "picky", "-p", plugin)["components"]
    assert found["statistics"] == [
        {"name": "missing", "shape": "(F,)", "summary": "", "collectors": [], "cost": "no collector measures it"},
        {
            "name": "rows", "shape": "(n, D)", "summary": "all inputs", "collectors": ["rows"],
            "cost": "n x D float32 numbers of one feed-forward at a time, nine windows of ten, one process only",
        },
    ]  # fmt: skip
    assert found["depends_on_options"] is True
    [collector] = read_json("show", "rows", "-p", plugin)["components"]
    assert collector["read_by"] == ["criterion picky"]
    text = invoke("plugins", "show", "rows", "-p", plugin, columns=120).stdout
    assert "Read by: criterion picky" in text


@pytest.mark.parametrize(("name", "words"), [
    ("taylor", "a backward pass through the whole model"),
    ("obs", "F x F float32 numbers of one feed-forward at a time"),
    ("bias", "F float32 numbers a feed-forward"),
    ("owl", "Reads no statistics."),
    ("error-curve", "Asks for every block's compensated removal-error curve"),
    ("error-curve", "Asks for every block's sensitivity"),
])  # fmt: skip
def test_what_the_built_ins_cost(name: str, words: str) -> None:
    assert words in " ".join(invoke("plugins", "show", name, columns=300).stdout.split())


def test_a_definition_is_found_by_module_file_and_line(plugin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = PLUGIN.splitlines().index("class Picky(Criterion):") + 1
    text = invoke("plugins", "show", "picky", "-p", plugin).stdout
    assert f"Defined in _cfsp_plugin_picky, {plugin}:{line}" in text
    monkeypatch.chdir(plugin.parent)
    assert f"Defined in _cfsp_plugin_picky, picky.py:{line}" in invoke("plugins", "show", "picky", "-p", plugin).stdout
    assert "-p no:cfsp-criteria" in invoke("plugins", "show", "obs").stdout
