"""A sweep through the command line on the tiny base: ordinary runs, continued exactly, a report at the end."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from lightning_lab.__main__ import main
from tests.acceptance.conftest import lab, metrics, start, validations
from tests.processes import processes_in

GRID = ("--sweep.grid", "{model.lr: [1e-3, 3e-3], model.r: [8]}", "--sweep.tie", "{model.alpha: model.r}")


@pytest.fixture(scope="module")
def folder(tiny_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that is stopped twice: by SIGTERM in its first run, by SIGKILL in its second; then left to end."""
    folder = tmp_path_factory.mktemp("sweep")
    for trial, step, number in (("lr1e-3_r8", 3, signal.SIGTERM), ("lr3e-3_r8", 7, signal.SIGKILL)):
        process = start("sweep", *tiny_args, *GRID, cwd=folder)
        rows = folder / "runs" / "embedded" / "trials" / trial / "metrics.csv"
        deadline = time.monotonic() + 240
        while not (rows.exists() and f"\n{step}," in rows.read_text()):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the run never came to that step"
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate(timeout=120)
        if number == signal.SIGKILL:  # the run as well, which leads a session of its own
            for pid in processes_in(folder):
                os.kill(pid, number)
    process = start("sweep", *tiny_args, *GRID, cwd=folder)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors
    return folder


def test_its_runs_are_those_of_fit(
    folder: Path, tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = folder / "runs" / "embedded" / "trials" / "lr3e-3_r8"
    monkeypatch.chdir(tmp_path)
    lab("fit", *tiny_args, "--model.lr=3e-3", "--model.r=8", "--model.alpha=8", "--run_dir=alone")
    assert metrics(trial) == metrics(tmp_path / "alone")
    for name in ("losses.md", "checkpoints/best/adapter_model.safetensors"):
        assert (trial / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    lab("test", "--run_dir=alone", "--ckpt_path=best")
    assert (trial / "test_examples.csv").read_text() == (tmp_path / "alone" / "test_examples.csv").read_text()


def test_each_run_was_begun_once_and_data_prepared_before(folder: Path) -> None:
    sweep = folder / "runs" / "embedded"
    record = json.loads((sweep / "sweep.json").read_text())
    assert [(t["name"], t["state"]) for t in record["trials"]] == [("lr1e-3_r8", "complete"), ("lr3e-3_r8", "complete")]
    assert record["trials"][0]["settings"] == {"model.lr": 1e-3, "model.r": 8, "model.alpha": 8}
    for trial in record["trials"]:
        assert trial["value"] == min(validations(sweep / trial["run"]).values())
        log = (sweep / "logs" / f"{trial['name']}.log").read_text()
        fits = [line for line in log.splitlines() if line.startswith("$ ") and " fit " in line]
        assert ["--ckpt_path=last" in line for line in fits] == [False, True]
        assert "tokenising" not in log


def test_it_ends_with_the_report(folder: Path) -> None:
    sweep = folder / "runs" / "embedded"
    report = (sweep / "report.md").read_text()
    ranks = re.findall(r"^\| *\d+ *\| *`?(lr\S+?)`? *\|", report, re.MULTILINE)
    values = {t["name"]: t["value"] for t in json.loads((sweep / "sweep.json").read_text())["trials"]}
    assert ranks[:2] == sorted(values, key=lambda name: values[name])
    assert "<html" in (sweep / "report.html").read_text()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--sweep.grid={model.lrr: [1, 2]}"], "lrr"),
        (["--sweep.grid={model.r: [8, many]}"], "model.r"),
        (["--sweep.grid={model.lr: [1e-4, -1]}"], "model.lr is -1"),
        (["--sweep.grid={trainer.precision: [16]}"], "trainer.precision is not used here"),
        (["--sweep.grid={model.lr: [1e-4]}", "--sweep.search={model.r: {low: 1, high: 9}}"], "a search and a grid"),
        ([], "the sweep has no settings"),
        (["--sweep.grid={data.source: [nowhere.jsonl]}"], "nowhere.jsonl"),
        (["--sweep.grid={model.r: [8]}", "--data.split=[60,0,20]"], "compares its runs by their validation loss"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(
    tiny_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *tiny_args, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1]
    assert error.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("runs/*/trials/*"))


def test_the_labs_grid(tmp_path: Path) -> None:
    """What it would run, without running it."""
    import yaml

    from lightning_lab.configs_lookup import configs_dir
    from lightning_lab.experiments.points import SweepSettings, grid_points
    from lightning_lab.files import flatten

    grid = yaml.safe_load((configs_dir() / "lab_grid.yaml").read_text())
    points = grid_points(SweepSettings(**grid.pop("sweep")))
    for point in points:
        alone = yaml.safe_load((configs_dir() / f"{point.name}.yaml").read_text())
        assert flatten(grid) | point.settings == flatten(alone)
    assert len(points) == 4
