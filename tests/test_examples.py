"""The examples run as they are written, on the embedded model, and go on where they were interrupted."""

import csv
import json
import os
import signal
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_lab
from lightning_lab import rundir

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "lightning_lab.ipynb"


@pytest.fixture(autouse=True)
def _without_a_gpu_in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def interrupted_after_step_1(run: Callable[[], object]) -> None:
    """Run until Ctrl-C in the first step, which the run finishes and saves."""
    append = rundir.append_metrics

    def append_and_interrupt(path: Path, row: Mapping[str, Any]) -> None:
        append(path, row)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rundir, "append_metrics", append_and_interrupt)
        with pytest.raises(SystemExit, match=str(128 + signal.SIGINT)):
            run()


def smaller(code: str, numbers: Mapping[str, str]) -> str:
    """The code with other numbers, to be done in seconds."""
    for written, instead in numbers.items():
        assert code.count(written) == 1, written
        code = code.replace(written, instead)
    return code


def steps(run_dir: Path) -> list[int]:
    with (run_dir / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train_loss"]]


def test_the_script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "runs/mine", "2"])
    code = (ROOT / "examples" / "train.py").read_text()
    code = smaller(code, {"max_new_tokens=32": "max_new_tokens=8", "sample_tokens=32": "sample_tokens=4"})
    interrupted_after_step_1(lambda: exec(code, {}))
    assert steps(Path("runs/mine")) == [1]
    exec(code, {})
    assert steps(Path("runs/mine")) == [1, 2]
    names = {path.name for path in Path("runs/mine").iterdir()}
    assert {"losses.md", "validation.json", "test.json", "predictions-test.jsonl"} <= names
    assert json.loads(Path("runs/mine/test.json").read_text())["step"] == 2
    assert capsys.readouterr().out.count("\n-> ") == 3


class TestNotebook:
    @pytest.fixture
    def cells(self, monkeypatch: pytest.MonkeyPatch) -> list[str]:
        monkeypatch.setenv("MAX_STEPS", "2")
        shown = types.ModuleType("IPython.display")  # of Jupyter, which the tests do without
        shown.__dict__.update(dict.fromkeys(("Image", "Markdown", "display"), lambda *args, **kwargs: None))
        monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
        monkeypatch.setitem(sys.modules, "IPython.display", shown)
        lines = ["".join(cell["source"]).splitlines() for cell in notebook()["cells"] if cell["cell_type"] == "code"]
        return ["\n".join(line for line in cell if not line.startswith(("%", "!"))) for cell in lines]

    def test_it_runs_and_continues(self, cells: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        namespace: dict[str, Any] = {}
        numbers = {"max_new_tokens=64": "max_new_tokens=8", "sample_tokens=32": "samples=1, sample_tokens=4"}
        code = smaller("\n".join(cells), numbers)

        def run_all() -> None:
            exec(code, namespace)

        interrupted_after_step_1(run_all)
        run_dir = namespace["run_dir"]
        assert steps(run_dir) == [1]
        run_all()
        assert steps(run_dir) == [1, 2]
        assert json.loads((run_dir / "test.json").read_text())["step"] == 2
        assert namespace["answer"].strip() in capsys.readouterr().out

    def test_on_colab_the_run_is_kept_in_the_drive(self, cells: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        mounted: list[str] = []
        colab = types.ModuleType("google.colab")
        colab.drive = types.SimpleNamespace(mount=mounted.append)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "google.colab", colab)
        namespace: dict[str, Any] = {}
        for cell in cells[:2]:
            exec(cell, namespace)
        assert mounted == ["/content/drive"]
        assert namespace["runs"] == Path("/content/drive/MyDrive/lightning_lab")

    def test_a_gpu_gets_the_labs_settings(self, cells: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        from lightning_lab.files import read_yaml

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        namespace: dict[str, Any] = {}
        for cell in cells[:3]:
            exec(cell, namespace)
        module, data = namespace["module"].hparams, namespace["data"].hparams
        defaults, best = (read_yaml(ROOT / "configs" / name) for name in ("defaults.yaml", "lr3e-4_r32.yaml"))
        for section, settings in (("model", module), ("data", data)):
            asked = {**defaults[section], **best[section]}
            assert {key: settings[key] for key in asked} == asked
        assert (namespace["every"], namespace["window"]) == (defaults["val_every_steps"], best["train_loss_window"])

    def test_its_format(self) -> None:
        """What nbformat's schema of 4.5 demands, and no outputs."""
        content = notebook()
        assert (content["nbformat"], content["nbformat_minor"]) == (4, 5)
        assert content["metadata"]["kernelspec"].keys() >= {"name", "display_name"}
        assert len({cell["id"] for cell in content["cells"]}) == len(content["cells"])
        for cell in content["cells"]:
            code = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
            assert cell.keys() == {"cell_type", "id", "metadata", "source"} | code
            assert not cell.get("outputs")
            assert cell.get("execution_count") is None
            assert all(line.endswith("\n") for line in cell["source"][:-1])


def notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(NOTEBOOK.read_text())
    return content


@pytest.mark.slow
def test_the_packages_docstring(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is written, but for one step, a few conversations and short samples."""
    import lightning.pytorch as pl

    assert lightning_lab.__doc__
    *_, indented = lightning_lab.__doc__.partition("::\n\n")
    lines = [line.removeprefix("    ") for line in indented.splitlines() if line.startswith("    ")]
    code = "\n".join(lines)
    assert len(lines) <= 10
    assert "max_epochs=1" in code
    whole = pl.Trainer

    def short(**options: Any) -> pl.Trainer:
        return whole(**options, max_steps=1, limit_val_batches=1, limit_test_batches=1)

    monkeypatch.setattr(pl, "Trainer", short)
    few = 'source="embedded", rows=24, split=[8, 8, 8],'
    numbers = {'source="embedded",': few, '("runs/mine")': '("runs/mine", samples=1, sample_tokens=4)'}
    exec(smaller(code, numbers), {})
    assert steps(Path("runs/mine")) == [1]
    assert json.loads(Path("runs/mine/test.json").read_text())["step"] == 1
