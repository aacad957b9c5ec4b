import gc
import json
import multiprocessing
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_lab.data import rendering
from lightning_lab.data import tokenized as module
from lightning_lab.data.conversation import UnreadableRow, parse_conversation
from lightning_lab.data.rendering import Renderer
from lightning_lab.data.sources import Rows, load_rows
from lightning_lab.data.tokenized import tokenize_rows
from lightning_lab.errors import LabError


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"question {i}", f"answer {i} " + "and more " * (i % 7)) for i in range(600)]  # five batches of 128
BAD = [chat("a", "b"), {"text": "no"}, chat("c", "d"), UnreadableRow("the line is not JSON"), chat("e", "x " * 200)]


def as_rows(rows: list[Any], fingerprint: str = "0") -> Rows:
    return Rows(rows, "data.jsonl", fingerprint, [2 * i + 1 for i in range(len(rows))])


@pytest.fixture(scope="module")
def renderer(smollm2_tokenizer: Any) -> Renderer:
    return Renderer(smollm2_tokenizer)


@pytest.fixture(scope="module")
def short_renderer(smollm2_tokenizer: Any) -> Renderer:
    return Renderer(smollm2_tokenizer, max_length=60)


def files(folder: Path) -> list[Path]:
    return list((folder / "tokenized").iterdir())


def test_every_row_is_what_the_renderer_gives(renderer: Renderer, tmp_path: Path) -> None:
    data = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert len(data) == 600
    for i in (0, 1, 127, 128, 511, 512, 599):
        encoded = renderer.encode(parse_conversation(GOOD[i]))
        assert data.input_ids(i).tolist() == encoded.input_ids
        assert data.labels(i).tolist() == encoded.labels
        assert data.input_ids(i).dtype == data.labels(i).dtype == np.int32
        assert data.lengths[i] == len(encoded.input_ids)
        assert data.supervised[i] == sum(label != -100 for label in encoded.labels[1:])
    assert (data.dropped, data.truncated) == ({}, [])
    data.input_ids(0)[:] = 7  # a copy: the file stays as it is
    assert data.input_ids(0)[0] != 7
    for outside in (600, -1):
        with pytest.raises(IndexError):
            data.input_ids(outside)


def test_labels_at_the_first_token_do_not_count(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bare = Renderer(smollm2_tokenizer, str(tmp_path / "bare.jinja"))
    rows = as_rows([{"messages": [{"role": "assistant", "content": "one two three"}]}])
    data = tokenize_rows(rows, bare, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert data.labels(0)[0] != -100
    assert (data.lengths[0], data.supervised[0]) == (3, 2)


@pytest.mark.parametrize("ahead", [1, 7])
def test_the_file_does_not_depend_on_how_many_batches_are_in_the_making(
    short_renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    """On against off: one thread of the tokenizer's and one batch at a time against many."""
    rows = as_rows([*GOOD, *BAD, *GOOD])
    monkeypatch.setattr(rendering, "_BATCHES_AHEAD", ahead)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    tokenize_rows(rows, short_renderer, on_bad_row="drop", cache_dir=tmp_path / "on", progress=False)
    monkeypatch.setattr(rendering, "_BATCHES_AHEAD", 0)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    tokenize_rows(rows, short_renderer, on_bad_row="drop", cache_dir=tmp_path / "off", progress=False)
    (on,), (off,) = files(tmp_path / "on"), files(tmp_path / "off")
    assert on.read_bytes() == off.read_bytes()


def test_the_earliest_bad_row_is_named_whatever_comes_after(renderer: Renderer, tmp_path: Path) -> None:
    rows = as_rows([*GOOD[:300], {"text": "no"}, *GOOD[:300], {"other": "no"}])
    threads = threading.active_count()
    with pytest.raises(LabError, match=r"^data\.jsonl line 601: .*keys found: text"):
        tokenize_rows(rows, renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert threading.active_count() == threads
    assert gc.get_freeze_count() == 0


def test_bad_rows_keep_their_index(short_renderer: Renderer, tmp_path: Path) -> None:
    for _ in ("made", "from the cache"):
        data = tokenize_rows(as_rows(BAD), short_renderer, on_bad_row="drop", cache_dir=tmp_path, progress=False)
        assert len(data) == 5
        assert sorted(data.dropped) == [1, 3]
        assert "keys found: text" in data.dropped[1]
        assert data.dropped[3] == "the line is not JSON"
        assert data.lengths[[1, 3]].tolist() == data.supervised[[1, 3]].tolist() == [0, 0]
        assert data.truncated == [4]
        assert data.lengths[4] == 60
        assert data.input_ids(2).tolist() == short_renderer.encode(parse_conversation(BAD[2])).input_ids


@pytest.mark.parametrize("cached", [False, True])
def test_first_bad_row_is_an_error(short_renderer: Renderer, tmp_path: Path, cached: bool) -> None:
    if cached:
        tokenize_rows(as_rows(BAD), short_renderer, on_bad_row="drop", cache_dir=tmp_path, progress=False)
    with pytest.raises(LabError, match=r"^data\.jsonl line 3: no 'conversations'.*set data\.on_bad_row to drop$"):
        tokenize_rows(as_rows(BAD), short_renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert len(files(tmp_path)) == cached  # nothing half-written stays


def test_rows_that_are_too_long(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    rows = as_rows([BAD[0], BAD[4]])
    dropping = Renderer(smollm2_tokenizer, max_length=60, truncation="drop")
    data = tokenize_rows(rows, dropping, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert list(data.dropped) == [1]
    assert "more than data.max_length 60" in data.dropped[1]
    refusing = Renderer(smollm2_tokenizer, max_length=60, truncation="error")
    with pytest.raises(LabError, match=r"line 3: .* more than data\.max_length 60; raise data\.max_length"):
        tokenize_rows(rows, refusing, on_bad_row="drop", cache_dir=tmp_path, progress=False)


def test_nothing_left_is_an_error(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"every row of data\.jsonl is dropped; data\.jsonl line 1: no 'conv"):
        tokenize_rows(as_rows([{}, {}]), renderer, on_bad_row="drop", cache_dir=tmp_path, progress=False)


def test_cache_is_used_and_keyed(
    renderer: Renderer, short_renderer: Renderer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *_: pytest.fail("tokenised again"))
        again = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="drop", cache_dir=tmp_path, progress=False)
    assert again.fingerprint == first.fingerprint
    others = [
        tokenize_rows(as_rows(GOOD, "other rows"), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False),
        tokenize_rows(as_rows(GOOD), short_renderer, on_bad_row="error", cache_dir=tmp_path, progress=False),
    ]
    monkeypatch.setattr(module, "_FORMAT", module._FORMAT + 1)
    others.append(tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert len(files(tmp_path)) == 4


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "text", "short"])
def test_damaged_cache_is_made_again(renderer: Renderer, tmp_path: Path, damage: str) -> None:
    data = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    expected = [data.input_ids(i).tolist() for i in range(600)]
    (path,) = files(tmp_path)
    content = path.read_bytes()
    ids = data.input_ids(300).tobytes()
    place = content.index(ids)
    del data
    other = Rows(GOOD[:10], "data.jsonl", "0")
    if damage == "short":  # whole, but of fewer rows
        path.unlink()
        tokenize_rows(other, renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    else:
        flipped = content[: place + 8] + bytes([content[place + 8] ^ 1]) + content[place + 9 :]
        path.write_bytes({"empty": b"", "cut": content[:-100], "flipped": flipped, "text": b"hello"}[damage])
    again = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert [again.input_ids(i).tolist() for i in range(600)] == expected
    assert path.read_bytes() == content


def test_pickles_as_a_path(renderer: Renderer, tmp_path: Path) -> None:
    data = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    packed = pickle.dumps(data)
    assert len(packed) < 1000
    assert pickle.loads(packed).labels(599).tolist() == data.labels(599).tolist()


def _tokenize_in_child(renderer: Renderer, folder: Path) -> None:
    tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=folder, progress=False)


def test_two_processes_at_once(renderer: Renderer, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_tokenize_in_child, args=(renderer, tmp_path)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [path.suffix for path in files(tmp_path)] == [".arrow"]
    data = tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    assert data.input_ids(599).tolist() == renderer.encode(parse_conversation(GOOD[599])).input_ids


def test_unwritable_cache(renderer: Renderer, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="cannot write .* set LIGHTNING_LAB_CACHE"):
        tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path / "file", progress=False)


def test_progress_lines(renderer: Renderer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"tokenising: {done} of 600 rows" for done in (128, 256, 384, 512, 600)
    ]
    tokenize_rows(as_rows(GOOD), renderer, on_bad_row="error", cache_dir=tmp_path)
    assert capsys.readouterr().err == ""


def test_embedded_data(renderer: Renderer, tmp_path: Path) -> None:
    rows = load_rows("embedded", 50)
    data = tokenize_rows(rows, renderer, on_bad_row="error", cache_dir=tmp_path, progress=False)
    answer = rows.rows[49]["conversations"][1]["value"]
    assert json.dumps(answer)
    assert renderer.encode(parse_conversation(rows.rows[49])).input_ids == data.input_ids(49).tolist()
