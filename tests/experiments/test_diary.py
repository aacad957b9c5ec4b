"""The report's conversations, on files written by hand: which are shown, their table, their heat in the page."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_lab.experiments.diary import SHOWN
from lightning_lab.experiments.heat import MOST_CHARACTERS
from tests.experiments.directories import BASELINE, R32, write_lab_run
from tests.experiments.test_page import Page

Pieces = Sequence[tuple[str, float | None]]
HEADING = "Conversations of the test split"
SCRIPT = "<script>alert('`1`|2')</script>"


def simple(row: int, *nll: float) -> list[tuple[str, float | None]]:
    """A masked question and an answer of a token for each loss."""
    return [(f"Question {row}?\n", None), *((f" w{place}", value) for place, value in enumerate(nll))]


ADAPTER: dict[int, Pieces] = {
    4: [(f"{SCRIPT}\x1b[31m", None), (SCRIPT, 6.0), (" 日本\x9b", 2.0), ("\n\n", 1.0)],  # mean 3, base 2
    7: simple(7, 2.0, 0.0),  # mean 1, base 3
    9: simple(9, 0.25, 0.75, 0.5),  # mean 0.5, base 0.5
    11: simple(11, 5.0),  # mean 5, base 4.5
    12: simple(12, 4.0, 5.0),  # mean 4.5, base 4.5625
}
BASE: dict[int, Pieces] = {
    4: [(text, value and 2.0) for text, value in ADAPTER[4]],
    7: simple(7, 4.0, 2.0),
    9: simple(9, 0.5, 0.5, 0.5),
    11: simple(11, 4.5),
    12: simple(12, 4.0625, 5.0625),
}


def mean(pieces: Pieces) -> tuple[float, int]:
    losses = [value for _, value in pieces if value is not None]
    return sum(losses) / len(losses), len(losses)


def write(
    run: Path,
    said: Mapping[int, Pieces],
    base: Mapping[int, Pieces] | None = None,
    name: str = "test",
    source: str = "chats.jsonl",
) -> None:
    """A result with its conversations, beside the base's losses where they are given."""
    figures = {row: mean(pieces) for row, pieces in said.items()}
    tokens = sum(count for _, count in figures.values())
    loss = sum(own * count for own, count in figures.values()) / tokens
    record = {"test_loss": loss, "test_perplexity": 1.0, "test_token_accuracy": 0.5, "supervised_tokens": tokens}
    (run / f"{name}.json").write_text(json.dumps(record))
    lines = ["row,loss,supervised_tokens" + ",base_loss,loss_minus_base" * (base is not None)]
    for row, (own, count) in figures.items():
        beside = mean(base[row])[0] if base and row in base else None
        joined = "" if base is None else ",," if beside is None else f",{beside!r},{own - beside!r}"
        lines.append(f"{row},{own!r},{count}{joined}")
    (run / f"{name}_examples.csv").write_text("".join(f"{line}\r\n" for line in lines))
    columns = {
        "row": list(said),
        "where": [f"{source} line {row + 1}" for row in said],
        "text": [[text for text, _ in pieces] for pieces in said.values()],
        "nll": pa.array([[nll for _, nll in pieces] for pieces in said.values()], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), run / f"{name}_tokens.parquet", row_group_size=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose test and base's test are on disk."""
    run = write_lab_run(tmp_path / "runs" / "demo", BASELINE)
    write(run, ADAPTER, BASE)
    write(run, BASE, name="test-base")
    return run


def spans(page: str) -> list[list[tuple[str, dict[str, str | None]]]]:
    """Of each conversation in the page its spans: text and attributes."""

    class Spans(Page):
        def __init__(self, text: str) -> None:
            self.found: list[list[tuple[str, dict[str, str | None]]]] = []
            super().__init__(text)

        def handle_data(self, data: str) -> None:
            super().handle_data(data)
            if "pre" in self.open and self.open[-1] != "pre":
                self.found[-1].append((data, self.tags[-1][1]))

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            super().handle_starttag(tag, attrs)
            if tag == "pre":
                self.found.append([])

    return Spans(page).found


@pytest.mark.usefixtures("_only_text")
class TestTable:
    def test_the_worst_the_most_improved_and_the_most_harmed(self, run: Path, report: Any) -> None:
        assert SHOWN == 3
        headings, rows = report(run).table(HEADING)
        assert headings == [
            *("conversation", "row", "place", "loss", "base loss", "loss minus base", "supervised tokens"),
            "first answer",
        ]
        assert [row[:2] for row in rows] == [
            *(["Worst", "11"], ["Worst", "12"], ["Worst", "4"], ["Most improved", "7"], ["Most improved", "12"]),
            *(["Most harmed", "4"], ["Most harmed", "11"]),
        ]
        assert rows[3][3:] == ["1.0000", "3.0000", "-2.0000", "2", "w0 w1"]
        assert rows[0][3:] == ["5.0000", "4.5000", "+0.5000", "1", "w0"]

    def test_without_the_base_only_the_worst_and_how_to_get_the_others(self, run: Path, report: Any) -> None:
        write(run, ADAPTER)
        output = report(run)
        assert [row[:2] for row in output.table(HEADING)[1]] == [["Worst", "11"], ["Worst", "12"], ["Worst", "4"]]
        how = f"`python -m lightning_lab test --run_dir {run} --ckpt_path base`"
        lacking = "test_examples.csv has no loss of the base, to which the adapter's is compared"
        assert f"* {lacking}; {how} adds it\n" in output.out
        write(run, ADAPTER, {row: BASE[row] for row in (7, 9)})
        output = report(run)
        assert "* 3 of 5 conversations have no loss of the base" in output.out
        assert "* Most harmed: none.\n" in output.out
        assert [row[1] for row in output.table(HEADING)[1]] == ["11", "12", "4", "7"]

    def test_the_first_of_the_ranking_that_has_them(self, run: Path, report: Any) -> None:
        better = write_lab_run(run.parent / "better", R32)
        output = report(run.parent)
        how = f"`python -m lightning_lab test --run_dir {better} --ckpt_path best`"
        assert f"* better has no test_tokens.parquet; {how} writes it\n" in output.out
        assert "Those of demo with the highest mean loss" in output.out
        (run / "test_tokens.parquet").unlink()
        output = report(run.parent)
        assert f"* better has no test_tokens.parquet; {how} writes it\n" in output.out
        assert "Those of" not in output.out
        output = report(run.parent, "--split", "validation")
        assert "better has no validation_tokens.parquet; `python -m lightning_lab validate --run_dir" in output.out

    def test_json_has_the_numbers(self, run: Path, report: Any) -> None:
        diary = json.loads(report(run, "--json").out)["diary"]
        assert (diary["run"], diary["split"], diary["notes"]) == ("demo", "test", [])
        assert diary["most_harmed"] == [
            {"row": 4, "loss": 3.0, "supervised_tokens": 3.0, "weight": 3.0, "base_loss": 2.0, "loss_minus_base": 1.0},
            {"row": 11, "loss": 5.0, "supervised_tokens": 1.0, "weight": 1.0, "base_loss": 4.5, "loss_minus_base": 0.5},
        ]
        assert [example["row"] for example in diary["worst"]] == [11, 12, 4]

    @pytest.mark.parametrize("name", ["test", "test-base"])
    def test_damaged_and_missing_texts_are_named(self, run: Path, report: Any, name: str) -> None:
        path = run / f"{name}_tokens.parquet"
        how = f"--run_dir {run} --ckpt_path {'base' if 'base' in name else 'best'}`"
        texts = pa.table({"row": [11], "where": [5], "text": [1.5], "nll": ["x"]})
        for content in (b"PAR1 damaged", texts, pa.table({"row": [11]}), None):
            if isinstance(content, pa.Table):
                pq.write_table(content, path)
            else:
                path.write_bytes(content or b"")
            output = report(run)
            assert output.status == 0
            assert f"* {path}: cannot be read (" in output.out
            assert f"; write it anew with `python -m lightning_lab test {how}\n" in output.out
            assert output.table(HEADING)[1][0][:2] == ["Worst", "11"]
        other = ADAPTER if name == "test-base" else BASE
        write(run.parent, other, name=name)
        (run.parent / path.name).replace(path)
        assert f"* {path}: is of another evaluation; write it anew with" in report(run).out

    def test_a_damaged_list_is_named(self, run: Path, report: Any) -> None:
        path = run / "test_examples.csv"
        path.write_text(path.read_text().replace("\n7,", f"\n{10**30},"))
        output = report(run)
        assert output.status == 0
        assert f"* {path} line 3: needs row, loss and supervised_tokens; evaluate again\n" in output.out


class TestPage:
    def test_each_token_on_the_colour_of_its_loss(self, run: Path, report: Any) -> None:
        report(run)
        page = (run / "report.html").read_text()
        shown = spans(page)
        masked = {"class": "masked"}
        assert len(shown) == 7
        assert shown[0] == [("Question 11?\n", masked), (" w0", {"class": "w4", "title": "5.00"})]
        # the colours begin at 0.5, 1, 2, 4 and 8 nats
        assert shown[2] == [
            (f"{SCRIPT}␛[31m", masked),
            (SCRIPT, {"class": "w4", "title": "6.00"}),
            (" 日本�", {"class": "w3", "title": "2.00"}),
            ("\n\n", {"class": "w2", "title": "1.00"}),
        ]
        # at 0.1, 0.25, 0.5, 1 and 2 nats of a difference
        assert shown[3] == [
            ("Question 7?\n", masked),
            (" w0", {"class": "b5", "title": "-2.00, loss 2.00"}),
            (" w1", {"class": "b5", "title": "-2.00, loss 0.00"}),
        ]
        assert shown[4][1:] == [(f" w{i}", {"title": f"-0.06, loss {loss}.00"}) for i, loss in enumerate((4, 5))]
        assert [(attributes.get("class"), attributes.get("title")) for _, attributes in shown[5][1:]] == [
            *(("w5", "+4.00, loss 6.00"), (None, "+0.00, loss 2.00"), ("b4", "-1.00, loss 1.00")),
        ]
        assert "Loss of a token, nats: " in page

    def test_nothing_of_the_data_is_markup(self, run: Path, report: Any) -> None:
        said = {**ADAPTER, 30: [("x", None), (f"``{SCRIPT}` $body \x00 </pre><b>", 9.0)]}
        write(run, said, source="my|`<b>``.jsonl")
        output = report(run)
        parsed = Page((run / "report.html").read_text())
        assert not {"script", "b"} & {tag for tag, _ in parsed.tags}
        assert SCRIPT in "".join(parsed.text)
        assert "$body ␀ </pre><b>" in "".join(parsed.text)
        assert "\x1b" not in output.out
        assert "| my\\|`\\<b>``.jsonl line 31 |" in output.out
        assert "my|`<b>``.jsonl line 31" in parsed.text

    def test_long_texts_are_cut_and_say_so(self, run: Path, report: Any) -> None:
        said = [("u" * 5000, None), *[("ab", 3.0)] * 3000, ("after", None)]
        write(run, {1: said})
        report(run)
        text = (run / "report.html").read_text()
        (shown,) = spans(text)
        assert shown[1] == ("[4,400 characters are cut here]", {})
        kept = "".join(piece for piece, _ in shown if not piece.startswith("["))
        assert len(kept) == MOST_CHARACTERS
        assert shown[-1][0] == f"[{6005 - (MOST_CHARACTERS - 600):,} characters are cut here]"
        assert len(text) < 400_000

    def test_where_nothing_can_be_shown_there_is_no_legend(self, run: Path, report: Any) -> None:
        (run / "test_tokens.parquet").unlink()
        report(run)
        assert "<pre" not in (run / "report.html").read_text()
        assert "legend" not in (run / "report.html").read_text().partition("</style>")[2]


def test_numbers_alone_need_no_arrow(run: Path) -> None:
    code = (
        "import sys\n"
        "from lightning_lab.__main__ import main\n"
        f"assert main(['report', '--json', {str(run)!r}]) == 0\n"
        "assert not {'torch', 'pyarrow', 'tokenizers'} & set(sys.modules)\n"
        f"assert main(['report', {str(run)!r}]) == 0\n"
        "assert 'pyarrow' in sys.modules\n"
        "assert not {'torch', 'tokenizers', 'pandas'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL)
