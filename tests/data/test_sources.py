"""Every form of a data SPEC, read for calibration and for evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cfsp_framework.data import sources as data
from cfsp_framework.data.demo import corpus
from cfsp_framework.data.sources import Role, apportion, parse_mixture, read_text
from cfsp_framework.data.windows import calibration_windows, draw_windows, tokenize
from cfsp_framework.errors import DataError

ROLES: tuple[Role, ...] = ("calibration", "evaluation")
ROWS = {"text": ["one", "two", "three"], "story": ["a", "b", "c"], "number": [1, 2, 3]}


class Characters:
    """Tokenize every character, with a token before all of them."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [1, *map(ord, text)]}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use no cache but the test's."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def write_rows(folder: Path, suffix: str) -> Path:
    path = folder / f"rows{suffix}"
    rows = datasets.Dataset.from_dict(ROWS)
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](path)
    return path


@pytest.mark.parametrize("role", ROLES)
def test_a_text_file_is_read_unchanged(role: Role, tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("Once upon\n\na time — ünïcode.\n", encoding="utf-8")
    assert read_text(str(path), role) == "Once upon\n\na time — ünïcode.\n"


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
@pytest.mark.parametrize("role", ROLES)
def test_a_table_gives_its_column_text_or_the_one_named(
    suffix: str, role: Role, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_rows(tmp_path, suffix)
    capfd.readouterr()
    assert read_text(str(path), role) == "one\n\ntwo\n\nthree"
    assert read_text(f"{path}:story", role) == "a\n\nb\n\nc"
    assert capfd.readouterr() == ("", "")


def test_a_saved_data_set_is_opened(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    assert read_text(str(tmp_path / "saved"), "calibration") == "one\n\ntwo\n\nthree"
    assert read_text(f"{tmp_path / 'saved'}:story", "evaluation") == "a\n\nb\n\nc"


@pytest.mark.parametrize(("splits", "calibration", "evaluation"), [
    (("train", "validation", "test"), "train", "test"),
    (("validation", "train"), "train", "validation"),
    (("everything",), "everything", "everything"),
])  # fmt: skip
def test_each_role_takes_its_split(splits: tuple[str, ...], calibration: str, evaluation: str, tmp_path: Path) -> None:
    parts: Any = {split: datasets.Dataset.from_dict({"text": [f"this is {split}"]}) for split in splits}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    assert read_text(str(tmp_path / "saved"), "calibration") == f"this is {calibration}"
    assert read_text(str(tmp_path / "saved"), "evaluation") == f"this is {evaluation}"


def test_a_folder_of_files_is_a_data_set_too(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text(json.dumps({"text": f"this is {split}"}) + "\n")
    assert read_text(str(folder), "calibration") == "this is train"
    assert read_text(str(folder), "evaluation") == "this is test"


def test_rows_without_a_text_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", None, "two")))
    assert read_text(str(path), "calibration") == "one\n\ntwo"


def test_the_demo_has_a_split_for_every_role() -> None:
    for role, split in (("calibration", "calibration"), ("evaluation", "test"), ("training", "train")):
        assert read_text("demo", role) == corpus.text(split)  # type: ignore[arg-type]


@pytest.mark.parametrize(("content", "suffix", "column", "message"), [
    (b"", ".txt", "", "holds no text"),
    (b" \n ", ".txt", "", "holds no text"),
    (b"caf\xe9", ".txt", "", "is not UTF-8 text: byte 3"),
    (b"text", ".txt", ":story", "a .txt file has no columns"),
    (b'{"text": "a"}\n{broken', ".jsonl", "", "cannot be read: ArrowInvalid: "),
    (b'{"text": "a"}\n', ".jsonl", ":texts", "has no column 'texts'. Did you mean 'text'? Available: text."),
    (b'{"text": 3}\n', ".jsonl", "", "column 'text' holds int, not text"),
    (b'{"text": ["a"]}\n', ".jsonl", "", "column 'text' holds list, not text"),
    (b"text", ".rst", "", "expected .txt, .jsonl, .json, .parquet, .csv or a folder with a data set"),
])  # fmt: skip
def test_files_that_cannot_be_used_are_refused_in_one_line(
    content: bytes, suffix: str, column: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_text(f"{path}{column}", "calibration")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(("spec", "message"), [
    ("wikitext", "no such file or name. Did you mean 'wikitext2'?"),
    ("/nowhere/x.txt", "no such file or name."),
    ("hf:", "expected hf:REPO[:CONFIG][:SPLIT][:COLUMN]"),
    ("hf:a:b:c:d:e", "expected hf:REPO[:CONFIG][:SPLIT][:COLUMN]"),
])  # fmt: skip
def test_unknown_names_are_refused(spec: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_text(spec, "calibration")
    assert message in str(caught.value)


def test_a_folder_without_a_data_set_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="cannot be read as a data set"):
        read_text(str(tmp_path / "folder"), "calibration")


class Hub:
    """Replace load_dataset: record its arguments and return rows, as a stream if that is asked for."""

    def __init__(self, column: str, rows: int) -> None:
        self.calls: list[dict[str, Any]] = []
        self.rows = datasets.Dataset.from_dict({column: [f"row {i}" for i in range(rows)]})

    def __call__(self, repository: str, config: str | None, **keywords: Any) -> Any:
        self.calls.append({"repository": repository, "config": config, **keywords})
        return self.rows.to_iterable_dataset() if keywords["streaming"] else self.rows


@pytest.mark.parametrize(("spec", "role", "column", "expected", "text"), [
    ("wikitext2", "calibration", "text", ("Salesforce/wikitext", "wikitext-2-raw-v1", "train"), "row 0 row 1"),
    ("wikitext2", "evaluation", "text", ("Salesforce/wikitext", "wikitext-2-raw-v1", "test"), "row 0\n\nrow 1"),
    ("ptb", "calibration", "sentence", ("ptb-text-only/ptb_text_only", None, "train"), "row 0 row 1"),
    ("ptb", "evaluation", "sentence", ("ptb-text-only/ptb_text_only", None, "test"), "row 0 row 1"),
    ("c4", "calibration", "text", ("allenai/c4", "en", "train"), "row 0\n\nrow 1"),
    ("c4", "evaluation", "text", ("allenai/c4", "en", "validation"), "row 0\n\nrow 1"),
    ("fineweb-edu", "calibration", "text", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "train"), "row 0\n\nrow 1"),
    ("hf:me/mine", "calibration", "text", ("me/mine", None, "train"), "row 0\n\nrow 1"),
    ("hf:me/mine", "evaluation", "text", ("me/mine", None, "test"), "row 0\n\nrow 1"),
    ("hf:me/mine:v2:dev:story", "calibration", "story", ("me/mine", "v2", "dev"), "row 0\n\nrow 1"),
    ("hf:me/mine::dev", "evaluation", "text", ("me/mine", None, "dev"), "row 0\n\nrow 1"),
])  # fmt: skip
def test_hub_names_load_the_right_split_and_joint(
    spec: str,
    role: Role,
    column: str,
    expected: tuple[str, str | None, str],
    text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = Hub(column, rows=2)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert read_text(spec, role) == text
    [call] = hub.calls
    assert (call["repository"], call["config"], call["split"]) == expected


def test_a_stream_is_read_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Hub("text", rows=1000))
    monkeypatch.setattr(data, "STREAM_CHARACTERS", 50)
    assert len(read_text("c4", "calibration").split("\n\n")) == 10


def test_the_two_roles_share_no_row_of_a_corpus_with_one_split(monkeypatch: pytest.MonkeyPatch) -> None:
    skip = data.WELL_KNOWN["fineweb-edu"].evaluation_skip
    monkeypatch.setattr(datasets, "load_dataset", Hub("text", rows=skip + 1))
    assert read_text("fineweb-edu", "evaluation") == f"row {skip}"


@pytest.mark.parametrize("spec", ["wikitext2", "hf:me/mine"])
def test_without_a_network_hub_names_fail_in_one_line(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach it on the Hub\n(ConnectError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(DataError) as caught:
        read_text(spec, "calibration")
    assert str(caught.value) == f"data {spec!r}: the Hub cannot be reached; give a local file, or `demo`."


def test_a_missing_column_or_data_set_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", Hub("story", rows=2))
    with pytest.raises(DataError, match="has no column 'text'"):
        read_text("hf:me/mine", "calibration")

    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'me/mine' doesn't exist on the Hub\nor is private")

    monkeypatch.setattr(datasets, "load_dataset", missing)
    with pytest.raises(DataError, match=r"from the Hub: FileNotFoundError: "):
        read_text("hf:me/mine", "calibration")


def test_the_settings_of_datasets_are_restored(tmp_path: Path) -> None:
    path, verbosity = write_rows(tmp_path, ".jsonl"), datasets.logging.get_verbosity()
    read_text(str(path), "calibration")
    assert datasets.logging.get_verbosity() == verbosity
    assert not datasets.are_progress_bars_disabled()


def test_a_mixture_is_names_with_weights(tmp_path: Path) -> None:
    assert parse_mixture("demo") == [("demo", 1.0)]
    assert parse_mixture("demo=0.7,hf:a/b:c=0.3") == [("demo", 0.7), ("hf:a/b:c", 0.3)]
    odd = tmp_path / "a=b.txt"
    odd.touch()
    assert parse_mixture(str(odd)) == [(str(odd), 1.0)]


@pytest.mark.parametrize("spec", ["a=0.5,b", "a=x", "=1", "a=0", "a=-1", "a=nan", "a=inf", "a=1,"])
def test_a_mixture_without_proper_weights_is_refused(spec: str) -> None:
    with pytest.raises(DataError, match="a mixture is NAME=WEIGHT,NAME=WEIGHT with positive weights"):
        parse_mixture(spec)


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 1000))
def test_shares_are_whole_exact_and_nearest(weights: list[float], total: int) -> None:
    counts = apportion(weights, total)
    assert sum(counts) == total
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_a_mixtures_windows_come_from_its_parts_in_proportion(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 500)
    windows = calibration_windows(f"{tmp_path}/a.txt=3,{tmp_path}/b.txt=1", Characters(), 8, 16, seed=0)
    assert windows.shape == (8, 16)
    assert [chr(int(window[-1])) for window in windows] == list("aaaaaabb")


@given(st.integers(18, 200), st.integers(1, 30), st.integers(0, 10))
def test_windows_are_consecutive_tokens_of_the_text(length: int, samples: int, seed: int) -> None:
    ids = tokenize("".join(map(chr, range(100, 99 + length))), Characters())
    windows = draw_windows(ids, samples, 17, seed)
    assert windows.shape == (samples, 17)
    assert windows.equal(draw_windows(ids, samples, 17, seed))
    for window in windows:
        start = ids.tolist().index(int(window[0]))
        assert window.equal(ids[start : start + 17])


def test_another_seed_draws_other_windows() -> None:
    ids = tokenize("abcdefghij" * 100, Characters())
    drawn: list[Tensor] = [draw_windows(ids, 8, 16, seed) for seed in (0, 1)]
    assert not drawn[0].equal(drawn[1])


@pytest.mark.parametrize(("characters", "fits"), [(15, False), (16, True)])
def test_a_text_shorter_than_a_window_is_refused(characters: int, fits: bool, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("x" * characters)
    if fits:
        assert calibration_windows(str(path), Characters(), 2, 16, seed=0).shape == (2, 16)
        return
    with pytest.raises(DataError, match=r"has 16 tokens; one calibration window of 16 needs more\. Give more text"):
        calibration_windows(str(path), Characters(), 2, 16, seed=0)
