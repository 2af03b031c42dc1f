"""``cfsp plugins new`` writes packages that load, run and pass their own tests, and refuses names in use."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import canonicalize_name, is_normalized_name

from cfsp_framework.errors import ConfigError, OutputError
from cfsp_framework.host.manager import load_plugins
from cfsp_framework.host.scaffold import Kind, check_free, plugin_names, render, write_plugin
from helpers.plugins import install_distribution
from helpers.runs import invoke

KINDS: tuple[Kind, ...] = get_args(Kind)
by_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Kind, Path]:
    """A package of each kind, ``example-KIND``."""
    folder = tmp_path_factory.mktemp("packages")
    for kind in KINDS:
        write_plugin(plugin_names(f"example-{kind}", kind), folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def installed(packages: Mapping[Kind, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All packages as an editable install makes them visible: source on the path, metadata beside it."""
    for folder in packages.values():
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        points = project["entry-points"]["cfsp_framework"]
        install_distribution(folder / "src", project["name"], points, version=project["version"])
        monkeypatch.syspath_prepend(str(folder / "src"))
    yield
    for kind in KINDS:
        sys.modules.pop(f"example_{kind}", None)


# --- what is written --------------------------------------------------------------------------------------------------


@by_kind
def test_a_package_is_complete_and_its_files_are_valid(kind: Kind) -> None:
    files = render(plugin_names(f"cfsp-two-words-{kind}", kind))
    assert sorted(files) == [
        ".github/workflows/test.yml",
        ".gitignore",
        "README.md",
        "pyproject.toml",
        f"src/cfsp_two_words_{kind}/__init__.py",
        f"src/cfsp_two_words_{kind}/py.typed",
        "tests/conftest.py",
        f"tests/test_cfsp_two_words_{kind}.py",
    ]
    for path, text in files.items():
        assert text == "" or (text.endswith("\n") and not text.endswith("\n\n")), path
        assert max(map(len, text.splitlines()), default=0) <= 120, path
        if path.endswith(".py"):
            ast.parse(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    assert project["name"] == f"cfsp-two-words-{kind}"
    assert project["entry-points"]["cfsp_framework"] == {project["name"]: f"cfsp_two_words_{kind}"}
    assert project["dependencies"] == [f"cfsp-framework>={version('cfsp-framework')}"]
    steps = yaml.safe_load(files[".github/workflows/test.yml"])["jobs"]["test"]["steps"]
    assert {"run": "python -m pytest"} in steps


@by_kind
def test_the_commands_of_a_readme_exist(kind: Kind, packages: Mapping[Kind, Path], installed: None) -> None:
    text = (packages[kind] / "README.md").read_text()
    commands = [line.partition(" #")[0].split() for line in text.splitlines() if line.startswith("cfsp ")]
    assert [words[1:3] for words in commands[:2]] == [["plugins", "list"], ["plugins", "show"]]
    shown = invoke(*commands[1][1:])
    assert shown.exit_code == 0, shown.output
    assert f"-p no:example-{kind}" in text


def test_every_generated_module_is_clean(packages: Mapping[Kind, Path]) -> None:
    pytest.importorskip("ruff")
    folders = list(map(str, packages.values()))
    for command in (["check", "--extend-select", "I,B,UP,SIM,RUF"], ["format", "--check"]):
        checked = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache", *folders],
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stdout + checked.stderr


# --- that it works ----------------------------------------------------------------------------------------------------


@by_kind
def test_an_installed_package_is_listed_with_a_described_option(kind: Kind, installed: None) -> None:
    plugins = load_plugins()
    assert str(plugins.origins[f"example-{kind}"]) == f"plugin 'example-{kind}' of example-{kind} 0.1.0"
    [registry] = [registry for registry in plugins.registries if registry.kind == kind]
    component = registry[f"example-{kind}"]
    if kind == "collector":  # has none: the host makes it wherever its statistic is required
        component = plugins.criteria[f"example-{kind}"]
    assert component.model_fields
    assert all(field.description for field in component.model_fields.values())
    assert component.__doc__


@by_kind
def test_a_module_is_a_plugin_without_installing(kind: Kind, packages: Mapping[Kind, Path]) -> None:
    plugins = load_plugins([str(packages[kind] / "src" / f"example_{kind}" / "__init__.py")])
    assert any(f"example-{kind}" in registry for registry in plugins.registries)


def test_components_of_all_kinds_prune_a_model_together(
    installed: None, make_model: Callable[..., Path], calibration_text: Path, tmp_path: Path
) -> None:
    result = invoke(
        "prune", make_model("llama"), tmp_path / "out", "--calibration", calibration_text,
        "--samples", 4, "--seqlen", 32, "--round-to", 1, "--json",
        "--criterion", "example-collector", "--allocator", "example-allocator",
        "--compensator", "example-compensator:strength=0.5", "--recovery", "example-recovery:rank=2",
        "--recovery-steps", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["components"] == {
        "criterion": "example-collector:power=1.0",
        "allocator": "example-allocator:spread=0.1",
        "compensator": "example-compensator:strength=0.5",
        "recovery": "example-recovery:rank=2,share=0.5",
    }
    assert len({block["width_after"] for block in report["blocks"]}) > 1
    assert report["channels_after"] * 2 == report["channels_before"]
    planned = invoke(
        "plan", make_model("llama"), tmp_path / "plan.json", "--calibration", calibration_text,
        "--samples", 4, "--seqlen", 32, "--round-to", 1, "--json", "--criterion", "example-criterion:power=2",
    )  # fmt: skip
    assert planned.exit_code == 0, planned.output


def test_the_tests_of_every_package_pass(packages: Mapping[Kind, Path], tmp_path: Path) -> None:
    pytest.importorskip("cfsp_framework.testing")
    sources = os.pathsep.join([*(str(folder / "src") for folder in packages.values()), *sys.path])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-W", "error"]
    tested = subprocess.run(
        [*command, *(str(folder / "tests") for folder in packages.values())],
        env={**os.environ, "PYTHONPATH": sources, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout[-4000:] + tested.stderr[-2000:]
    for kind in KINDS:
        assert f"{kind}/tests" not in tested.stdout.partition("short test summary")[2]


def test_the_command_writes_a_package_and_prints_the_next_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    result = invoke("plugins", "new", "Example.Peak", "--kind", "criterion")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "example-peak" / "src" / "example_peak" / "__init__.py").is_file()
    assert result.stdout.splitlines()[1:] == [
        "  pip install -e './example-peak[test]'",
        "  cfsp plugins show example-peak",
        "  cfsp prune demo pruned --evaluate demo --evaluate-windows 20 --criterion example-peak",
    ]
    as_json = invoke("plugins", "new", "cfsp-example", "--kind", "recovery", "--out", "else where", "--json")
    found = json.loads(as_json.stdout)
    assert (found["component"], found["module"], found["folder"]) == ("example", "cfsp_example", "else where")
    assert found["next"][0] == "pip install -e './else where[test]'"
    assert all((tmp_path / "else where" / file).is_file() for file in found["files"])
    assert invoke("plugins", "new", "example-quiet", "--kind", "allocator", "-q").output == ""


# --- names ------------------------------------------------------------------------------------------------------------


@given(st.text("bRecvy9._-", min_size=1, max_size=12).map("Block{}x".format), st.sampled_from(KINDS))
def test_a_name_becomes_a_distribution_a_module_and_classes(name: str, kind: Kind) -> None:
    names = plugin_names(name, kind)
    assert names.distribution == canonicalize_name(name)
    assert is_normalized_name(names.distribution)
    classes = [names.class_name, names.criterion, names.accumulator]
    assert all(word.isidentifier() for word in (names.module, names.constant, *classes))
    assert "_" not in names.component
    assert names.distribution in (names.component, f"cfsp-{names.component}")


@pytest.mark.parametrize("name", ["", "-peak", "peak-", "pe ak", "peak!", "a/b", "..", "größe", "peak\n"])
def test_a_bad_name_of_a_package_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a package"):
        plugin_names(name, "criterion")


@pytest.mark.parametrize("name", ["3d", "cfsp-3d", "class", "Import", "0"])
def test_a_name_that_python_cannot_import_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a Python module and class"):
        plugin_names(name, "criterion")


@pytest.mark.parametrize(("name", "kind", "reason"), [
    ("pytest", "criterion", "a distribution of that name is installed, pytest"),
    ("cfsp-criteria", "criterion", "a plugin of that name is installed, plugin 'cfsp-criteria' of cfsp-framework"),
    ("cfsp_plugins", "allocator", "a module 'cfsp_plugins' can be imported already"),
    ("random", "recovery", "a module 'random' can be imported already"),
    ("cfsp-magnitude", "criterion", "the criterion 'magnitude' exists already, of plugin 'cfsp-criteria'"),
    ("cfsp-magnitude", "collector", "the criterion 'magnitude' exists already"),
    ("cfsp-down-input-mean", "collector", "the collector 'down-input-mean' exists already"),
    ("cfsp-uniform", "allocator", "the allocator 'uniform' exists already"),
])  # fmt: skip
def test_a_name_in_use_is_refused_with_the_reason(name: str, kind: Kind, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_free(plugin_names(name, kind), load_plugins())
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["criterion", "cfsp-criterion", "recovery-scheduler", "block"])
def test_no_class_is_called_like_what_it_is_derived_from(name: str) -> None:
    for kind in KINDS:
        for path, text in render(plugin_names(name, kind)).items():
            if path.endswith("__init__.py"):
                imported = {
                    a.asname or a.name
                    for n in ast.walk(ast.parse(text))
                    if isinstance(n, ast.ImportFrom)
                    for a in n.names
                }
                defined = {node.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)}
                assert not imported & defined


def test_a_name_of_another_kind_is_free() -> None:
    check_free(plugin_names("cfsp-magnitude", "allocator"), load_plugins())


def test_a_package_that_is_installed_already_is_not_written_again(installed: None) -> None:
    result = invoke("plugins", "new", "example-criterion", "--kind", "criterion")
    assert result.exit_code == 2
    assert "a distribution of that name is installed, example-criterion 0.1.0" in result.stderr


def test_an_existing_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    result = invoke("plugins", "new", "cfsp-example", "--kind", "criterion", "--out", tmp_path / "new")
    assert result.exit_code == 2
    assert f"{tmp_path / 'new'} exists; give another name, or another folder with --out." in result.stderr
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Path.write_text

    def fails_late(path: Path, text: str, **options: str) -> int:
        if path.name == "conftest.py":
            raise OSError(28, "No space left on device", str(path))
        return written(path, text, **options)

    monkeypatch.setattr(Path, "write_text", fails_late)
    with pytest.raises(OutputError, match="No space left"):
        write_plugin(plugin_names("cfsp-example", "criterion"), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="is not a writable directory"):
        write_plugin(plugin_names("cfsp-example", "criterion"), tmp_path / "no" / "new")
