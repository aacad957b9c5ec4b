"""Conversations with planted duplicates, counted by hand."""

import json
from pathlib import Path
from typing import Any


def words(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]}


QUESTION, ANSWER = " ".join(words("question", 20)), words("answer", 20)
CHANGED = " ".join([*ANSWER[:10], "another", *ANSWER[11:]])  # 31 of 36 + 5 shingles of the whole are common
SPLITS = {
    "train": [
        chat(QUESTION, " ".join(ANSWER)),  # 0
        chat(QUESTION, " ".join(ANSWER)),  # 1 is a copy of 0
        chat("What is it?", " ".join(words("is", 20))),  # 2
        chat("Hello there", "Good day", "And now?", " ".join(words("now", 9))),  # 3
        chat(" ".join(words("alone", 9)), " ".join(words("single", 9))),  # 4
    ],
    "validation": [
        chat(QUESTION, " ".join(ANSWER)),  # 5 is a copy of 0 and 1
        chat("One", "Two"),  # 6
    ],
    "test": [
        chat(QUESTION, CHANGED),  # 7 is one word from 0, 1 and 5
        chat("what is  IT?", " ".join(words("other", 20))),  # 8 asks what 2 does
        chat("HELLO  there", "Who is it?", "Nobody", " ".join(words("nobody", 9))),  # 9 begins as 3
        chat("Three", "Four"),  # 10
    ],
}
ROWS = [row for rows in SPLITS.values() for row in rows]
NONE: dict[str, dict[int, int]] = {
    "copies": {},
    "near_duplicates": {},
    "same_question_other_answer": {},
    "same_first_turn": {},
}
PAIRS = [(0, 1), (0, 5), (0, 7), (1, 5), (1, 7), (5, 7)]
MATCHES = {  # of (split, which may repeat the rows of): each row, and the first that it repeats
    ("train", "train"): {k: {} if "other" in k else {0: 1, 1: 0} for k in NONE},
    ("validation", "validation"): NONE,
    ("test", "test"): NONE,
    ("validation", "train"): {k: {} if "other" in k else {5: 0} for k in NONE},
    ("test", "train"): {
        "copies": {},
        "near_duplicates": {7: 0},
        "same_question_other_answer": {7: 0, 8: 2},
        "same_first_turn": {7: 0, 8: 2, 9: 3},
    },
    ("test", "validation"): {k: {} if k == "copies" else {7: 5} for k in NONE},
}


def planted_files(folder: Path) -> dict[str, str]:
    """A file for each split, under its key of `ChatDataModule`."""
    keys = {"train": "source", "validation": "validation_source", "test": "test_source"}
    for name, rows in SPLITS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {key: str(folder / f"{name}.jsonl") for name, key in keys.items()}
