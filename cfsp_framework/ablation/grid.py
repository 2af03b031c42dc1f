"""Expand a sweep's axes, named rows, grids and exclusions to one RunConfig per cell; needs no model and no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import cast

from cfsp_framework.config import CHOICES, Choice, RunConfig, layered
from cfsp_framework.errors import ConfigError, did_you_mean

AMOUNTS = ("samples", "seeds", "ratio")
"""Axes of numbers, the outermost first: cells that share a collection lie together."""
TRAINING = ("recovery_data", "recovery_steps", "recovery_check_every", "recovery_patience")
ROW_OPTIONS = (*CHOICES, "rounds", "rebalance", "reuse_windows", *TRAINING)
"""Options in which rows may differ."""
SHARED = (
    *(
        "budget",
        "round_to",
        "rounds",
        "rebalance",
        "reuse_windows",
        *TRAINING,
        "calibration",
        "seqlen",
        "pack",
        "skip_bos",
    ),
    *("batch_size", "device", "dtype", "spill", "evaluate", "evaluate_windows", "trust_remote_code", "plugins"),
)
"""Options of a run that hold for all cells; a row may override those that are also in ``ROW_OPTIONS``."""
PARTS = ("preset", "rows", "include", "exclude")
Options = Mapping[str, object]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep, and its row in the tables."""

    row: str
    config: RunConfig


def expand(model: str, options: Options) -> tuple[Cell, ...]:
    """Return all cells of a sweep: those of named rows first, then those of grids.

    ``options`` hold the axes (components, ``ratio``, ``samples``, ``seeds``: one value or many), the ``SHARED`` options
    of a run, and ``preset`` (names), ``rows`` (options by name), ``include`` (more grids) and ``exclude`` (values
    of cells to leave out). The axes at the top make a grid if a component is among them, or without rows and grids.

    Raises:
        ConfigError: an option is unknown or has an impossible value, or no cell is left.
    """
    check_names(options, (*CHOICES, *AMOUNTS, *SHARED, *PARTS), "the sweep")
    shared: Options = {"model": model, **{name: options[name] for name in SHARED if name in options}}
    top: Options = {name: options[name] for name in (*CHOICES, *AMOUNTS) if name in options}
    rows = [*_preset_rows(options), *_mappings(options.get("rows"), "rows").items()]
    grids = [dict(grid) for grid in _list_of_mappings(options.get("include"), "include")]
    if any(kind in top for kind in CHOICES) or not (rows or grids):
        grids.insert(0, dict(top))
    cells = [cell for name, row in rows for cell in _named(name, row, top, shared)]
    cells += [cell for grid in grids for cell in _crossed(grid, top, shared)]
    exclude = [_exclusion(values) for values in _list_of_mappings(options.get("exclude"), "exclude")]
    kept = tuple(cell for cell in cells if not any(_matches(cell, values) for values in exclude))
    if not kept:
        raise ConfigError("the sweep has no cells: `exclude` leaves none.")
    return kept


def split_choices(text: str) -> list[str]:
    """Split ``a,b:x=1,y=2,c`` into ``a``, ``b:x=1,y=2`` and ``c``: an item with ``=`` is an option of the choice before it.

    A name has no ``=`` before its colon, an option has; so a comma separates options inside a choice, and choices else.
    """
    choices: list[str] = []
    for item in text.split(","):
        name, equals, _ = item.partition("=")
        if not item.strip():
            raise ConfigError(f"{text!r}: there is nothing between two commas, or at an end.")
        if not equals or ":" in name:
            choices.append(item.strip())
        elif choices and ":" in choices[-1]:
            choices[-1] += f",{item.strip()}"
        else:
            raise ConfigError(f"{text!r}: {item.strip()!r} is an option, but of no NAME:option=value before it.")
    return choices


def check_names(options: Options, known: Sequence[str], where: str) -> None:
    """Check that ``where`` has all the options.

    Raises:
        ConfigError: an option is unknown; the message names the nearest one.
    """
    for name in options:
        if name not in known:
            raise ConfigError(f"{where}: unknown option {name!r}.{did_you_mean(name, known)}")


def _preset_rows(options: Options) -> Iterator[tuple[str, Options]]:
    for name in _values(options.get("preset"), "preset"):
        yield str(name), {"preset": name}


def _named(name: str, row: Options, top: Options, shared: Options) -> Iterator[Cell]:
    """Yield the cells of a named row: a preset, and its changes."""
    check_names(row, ("preset", *ROW_OPTIONS, *AMOUNTS), f"row {name!r}")
    changes = {option: row[option] for option in ROW_OPTIONS if option in row}
    preset = row.get("preset")
    for amounts in _amounts({**top, **row}):
        yield Cell(name, layered(cast("str | None", preset), None, {**changes, **amounts}, start=shared))


def _crossed(grid: Options, top: Options, shared: Options) -> Iterator[Cell]:
    """Yield the cells of a grid: every component with every other, at every amount."""
    check_names(grid, (*ROW_OPTIONS, *AMOUNTS), "a grid")
    changes = {option: grid[option] for option in ROW_OPTIONS if option in grid and option not in CHOICES}
    kinds = [kind for kind in CHOICES if kind in grid]
    for chosen in product(*(_choices(grid[kind], kind) for kind in kinds)):
        for amounts in _amounts({**top, **grid}):
            config = RunConfig.build(**{**shared, **changes, **dict(zip(kinds, chosen, strict=True)), **amounts})
            yield Cell(row_name(config, changes), config)


def row_name(config: RunConfig, changes: Options) -> str:
    """Name the row of a grid's cells: their components, and the options that the grid changes."""
    optional = [
        choice for choice in (config.components.compensator, config.components.recovery) if choice.name != "none"
    ]
    words = [str(choice) for choice in (config.components.criterion, config.components.allocator, *optional)]
    return " + ".join([*words, *(f"{name}={value}" for name, value in changes.items())])


def _amounts(axes: Options) -> Iterator[dict[str, object]]:
    values = [_values(axes[name], name) if name in axes else [None] for name in AMOUNTS]
    fields = ["seed" if name == "seeds" else name for name in AMOUNTS]
    for combination in product(*values):
        pairs = zip(fields, combination, strict=True)
        yield {name: value for name, value in pairs if value is not None}


def _choices(value: object, where: str) -> list[object]:
    """Return components: names with options as text, several in one text, mappings, or a list of these."""
    if isinstance(value, str):
        return list(split_choices(value))
    if isinstance(value, Mapping | Choice):
        return [cast("object", value)]
    if isinstance(value, list | tuple) and value:
        return [choice for part in cast("Sequence[object]", value) for choice in _choices(part, where)]
    raise ConfigError(f"{where}: expected names of components, not {value!r}.")


def _values(value: object, where: str) -> list[object]:
    """Return one value, several in a text between commas, or a list of these, as a list."""
    if value is None:
        return []
    if isinstance(value, str):
        return [part.strip() for part in value.split(",")]
    if isinstance(value, list | tuple):
        return [item for part in cast("Sequence[object]", value) for item in _values(part, where)]
    if isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected one value or a list, not {value!r}.")
    return [value]


def _mappings(value: object, where: str) -> dict[str, Options]:
    """Check a mapping of options by name."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected options by name, not {value!r}.")
    rows = cast("Mapping[object, object]", value)
    return {str(name): _options(row, f"{where}, {name}") for name, row in rows.items()}


def _list_of_mappings(value: object, where: str) -> list[Options]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise ConfigError(f"{where}: expected a list of `name: value` lines, not {value!r}.")
    return [_options(item, where) for item in cast("list[object]", value)]


def _options(value: object, where: str) -> Options:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: expected `name: value` lines, not {value!r}.")
    return {str(name).replace("-", "_"): item for name, item in cast("Mapping[object, object]", value).items()}


def _exclusion(options: Options) -> dict[str, list[object]]:
    """Return the values by name of which a cell must have one each to be left out."""
    check_names(options, ("row", *CHOICES, *AMOUNTS), "exclude")
    exclusion: dict[str, list[object]] = {}
    for name, value in options.items():
        if name in CHOICES:
            exclusion[name] = [Choice.model_validate(choice) for choice in _choices(value, name)]
        elif name == "row":
            exclusion[name] = [value] if isinstance(value, str) else _values(value, name)
        else:
            exclusion[name] = [_number(number, name) for number in _values(value, name)]
    return exclusion


def _number(value: object, where: str) -> float:
    try:
        return float(cast("float", value))
    except (TypeError, ValueError):
        raise ConfigError(f"exclude, {where}: {value!r} is not a number.") from None


def _matches(cell: Cell, exclusion: Mapping[str, Sequence[object]]) -> bool:
    """Return whether a cell has one of the values of every name; a component matches if it has at least those options."""
    config = cell.config
    amounts: dict[str, object] = {
        "row": cell.row,
        "seeds": config.run.seed,
        "samples": config.calibration.samples,
        "ratio": config.budget.ratio,
    }
    for name, values in exclusion.items():
        if name in CHOICES:
            choice: Choice = getattr(config.components, name)
            excluded = cast("Sequence[Choice]", values)
            if not any(ex.name == choice.name and ex.options.items() <= choice.options.items() for ex in excluded):
                return False
        elif amounts[name] not in values:
            return False
    return True
