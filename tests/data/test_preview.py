import io
import json
from collections.abc import Iterator
from typing import Any

import pytest

from lightning_lab.data.encoding import Renderer
from lightning_lab.data.preview import preview
from lightning_lab.data.sources import Rows
from lightning_lab.data.tokenized import TokenizedRows, tokenize_rows

ROWS = [
    {"instruction": "Say [bold]hi[/bold]", "output": "hi \x1b[31m", "system": "s"},
    {"text": "bad"},
    {"instruction": "Count", "output": "one two three four five six seven eight " * 3, "system": "s"},
    {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "a"}] * 1
     + [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> Rows:
    return Rows(ROWS, "data.json", "0", len(ROWS))


@pytest.fixture(scope="module")
def renderer(smollm2_tokenizer: Any) -> Renderer:
    return Renderer(smollm2_tokenizer, max_length=34)


@pytest.fixture(scope="module")
def data(rows: Rows, renderer: Renderer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TokenizedRows]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tokenize_rows(rows, renderer, on_bad_row="drop", progress=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(data: TokenizedRows, rows: Rows, tokenizer: Any, file: io.StringIO | None = None, **options: Any) -> str:
    file = file or io.StringIO()
    preview(data, rows, tokenizer, Renderer(tokenizer, max_length=34), file=file, **options)
    return file.getvalue()


def test_text(data: TokenizedRows, rows: Rows, smollm2_tokenizer: Any) -> None:
    text = shown(data, rows, smollm2_tokenizer, limit=3, packing={"micro-batches": 2, "fill": 0.51234567})
    assert "<|im_start|>user\nSay [bold]hi[/bold]<|im_end|>\n<|im_start|>assistant\n⟦hi ␛[31m<|im_end|>⟧\n" in text
    assert "assistant\n⟦a<|im_end|>⟧\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n⟦c<|im_end|>⟧\n" in text
    assert text.index("--- data.json row 0: ") < text.index("--- data.json row 2: 34 tokens, ")
    assert "4 rows of data.json: 3 kept, 1 dropped" in text
    assert "1 cut at max_length: rows 2\n" in text
    assert "0 tokenised otherwise without cuts at the answers\n" in text
    assert (
        "dropped data.json row 1: no 'conversations', 'messages' or 'instruction' in the row (keys found: text)" in text
    )
    assert text.endswith("micro-batches: 2\nfill: 0.5123\n")
    assert f"{data.lengths.sum()} tokens, {data.supervised.sum()} supervised" in text
    assert "p100 34" in text


def test_indices_and_limit(data: TokenizedRows, rows: Rows, smollm2_tokenizer: Any) -> None:
    text = shown(data, rows, smollm2_tokenizer, indices=[3, 0], limit=1)
    assert "row 3: " in text
    assert "row 0: " not in text
    assert "2 rows of data.json: 2 kept, 0 dropped" in text
    assert "0 cut at max_length\n" in text


@pytest.mark.usefixtures("data")  # its cache
def test_boundary_shifts_are_counted(smollm2_tokenizer: Any, renderer: Renderer) -> None:
    """Of the rows that are kept, by comparing with the whole text tokenised at once."""
    answers = ["plain", "\n\nbegins with empty lines", None, " begins with a space", "\n", "x" * 9]
    rows = Rows([{"instruction": "q", "output": answer} for answer in answers], "data.json", "1", 6)
    data = tokenize_rows(rows, renderer, on_bad_row="drop", progress=False)
    backend = smollm2_tokenizer.backend_tokenizer
    shifted = []
    for i, answer in enumerate(answers):
        if answer is not None:
            header = backend.encode("assistant\n", add_special_tokens=False).ids
            cut = header + backend.encode(answer, add_special_tokens=False).ids
            if backend.encode(f"assistant\n{answer}", add_special_tokens=False).ids != cut:
                shifted.append(i)
    assert 0 < len(shifted) < 5
    named = f"{len(shifted)} tokenised otherwise without cuts at the answers: rows {', '.join(map(str, shifted))}\n"
    assert named in shown(data, rows, smollm2_tokenizer)
    assert f"1 tokenised otherwise without cuts at the answers: rows {shifted[-1]}\n" in shown(
        data, rows, smollm2_tokenizer, indices=[shifted[-1], 0]
    )


def test_colours_on_a_terminal(
    data: TokenizedRows, rows: Rows, smollm2_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    text = shown(data, rows, smollm2_tokenizer, Terminal(), limit=3)
    assert "⟦" not in text
    assert "\x1b[32ma<|im_end|>\x1b[0m" in text  # green
    assert "\x1b[2m" in text  # dim
    assert "\x1b[31m" not in text  # what the row quotes does not reach the terminal


def test_json(data: TokenizedRows, rows: Rows, smollm2_tokenizer: Any) -> None:
    lines = [json.loads(line) for line in shown(data, rows, smollm2_tokenizer, limit=9, as_json=True).splitlines()]
    assert [line["row"] for line in lines] == [0, 2, 3]
    for line in lines:
        assert set(line) == {"row", "input_ids", "labels", "text"}
        assert line["input_ids"] == data.input_ids(line["row"]).tolist()
        assert line["labels"] == data.labels(line["row"]).tolist()
    assert lines[0]["text"].endswith("<|im_start|>assistant\nhi \x1b[31m<|im_end|>\n")
    assert len(lines[1]["labels"]) == 34
