"""Check a pruned checkpoint and publish it on the Hugging Face Hub.

A temporary folder of links is uploaded, so that the checkpoint stays unchanged: the card's examples name the repository,
and absolute paths of this machine are reduced to their last parts.
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
from cfsp_framework.errors import CfspError, ConfigError, ModelError, one_line
from cfsp_framework.reporting.html import PLACE

_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_NOT_UPLOADED = (STATISTICS_FILE,)  # engines read every *.safetensors of a repository as weights
_EDITED = (CARD_FILE, REPORT_FILE, PAGE_FILE, PLAN_FILE, "recovery_plan.json", "adapter/adapter_config.json")
_PATH = re.compile(r"(?<![\w.:/<~-])(?:[A-Za-z]:\\|/)(?:[\w.+@ -]+[/\\])+[\w.+@-]+")
_SCRIPT = re.compile(r"<script\b.*?</script>", re.DOTALL)


class UploadedFile(FrozenRecord):
    """Name and size of an uploaded file."""

    name: str
    bytes: int


class Check(FrozenRecord):
    """Result of a check; ``failed`` prevents the upload, ``remark`` does not."""

    what: str
    outcome: Literal["passed", "remark", "failed"]
    detail: str


class Upload(FrozenRecord):
    """Files and metadata that are published, or would be."""

    repository: str
    revision: str | None
    private: bool
    message: str
    files: tuple[UploadedFile, ...]
    left_out: tuple[str, ...]
    """Files of the folder that are not uploaded."""
    checks: tuple[Check, ...]
    card: dict[str, Any]
    """Metadata at the top of the model card."""
    url: str | None = None
    """Address of the upload; None if nothing was uploaded."""

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def check_repository(name: str) -> None:
    """Refuse, before any work is done, a name that the Hub does not accept for a repository."""
    try:
        validate_repo_id(name)
        valid = name.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ConfigError(f"{name!r} is not a repository of the Hub; give USER/NAME.")


def push(
    folder: Path,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> Upload:
    """Publish the checkpoint in ``folder``; ``dry_run`` only checks and lists the files, without the network.

    Raises:
        ConfigError: ``repository`` is not the name of a repository.
        ModelError: the folder is not a checkpoint of this package, or a check failed.
        CfspError: the Hub could not be reached or refused the upload.
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
            files=tuple(UploadedFile(name=name, bytes=(staged / name).stat().st_size) for name in _list_files(staged)),
            left_out=tuple(sorted({*_list_files(folder)} - {*_list_files(staged)})),
            checks=tuple(run_checks(staged, replaced)),
            card=_read_card(staged / CARD_FILE),
        )
        failed = [check for check in upload.checks if check.outcome == "failed"]
        if failed and not dry_run:
            raise ModelError(f"{folder} is not published: {failed[0].detail}")
        return upload if dry_run else upload.model_copy(update={"url": _upload(staged, upload, folder)})


def run_checks(folder: Path, replaced: Mapping[str, str]) -> Iterator[Check]:
    """Check a folder to publish; ``replaced`` are the private paths that were removed from its texts."""
    problems = {
        "weights": (_weight_problem, "safetensors only."),
        "shards": (_shard_problem, "all are present."),
        "model card": (_card_problem, "its metadata can be read."),
        "code": (_code_problem, "the files that config.json names are present."),
    }
    for name, (find_problem, passed) in problems.items():
        problem = find_problem(folder)
        yield Check(what=name, outcome="failed" if problem else "passed", detail=problem or passed)
    paths = ", ".join(f"{path} as {name}" for path, name in sorted(replaced.items()))
    detail = (
        f"of this machine, uploaded without: {paths}." if paths else "no path of this machine in card, report or plan."
    )
    yield Check(what="private paths", outcome="remark" if paths else "passed", detail=detail)
    licence = _read_card(folder / CARD_FILE).get("license")
    detail = f"{licence}." if licence else f"the base model's card named none; add one to {CARD_FILE}."
    yield Check(what="licence", outcome="passed" if licence else "remark", detail=detail)


def _weight_problem(folder: Path) -> str | None:
    names = _list_files(folder)
    pickled = [name for name in names if name.endswith(_PICKLED)]
    if pickled:
        return f"{pickled[0]} is pickled, which can run code when it is opened; remove it."
    return None if any(name.endswith(".safetensors") for name in names) else "the folder has no safetensors."


def _shard_problem(folder: Path) -> str | None:
    index, shards = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    return _missing(folder, shards)


def _card_problem(folder: Path) -> str | None:
    if not (folder / CARD_FILE).exists():
        return f"{CARD_FILE} is missing."
    has_metadata = _read_card(folder / CARD_FILE).get("library_name")
    return None if has_metadata else f"{CARD_FILE} has no metadata that the Hub can read."


def _code_problem(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = map(str, (config.get("auto_map") or {}).values())
    named = {name.rpartition("--")[2].partition(".")[0] + ".py" for name in classes}
    if (config.get("per_layer_config") or (config.get("text_config") or {}).get("per_layer_config")) and not named:
        return f"blocks differ in width and config.json names no {CODE_FILE}."
    problem = _missing(folder, named)
    return problem and f"config.json names {problem}"


def _missing(folder: Path, names: set[str]) -> str | None:
    missing = sorted(name for name in names if not (folder / name).exists())
    return f"{missing[0]}, which is missing." if missing else None


def _read_card(path: Path) -> dict[str, Any]:
    """Return the metadata of a card, empty if it cannot be read."""
    try:
        return metadata_load(path) or {}
    except Exception:  # noqa: BLE001  (any error of yaml and huggingface_hub; a check reports it)
        return {}


def _stage(folder: Path, staged: Path, repository: str) -> dict[str, str]:
    """Link the files to upload into ``staged``, edit the texts, and return the paths replaced in them."""
    names = [name for name in _list_files(folder) if name not in _NOT_UPLOADED]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names if name in _EDITED}
    paths = {path: last for text in texts.values() for path, last in private_paths(text).items()}
    for name in names:
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in texts:
            os.symlink((folder / name).absolute(), target)
            continue
        text = texts[name]
        for path in sorted(paths, key=len, reverse=True):
            text = text.replace(path, paths[path])
        target.write_text(text.replace(PLACE, repository), encoding="utf-8")
    return paths


def private_paths(text: str) -> dict[str, str]:
    """Return the absolute paths in a text, each with its last part.

    Scripts of a page are not searched: their regular expressions and divisions look like paths.
    """
    paths = _PATH.findall(_SCRIPT.sub("", text))
    return {path: PurePath(path.replace("\\", "/")).name for path in paths}


def _list_files(folder: Path) -> list[str]:
    """Return the relative paths of all files of a folder that are not hidden."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def _upload(staged: Path, upload: Upload, folder: Path) -> str:
    api = HfApi(library_name="cfsp-framework")
    try:
        api.create_repo(upload.repository, private=upload.private, exist_ok=True)
        if upload.revision:
            api.create_branch(upload.repository, branch=upload.revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=upload.repository, folder_path=staged, revision=upload.revision, commit_message=upload.message
        )
    except Exception as error:  # any error of the network and the Hub
        raise CfspError(
            f"the upload to {upload.repository} failed: {_explain(error)}\n"
            f"The checkpoint is in {folder}; `cfsp push {folder} {upload.repository}` tries again."
        ) from error
    return str(getattr(commit, "commit_url", commit))


def _explain(error: Exception) -> str:
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    match error:
        case LocalTokenNotFoundError():
            return "you are not logged in; run `hf auth login`."
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set."
        case HfHubHTTPError() if error.response is not None and error.response.status_code in (401, 403):
            return "the Hub refuses the write; run `hf auth login` with a token that has write access."
        case _:
            return one_line(error)[:200].rstrip(".: ") + "."
