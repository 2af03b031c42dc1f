"""Fixtures for plugin authors: ``pytest_plugins = ["cfsp_framework.testing"]`` in ``conftest.py``.

PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cfsp_framework.testing import models, samples

if TYPE_CHECKING:
    from torch import Tensor

    from cfsp_framework.host.registry import Plugins
    from cfsp_framework.modeling.decoder import Decoder
    from cfsp_framework.testing.samples import Case, Sample


@pytest.fixture(scope="session")
def host() -> Callable[..., Plugins]:
    """``host("file.py", "some_module", "an-entry-point")``: the built-in plugins and those named, no other installed ones."""
    return samples.only


@pytest.fixture(scope="session")
def make_sample() -> Callable[..., Sample]:
    """``make_sample(Case(form="plain", channels=8))``: a feed-forward, its activations, ``statistics(required, [])``."""

    def make(case: Case | None = None) -> Sample:
        return samples.make_sample(case or samples.Case())

    return make


@pytest.fixture(scope="session")
def tiny_decoder() -> Callable[..., Decoder]:
    """``tiny_decoder("gpt2")``: a new random model, opened; one of llama, opt, phi3, gpt2 and mixtral."""
    return models.tiny_decoder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_checkpoint("llama")``: its folder with a tokenizer, a MODEL for a run; shared by all tests, do not change it."""

    @cache
    def make(name: str = "llama") -> Path:
        return models.write_checkpoint(name, tmp_path_factory.mktemp("tiny") / name)

    return make


@pytest.fixture(scope="session")
def calibration_windows() -> Tensor:
    """Random token ids for the tiny models, ``(12, 16)``."""
    return models.calibration_windows()
