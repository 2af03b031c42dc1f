"""Options of a run in one frozen model, layered from presets, a YAML file and the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo

from cfsp_framework.errors import ConfigError, did_you_mean


class FrozenRecord(BaseModel):
    """Hold data that cannot change after validation; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Choice(FrozenRecord):
    """Name a component and the options given to it: ``NAME`` or ``NAME:option=value,option=value``."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: object) -> object:
        return parse_choice(value) if isinstance(value, str) else value

    def __str__(self) -> str:
        options = ",".join(f"{key}={format_scalar(value)}" for key, value in self.options.items())
        return f"{self.name}:{options}" if options else self.name


def format_scalar(value: object) -> str:
    """Write a value as YAML does."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


class OptionGroup(FrozenRecord):
    """Hold options that belong together.

    On the command line, in YAML and in ``RunConfig.build`` an option has the name of its field, or the field's
    validation alias where the group's name already says the rest: ``recovery.steps`` is ``recovery_steps``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_by_name=True, validate_by_alias=True)

    @field_validator("*", mode="before")
    @classmethod
    def _accept_one_for_many(cls, value: object, info: ValidationInfo) -> object:
        """Take a single value where a tuple is expected."""
        assert info.field_name is not None
        many = get_origin(cls.model_fields[info.field_name].annotation) is tuple
        given = value  # pyright would follow the check below into a partly unknown type
        return (given,) if many and isinstance(value, str | dict) else given


class ModelOptions(OptionGroup):
    """Which model to open, and how."""

    source: str = Field(validation_alias="model", description="A folder, a Hub id, or `demo`.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="auto: the checkpoint's own."
    )
    device_map: Literal["none", "auto"] = Field(
        default="none", description="auto: spread the model over all GPUs with accelerate."
    )
    stream: bool = Field(default=False, description="Read one block at a time from the checkpoint, and write it so.")
    trust_remote_code: bool = Field(default=False, description="Run the Python code a checkpoint brings along.")


class BudgetOptions(OptionGroup):
    """How much to remove."""

    ratio: float = Field(default=0.5, ge=0, lt=1, allow_inf_nan=False, description="Share to remove, in [0, 1).")
    unit: Literal["channels", "parameters"] = Field(
        default="channels",
        validation_alias="budget",
        description="What --ratio counts: feed-forward channels, or all parameters of the model.",
    )
    round_to: int = Field(default=128, ge=1, description="Widths are multiples of this.")
    tensor_parallel: int = Field(
        default=1, ge=1, description="Processes the model will be served on: widths are multiples of this, too."
    )
    rounds: int = Field(
        default=1,
        ge=1,
        description="Prune in so many steps, each measured on the model as it is cut and compensated by then.",
    )
    rebalance: bool = Field(default=True, description="Restore the exact budget after rounding.")
    drop_attention: Literal["auto"] | Annotated[int, Field(ge=0)] = Field(
        default=0, description="Attentions to drop as a whole: a number, or `auto` for a ratio of all parameters."
    )


class ComponentOptions(OptionGroup):
    """Which components to run."""

    criterion: Choice = Field(default=Choice(name="cfsp"), description="Fine importance: which channels stay.")
    allocator: Choice = Field(default=Choice(name="cfsp"), description="Coarse importance: what each block keeps.")
    compensator: Choice = Field(default=Choice(name="none"), description="How the kept weights change.")
    recovery: Choice = Field(default=Choice(name="none"), description="What is trained afterwards.")


class CalibrationOptions(OptionGroup):
    """Which text is measured, in which windows."""

    data: str = Field(
        default="demo", validation_alias="calibration", description="Data SPEC the activations are measured on."
    )
    samples: int = Field(default=128, ge=1, description="Calibration windows.")
    reuse_windows: bool = Field(
        default=True,
        description="Measure all windows again to compensate; else half selects and half compensates.",
    )
    seqlen: int | None = Field(
        default=None, ge=2, description="Tokens per window; default: 1024, or the model's context."
    )
    pack: bool = Field(
        default=True, description="Cut windows anywhere from all text; else every window is one document, padded."
    )
    skip_bos: bool = Field(default=False, description="Leave the beginning-of-sequence token out of the statistics.")
    batch_size: int | None = Field(
        default=None, ge=1, description="Windows per batch; default: what keeps a batch small."
    )


class RecoveryOptions(OptionGroup):
    """How the pruned model is trained."""

    data: str | None = Field(
        default=None,
        validation_alias="recovery_data",
        description="Data SPEC to train on, or instructions:SPEC; default: what was calibrated on.",
    )
    steps: int | None = Field(
        default=None,
        ge=1,
        validation_alias="recovery_steps",
        description="Training steps; default: the scheduler's.",
    )
    check_every: int | None = Field(
        default=None,
        ge=1,
        validation_alias="recovery_check_every",
        description="Every N steps look at held-out training data, and keep the best step's weights.",
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        validation_alias="recovery_patience",
        description="Stop training after N such looks without a gain.",
    )
    report_to: tuple[str, ...] = Field(
        default=(), description="Trackers the training reports to: tensorboard, wandb, mlflow ..."
    )
    keep_adapter: bool = Field(
        default=False, description="Write what was trained as an adapter beside the pruned weights, not into them."
    )


class EvaluationOptions(OptionGroup):
    """Texts that perplexity is reported on."""

    data: tuple[str, ...] = Field(
        default=(), validation_alias="evaluate", description="Data SPECs to report perplexity on."
    )
    windows: int | None = Field(
        default=None, ge=1, validation_alias="evaluate_windows", description="Evaluate on the first N windows only."
    )


class RunOptions(OptionGroup):
    """How the run is done: seed, folders, observers and plugins."""

    seed: int = Field(default=0, ge=0, description="Seed of everything that draws.")
    spill: Path | None = Field(
        default=None, description="Keep hidden states in a file in this folder, of which memory holds what fits."
    )
    resume: Path | None = Field(
        default=None,
        description="Keep what is measured and compensated in this folder: a killed run goes on after the last "
        "finished block, and another ratio measures nothing again.",
    )
    observers: tuple[Choice, ...] = Field(
        default=(), validation_alias="observer", description="Observers notified of the run's events."
    )
    plugins: tuple[str, ...] = Field(default=(), description="-p: a module, a file.py, or no:NAME.")


class RunConfig(FrozenRecord):
    """Hold every option of a run: what to prune, how much, with which components, on which data."""

    model: ModelOptions
    budget: BudgetOptions = BudgetOptions()
    components: ComponentOptions = ComponentOptions()
    calibration: CalibrationOptions = CalibrationOptions()
    recovery: RecoveryOptions = RecoveryOptions()
    evaluation: EvaluationOptions = EvaluationOptions()
    run: RunOptions = RunOptions()

    @classmethod
    def build(cls, **options: object) -> Self:
        """Validate options given by the names they have on the command line.

        Raises:
            ConfigError: an option is unknown or its value impossible; all problems are named at once.
        """
        groups: dict[str, dict[str, object]] = {"model": {}}
        for name, value in options.items():
            if name not in OPTIONS:
                raise ConfigError(f"Unknown option {name!r}.{did_you_mean(name, OPTIONS)}")
            groups.setdefault(OPTIONS[name].group, {})[name] = value
        try:
            return cls.model_validate(groups)
        except ValidationError as error:
            problems = (
                f"{'.'.join(map(str, e['loc'][1:]))}: {e['msg']} (given: {e['input']!r})" for e in error.errors()
            )
            raise ConfigError("; ".join(problems)) from error

    @classmethod
    def validate_option(cls, name: str, value: object) -> None:
        """Check one option's value without the others.

        Raises:
            ValidationError: the value is impossible.
        """
        groups: dict[str, dict[str, object]] = {"model": {"model": "demo"}}
        groups.setdefault(OPTIONS[name].group, {})[name] = value
        cls.model_validate(groups)

    def options(self) -> dict[str, object]:
        """Return every option by its name on the command line; ``build`` takes them back."""
        return {name: option.read(self) for name, option in OPTIONS.items()}

    def to_json_options(self) -> dict[str, object]:
        """Return every option by its name on the command line, as JSON values."""
        groups = self.model_dump(mode="json")
        return {name: groups[option.group][option.attribute] for name, option in OPTIONS.items()}

    def replace(self, **changes: object) -> Self:
        """Return a copy with some options, given by their names on the command line, changed."""
        return self.build(**{**self.options(), **changes})


@dataclass(frozen=True)
class Option:
    """Say where in a ``RunConfig`` an option is kept."""

    group: str
    attribute: str
    field: FieldInfo

    def read(self, config: RunConfig) -> object:
        """Return the option's value in ``config``."""
        return getattr(getattr(config, self.group), self.attribute)


def _options() -> Iterator[tuple[str, Option]]:
    for group, holder in RunConfig.model_fields.items():
        assert isinstance(holder.annotation, type)
        assert issubclass(holder.annotation, OptionGroup)
        for attribute, field in holder.annotation.model_fields.items():
            yield str(field.validation_alias or attribute), Option(group, attribute, field)


OPTIONS: Mapping[str, Option] = dict(_options())
"""Every option of a run by its name on the command line and in YAML."""

CHOICES = ("criterion", "allocator", "compensator", "recovery")

PRESETS: Mapping[str, Mapping[str, object]] = {
    "cfsp": {"criterion": "cfsp", "allocator": "cfsp"},
    "cfsp-closed-form": {
        "criterion": "obs",
        "allocator": "error-curve",
        "compensator": "sequential",
        "reuse_windows": False,
    },
    "cfsp-refined": {"criterion": "obs", "allocator": "error-curve", "compensator": "local-reconstruction"},
    "cfsp-released": {"criterion": "cfsp:variant=act", "allocator": "cfsp:released=true", "rebalance": False},
    "wanda-sp-released": {"criterion": "wanda-sp", "allocator": "global-zscore", "rebalance": False},
    "flap-released": {
        "criterion": "flap:released=true",
        "allocator": "global-zscore",
        "compensator": "bias",
        "rebalance": False,
    },
    "magnitude-released": {"criterion": "magnitude", "allocator": "uniform:released=true", "rebalance": False},
}
"""Named starting points. ``cfsp-closed-form`` and ``cfsp-refined`` re-fit or train the kept weights; docs/quality.md compares
them with CFSP on a real language model. ``*-released`` reproduce the CFSP authors' code (docs/method.md)."""


def parse_choice(text: str) -> dict[str, object]:
    """Parse ``NAME:option=value,option=value`` into a name and options; values are YAML scalars."""
    name, _, rest = text.partition(":")
    options: dict[str, object] = {}
    for part in filter(None, rest.split(",")):
        key, separator, value = part.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"{text!r}: expected NAME:option=value,option=value, found {part!r}.")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"{text!r}: the value of {key.strip()!r} cannot be read: {value!r}.") from error
    return {"name": name.strip(), "options": options}


def layered(
    preset: str | None,
    config_file: Path | None,
    given: Mapping[str, object],
    start: Mapping[str, object] | None = None,
) -> RunConfig:
    """Layer defaults, a command's own (``start``), the preset, the YAML file and the options of the command line.

    A component named again under the same name keeps the options it had: ``--preset cfsp-released --allocator
    cfsp:distance=mse`` changes the distance only.
    """
    from_file = read_yaml(config_file) if config_file else {}
    own_preset = from_file.pop("preset", None)
    for name in from_file:
        if name not in OPTIONS:
            raise ConfigError(f"{config_file}: Unknown option {name!r}.{did_you_mean(name, OPTIONS)}")
    chosen = preset if preset is not None else own_preset
    merged: dict[str, object] = {}
    for layer in (start or {}, _preset(chosen) if chosen is not None else {}, from_file, given):
        for key, value in layer.items():
            merged[key] = _merged_choice(merged.get(key), value) if key in CHOICES else value
    return RunConfig.build(**merged)


def read_yaml(path: Path) -> dict[str, object]:
    """Read a YAML file of options.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        loaded: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path} must hold options as `name: value` lines.")
    return {str(key).replace("-", "_"): value for key, value in cast("dict[object, object]", loaded).items()}


def _preset(name: object) -> Mapping[str, object]:
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}.{did_you_mean(str(name), PRESETS)}")
    return PRESETS[name]


def _merged_choice(before: object, now: object) -> object:
    """Merge the options of one component; other values are left for ``RunConfig`` to refuse."""
    old, new = _as_mapping(before), _as_mapping(now)
    old_options, new_options = old.get("options", {}), new.get("options", {})
    same = "name" in new and new["name"] == old.get("name")
    if not (same and isinstance(old_options, dict) and isinstance(new_options, dict)):
        return now
    return {**new, "options": {**cast("dict[str, object]", old_options), **cast("dict[str, object]", new_options)}}


def _as_mapping(value: object) -> dict[str, object]:
    if isinstance(value, str):
        return parse_choice(value)
    if isinstance(value, Choice):
        return value.model_dump()
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}
