"""Tables and text as Markdown, read back by a Markdown parser."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lightning_lab.tables import Best, Table, escape, numbers

PARSER = MarkdownIt("commonmark", {"html": False}).enable("table")
# what begins or ends any markup, and some letters between
NAMES = st.text("*_\\<>[]()!&;#+-=~|.:/1ab \"'$", min_size=1, max_size=12).map(lambda name: " ".join(name.split()))


def shown(markdown: str) -> list[str]:
    """The text of each block; fails on anything but text in it."""
    texts = []
    for token in PARSER.parse(markdown):
        if token.type == "inline":
            assert {child.type for child in token.children or ()} <= {"text", "text_special"}, markdown
            texts.append("".join(child.content for child in token.children or ()))
    return texts


@settings(deadline=None)
@given(NAMES.filter(bool))
@example("<b>x</b>")
@example("[a](javascript:alert(1))")
@example("[a]: http://x.org")
@example("![a](http://x.org/y.png)")
@example("&lt;")
@example("1. a")
@example("# a")
def test_any_name_is_shown_as_it_is(name: str) -> None:
    assert shown(f"* {escape(name)}") == [name]
    assert shown(f"## {escape(name)} x") == [f"{name} x"]
    assert shown(Table(["a", name], [["b", name]], [name]).markdown()) == ["a", name, "b", name]


@pytest.mark.parametrize("name", ["lr3e-4_r16_seed1", "[q_proj, v_proj]", "-0.0012", "a (b)", "R&D", "2 > 1", "x [y]"])
def test_usual_names_stay_as_they_are(name: str) -> None:
    assert escape(name) == name


def test_code_stays_code() -> None:
    assert escape("make it with `test --run_dir a*_ --ckpt_path best`, *now*") == (
        "make it with `test --run_dir a*_ --ckpt_path best`, \\*now\\*"
    )


@settings(deadline=None)
@given(st.text("`<b>\\|a ", min_size=1, max_size=14).filter(str.strip))
@example("`<b>``")
@example("`a``b`<b>`")
@example("```<b>")
def test_backticks_let_no_markup_through(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    for markdown in (f"* {escape(text)}", f"a {escape(text)}", Table(["c"], [[text]], ["c"]).markdown()):
        tokens = parser.parse(markdown)
        assert not {token.type for token in tokens} & {"fence", "html_block"}
        inline = {child.type for token in tokens for child in token.children or ()}
        assert inline <= {"text", "text_special", "code_inline"}, markdown


def test_a_table_lines_up() -> None:
    table = Table(["run", "loss"], [["a | b", Best("1.5")], ["c", "12.25"]], ["run"])
    assert table.markdown() == ("| run    |  loss |\n|--------|------:|\n| a \\| b |   1.5 |\n| c      | 12.25 |")
    assert table.markdown(marked=True).splitlines()[2] == "| a \\| b | **1.5** |"


def test_a_table_without_padding() -> None:
    assert Table(["a", "b"], [["1", ""]], padded=False).markdown() == "| a | b |\n|---:|---:|\n| 1 | |"


def test_the_best_of_several_numbers_is_marked() -> None:
    def best(cells: list[str]) -> list[int]:
        return [place for place, cell in enumerate(cells) if isinstance(cell, Best)]

    assert numbers([1.5, None, 0.25], ".2f", min) == ["1.50", "–", "0.25"]
    assert best(numbers([1.5, None, 0.25, math.nan, 0.25], ".2f", min)) == [2, 4]
    assert best(numbers([1.5, 0.25, math.inf], ".2f", max)) == [0]
    assert best(numbers([1.5, None, math.nan], ".2f", min)) == []  # nothing to choose from
    assert best(numbers([1.5, 0.25], ".2f")) == []
