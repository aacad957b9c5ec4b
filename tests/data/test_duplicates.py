"""Near-duplicates are held against an exhaustive search over sets of words; the rest was counted by hand."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lab.data import duplicates as module
from lightning_lab.data.conversation import RowError, RowFormat
from lightning_lab.data.duplicates import Duplicates, find_duplicates
from lightning_lab.data.rows import Part, Rows
from lightning_lab.data.sources import load_rows
from tests.data.planted import MATCHES, PAIRS, ROWS, SPLITS, chat, words


def as_rows(rows: Sequence[Any], fingerprint: str = "0", **reading: RowFormat) -> Rows:
    return Rows([Part("data.jsonl", rows)], "data.jsonl", fingerprint, len(rows), **reading)


def find(rows: Sequence[Any], fingerprint: str | None = None) -> Duplicates:
    return find_duplicates(as_rows(rows, fingerprint or repr(rows)), progress=False)


def pairs(found: Duplicates) -> list[tuple[int, int]]:
    """All near-duplicates, those for which another row stands too."""
    rows, near = range(len(found.same)), {frozenset(pair) for pair in found.pairs.tolist()}
    same = found.same.tolist()
    return [(i, j) for i, j in combinations(rows, 2) if same[i] == same[j] or frozenset((same[i], same[j])) in near]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's."""
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path))
    return tmp_path / "duplicates"


def exhaustive(rows: Sequence[Any]) -> list[tuple[int, int]]:
    """Pairs with a Jaccard index of at least 1/2 of their runs of five lower-case words, by an inverted index."""
    sets = []
    for row in rows:
        text = " ".join(turn["content"] for turn in row["messages"] if turn["role"] != "system").lower()
        said = "".join(c if c.isalnum() or c == "_" else " " for c in text).split()
        sets.append({hash(tuple(said[i : i + 5])) for i in range(max(1, len(said) - 4))} if said else set())
    places = defaultdict(list)
    for i, runs in enumerate(sets):
        for run in runs:
            places[run].append(i)
    common = Counter(pair for found in places.values() if len(found) > 1 for pair in combinations(found, 2))
    return sorted((i, j) for (i, j), n in common.items() if 2 * n >= len(sets[i]) + len(sets[j]) - n)


def test_planted_ones() -> None:
    found = find(ROWS)
    assert pairs(found) == PAIRS
    ends = np.cumsum([0, *map(len, SPLITS.values())])
    rows = {name: np.arange(*ends[i : i + 2]) for i, name in enumerate(SPLITS)}
    contents = np.array([hash(repr(row)) % 2**63 for row in ROWS])
    for (split, other), expected in MATCHES.items():
        assert found.matches(contents, rows[split], rows[other]) == expected, (split, other)
    groups = found.groups(11).tolist()
    assert {i for i in range(11) if groups[i] == groups[0]} == {0, 1, 5, 7}
    assert len(set(groups)) == 8
    groups = found.groups(5).tolist()  # of the first rows, whatever comes after
    assert groups[0] == groups[1]
    assert len(groups) == 5
    assert len(set(groups)) == 4


def test_the_bound_belongs_to_it() -> None:
    """Ten words are six runs: with two other words at the beginning 4 of 8 are common, with three 3 of 9."""
    text = words("w", 10)
    others = [" ".join([*words(name, n), *text[n:]]) for name, n in (("a", 2), ("b", 3))]
    assert pairs(find([chat("", " ".join(text)), *(chat("", other) for other in others)])) == [(0, 1), (1, 2)][:1]


def test_what_words_are() -> None:
    rows = [
        chat("Hello, World!", "It's here."),
        chat("hello world", "IT S (here)"),
        chat("今天天气怎么样啊", "今天天气很好很晴朗"),  # of a script without spaces
        chat("今天天气怎么样啊", "今天天气很好很晴天"),
        chat("?", "!"),  # no word at all
        chat("?", "!"),
        chat("¿", "…"),
    ]
    assert pairs(find(rows)) == [(0, 1), (2, 3), (4, 5)]


def test_system_messages_do_not_count_but_belong_to_the_question() -> None:
    system = {"role": "system", "content": " ".join(words("rule", 50))}
    rows = [chat(f"question {i}", " ".join(words(f"answer{i}", 9))) for i in range(2)] + [chat("question 0", "Else")]
    ruled = [{"messages": [system, *row["messages"]]} for row in rows]
    found = find([*ruled, rows[2]])
    assert pairs(found) == [(2, 3)]
    every = np.arange(4)
    matches = found.matches(every + 1, every, every)
    assert matches["same_question_other_answer"] == {0: 2, 2: 0}
    assert matches["same_first_turn"] == {0: 2, 2: 0, 3: 0}


def test_rows_that_cannot_be_read_repeat_nothing() -> None:
    bad = RowError("the line is not JSON")
    answer = {"messages": [{"role": "assistant", "content": "an answer to nothing"}]}
    found = find([bad, {"text": "no"}, answer, bad, answer, ROWS[0]], "bad")
    assert pairs(found) == [(2, 4)]
    assert found.question.tolist()[:5] == found.first.tolist()[:5] == [0] * 5
    every = np.arange(6)
    assert set(map(len, found.matches(every + 1, every, every).values())) == {0, 2}
    assert pairs(find([bad, bad], "all bad")) == []


text = st.lists(st.sampled_from("abc"), min_size=1, max_size=12).map(" ".join)


@given(st.lists(st.builds(chat, text, text), min_size=1, max_size=25))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_all_are_found_and_no_others(rows: list[Any]) -> None:
    assert pairs(find(rows)) == exhaustive(rows)


def test_all_are_found_among_real_conversations() -> None:
    rows = load_rows("chitchat", 600)
    found = find_duplicates(rows, progress=False)
    assert pairs(found) == exhaustive(rows)
    assert pairs(found)


@pytest.mark.slow
def test_figures_that_are_published() -> None:
    """Of chitchat's permutation by seed 3407 the last 403, and the first 3,213 to train; of the embedded data none."""
    rows = load_rows("chitchat")
    order = np.random.default_rng(3407).permutation(len(rows))
    found = find_duplicates(rows, progress=False)
    assert pairs(found) == exhaustive(rows)
    matches = found.matches(np.arange(len(rows)), order[-403:], order[:3213])
    assert {kind: len(of_kind) for kind, of_kind in matches.items()} == {
        "copies": 0,
        "near_duplicates": 5,
        "same_question_other_answer": 10,
        "same_first_turn": 137,
    }
    assert pairs(find_duplicates(load_rows("embedded"), progress=False)) == []


def test_a_text_that_all_share_does_not_cost_the_square_of_their_number(capsys: pytest.CaptureFixture[str]) -> None:
    shared = " ".join(words("shared", 60))
    rows = [chat(shared, " ".join(words(f"own{i}", 10))) for i in range(400)] + [chat("What?", "Nothing")]
    found = find_duplicates(as_rows(rows))
    assert "\n400 rows share a text with over 50 others, compared with some only\n" in capsys.readouterr().err
    assert len(found.pairs) < 400 * 100 < 400 * 399 / 2
    assert set(found.pairs.ravel().tolist()) == set(range(400))
    assert len(set(found.groups(401).tolist())) == 2
    # and hides no others
    rows[7] = chat(rows[300]["messages"][0]["content"], " ".join([*words("own300", 9), "else"]))
    assert (7, 300) in pairs(find(rows, "changed"))


def test_what_was_found_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    first = find_duplicates(as_rows(ROWS))
    assert capsys.readouterr().err == "looking for duplicates among 11 rows of data.jsonl\n"
    (path,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(module, "_compare", lambda *_: pytest.fail("compared again"))
        again = find_duplicates(as_rows(ROWS))
    assert [values.tolist() for values in again] == [values.tolist() for values in first]
    find_duplicates(as_rows(ROWS, row_format=RowFormat(ignore=("id",))), progress=False)
    find_duplicates(as_rows(ROWS, "of other rows"), progress=False)
    assert len(list(folder.iterdir())) == 3
    assert capsys.readouterr().err == ""
    path.write_bytes(path.read_bytes()[:-50])
    again = find_duplicates(as_rows(ROWS))
    assert [values.tolist() for values in again] == [values.tolist() for values in first]
    assert f"warning: {path} is damaged; making it anew\n" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_stops_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write_text("a file")
    assert pairs(find(ROWS)) == PAIRS
    assert f"warning: cannot write {folder}/" in capsys.readouterr().err


def test_a_row_is_not_its_own_near_duplicate() -> None:
    """Two of its hashes differ in the first bit alone, which is cut off to make room for the row."""
    rows = [np.array([1, 1 + 2**63], dtype=np.uint64), np.array([5], dtype=np.uint64)]
    assert module._candidates(rows)[0].tolist() == []


def test_copies_are_found_in_any_crowd() -> None:
    """Twelve texts in three places: each stands in 144 different conversations, of which there are six copies."""
    texts = [" ".join(words(f"text{i}", 20)) for i in range(12)]
    rows = [chat(a, f"{b} {c}") for a in texts[:4] for b in texts[4:8] for c in texts] * 6
    found = find(rows, "crowd")
    assert found.same.tolist() == [*range(192)] * 6
    groups, every = found.groups(len(rows)), np.arange(len(rows))
    assert all(len(set(groups[i::192].tolist())) == 1 for i in range(192))
    contents = np.tile(np.arange(1, 193), 6)
    assert found.matches(contents, every[-1:], every[:-1], ["copies", "near_duplicates"]) == {
        "copies": {1151: 191},
        "near_duplicates": {1151: 191},
    }
