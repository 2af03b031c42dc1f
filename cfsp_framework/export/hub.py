"""``cfsp push``: what is checked before a checkpoint is published, and the upload.

What is uploaded is a copy of links in a temporary folder, so that the checkpoint stays as it is: the card's examples name
the repository, and absolute paths of this machine are cut to their last parts.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, Literal

from huggingface_hub import HfApi, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # exported, but not by name

from cfsp_framework.checkpoint.save import (
    CARD_FILE,
    CODE_FILE,
    PAGE_FILE,
    PLAN_FILE,
    REPORT_FILE,
    STATISTICS_FILE,
    read_pruned,
)
from cfsp_framework.config import FrozenRecord
from cfsp_framework.errors import CfspError, ConfigError, ModelError
from cfsp_framework.reporting.html import PLACE

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LEFT_OUT = (STATISTICS_FILE,)  # engines read every *.safetensors of a repository as weights
_OWN_TEXTS = (CARD_FILE, REPORT_FILE, PAGE_FILE, PLAN_FILE, "recovery_plan.json", "adapter/adapter_config.json")
_PATH = re.compile(r"(?<![\w.:/<~-])(?:[A-Za-z]:\\|/)(?:[\w.+@ -]+[/\\])+[\w.+@-]+")


class UploadedFile(FrozenRecord):
    """A file as it is uploaded."""

    name: str
    bytes: int


class Check(FrozenRecord):
    """Something that was looked at; what ``failed`` forbids the upload, a ``remark`` does not."""

    what: str
    outcome: Literal["passed", "remark", "failed"]
    detail: str


class Upload(FrozenRecord):
    """What is, or would be, published."""

    repository: str
    revision: str | None
    private: bool
    message: str
    files: tuple[UploadedFile, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not uploaded."""
    checks: tuple[Check, ...]
    card: dict[str, Any]
    """The metadata at the top of the model card."""
    url: str | None = None
    """Where it lies now; None where nothing was uploaded."""

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(file.bytes for file in self.files)


def check_repository(name: str) -> None:
    """Refuse, before any work is done, what is no name of a repository of the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{name!r} is no repository of the Hub; it is called USER/NAME.") from error
    if name.count("/") != 1:
        raise ConfigError(f"{name!r} is no repository of the Hub; it is called USER/NAME.")


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Publish the checkpoint in ``folder``; with ``dry_run`` only say what would be, without the network.

    Raises:
        ConfigError: ``repository`` is no name of one.
        ModelError: the folder is no checkpoint of this package, or a check failed.
        CfspError: the Hub could not be reached or refused.
    """
    check_repository(repository)
    _, report = read_pruned(folder)
    message = message or f"Prune {PurePath(report.model).name}: {report.channel_ratio:.0%} of the feed-forward channels"
    with tempfile.TemporaryDirectory(prefix="cfsp-push-") as scratch:
        staged = Path(scratch)
        replaced = _stage(folder, staged, repository)
        upload = Upload(
            repository=repository,
            revision=revision,
            private=private,
            message=message,
            files=tuple(UploadedFile(name=name, bytes=(staged / name).stat().st_size) for name in _names(staged)),
            left_out=tuple(sorted({*_names(folder)} - {*_names(staged)})),
            checks=tuple(run_checks(staged, replaced)),
            card=_card(staged / CARD_FILE),
        )
        failed = [check for check in upload.checks if check.outcome == "failed"]
        if failed and not dry_run:
            raise ModelError(f"{folder} is not published: {failed[0].detail}")
        return upload if dry_run else upload.model_copy(update={"url": _upload(staged, upload, folder)})


def run_checks(folder: Path, replaced: Mapping[str, str]) -> Iterator[Check]:
    """Look at a folder that is to be published; ``replaced`` are the private paths that were in it."""
    yield _safetensors_only(folder)
    yield _shards_there(folder)
    yield _card_readable(folder)
    yield _code_there(folder)
    if replaced:
        shown = ", ".join(f"{path} as {name}" for path, name in sorted(replaced.items()))
        yield Check(what="private paths", outcome="remark", detail=f"of this machine, uploaded without: {shown}.")
    else:
        yield Check(what="private paths", outcome="passed", detail="no path of this machine in card, report or plan.")
    licence = _card(folder / CARD_FILE).get("license")
    yield Check(
        what="licence",
        outcome="passed" if licence else "remark",
        detail=f"{licence}." if licence else f"the base model's card named none; add one to {CARD_FILE}.",
    )


def _safetensors_only(folder: Path) -> Check:
    pickled = [name for name in _names(folder) if name.endswith(_PICKLED)]
    weights = [name for name in _names(folder) if name.endswith(".safetensors")]
    if pickled:
        detail = f"{pickled[0]} is pickled, which can run code when it is opened; remove it."
        return Check(what="weights", outcome="failed", detail=detail)
    if not weights:
        return Check(what="weights", outcome="failed", detail="there are no safetensors.")
    return Check(what="weights", outcome="passed", detail=f"safetensors only, {len(weights)} files.")


def _shards_there(folder: Path) -> Check:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        there = (folder / "model.safetensors").exists()
        detail = "model.safetensors is there." if there else "model.safetensors is missing."
        return Check(what="shards", outcome="passed" if there else "failed", detail=detail)
    shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    missing = sorted(shard for shard in shards if not (folder / shard).exists())
    if missing:
        return Check(what="shards", outcome="failed", detail=f"{missing[0]} is missing.")
    return Check(what="shards", outcome="passed", detail=f"all {len(shards)} are there.")


def _card_readable(folder: Path) -> Check:
    path = folder / CARD_FILE
    if not path.exists():
        return Check(what="model card", outcome="failed", detail=f"there is no {CARD_FILE}.")
    if not _card(path).get("library_name"):
        return Check(what="model card", outcome="failed", detail=f"{CARD_FILE} has no metadata the Hub can read.")
    return Check(what="model card", outcome="passed", detail="its metadata can be read.")


def _code_there(folder: Path) -> Check:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {
        str(path).rpartition("--")[2].partition(".")[0] + ".py" for path in (config.get("auto_map") or {}).values()
    }
    missing = sorted(name for name in named if not (folder / name).exists())
    widths = config.get("per_layer_config") or (config.get("text_config") or {}).get("per_layer_config")
    if missing:
        return Check(what="code", outcome="failed", detail=f"config.json names {missing[0]}, which is missing.")
    if widths and not named:
        return Check(
            what="code", outcome="failed", detail=f"blocks differ in width and config.json names no {CODE_FILE}."
        )
    return Check(
        what="code", outcome="passed", detail=f"{', '.join(sorted(named))} is there." if named else "none needed."
    )


def _card(path: Path) -> dict[str, Any]:
    """The metadata of a card, or nothing where it cannot be read."""
    try:
        return metadata_load(path) or {}
    except Exception:  # noqa: BLE001  (whatever yaml and huggingface_hub raise; a check tells)
        return {}


def _stage(folder: Path, staged: Path, repository: str) -> dict[str, str]:
    """Links to all files to upload in ``staged``, and copies of those that change: the paths replaced in them."""
    replaced: dict[str, str] = {}
    for name in _names(folder):
        if name in _LEFT_OUT:
            continue
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in _OWN_TEXTS:
            os.symlink((folder / name).absolute(), target)
            continue
        text = (folder / name).read_text(encoding="utf-8")
        found = private_paths(text)
        for path in sorted(found, key=len, reverse=True):
            text = text.replace(path, found[path])
        replaced |= found
        target.write_text(text.replace(PLACE, repository), encoding="utf-8")
    return replaced


def private_paths(text: str) -> dict[str, str]:
    """The absolute paths in a text, each with its last part."""
    return {path: PurePath(path.replace("\\", "/")).name for path in _PATH.findall(text)}


def _names(folder: Path) -> list[str]:
    """The files of a folder, hidden ones aside."""
    found = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]


def _upload(staged: Path, upload: Upload, folder: Path) -> str:
    api = HfApi(library_name="cfsp-framework")
    try:
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        if upload.revision:
            api.create_branch(upload.repository, branch=upload.revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=upload.repository,
            folder_path=staged,
            revision=upload.revision,
            commit_message=upload.message,
        )
    except Exception as error:  # whatever the network and the Hub raise
        raise CfspError(
            f"the upload to {upload.repository} failed: {_reason(error)}\n"
            f"The checkpoint is in {folder}; `cfsp push {folder} {upload.repository}` tries again."
        ) from error
    return str(getattr(done, "commit_url", done))


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    match error:
        case LocalTokenNotFoundError():
            return "nobody is logged in; `hf auth login` does."
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set."
        case HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return "the Hub does not let you write there; `hf auth login` with a token that may."
        case _:
            words = " ".join(str(error).split())
            return f"{type(error).__name__}: {words}"[:200].rstrip(".: ") + "."
