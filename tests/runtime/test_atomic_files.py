"""Files and folders exist whole or not at all, and other users can read them."""

from __future__ import annotations

import errno
import os
from collections.abc import Generator
from pathlib import Path

import pytest
from safetensors import SafetensorError

from cfsp_framework.errors import OutputError
from cfsp_framework.runtime.atomic_files import check_parent, staged_folder, write_text


@pytest.fixture
def umask() -> Generator[None]:
    """Set a usual umask."""
    previous = os.umask(0o022)
    yield
    os.umask(previous)


def test_a_staged_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with staged_folder(out) as staging:
        (staging / "weights").write_text("w")
        assert staging.parent == tmp_path
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "w"


def _fail_midway(folder: Path, error: type[BaseException]) -> None:
    (folder / "weights").write_text("half")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), staged_folder(tmp_path / "out") as staging:
        _fail_midway(staging, error)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "deep").mkdir(parents=True)
    (out / "deep" / "old").write_text("old")
    with staged_folder(out) as staging:
        (staging / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["new"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(RuntimeError), staged_folder(out):
        raise RuntimeError
    assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.suffix == ".partial":
            raise OSError(errno.EACCES, os.strerror(errno.EACCES))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="cannot be written: Permission denied"), staged_folder(out):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "old").read_text() == "old"


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    target, out = tmp_path / "target", tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    out.symlink_to(target)
    with staged_folder(out) as staging:
        (staging / "new").write_text("new")
    assert (target / "old").exists()
    assert not out.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "target"]


@pytest.mark.usefixtures("umask")
def test_other_users_can_read_the_files(tmp_path: Path) -> None:
    with staged_folder(tmp_path / "out") as staging:
        (staging / "deep").mkdir(mode=0o700)
        (staging / "deep" / "weights").touch(mode=0o600)
    write_text(tmp_path / "plan.json", "{}")
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert modes == {"out": 0o755, "deep": 0o755, "weights": 0o644, "plan.json": 0o644}


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
])  # fmt: skip
def test_a_full_disk_is_reported_in_one_line(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"out cannot be written: No space left on device\.$"),
        staged_folder(tmp_path / "out"),
    ):
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_error_about_a_file_elsewhere_passes_through(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_folder(tmp_path / "out"):
        (tmp_path / "input").read_text()
    with pytest.raises(SafetensorError), staged_folder(tmp_path / "out"):
        raise SafetensorError("header too large")
    assert list(tmp_path.iterdir()) == []


def test_text_replaces_a_file_or_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "plan.json"
    write_text(path, "first")
    write_text(path, "second")
    assert path.read_text() == "second"

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match=r"plan\.json cannot be written: No space left on device"):
        write_text(path, "third")
    assert path.read_text() == "second"
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


def test_a_place_that_does_not_exist_is_refused_at_once(tmp_path: Path) -> None:
    check_parent(tmp_path / "plan.json")
    with pytest.raises(OutputError, match="nowhere is not a writable directory"):
        check_parent(tmp_path / "nowhere" / "plan.json")
    with pytest.raises(OutputError, match="cannot be written"):
        write_text(tmp_path / "nowhere" / "plan.json", "{}")
    with pytest.raises(OutputError, match="cannot be written"), staged_folder(tmp_path / "nowhere" / "out"):
        pass
