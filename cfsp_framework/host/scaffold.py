"""Write a new plugin package from the templates in ``templates/plugin``."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cfsp_framework.errors import ConfigError, OutputError
from cfsp_framework.runtime.atomic_files import check_parent, staged_folder

if TYPE_CHECKING:
    from cfsp_framework.host.registry import Plugins

Kind = Literal["criterion", "allocator", "collector", "compensator", "recovery"]

_NAME = re.compile(r"[A-Z0-9]|[A-Z0-9][A-Z0-9._-]*[A-Z0-9]", re.IGNORECASE)
"""Names of distributions (PEP 508)."""
_KINDS: dict[Kind, tuple[str, str, str]] = {
    "criterion": ("criterion", "Criterion", "--criterion {name}"),
    "allocator": ("allocator", "Allocator", "--allocator {name}"),
    "collector": ("collector", "Collector", "--criterion {name}"),
    "compensator": ("compensator", "Compensator", "--compensator {name}"),
    "recovery": ("recovery scheduler", "RecoveryScheduler", "--recovery {name} --recovery-steps 20"),
}
"""Each kind in words, the end of its class names, and the options of ``cfsp prune`` that use it."""


@dataclass(frozen=True)
class PluginNames:
    """Names in a new package, which the templates use."""

    kind: Kind
    what: str
    """The kind in words."""
    distribution: str
    """Name of the distribution, normalised (PEP 503), and of the entry point, which ``-p no:`` takes."""
    module: str
    source: str
    """Path of the module's file inside the package's folder."""
    component: str
    """Name of the component on the command line: that of the package without ``cfsp-``."""
    class_name: str
    """Name of the component's class."""
    statistic: str
    """Name of the statistic that a collector provides."""
    constant: str
    """Name of the statistic's constant in Python."""
    criterion: str
    """Name of the class of the criterion that reads a new statistic."""
    accumulator: str
    """Name of the class that accumulates a new statistic."""
    use: str
    """Command that runs the component."""


def plugin_names(name: str, kind: Kind) -> PluginNames:
    """Derive all names in a package from that of its distribution.

    Raises:
        ConfigError: the name cannot be that of a package, module or class.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} cannot be the name of a package: use letters, digits, and '-', '_' or '.' between them, as in "
            "cfsp-peak."
        )
    distribution = re.sub(r"[-_.]+", "-", name).lower()
    module, component = distribution.replace("-", "_"), distribution.removeprefix("cfsp-")
    if keyword.iskeyword(module) or not component[:1].isalpha():
        raise ConfigError(
            f"{name!r} cannot be the name of a Python module and class; begin it with a letter, or with cfsp- and a "
            "letter, and use no keyword."
        )
    what, ending, options = _KINDS[kind]
    statistic = component.replace("-", "_")
    return PluginNames(
        kind=kind,
        what=what,
        distribution=distribution,
        module=module,
        source=f"src/{module}/__init__.py",
        component=component,
        class_name=_camel_case(component, ending),
        statistic=statistic,
        constant=statistic.upper(),
        criterion=_camel_case(component, "Criterion"),
        accumulator=_camel_case(component, "Sums"),
        use=f"cfsp prune demo pruned --evaluate demo --evaluate-windows 20 {options.format(name=component)}",
    )


def _camel_case(component: str, ending: str) -> str:
    """Return a component's name as that of a class, with ``ending`` unless it ends so already."""
    name = "".join(part.capitalize() for part in component.split("-"))
    return name if name.endswith(ending) and name != ending else name + ending


def check_free(names: PluginNames, plugins: Plugins) -> None:
    """Refuse names that are in use.

    Raises:
        ConfigError: a distribution, plugin, module, component or statistic has the name.
    """
    for conflict in _find_conflicts(names, plugins):
        raise ConfigError(f"{names.distribution!r} cannot be used: {conflict}. Choose another name.")


def render(names: PluginNames) -> dict[str, str]:
    """Render the package's files: their texts by their paths inside its folder."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cfsp_framework", "host/templates/plugin"),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    templates = {
        ".github/workflows/test.yml": "test.yml",
        ".gitignore": "gitignore",
        "README.md": "README.md",
        "pyproject.toml": "pyproject.toml",
        names.source: f"{names.kind}.py",
        "tests/conftest.py": "conftest.py",
        f"tests/test_{names.module}.py": f"test_{names.kind}.py",
    }
    variables = {**asdict(names), "version": metadata.version("cfsp-framework")}
    files = {path: environment.get_template(f"{name}.j2").render(variables) for path, name in templates.items()}
    return {**files, f"src/{names.module}/py.typed": ""}


def write_plugin(names: PluginNames, folder: Path) -> list[str]:
    """Write the package into ``folder`` atomically, and return the paths of its files inside it.

    Raises:
        OutputError: the folder exists, or cannot be written.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists; give another name, or another folder with --out.")
    check_parent(folder)
    files = render(names)
    with staged_folder(folder) as staging:
        for path, text in files.items():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            (staging / path).write_text(text, encoding="utf-8")
    return sorted(files)


def next_commands(names: PluginNames, folder: Path) -> list[str]:
    """Return the commands to install, show and run the new plugin."""
    target = folder if folder.is_absolute() else f"./{folder}"
    return [
        f"pip install -e {shlex.quote(f'{target}[test]')}",
        f"cfsp plugins show {names.component}",
        names.use,
    ]


def describe_package(names: PluginNames, folder: Path, files: list[str]) -> dict[str, object]:
    """Return names, files and next commands for JSON output."""
    return {
        "folder": str(folder),
        "distribution": names.distribution,
        "plugin": names.distribution,
        "module": names.module,
        "kind": names.kind,
        "component": names.component,
        "files": files,
        "next": next_commands(names, folder),
    }


def _find_conflicts(names: PluginNames, plugins: Plugins) -> Iterator[str]:
    """Find what is installed under one of the names, in one clause each."""
    try:
        installed = metadata.distribution(names.distribution)
        yield f"a distribution of that name is installed, {installed.name} {installed.version}"
    except metadata.PackageNotFoundError:
        pass
    if names.distribution in plugins.origins:
        yield f"a plugin of that name is installed, {plugins.origins[names.distribution]}"
    if importlib.util.find_spec(names.module) is not None:
        yield f"a module {names.module!r} can be imported already"
    kinds = (names.kind, "criterion") if names.kind == "collector" else (names.kind,)
    for registry in plugins.registries:
        if registry.kind in kinds and names.component in registry:
            yield f"the {registry.kind} {names.component!r} exists already, of {registry.origin(names.component)}"
    for name, collector in plugins.collectors.items():
        if names.kind == "collector" and collector.provides.name == names.statistic:
            yield (
                f"the statistic {names.statistic!r} is measured already, by {name!r} of {plugins.collectors.origin(name)}"
            )
