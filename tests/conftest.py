"""What every test shares: no network, one thread, the project's assets, tiny random models."""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before Transformers is imported: it reads these once. Code that checkpoints bring along is copied under HF_HOME.
_HF_HOME = tempfile.TemporaryDirectory(prefix="cfsp-tests-", ignore_cleanup_errors=True)
atexit.register(_HF_HOME.cleanup)
os.environ.update(HF_HOME=_HF_HOME.name, HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import pytest
import torch

from helpers.tiny_models import TINY_MODELS, make_random_model, make_tokenizer

if TYPE_CHECKING:
    from cfsp_framework.api.records import PruningPlan
    from cfsp_framework.host.registry import Plugins
    from cfsp_framework.modeling.decoder import Decoder
    from cfsp_framework.modeling.loading import LoadedModel

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The models, texts and expected numbers shared by the project; too large for the repository."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("CFSP_TEST_ASSETS", default))
    if not (folder / "models").is_dir():
        pytest.skip(f"no test assets in {folder}; set CFSP_TEST_ASSETS to the folder that has them")
    return folder


@pytest.fixture(scope="session", params=TINY_MODELS)
def family(request: pytest.FixtureRequest) -> str:
    """Each of the tiny models in turn, by name."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_model(name, **settings)``: the folder of a tiny random model with tokenizer; made once, never change it.

    ``name`` is one of TINY_MODELS or MIXTURES, ``settings`` go into its configuration, except ``dtype`` (``"float32"``).
    """
    made: dict[str, Path] = {}

    def make(name: str, *, dtype: str = "float32", **settings: Any) -> Path:
        key = f"{name} {dtype} {settings}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("models") / name
            make_random_model(name, settings).to(getattr(torch, dtype)).save_pretrained(made[key])
            make_tokenizer().save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def plugins() -> Plugins:
    """Every installed plugin."""
    from cfsp_framework.host.manager import load_plugins

    return load_plugins()


@pytest.fixture(scope="session")
def open_tiny(plugins: Plugins) -> Callable[..., tuple[LoadedModel, Decoder]]:
    """``open_tiny(folder, **options)``: a fresh model and its decoder, as a run with these options opens them."""
    from cfsp_framework.config import RunConfig
    from cfsp_framework.modeling.decoder import open_decoder
    from cfsp_framework.modeling.loading import load_model

    def open_folder(folder: Path, **options: object) -> tuple[LoadedModel, Decoder]:
        loaded = load_model(RunConfig.build(model=str(folder), device="cpu", **options))
        return loaded, open_decoder(loaded.model, plugins)

    return open_folder


@pytest.fixture(scope="session")
def make_plan() -> Callable[..., PruningPlan]:
    """``make_plan(decoder, widths, fingerprint="")``: a plan that keeps so many random channels of each feed-forward."""
    from cfsp_framework.api.records import BlockPlan, ModelIdentity
    from cfsp_framework.testing import build_plan

    def make(decoder: Decoder, widths: Sequence[int], fingerprint: str = "") -> PruningPlan:
        draw = torch.Generator().manual_seed(sum(widths))
        blocks = [
            BlockPlan(
                block=block,
                path=path,
                width=width,
                kept=tuple(torch.randperm(width, generator=draw)[:count].sort().values.tolist()),
            )
            for (block, path, width), count in zip(decoder.places, widths, strict=True)
        ]
        family = decoder.architecture.family
        model = ModelIdentity(source="tiny", family=family, fingerprint=fingerprint, parameters=0)
        return build_plan(blocks, model=model)

    return make


@pytest.fixture(scope="session")
def calibration_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of some thousand bytes to calibrate on."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"{n} squared is {n * n}, and the quick brown fox jumps again.\n" for n in range(200)))
    return path
