import gc
import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lab.data import tokenized as module
from lightning_lab.data.conversation import RowError, parse_conversation
from lightning_lab.data.encoding import ConversationEncoder
from lightning_lab.data.rows import Part, Rows
from lightning_lab.data.sources import load_rows
from lightning_lab.data.tokenized import changed_rows, tokenize_rows
from lightning_lab.errors import LabError
from tests.data.encoded import encode, labels


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


GOOD = [chat(f"question {i}", f"answer {i} " + "and more " * (i % 7)) for i in range(600)]  # three batches of 256
BAD = [chat("a", "b"), {"text": "no"}, chat("c", "d"), RowError("the line is not JSON"), chat("e", "x " * 200)]


def as_rows(rows: list[Any], fingerprint: str = "0") -> Rows:
    part = Part("data.jsonl", rows, [2 * i + 1 for i in range(len(rows))])
    return Rows([part], "data.jsonl", fingerprint, len(rows))


@pytest.fixture(scope="module")
def encoder(smollm2_tokenizer: Any) -> ConversationEncoder:
    return ConversationEncoder(smollm2_tokenizer)


@pytest.fixture(scope="module")
def short_encoder(smollm2_tokenizer: Any) -> ConversationEncoder:
    return ConversationEncoder(smollm2_tokenizer, max_length=60)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's."""
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path))
    return tmp_path / "tokenized"


def test_every_row_is_what_the_encoder_gives(encoder: ConversationEncoder) -> None:
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    assert len(data) == 600
    for i in (0, 1, 255, 256, 511, 512, 599):
        encoded = encode(encoder, parse_conversation(GOOD[i]))
        assert data.input_ids(i).tolist() == encoded.input_ids
        assert data.labels(i).tolist() == labels(encoded)
        assert data.input_ids(i).dtype == data.labels(i).dtype == np.int32
        assert data.lengths[i] == len(encoded.input_ids)
        assert data.supervised[i] == sum(label != -100 for label in labels(encoded)[1:])
    assert (data.dropped, data.truncated) == ({}, [])
    data.input_ids(0)[:] = 7  # a copy: the file stays as it is
    assert data.input_ids(0)[0] != 7
    with pytest.raises(IndexError):
        data.input_ids(600)


def test_labels_at_the_first_token_do_not_count(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bare = ConversationEncoder(smollm2_tokenizer, str(tmp_path / "bare.jinja"))
    rows = as_rows([{"messages": [{"role": "assistant", "content": "one two three"}]}])
    data = tokenize_rows(rows, bare, on_bad_row="error", progress=False)
    assert data.labels(0)[0] != -100
    assert (data.lengths[0], data.supervised[0]) == (3, 2)


def test_weights_are_kept_where_they_are_not_all_one(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bare = ConversationEncoder(smollm2_tokenizer, str(tmp_path / "bare.jinja"))

    def answers(*weights: float) -> dict[str, Any]:
        contents = [" one", " two three", " four"]
        pairs = zip(contents, weights, strict=True)
        return {"messages": [{"role": "assistant", "content": c, "weight": w} for c, w in pairs]}

    rows = as_rows([answers(1, 1, 1), answers(1, 0, 1), answers(3, 0.5, 0)])
    for _ in ("made", "from the cache"):
        data = tokenize_rows(rows, bare, on_bad_row="error", progress=False)
        assert data.supervised.tolist() == [3, 1, 2]  # less the first token, which nothing predicts
        assert data.weight.tolist() == [3, 1, 1]
        assert [data.example(i).weights is None for i in range(3)] == [True, True, False]
        weights = data.example(2).weights
        assert weights is not None
        assert weights.tolist() == [3, 0.5, 0.5, 0]
        assert (data.labels(1) == -100).tolist() == [False, True, True, False]
        assert len(set(data.row_hashes.tolist())) == 3


def test_contents_are_the_same_in_any_format(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    bare = ConversationEncoder(smollm2_tokenizer, str(tmp_path / "bare.jinja"), max_length=3)
    answer = {"role": "assistant", "content": "a longer answer"}
    same = [
        {"messages": [{"role": "user", "content": "q"}, answer]},
        {"messages": [{"role": "user", "content": " q\n"}, {**answer, "weight": 0.5, "name": "Ada"}], "id": 7},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a longer answer"}]},
        {"instruction": "q", "output": "a longer answer"},
    ]
    call = {"function": {"name": "look", "arguments": {"x": 1, "y": None}}}
    other = [
        {"messages": [{"role": "system", "content": "s"}, *same[0]["messages"]]},
        {"messages": [{"role": "user", "content": "a longer answer"}, {**answer, "content": "q"}]},
        {**same[0], "tools": [{"name": "look"}]},
        {"messages": [same[0]["messages"][0], {**answer, "tool_calls": [call]}]},
    ]
    rows = as_rows([*same, *other, {"text": "no"}])
    data = tokenize_rows(rows, bare, on_bad_row="drop", progress=False)
    assert len(set(data.contents[:4].tolist())) == 1
    assert len(set(data.contents.tolist())) == 1 + len(other) + 1
    assert data.contents[-1] == 0
    assert data.contents.dtype == np.uint64
    whole = ConversationEncoder(smollm2_tokenizer)  # other template and length
    assert tokenize_rows(rows, whole, on_bad_row="drop", progress=False).contents[:4].tolist() == [data.contents[0]] * 4


def test_the_earliest_bad_row_is_named_whatever_comes_after(encoder: ConversationEncoder) -> None:
    rows = as_rows([*GOOD[:300], {"text": "no"}, *GOOD[:300], {"other": "no"}])
    thresholds = gc.get_threshold()
    with pytest.raises(LabError, match=r"^data\.jsonl line 601: .*keys found: text"):
        tokenize_rows(rows, encoder, on_bad_row="error", progress=False)
    assert gc.get_threshold() == thresholds


def test_bad_rows_keep_their_index(short_encoder: ConversationEncoder) -> None:
    for _ in ("made", "from the cache"):
        data = tokenize_rows(as_rows(BAD), short_encoder, on_bad_row="drop", progress=False)
        assert len(data) == 5
        assert sorted(data.dropped) == [1, 3]
        assert "keys found: text" in data.dropped[1]
        assert data.dropped[3] == "the line is not JSON"
        assert data.lengths[[1, 3]].tolist() == data.supervised[[1, 3]].tolist() == [0, 0]
        assert data.truncated == [4]
        assert data.lengths[4] == 60
        assert data.input_ids(2).tolist() == encode(short_encoder, parse_conversation(BAD[2])).input_ids


@pytest.mark.parametrize("cached", [False, True])
def test_first_bad_row_is_an_error(short_encoder: ConversationEncoder, folder: Path, cached: bool) -> None:
    if cached:
        tokenize_rows(as_rows(BAD), short_encoder, on_bad_row="drop", progress=False)
    with pytest.raises(LabError, match=r"^data\.jsonl line 3: no 'conversations'.*set data\.on_bad_row to drop$"):
        tokenize_rows(as_rows(BAD), short_encoder, on_bad_row="error", progress=False)
    assert len(list(folder.glob("*")) + list(folder.glob(".*"))) == cached  # nothing half-written stays


def test_rows_that_are_too_long(smollm2_tokenizer: Any) -> None:
    rows = as_rows([BAD[0], BAD[4]])
    dropping = ConversationEncoder(smollm2_tokenizer, max_length=60, truncation="drop")
    data = tokenize_rows(rows, dropping, on_bad_row="error", progress=False)
    assert list(data.dropped) == [1]
    assert "more than data.max_length 60" in data.dropped[1]
    refusing = ConversationEncoder(smollm2_tokenizer, max_length=60, truncation="error")
    with pytest.raises(LabError, match=r"line 3: .* more than data\.max_length 60; raise data\.max_length"):
        tokenize_rows(rows, refusing, on_bad_row="drop", progress=False)


def test_nothing_left_is_an_error(encoder: ConversationEncoder) -> None:
    with pytest.raises(LabError, match=r"every row of data\.jsonl is dropped; data\.jsonl line 1: no 'conv"):
        tokenize_rows(as_rows([{}, {}]), encoder, on_bad_row="drop", progress=False)


def test_cache_is_used_and_keyed(
    encoder: ConversationEncoder, short_encoder: ConversationEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_cached", lambda *_: pytest.fail("tokenised again"))
        again = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="drop", progress=False)
    assert again.fingerprint == first.fingerprint
    others = [
        tokenize_rows(as_rows(GOOD, "other rows"), encoder, on_bad_row="error", progress=False),
        tokenize_rows(as_rows(GOOD), short_encoder, on_bad_row="error", progress=False),
    ]
    monkeypatch.setattr(module, "_FORMAT", module._FORMAT + 1)
    others.append(tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False))
    assert len({first.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert len(list(folder.iterdir())) == 4


def test_rows_are_found_whatever_the_batches_were(
    encoder: ConversationEncoder, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache file may be of another version of this package, which wrote other batches."""
    expected = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    for path in folder.iterdir():
        path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_BATCH_ROWS", 100)
        tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
        patch.setattr(module, "write_cached", lambda *_: pytest.fail("tokenised again"))
        patch.setattr(module, "_BATCH_ROWS", 70)
        data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    for i in range(600):
        assert data.labels(i).tolist() == expected.labels(i).tolist()


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_damaged_cache_is_made_again(
    encoder: ConversationEncoder, folder: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": content[:-100], "text": b"hello"}[damage])
    again = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    assert [again.labels(i).tolist() for i in range(600)] == [data.labels(i).tolist() for i in range(600)]
    assert capsys.readouterr().err == f"warning: {path} is damaged; making it anew\n"
    assert path.read_bytes() == content


def test_any_flipped_bit_is_noticed(
    encoder: ConversationEncoder, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Anywhere in the file: ids, masks, offsets, Arrow's own headers, and the sum."""
    rows = as_rows(GOOD[:3])
    tokenize_rows(rows, encoder, on_bad_row="error", progress=False)
    (path,) = folder.iterdir()
    content = path.read_bytes()
    generator = random.Random(0)
    for bit in [*generator.sample(range(8 * len(content)), 200), 8 * len(content) - 1]:
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        tokenize_rows(rows, encoder, on_bad_row="error", progress=False)
        assert str(path) in capsys.readouterr().err
        assert path.read_bytes() == content


def run_child(target: Callable[..., None], *args: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=target, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def _read_a_file_that_is_cut_short(encoder: ConversationEncoder, folder: Path) -> None:
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    (path,) = folder.iterdir()
    os.truncate(path, 0)
    for i in range(600):
        assert len(data.labels(i)) == data.lengths[i]


def test_a_file_that_is_cut_short_meanwhile_ends_no_process(encoder: ConversationEncoder, folder: Path) -> None:
    assert run_child(_read_a_file_that_is_cut_short, encoder, folder) == 0  # was -7, SIGBUS


def _die_in_the_second_batch(encoder: ConversationEncoder) -> None:
    encode, calls = encoder.encode_batch, []

    def die(conversations: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(conversations)

    encoder.encode_batch = die  # type: ignore[method-assign]
    tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)


def test_a_killed_process_leaves_nothing_that_is_trusted(
    encoder: ConversationEncoder, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_child(_die_in_the_second_batch, encoder) == -signal.SIGKILL
    assert list(folder.glob("*.arrow")) == []
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    assert data.input_ids(599).tolist() == encode(encoder, parse_conversation(GOOD[599])).input_ids
    assert capsys.readouterr().err == ""


def test_what_killed_processes_left_is_swept_when_it_is_old(encoder: ConversationEncoder, folder: Path) -> None:
    for name, age in ((".old", 25 * 3600), (".new", 3600)):
        (folder / name).mkdir(parents=True)
        (folder / name / "half.arrow").write_text("half")
        os.utime(folder / name, (time.time() - age,) * 2)
    (folder / ".DS_Store").write_text("somebody else's")
    os.utime(folder / ".DS_Store", (0, 0))
    tokenize_rows(as_rows(GOOD[:3]), encoder, on_bad_row="error", progress=False)
    assert sorted(path.name for path in folder.glob(".*")) == [".DS_Store", ".new"]  # whose process may be at work


def test_pickles(encoder: ConversationEncoder) -> None:
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    assert pickle.loads(pickle.dumps(data)).labels(599).tolist() == data.labels(599).tolist()


def _tokenize(encoder: ConversationEncoder) -> None:
    tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)


def test_two_processes_at_once(encoder: ConversationEncoder, folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=_tokenize, args=(encoder,)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    assert [path.suffix for path in folder.iterdir()] == [".arrow"]
    data = tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)
    assert data.input_ids(599).tolist() == encode(encoder, parse_conversation(GOOD[599])).input_ids


def test_unwritable_cache(encoder: ConversationEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(LabError, match="cannot write .* set LIGHTNING_LAB_CACHE"):
        tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error", progress=False)


def test_progress_is_one_line_away_from_a_terminal(
    encoder: ConversationEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error")
    assert capsys.readouterr().err == "tokenising 600 rows of data.jsonl\n"
    tokenize_rows(as_rows(GOOD), encoder, on_bad_row="error")
    assert capsys.readouterr().err == ""


class TestRowHashes:
    def test_a_row_that_changes_is_found(self, encoder: ConversationEncoder) -> None:
        rows = [chat(f"question {i}", f"answer {i}") for i in range(6)]
        before = tokenize_rows(as_rows(rows), encoder, on_bad_row="drop", progress=False)
        rows[2], rows[4] = chat("question 2", "answer 3"), {"text": "no"}
        assert before.row_hashes.dtype == np.uint32
        after = tokenize_rows(as_rows(rows, "1"), encoder, on_bad_row="drop", progress=False)
        assert np.flatnonzero(before.row_hashes != after.row_hashes).tolist() == [2, 4]
        assert changed_rows(before.row_hashes, after.row_hashes) == "rows 2 and 4 differ"
        assert len(set(before.row_hashes.tolist())) == 6

    def test_the_mask_counts(self, smollm2_tokenizer: Any, tmp_path: Path) -> None:
        """One template, two sequences of roles: equal ids, of which others are supervised."""
        (tmp_path / "bare.jinja").write_text("{% for m in messages %}{{ m.content }}|{% endfor %}")
        bare = ConversationEncoder(smollm2_tokenizer, str(tmp_path / "bare.jinja"))
        turns = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}]
        both = [{**turn, "role": "assistant"} for turn in turns]
        data = tokenize_rows(
            as_rows([{"messages": turns}, {"messages": both}]), bare, on_bad_row="error", progress=False
        )
        assert data.input_ids(0).tolist() == data.input_ids(1).tolist()
        assert data.row_hashes[0] != data.row_hashes[1]

    @pytest.mark.parametrize(
        ("before", "now", "words"),
        [
            ([1, 2, 3], [1, 2, 3], ""),
            ([1, 2, 3], [1, 5, 3], "row 1 differs"),
            ([1, 2, 3], [9, 2, 8], "rows 0 and 2 differ"),
            ([0] * 20, [1] * 11 + [0] * 9, "rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 1 more differ"),
            (
                [0] * 1000,
                [0, 0, 0, 1, *[0] * 997],
                "the source has 1,001 rows, was 1,000; row 3 is the first that differs",
            ),
            ([1, 2, 3], [1, 2], "the source has 2 rows, was 3; the first 2 are the same"),
        ],
    )
    def test_words(self, before: list[int], now: list[int], words: str) -> None:
        assert changed_rows(before, now) == words
        assert changed_rows(np.array(before, np.uint32), torch.tensor(now)) == words


def test_embedded_data(encoder: ConversationEncoder) -> None:
    rows = load_rows("embedded", 50)
    data = tokenize_rows(rows, encoder, on_bad_row="error", progress=False)
    answer = rows[49]["conversations"][1]["value"]
    assert json.dumps(answer)
    assert encode(encoder, parse_conversation(rows[49])).input_ids == data.input_ids(49).tolist()
