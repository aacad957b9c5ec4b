"""The page: one HTML file that loads nothing."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_lab.experiments.page import page
from tests.experiments.directories import BASELINE, R32, lab_rows, write_lab_run, write_run


class Page(HTMLParser):
    """Tags with their attributes, and the text; fails on a tag that is not closed."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


class TestPage:
    @pytest.mark.parametrize("count", [1, 10, 12])
    def test_the_page_loads_nothing_and_shows_every_run(self, tmp_path: Path, report: Any, count: int) -> None:
        for i in range(count):
            rows = lab_rows([(step, train + i / 100, loss + i / 100) for step, train, loss in R32])
            write_run(tmp_path / "r" / f"run-{i}", rows, total=1500, seed_everything=i)
        report(tmp_path / "r", "--reference", "seed", "--out", tmp_path)
        parsed = Page((tmp_path / "report.html").read_text())
        tags = [tag for tag, _ in parsed.tags]
        for tag, attributes in parsed.tags:
            for name in ("src", "href", "srcset", "data", "action"):
                assert (attributes.get(name) or "#").startswith(("data:", "#")), (tag, name)
            if tag == "img":
                assert attributes["alt"]
        assert "script" not in tags
        assert "url(" not in (tmp_path / "report.html").read_text()
        assert tags.count("h1") == tags.count("title") == 1
        assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in parsed.tags
        assert tags.count("img") == 1
        text = "".join(parsed.text)
        for i in range(count):
            assert f"run-{i}" in text
        for table in (i for i, tag in enumerate(tags) if tag == "table"):  # each scrolls within its own box
            assert parsed.tags[table - 1][1]["class"] == "box"

    def test_names_errors_and_settings_are_escaped(self, tmp_path: Path, report: Any) -> None:
        name = "<b>$x_1$ & \"q\" | 'p' ](z) *i*"
        write_lab_run(tmp_path / "r" / name, R32)
        write_lab_run(tmp_path / "r" / "_plain", BASELINE, data__source="<script>alert(1)</script>")
        output = report(tmp_path / "r", "--out", tmp_path)
        assert output.status == 0
        parsed = Page((tmp_path / "report.html").read_text())
        assert not {"b", "em", "script"} & {tag for tag, _ in parsed.tags}
        assert name in "".join(parsed.text)
        assert "<script>alert(1)</script>" in "".join(parsed.text)
        assert "\\|" in output.out
        assert [tag for tag, _ in parsed.tags].count("img") == 1

    def test_best_values_are_marked(self, lab: Path, report: Any) -> None:
        report(lab, "--out", lab)
        text = (lab / "report.html").read_text()
        assert '<td style="text-align:right"><strong>0.821687</strong></td>' in text
        assert "<strong>0.848186</strong>" in text  # lowest of its own run's table
        assert "<strong>0.850037</strong>" not in text
        assert "**" not in text

    def test_numbers_are_told_from_text_and_the_picture_is_within(self) -> None:
        table = "| run | loss |\n|---|---:|\n| a_b | 1.5 |"
        text = page("T & t", f'# T\n\n![alt](p.png)\n\n{table}\n\nsrc="p.png" <table>\n', "p.png", b"<svg/>")
        parsed = Page(text)
        assert [attributes["src"] for tag, attributes in parsed.tags if tag == "img"] == [
            "data:image/svg+xml;base64,PHN2Zy8+"
        ]
        boxes = [attributes for _, attributes in parsed.tags if attributes.get("class") == "box"]
        assert [(box["role"], box["tabindex"]) for box in boxes] == [("region", "0")]
        assert "<td>a_b</td>" in text  # text has no alignment of its own, which tells it from numbers
        assert '<td style="text-align:right">1.5</td>' in text
        assert 'src="p.png" <table>' in "".join(parsed.text)
        assert "<title>T &amp; t</title>" in text
