"""Files of killed and interrupted writers: complete or absent, removed by the next writer, never those of a live one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfsp_framework.errors import OutputError
from cfsp_framework.runtime.atomic_files import save_tensors, staged_folder


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_tensors_are_written_completely_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "block_0.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {})
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode, "readable as any other file"

    def fail(tensors: Any, staging: Path, *_: object) -> None:
        assert staging != path
        staging.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", fail)
        with pytest.raises(OutputError, match="No space left on device"):
            save_tensors(path, {"a": torch.zeros(3)}, {})
    assert names_in(path.parent) == {path.name}
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    save_tensors(path, {"a": torch.zeros(3)}, {})
    assert torch.equal(load_file(path)["a"], torch.zeros(3))


def test_an_interrupt_between_both_renames_restores_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, rename = tmp_path / "out", Path.rename
    out.mkdir()
    (out / "weights").write_text("old")

    def interrupt(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            assert not out.exists()
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), staged_folder(out) as folder:
        (folder / "weights").write_text("new")
    assert names_in(tmp_path) == {"out"}
    assert (out / "weights").read_text() == "old"


def test_folders_of_killed_writers_are_removed_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    out, others = tmp_path / "out", {".out.v2.abcdefgh.partial", ".other.abcdefgh.partial"}
    for name in (".out.abcdefgh.partial", ".out.abcdefgh.old", *others):
        (tmp_path / name / "deep").mkdir(parents=True)
    (tmp_path / ".out.zyxwvuts.partial").touch()
    with staged_folder(out) as live:
        names = names_in(tmp_path) - {live.name, live.with_suffix(".lock").name}
        assert names == {".out.abcdefgh.old", *others}, "a replaced folder stays as long as its successor is missing"
        (live / "weights").write_text("first")
        with staged_folder(out) as other:
            assert live.exists()
            (other / "weights").write_text("second")
        assert out.exists()
        assert live.exists()
    assert (out / "weights").read_text() == "first"
    assert names_in(tmp_path) == {"out", *others}


def test_files_of_killed_writers_are_removed_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "hidden_0.safetensors", ".hidden_1.safetensors.abcdefgh.partial"
    for name in (".hidden_0.safetensors.abcdefgh.partial", other):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpxyz").write_bytes(b"half")
    nested: list[set[str]] = []

    def save_while_another_process_does(tensors: Any, staging: Path, metadata: Any) -> None:
        save_file(tensors, staging, metadata)
        if not nested:
            nested.append(names_in(tmp_path))
            save_tensors(path, {"a": torch.zeros(1)}, {})
            assert staging.exists()

    monkeypatch.setattr("safetensors.torch.save_file", save_while_another_process_does)
    save_tensors(path, {"a": torch.ones(1)}, {})
    assert len(nested[0]) == 3, "the other file's, and this process's folder and lock"
    assert other in nested[0]
    assert torch.equal(load_file(path)["a"], torch.ones(1))
    assert names_in(tmp_path) == {path.name, other}


def test_a_file_system_without_locks_keeps_every_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / ".out.abcdefgh.partial").mkdir()
    with staged_folder(tmp_path / "out") as folder:
        (folder / "weights").touch()
    assert names_in(tmp_path) == {"out", ".out.abcdefgh.partial"}
