import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.preview import check, packing_statistics, preview
from tests.data.planted import MATCHES, NONE, planted_files

ROWS = [
    {"instruction": "Say [bold]hi[/bold]", "output": "hi \x1b[31m", "system": "s"},
    {"text": "bad"},
    {"instruction": "Count", "output": "one two three four five six seven eight " * 3, "system": "s"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}] * 1
     + [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def prepare(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def made(rows: list[dict[str, Any]], **options: Any) -> ChatDataModule:
        path = tmp_path_factory.mktemp("rows") / "data.json"
        path.write_text(json.dumps(rows))
        settings: Any = {"tokenizer": str(tiny_base), "template": "tokenizer", "max_length": 34, "on_bad_row": "drop"}
        data = ChatDataModule(str(path), split=[0.5, 0.5, 0.0], batch_size=2, **settings, **options)
        data.prepare(progress=False)
        return data

    return made


@pytest.fixture(scope="module")
def prepared(prepare: Any) -> ChatDataModule:
    return prepare(ROWS)


@pytest.fixture
def data(prepared: ChatDataModule) -> ChatDataModule:
    prepared.eval_split = None
    return prepared


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(data: ChatDataModule, file: io.StringIO | None = None, **options: Any) -> str:
    file = file or io.StringIO()
    with redirect_stdout(file):
        preview(data, **options)
    return file.getvalue()


def test_text(data: ChatDataModule) -> None:
    text = shown(data, limit=3)
    assert "<|im_start|>user\nSay [bold]hi[/bold]<|im_end|>\n<|im_start|>assistant\n⟦hi ␛[31m<|im_end|>⟧\n" in text
    assert "assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n" in text
    assert text.index("data.json row 0: ") < text.index("data.json row 2: 34 tokens, ")
    assert f"4 rows of {data.source}: 3 kept, 1 dropped" in text
    assert "1 cut at max_length: rows 2\n" in text
    assert "0 tokenised otherwise without cuts at the answers\n" in text
    reason = "no 'conversations', 'messages', 'prompt' or 'instruction' in the row (keys found: text)"
    assert f"dropped 1: {reason} ({data.source} row 1)\n" in text
    figures = "".join(f"{name}: {value}\n" for name, value in packing_statistics(data).items())
    assert text.endswith(figures)
    assert f"{data.tokenized.lengths.sum()} tokens, {data.tokenized.supervised.sum()} supervised" in text
    assert "p100 34" in text


def test_a_split_and_a_limit(data: ChatDataModule) -> None:
    data.eval_split = "validation"
    mine: list[int] = np.random.default_rng(3407).permutation(4)[2:].tolist()
    kept = sorted(row for row in mine if row != 1)
    text = shown(data, limit=1)
    assert [f"row {row}: " in text for row in (0, 2, 3)] == [row == kept[0] for row in (0, 2, 3)]
    assert f"2 rows of {data.source}: {len(kept)} kept, {2 - len(kept)} dropped" in text
    assert f"{int(2 in mine)} cut at max_length" in text


def test_boundary_shifts_are_counted(prepare: Any) -> None:
    """Of the rows that are kept, by comparing with the whole text tokenised at once."""
    answers = ["plain", "\n\nbegins with empty lines", None, " begins with a space", "\n", "x" * 9]
    data = prepare([{"instruction": "q", "output": answer} for answer in answers], empty_answers="keep")
    backend = data.tokenizer.backend_tokenizer
    shifted = []
    for i, answer in enumerate(answers):
        if answer is not None:
            header = backend.encode("assistant\n", add_special_tokens=False).ids
            cut = header + backend.encode(answer, add_special_tokens=False).ids
            if backend.encode(f"assistant\n{answer}", add_special_tokens=False).ids != cut:
                shifted.append(i)
    assert 0 < len(shifted) < 5
    named = f"{len(shifted)} tokenised otherwise without cuts at the answers: rows {', '.join(map(str, shifted))}\n"
    assert named in shown(data)


def test_colours_on_a_terminal(data: ChatDataModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(data, Terminal(), limit=3)
    assert "⟦" not in text
    assert "\x1b[32ma<|im_end|>\x1b[0m" in text  # green
    assert "\x1b[2m" in text  # dim
    assert "\x1b[31m" not in text  # what the row quotes does not reach the terminal


def test_keys_that_are_not_read_are_counted(prepare: Any) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "mask": True, "id": 3}]
    rows = [{"messages": turns, "score": 1}, {"messages": turns, "source": ""}, {"text": "bad", "score": 1}]
    text = shown(prepare(rows, ignore=["mask"]))
    assert "keys that are not read, and the rows that have them: id (2), mask (2), score (1)\n" in text


def test_json(data: ChatDataModule) -> None:
    lines = [json.loads(line) for line in shown(data, limit=9, as_json=True).splitlines()]
    assert [line["row"] for line in lines] == [0, 2, 3]
    for line in lines:
        assert set(line) == {"row", "input_ids", "labels", "text"}
        assert line["input_ids"] == data.tokenized.input_ids(line["row"]).tolist()
        assert line["labels"] == data.tokenized.labels(line["row"]).tolist()
    assert lines[0]["text"].endswith("<|im_start|>assistant\nhi \x1b[31m<|im_end|>\n")
    assert len(lines[1]["labels"]) == 34


class TestCheck:
    @pytest.fixture(scope="class")
    def planted(self, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> ChatDataModule:
        files: Any = planted_files(tmp_path_factory.mktemp("planted"))
        data = ChatDataModule(**files, split=[5, 0, 0], tokenizer=str(tiny_base), template="tokenizer")
        data.prepare(progress=False)
        return data

    def checked(self, data: ChatDataModule, **options: Any) -> str:
        file = io.StringIO()
        with redirect_stdout(file):
            check(data, **options)
        return file.getvalue()

    def test_counts_and_places(self, planted: ChatDataModule) -> None:
        table, places = self.checked(planted).split("|\ntrain, ")
        sizes = {"train": 5, "validation": 2, "test": 4}
        counts = [
            [split, str(sizes[split]), other, *(str(len(of_kind)) for of_kind in found.values())]
            for (split, other), found in MATCHES.items()
        ]
        assert [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]] == counts
        train, held_out = planted.source, planted.hparams["test_source"]
        assert f"copies of train: {train} line 1 as {train} line 2, {train} line 2 as {train} line 1\n" in places
        where = f"{held_out} line 1 as {train} line 1, {held_out} line 2 as {train} line 3"
        assert f"\ntest, same question other answer of train: {where}\n" in places
        where += f", {held_out} line 3 as {train} line 4"
        assert f"\ntest, same first turn of train: {where}\n" in places

    def test_json(self, planted: ChatDataModule) -> None:
        found = json.loads(self.checked(planted, as_json=True))
        assert found["conversations"] == {"train": 5, "validation": 2, "test": 4}
        assert found["source"] == planted.rows.name
        for each, (names, expected) in zip(found["found"], MATCHES.items(), strict=True):
            assert (each.pop("split"), each.pop("repeats")) == names
            assert each == {kind: [list(pair) for pair in of_kind.items()] for kind, of_kind in expected.items()}

    def test_without_held_out_rows(self, data: ChatDataModule, tiny_base: Path) -> None:
        """Of the four rows the splits keep three, in two splits."""
        assert [line.split()[1] for line in self.checked(data).splitlines()[2:]] == [
            "train",
            "validation",
            "validation",
        ]
        alone = ChatDataModule(data.source, split=[1, 0, 0], tokenizer=str(tiny_base), template="tokenizer")
        alone.hparams["on_bad_row"] = "drop"
        alone.prepare(progress=False)
        found = json.loads(self.checked(alone, as_json=True))
        assert found["found"] == [{"split": "train", "repeats": "train", **{kind: [] for kind in NONE}}]
