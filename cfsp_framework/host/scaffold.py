"""A plugin package to start from: every file of it, rendered from the templates in ``templates/plugin``."""

from __future__ import annotations

import importlib.util
import keyword
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cfsp_framework.errors import ConfigError, OutputError
from cfsp_framework.runtime.atomic_files import check_parent, staged_folder

if TYPE_CHECKING:
    from cfsp_framework.host.registry import Plugins

Kind = Literal["criterion", "allocator", "collector", "compensator", "recovery"]

_PREFIX = "cfsp-"
_NAME = re.compile(r"[A-Z0-9]|[A-Z0-9][A-Z0-9._-]*[A-Z0-9]", re.IGNORECASE)
"""Names of distributions, as the packaging specifications allow them (PEP 508)."""
_WHAT: dict[Kind, tuple[str, str]] = {
    "criterion": ("criterion", "Criterion"),
    "allocator": ("allocator", "Allocator"),
    "collector": ("collector", "Collector"),
    "compensator": ("compensator", "Compensator"),
    "recovery": ("recovery scheduler", "RecoveryScheduler"),
}
"""Each kind in words, and the end of its classes' names."""
_USE = "cfsp prune demo pruned --evaluate demo --evaluate-windows 20"
_FLAG: dict[Kind, str] = {
    "criterion": "--criterion {name}",
    "allocator": "--allocator {name}",
    "collector": "--criterion {name}",
    "compensator": "--compensator {name}",
    "recovery": "--recovery {name} --recovery-steps 20",
}


@dataclass(frozen=True)
class PluginNames:
    """What everything in a new package is called."""

    kind: Kind
    distribution: str
    """Normalised (PEP 503); also the entry point's name, which ``-p no:`` takes."""

    @property
    def module(self) -> str:
        """What is imported."""
        return self.distribution.replace("-", "_")

    @property
    def source(self) -> str:
        """The module's file inside the package's folder."""
        return f"src/{self.module}/__init__.py"

    @property
    def component(self) -> str:
        """What is chosen on the command line: the package's name without ``cfsp-``."""
        return self.distribution.removeprefix(_PREFIX)

    @property
    def statistic(self) -> str:
        """What a collector provides."""
        return self.component.replace("-", "_")

    @property
    def constant(self) -> str:
        """The statistic in Python."""
        return self.statistic.upper()

    @property
    def what(self) -> str:
        """The kind in words."""
        return _WHAT[self.kind][0]

    @property
    def class_name(self) -> str:
        """Of the component."""
        return self._camel(_WHAT[self.kind][1])

    @property
    def criterion(self) -> str:
        """The class of the criterion that reads a new statistic."""
        return self._camel("Criterion")

    @property
    def accumulator(self) -> str:
        """The class that adds up a new statistic."""
        return self._camel("Sums")

    @property
    def use(self) -> str:
        """A command that runs the component."""
        return f"{_USE} {_FLAG[self.kind].format(name=self.component)}"

    def _camel(self, end: str) -> str:
        """The component's name as a class's; one that ends so already is not lengthened."""
        name = "".join(part.capitalize() for part in self.component.split("-"))
        return name if name.endswith(end) and name != end else name + end


def plugin_names(name: str, kind: Kind) -> PluginNames:
    """The names that follow from a package's.

    Raises:
        ConfigError: no package, module or class can be called so.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a package: letters, digits, and '-', '_' or '.' between them (as in cfsp-peak)."
        )
    names = PluginNames(kind, re.sub(r"[-_.]+", "-", name).lower())
    if keyword.iskeyword(names.module) or not names.component[:1].isalpha():
        raise ConfigError(
            f"{name!r} gives no name for a Python module and class; begin it with a letter, "
            "or with cfsp- and a letter, and use no keyword."
        )
    return names


def check_free(names: PluginNames, plugins: Plugins) -> None:
    """Refuse names that something installed has.

    Raises:
        ConfigError: a distribution, plugin, module, component or statistic is called so.
    """
    for taken in _taken(names, plugins):
        raise ConfigError(f"{names.distribution!r} cannot be used: {taken}. Choose another name.")


def render(names: PluginNames) -> dict[str, str]:
    """The package's files: their texts by their paths inside its folder."""
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
    known = {name: getattr(names, name) for name in dir(names) if not name.startswith("_")}
    known["version"] = version("cfsp-framework")
    files = {path: environment.get_template(f"{name}.j2").render(known) for path, name in templates.items()}
    return {**files, f"src/{names.module}/py.typed": ""}


def write_plugin(names: PluginNames, folder: Path) -> list[str]:
    """Write the package into ``folder``, whole or not at all; its files' paths inside it.

    Raises:
        OutputError: something is there already, or the place is not writable.
    """
    if folder.exists() or folder.is_symlink():
        raise OutputError(f"{folder} exists; give another name, or another folder with --out.")
    check_parent(folder)
    files = render(names)
    with staged_folder(folder) as aside:
        for path, text in files.items():
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            (aside / path).write_text(text, encoding="utf-8")
    return sorted(files)


def next_commands(names: PluginNames, folder: Path) -> list[str]:
    """What to type after a package was written."""
    target = folder if folder.is_absolute() else f"./{folder}"
    return [
        f"pip install -e {shlex.quote(f'{target}[test]')}",
        f"cfsp plugins show {names.component}",
        names.use,
    ]


def described(names: PluginNames, folder: Path, files: list[str]) -> dict[str, object]:
    """The same for programs."""
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


def _taken(names: PluginNames, plugins: Plugins) -> Iterator[str]:
    """Everything installed that stands in the way, in one clause each."""
    try:
        found = distribution(names.distribution)
    except PackageNotFoundError:
        pass
    else:
        yield f"a distribution of that name is installed, {found.name} {found.version}"
    if names.distribution in plugins.origins:
        yield f"a plugin of that name is installed, {plugins.origins[names.distribution]}"
    if importlib.util.find_spec(names.module) is not None:
        yield f"a module {names.module!r} can be imported already"
    kinds = (names.kind, "criterion") if names.kind == "collector" else (names.kind,)
    for registry in plugins.registries:
        if registry.kind in kinds and names.component in registry:
            article = "an" if registry.kind == "allocator" else "a"
            yield f"there is {article} {registry.kind} {names.component!r} already, of {registry.origin(names.component)}"
    for name, collector in plugins.collectors.items():
        if names.kind == "collector" and collector.provides.name == names.statistic:
            yield f"the statistic {names.statistic!r} is measured already, by {name!r} of {plugins.collectors.origin(name)}"
