"""Conversations that repeat each other: copies, near-duplicates, the same question with another answer."""

import hashlib
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from itertools import count
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.progress import Progress
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from lightning_lab.data.cache import making, read_cached, write_cached
from lightning_lab.data.conversation import Conversation, Prompt
from lightning_lab.data.rows import Rows
from lightning_lab.data.tokenized import hashed
from lightning_lab.data.turns import RowError, or_error
from lightning_lab.hub import cache_dir

NEAR = 0.5  # Jaccard index of their shingles from which two conversations are near-duplicates
SHINGLE = 5  # words
# Where more than CROWD conversations have a shingle by which they might be found, each is compared with the FEW after
# it there, so that a text that all share does not cost the square of their number.
CROWD, FEW = 50, 5

KINDS = ("copies", "near_duplicates", "same_question_other_answer", "same_first_turn")

# Part of the cache key: raise it whenever the columns, or what is made of the same rows, change.
_FORMAT = 2
# A character of a script without spaces is a word.
_WORD = re.compile(r"[\u3040-\u9fff]|[^\W\u3040-\u9fff]+")
_FACTORS = np.random.default_rng(0).integers(2**64, size=SHINGLE, dtype=np.uint64) | np.uint64(1)
_HASHES = ("first", "question", "answer")
_SCHEMA = pa.schema(  # `near` has rows after this one alone
    {**dict.fromkeys(_HASHES, pa.uint64()), "same": pa.int64(), "near": pa.list_(pa.int64()), "crowded": pa.bool_()}
)


class Duplicates(NamedTuple):
    """What the rows of a source share, whatever their splits; case and spacing make no difference.

    Attributes:
        first: uint64 [rows], a hash of the first user turn; 0 where there is none.
        question: uint64 [rows], of all before the last answer, the system message and tools too; 0 where nothing is.
        answer: uint64 [rows], of the last answer.
        same: int64 [rows], the first row with the same shingles, which stands for all of them.
        pairs: int64 [pairs, 2], near-duplicates among those rows in ascending order, the lower row first.

    """

    first: np.ndarray
    question: np.ndarray
    answer: np.ndarray
    same: np.ndarray
    pairs: np.ndarray

    def groups(self, rows: int) -> np.ndarray:
        """Number the connected near-duplicates among the first ``rows`` rows: int [rows], the group of each."""
        links = np.concatenate([self.pairs, np.column_stack([self.same, np.arange(len(self.same))])])
        linked = links[links[:, 1] < rows]
        graph = coo_array((np.ones(len(linked)), tuple(linked.T)), shape=(rows, rows))
        return connected_components(graph, directed=False)[1]

    def matches(
        self, contents: np.ndarray, rows: np.ndarray, others: np.ndarray, kinds: Sequence[str] = KINDS
    ) -> dict[str, dict[int, int]]:
        """Find rows that repeat one of the ``others``, which may be the same rows.

        Args:
            contents: uint64 [all rows], as of `TokenizedRows`: equal of exact copies.
            rows: To look at.
            others: To look among.
            kinds: What to look for.

        Returns:
            For each kind such rows in ascending order, each with one that it repeats. ``copies`` are near-duplicates
            too.

        """
        row = np.arange(len(contents))
        keys = {
            "copies": (contents, row),
            "near_duplicates": (self.same + 1, row),
            "same_question_other_answer": (self.question, self.answer),
            "same_first_turn": (self.first, row),
        }
        found = {kind: _matches(*keys[kind], rows, others) for kind in kinds}
        if "near_duplicates" in kinds:
            stands_for = dict(zip(self.same[others[::-1]].tolist(), others[::-1].tolist(), strict=True))
            both = np.concatenate([self.pairs, self.pairs[:, ::-1]])
            beside = {one: stands_for[other] for one, other in both[::-1].tolist() if other in stands_for}
            stood_for = zip(rows.tolist(), self.same[rows].tolist(), strict=True)
            near = {row: beside[one] for row, one in stood_for if one in beside}
            found["near_duplicates"] = near | found["near_duplicates"]
        return {kind: dict(sorted(each.items())) for kind, each in found.items()}


def _matches(key: np.ndarray, unlike: np.ndarray, rows: np.ndarray, others: np.ndarray) -> dict[int, int]:
    """Rows for which one of the ``others`` has the same key, unless it is 0, and something else in ``unlike``."""
    places: dict[int, dict[int, int]] = defaultdict(dict)
    for of_key, of_unlike, other in zip(key[others].tolist(), unlike[others].tolist(), others.tolist(), strict=True):
        places[of_key].setdefault(of_unlike, other)
    found = {}
    for of_key, of_unlike, row in zip(key[rows].tolist(), unlike[rows].tolist(), rows.tolist(), strict=True):
        other = next((other for told, other in places[of_key].items() if told != of_unlike), None)
        if of_key and other is not None:
            found[row] = other
    return found


def find_duplicates(rows: Rows, progress: bool = True) -> Duplicates:
    """Compare all rows, or read what an earlier call found; rows that cannot be read repeat nothing.

    Words are those of all turns but the system message, which data sets repeat. Near-duplicates are not estimated: but
    for crowds, of which a line says how many rows they are, all are found.

    Args:
        rows: The source.
        progress: Report on stderr.

    """
    key = f"{_FORMAT} {NEAR} {SHINGLE} {CROWD} {FEW} {rows.fingerprint} {rows.row_format}"
    path = cache_dir() / "duplicates" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.arrow"
    table = read_cached(path)
    if table is None:
        with making(f"looking for duplicates among {len(rows):,} rows of {rows.name}", progress) as bar:
            table = _compare(rows, bar)
        try:
            write_cached(path, _SCHEMA, [table])
        except OSError as error:  # it can be done without
            print(f"warning: cannot write {path}: {error.strerror or error}", file=sys.stderr)
    pairs = np.column_stack([pc.list_parent_indices(table["near"]), pc.list_flatten(table["near"])])
    if progress and (crowded := pc.sum(table["crowded"]).as_py()):
        print(f"{crowded:,} rows share a text with over {CROWD} others, compared with some only", file=sys.stderr)
    first, question, answer, same = (table[name].to_numpy() for name in (*_HASHES, "same"))
    return Duplicates(first, question, answer, same, pairs)


def try_find(rows: Rows, progress: bool = True) -> Duplicates | None:
    """Do as `find_duplicates`, for those who only tell: None where it fails, as a line says."""
    try:
        return find_duplicates(rows, progress)
    except Exception as error:  # of a million rows the memory may not do
        print(f"warning: near-duplicates are not known ({type(error).__name__}: {error})", file=sys.stderr)
        return None


def _compare(rows: Rows, bar: Progress) -> pa.Table:
    numbers: dict[str, int] = defaultdict(count(1).__next__)
    turns, shingles = [], []
    for index in bar.track(range(len(rows)), description="reading"):
        said = or_error(rows.conversation, index)
        turns.append((0, 0, 0) if isinstance(said, RowError) else _turns(said))
        words = [] if isinstance(said, RowError) else _words(said)
        shingles.append(_shingles([numbers[word] for word in words]))
    first_of: dict[bytes, int] = {}
    same = [first_of.setdefault(each.tobytes(), i) if len(each) else i for i, each in enumerate(shingles)]
    once = [each if same[i] == i else each[:0] for i, each in enumerate(shingles)]  # so identical ones are no crowd
    candidates, crowded = _candidates(once)
    found = [_are_near(shingles[i], shingles[j]) for i, j in bar.track(candidates.tolist(), description="comparing")]
    pairs = candidates[np.array(found, dtype=bool)]
    ends = np.searchsorted(pairs[:, 0], np.arange(len(rows) + 1)).astype(np.int32)
    near = pa.ListArray.from_arrays(ends, pairs[:, 1])
    first, question, answer = np.array(turns, dtype=np.uint64).T
    return pa.table([first, question, answer, same, near, np.isin(np.arange(len(rows)), crowded)], schema=_SCHEMA)


def _turns(conversation: Conversation) -> tuple[int, int, int]:
    """Hashes of the first user turn, of all before the last answer, and of that answer; 0 where there is none."""
    first = next((_plain(m.content) for m in conversation.messages if m.role == "user"), "")
    prompt = Prompt.of(0, conversation)
    asked = prompt and [[(m.role, _plain(m.answer)) for m in prompt.conversation.messages], conversation.tools]
    answer = prompt and _plain(prompt.reference or "")
    return hashed(first) if first else 0, hashed(asked) if asked else 0, hashed(answer)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _words(conversation: Conversation) -> list[str]:
    text = " ".join(m.answer for m in conversation.messages if m.role != "system").casefold()
    return _WORD.findall(text) or text.split()


def _shingles(words: Sequence[int]) -> np.ndarray:
    """Hash each run of five words, numbered from 1; fewer words are one shingle, none have none. uint64, ascending."""
    padded = np.zeros(max(len(words), SHINGLE), dtype=np.uint64)
    padded[: len(words)] = words
    windows = np.lib.stride_tricks.sliding_window_view(padded, SHINGLE)
    return np.unique(windows[: len(words)] @ _FACTORS)  # modulo 2**64


def _candidates(shingles: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows among which all near-duplicates are, and rows that are not compared with all that they might be.

    The prefix filter (Chaudhuri, Ganti and Kaushik 2006, "A primitive operator for similarity joins in data cleaning"):
    in any fixed order of the shingles, sets of a Jaccard index of at least t have one in common among the first
    ``n - ceil(t * n) + 1`` of each set's n. With the rarest first most have no other row's there. MinHash bands that
    miss less than 1 % of the pairs at 0.5 (73 of 4, by rensa 0.5) took twice the time, and found two thousand times as
    many candidates where all rows shared a third of their text.

    Returns:
        int64 [candidates, 2] in ascending order, the lower row first; int64 [crowded rows].

    """
    sizes = np.array([len(each) for each in shingles])
    bits = np.uint64(len(shingles).bit_length())
    packed = np.concatenate(shingles) << bits  # what is left of a hash, 44 bits of a million rows', and its row
    packed |= np.repeat(np.arange(len(shingles), dtype=np.uint32), sizes)
    packed.sort()
    key = packed >> bits
    shared = np.zeros(len(key), dtype=bool)
    shared[1:] = key[1:] == key[:-1]
    shared[:-1] |= shared[1:]
    key, row = key[shared], (packed[shared] & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    del packed, shared
    counts = np.unique(key, return_counts=True)[1]
    rarest = np.lexsort((key, np.repeat(counts, counts), row))
    shared_by_row = np.bincount(row, minlength=len(sizes))
    place = np.arange(len(row)) - np.repeat(np.cumsum(shared_by_row) - shared_by_row, shared_by_row)
    # the others of a row are its own alone, and come before these
    prefix = shared_by_row - np.ceil(NEAR * sizes).astype(np.int64) + 1
    chosen = np.sort(rarest[place < np.repeat(prefix, shared_by_row)])
    key, row = key[chosen], row[chosen]
    counts = np.unique(key, return_counts=True)[1]
    crowded = np.repeat(counts > CROWD, counts)
    at, found = np.arange(len(key)), [np.empty(0, dtype=np.int64)]
    for distance in range(1, CROWD):
        at = at[at + distance < len(key)]
        at = at[(key[at] == key[at + distance]) & ((distance <= FEW) | ~crowded[at])]
        at = at[row[at] != row[at + distance]]  # two hashes of one row may be cut to the same
        found.append(np.unique(row[at] * len(sizes) + row[at + distance]))
    return np.column_stack(np.divmod(np.unique(np.concatenate(found)), len(sizes))), np.unique(row[crowded])


def _are_near(one: np.ndarray, other: np.ndarray) -> bool:
    both = np.sort(np.concatenate([one, other]))
    common = np.count_nonzero(both[1:] == both[:-1])
    return bool(common >= NEAR * (len(both) - common))
