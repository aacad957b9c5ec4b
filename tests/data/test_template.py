"""Templates that do not end, and where a template puts contents that it changes."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lab.data.conversation import Conversation, Message, RowError
from lightning_lab.data.encoding import ConversationEncoder
from lightning_lab.data.marks import walk
from lightning_lab.errors import LabError
from tests.data.encoded import encode

CHATML = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
LOOPS = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd") + "x" + "{% endfor %}" * 4
RECURSION = "{% macro again() %}{{ again() }}{% endmacro %}"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_template_that_loops_without_end_is_one_line(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    started, before = time.monotonic(), sys.gettrace()
    with pytest.raises(LabError, match=r"endless\.jinja cannot be used: .* takes more than 5 s.* may loop without end"):
        ConversationEncoder(smollm2_tokenizer, write(tmp_path / "endless.jinja", CHATML + LOOPS))
    assert time.monotonic() - started < 60  # not a measure of speed: it hung for ever
    assert sys.gettrace() is before


def test_a_template_that_calls_itself_is_one_line(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(LabError, match=r"again\.jinja cannot be used: the chat template calls itself without end"):
        ConversationEncoder(smollm2_tokenizer, write(tmp_path / "again.jinja", CHATML + RECURSION + "{{ again() }}"))


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [(RECURSION + "{{ again() }}", "calls itself without end"), ("{{ 1 / 0 }}", "division by zero")],
)
def test_what_goes_wrong_in_a_later_row_is_that_rows(
    smollm2_tokenizer: Any, tmp_path: Path, trouble: str, reason: str
) -> None:
    only_then = "{% if messages | length > 2 %}" + trouble + "{% endif %}"
    encoder = ConversationEncoder(smollm2_tokenizer, write(tmp_path / "later.jinja", CHATML + only_then))
    turns = (Message("user", "a"), Message("assistant", "b"))
    good, bad = Conversation(turns), Conversation(turns * 2)
    first, second, third = encoder.encode_batch([good, bad, good])
    assert isinstance(second, RowError)
    assert reason in str(second)
    assert first == third == encode(encoder, good)


@given(
    literals=st.lists(st.sampled_from(["", " ", "|", "ab"]), min_size=2, max_size=5),
    contents=st.lists(st.sampled_from(["", " ", "a", " a", "a ", " a "]), min_size=1, max_size=4),
    trims=st.lists(st.sampled_from(["as it is", "strip", "lstrip"]), min_size=4, max_size=4),
)
def test_contents_that_are_trimmed_are_placed(literals: list[str], contents: list[str], trims: list[str]) -> None:
    """The places found make up the text, whichever of several ways is taken; and one is found whenever there is one."""
    contents = contents[: len(literals) - 1]
    literals = literals[: len(contents) + 1]
    written = [c if trim == "as it is" else getattr(c, trim)() for c, trim in zip(contents, trims, strict=False)]
    text = literals[0] + "".join(w + after for w, after in zip(written, literals[1:], strict=True))
    variants = [[c, c.strip(), c.lstrip(), c.rstrip()] for c in contents]
    places = walk(text, literals, variants)
    assert places is not None
    position = 0
    for literal, (start, end), choices in zip(literals, places, variants, strict=False):
        assert text[position:start] == literal
        assert text[start:end] in choices
        position = end
    assert text[position:] == literals[-1]


def test_many_ambiguous_contents_take_no_time(smollm2_tokenizer: Any, tmp_path: Path) -> None:
    """Blank contents between blank literals: 5 ways for each of 300, of which few are tried."""
    trimming = write(tmp_path / "trim.jinja", "{% for m in messages %}{{ m.content | trim }} {% endfor %}")
    turns = [Message("user" if i % 2 else "assistant", "a ") for i in range(300)]
    rendered = ConversationEncoder(smollm2_tokenizer, trimming).template.render(Conversation(tuple(turns)))
    assert rendered.text == "a " * 300
    assert len(rendered.contents) == 300
