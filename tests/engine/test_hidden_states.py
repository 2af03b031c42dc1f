"""Hidden states in a file give the same checkpoint; places that cannot hold them are refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from cfsp_framework.checkpoint.save import PLAN_FILE, REPORT_FILE
from cfsp_framework.engine.hidden_states import allocate
from cfsp_framework.errors import OutputError, ResourceError
from helpers.runs import equal_tensors, prune_small, refuse_small, weights_of
from helpers.types import MakeModel


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all tensors that are mapped from files."""
    sizes: list[int] = []
    original = torch.from_file

    def from_file(*arguments: Any, **options: Any) -> Tensor:
        sizes.append(options["size"])
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "from_file", from_file)
    return sizes


@pytest.mark.parametrize("stream", [False, True])
def test_spilled_hidden_states_change_nothing(
    stream: bool, make_model: MakeModel, calibration_text: Path, tmp_path: Path, mapped: list[int]
) -> None:
    model, spill, preset = make_model("llama"), tmp_path / "deep" / "spill", "cfsp-closed-form"
    plain = prune_small(model, tmp_path / "plain", calibration_text, preset, stream=stream)
    assert mapped == []
    spilled = prune_small(model, tmp_path / "spilled", calibration_text, preset, stream=stream, spill=spill)
    assert mapped.count(10 * 32 * 32) == 3, "the first pass, and the second's two streams"
    assert list(spill.iterdir()) == []
    assert spilled.plan == plain.plan
    assert equal_tensors(weights_of(spilled.folder), weights_of(plain.folder))
    assert spilled.report.evaluations == plain.report.evaluations


def test_a_spilled_tensor_has_no_file_name_and_holds_what_is_written(tmp_path: Path) -> None:
    like = torch.zeros(1, dtype=torch.bfloat16)
    tensor = allocate((3, 5, 7), like, tmp_path)
    assert list(tmp_path.iterdir()) == []
    values = torch.arange(105.0).view(3, 5, 7).bfloat16()
    assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
    tensor[1:].copy_(values[1:])
    assert torch.equal(tensor[1:], values[1:])
    assert allocate((2, 3), like, None).shape == (2, 3)


def test_places_that_cannot_be_spilled_to_are_refused(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    (tmp_path / "file").touch()
    message = refuse_small(model, tmp_path, calibration_text, "--spill", tmp_path / "file" / "spill")
    assert f"{tmp_path}/file/spill: Not a directory." in message

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    (tmp_path / "spill").mkdir()
    assert "No space left" in refuse_small(model, tmp_path, calibration_text, "--spill", tmp_path / "spill")
    with pytest.raises(OutputError, match="No space left on device"):
        allocate((2, 2), torch.zeros(1), tmp_path / "spill")


def test_too_little_memory_is_refused_before_it_is_allocated(
    make_model: MakeModel, calibration_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1e4))
    message = refuse_small(model, tmp_path, calibration_text)
    assert all(words in message for words in ("0.02 MB", "0.01 MB are free", "--spill FOLDER"))
    with pytest.raises(ResourceError, match="--spill"):
        allocate((2501,), torch.zeros(1), None)
    assert len(allocate((2500,), torch.zeros(1), None)) == 2500
    prune_small(model, tmp_path / "out", calibration_text, spill=tmp_path / "spill")
    assert (tmp_path / "out" / PLAN_FILE).exists()
    assert json.loads((tmp_path / "out" / REPORT_FILE).read_text())["samples"] == 20
