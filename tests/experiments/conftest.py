"""The lab's four runs, and ``report`` through the command line."""

from pathlib import Path
from typing import Any

import pytest

from lightning_lab.__main__ import main
from lightning_lab.experiments import report as module
from tests.experiments.directories import BASELINE, LR1E_4, LR3E_4, R32, write_lab_run


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """The lab's four runs."""
    runs = tmp_path / "runs"
    write_lab_run(runs / "baseline", BASELINE)
    write_lab_run(runs / "lr1e-4_r16", LR1E_4, model__lr=1e-4)
    write_lab_run(runs / "lr3e-4_r16", LR3E_4, model__lr=3e-4)
    write_lab_run(runs / "lr3e-4_r32", R32, model__lr=3e-4, model__r=32, model__alpha=32)
    return runs


class Output:
    """What a call printed and returned."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err

    def table(self, heading: str) -> tuple[list[str], list[list[str]]]:
        """Headings and cells of the first table after a heading."""
        lines = self.out[self.out.index(f"# {heading}\n") :].splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("|"))
        table = []
        for line in lines[start:]:
            if not line.startswith("|"):
                break
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        return table[0], table[2:]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str | Path) -> Output:
        status = main(["report", *map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Output(status, captured.out, captured.err)

    return call


@pytest.fixture
def _only_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is drawn or written: it takes half a second."""
    monkeypatch.setattr(module, "write_report", lambda summary, out: None)
