"""Publishing: which files are uploaded, checked and refused, and that nothing is lost. The Hub is a fake."""

from __future__ import annotations

import json
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from cfsp_framework.errors import CfspError, ConfigError, ModelError
from cfsp_framework.export import hub as publishing
from cfsp_framework.export.hub import Upload, check_repository, private_paths, push
from helpers.runs import invoke

MakeModel = Callable[..., Path]


@pytest.fixture(scope="module")
def base(make_model: MakeModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a card and a licence."""
    folder = tmp_path_factory.mktemp("base") / "secret-place"
    shutil.copytree(make_model("llama"), folder)
    (folder / "README.md").write_text(
        "---\nlicense: other\nlicense_name: fox-1\nlicense_link: LICENSE.md\n---\n# Fox\n"
    )
    (folder / "LICENSE.md").write_text("Be kind to foxes.\n")
    return folder


def small(calibration_text: Path) -> tuple[object, ...]:
    return "-q", "--calibration", calibration_text, "--samples", 4, "--seqlen", 32, "--round-to", 8


@pytest.fixture(scope="module")
def published(base: Path, calibration_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint made from absolute paths, with statistics beside it."""
    out = tmp_path_factory.mktemp("made") / "out"
    words = "prune", base, out, *small(calibration_text), "--evaluate", calibration_text, "--evaluate-windows", 1
    result = invoke(*words, "--keep-statistics")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def pruned(published: Path, tmp_path: Path) -> Path:
    """A copy of it to break."""
    return Path(shutil.copytree(published, tmp_path / "pruned"))


class Hub:
    """Stands for HfApi: keeps what it was given."""

    def __init__(self, **options: Any) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.texts: dict[str, str] = {}
        self.error: Exception | None = None

    def __call__(self, **options: Any) -> Hub:
        return self

    def create_repo(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_repo", (repository, options)))
        if self.error:
            raise self.error

    def create_branch(self, repository: str, **options: Any) -> None:
        self.calls.append(("create_branch", options))

    def upload_folder(self, *, folder_path: Path, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        for path in folder_path.rglob("*"):
            if path.is_file():
                name = path.relative_to(folder_path).as_posix()
                self.texts[name] = "" if name.endswith(".safetensors") else path.read_text(encoding="utf-8")
        return SimpleNamespace(commit_url="https://huggingface.co/me/fox/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    monkeypatch.setattr(publishing, "HfApi", found)
    return found


def test_a_dry_run_needs_no_network(pruned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("a dry run touched the network")

    monkeypatch.setattr(publishing, "HfApi", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    before = {path.name: path.read_bytes() for path in pruned.iterdir()}
    result = invoke("push", pruned, "me/fox", "--dry-run")
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in pruned.iterdir()} == before
    for words in (
        "model.safetensors",
        "modeling_pruned.py",
        "LICENSE.md",
        "license_name fox-1",
        "Nothing was uploaded",
    ):
        assert words in result.stdout, words
    assert "Not uploaded: statistics.safetensors." in result.stdout
    upload = Upload.model_validate_json(invoke("push", pruned, "me/fox", "--dry-run", "--json").stdout)
    assert {check.outcome for check in upload.checks} == {"passed", "remark"}
    sizes = {file.name: file.bytes for file in upload.files}
    assert sizes["model.safetensors"] == (pruned / "model.safetensors").stat().st_size
    assert upload.bytes == sum(sizes.values())
    assert upload.url is None


def test_what_is_uploaded_names_the_repository_and_no_place_of_this_machine(
    pruned: Path, hub: Hub, base: Path, calibration_text: Path
) -> None:
    done = push(pruned, "me/fox", private=True, revision="half", message="Half a fox")
    assert done.url == "https://huggingface.co/me/fox/commit/1"
    assert [name for name, _ in hub.calls] == ["create_repo", "create_branch", "upload_folder"]
    assert hub.calls[0][1] == ("me/fox", {"private": True, "exist_ok": True})
    assert hub.calls[2][1] == {"repo_id": "me/fox", "revision": "half", "commit_message": "Half a fox"}
    assert set(hub.texts) == {path.name for path in pruned.iterdir()} - {"statistics.safetensors"}
    assert 'from_pretrained("me/fox", trust_remote_code=True)' in hub.texts["README.md"]
    for name, text in hub.texts.items():
        assert str(base.parent) not in text, name
        assert str(calibration_text.parent) not in text, name
    assert json.loads(hub.texts["report.json"])["model"] == "secret-place"
    assert json.loads(hub.texts["pruning_plan.json"])["calibration"]["spec"] == calibration_text.name
    assert str(base) in (pruned / "report.json").read_text()  # the checkpoint itself stays as it is


def spoil_pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n")


def spoil_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "other.safetensors")


def spoil_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')


def spoil_code(folder: Path) -> None:
    (folder / "modeling_pruned.py").unlink()


def spoil_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))


def spoil_card(folder: Path) -> None:
    (folder / "README.md").write_text("---\n: [\n---\n# Fox\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_pickle, "pytorch_model.bin is pickled"),
        (spoil_weights, "model.safetensors, which is missing"),
        (spoil_shard, "model-2.safetensors, which is missing"),
        (spoil_code, "names modeling_pruned.py, which is missing"),
        (spoil_map, "blocks differ in width"),
        (spoil_card, "README.md has no metadata"),
    ],
)
def test_a_broken_checkpoint_is_not_published(
    spoil: Callable[[Path], None], message: str, pruned: Path, hub: Hub
) -> None:
    spoil(pruned)
    for words in ([], ["--dry-run"]):
        result = invoke("push", pruned, "me/fox", *words)
        assert result.exit_code == 2
        assert message in result.stderr
    assert "failed" in result.stdout
    assert hub.calls == []


def test_only_checkpoints_of_this_package_are_published(base: Path, hub: Hub) -> None:
    with pytest.raises(ModelError, match="was not written by `cfsp prune`"):
        push(base, "me/fox")
    assert hub.calls == []


@pytest.mark.parametrize("name", ["fox", "me/fox/small", "me/f x", "/home/me", "me/..fox"])
def test_names_the_hub_does_not_take_are_refused(name: str, published: Path) -> None:
    with pytest.raises(ConfigError, match="USER/NAME"):
        check_repository(name)
    assert invoke("push", published, name).exit_code == 2


def test_a_failed_upload_says_how_to_try_again(pruned: Path, hub: Hub) -> None:
    hub.error = ConnectionError("the line is dead")
    with pytest.raises(CfspError) as caught:
        push(pruned, "me/fox")
    assert "the line is dead" in str(caught.value)
    assert f"`cfsp push {pruned} me/fox` tries again" in str(caught.value)
    assert caught.value.exit_code == 1


def test_prune_publishes_when_all_is_done(base: Path, calibration_text: Path, tmp_path: Path, hub: Hub) -> None:
    words = "prune", base, tmp_path / "out", *small(calibration_text), "--push-to-hub", "me/fox"
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert [name for name, _ in hub.calls] == ["create_repo", "upload_folder"]
    hub.error = ConnectionError("the line is dead")
    result = invoke(*words, "--overwrite")
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 2
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_wrong_name_is_refused_before_the_run(
    base: Path, calibration_text: Path, tmp_path: Path, published: Path
) -> None:
    for words in (
        ("prune", base, tmp_path / "out", *small(calibration_text)),
        ("recover", published, tmp_path / "out"),
    ):
        result = invoke(*words, "--push-to-hub", "fox")
        assert result.exit_code == 2
        assert "USER/NAME" in result.stderr
    assert not (tmp_path / "out").exists()


@given(
    st.lists(
        st.text("abcXYZ019._+@", min_size=1, max_size=8).filter(lambda part: part.strip(".")), min_size=2, max_size=5
    ),
    st.sampled_from(['"{}"', ">{}<", "a {} b", "{}:text=0.5,hf:a/b=0.5", "({})", "`{}`"]),
)
def test_absolute_paths_are_found_wherever_they_stand(parts: list[str], around: str) -> None:
    path = "/" + "/".join(parts)
    found = private_paths(around.format(path))
    assert list(found) == [path]
    assert found[path] == parts[-1]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/a/b",
        "</td></tr>",
        "1/2/3",
        "me/fox/x",
        "14px/1.5 x",
        "../data/x",
        "~/data/x",
        "<script>x = (a) /b/2;\ny.test(/MSIE/.test)</script>",
    ],
)
def test_other_texts_are_not_paths(text: str) -> None:
    assert private_paths(text) == {}


def test_the_scripts_of_the_page_are_uploaded_unchanged(pruned: Path, hub: Hub) -> None:
    push(pruned, "me/fox")
    library = max(_scripts((pruned / "report.html").read_text(encoding="utf-8")), key=len)
    assert len(library) > 1_000_000  # plotly.js
    assert library in _scripts(hub.texts["report.html"])


def _scripts(page: str) -> list[str]:
    return re.findall(r"<script\b.*?</script>", page, re.DOTALL)


def test_the_card_that_is_uploaded_is_one_the_hub_reads(pruned: Path, hub: Hub) -> None:
    push(pruned, "me/fox")
    data: Any = ModelCard(hub.texts["README.md"]).data
    assert (data.license, data.license_name, data.license_link) == ("other", "fox-1", "LICENSE.md")
    assert data.library_name == "transformers"
