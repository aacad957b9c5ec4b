"""A run that was killed or stopped and then continued is the run that was left alone, bit for bit."""

import json
import shutil
import signal
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest

from lightning_lab.training.resume import read_checkpoint
from tests.acceptance.conftest import RESUMED, assert_same, lab, metrics, start


def stop_at(step: int, number: int, args: list[str], folder: Path) -> int:
    """Start a run, send it a signal once ``metrics.csv`` shows ``step``, return its exit status."""
    process = start("fit", *args, *RESUMED, cwd=folder)
    rows = folder / "runs" / "embedded" / "metrics.csv"
    deadline = time.monotonic() + 120
    while not (rows.exists() and f"\n{step}," in rows.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run never came to that step"
        time.sleep(0.001)
    process.send_signal(number)
    process.communicate(timeout=60)
    return process.returncode


@pytest.mark.parametrize(
    ("step", "number", "status"),
    [
        pytest.param(18, signal.SIGKILL, -9, marks=pytest.mark.slow),  # in epoch 2, after the validation at 15
        (2, signal.SIGKILL, -9),  # before the first validation
        # around the last step's validation and the best checkpoint
        pytest.param(26, signal.SIGKILL, -9, marks=pytest.mark.slow),
        pytest.param(17, signal.SIGINT, 130, marks=pytest.mark.slow),
        (10, signal.SIGTERM, 143),  # a step with a validation
    ],
)
def test_stopped_and_continued(
    tiny_args: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    number: int,
    status: int,
) -> None:
    assert stop_at(step, number, tiny_args, tmp_path) == status
    monkeypatch.chdir(tmp_path)
    run = Path("runs/embedded")
    read_checkpoint(run / "checkpoints" / "last.ckpt")  # whole
    if status > 0:  # a signal that can be caught saves where it stopped, not at the validation before
        assert read_checkpoint(run / "checkpoints" / "last.ckpt")["lightning_lab"]["completed_steps"] >= step
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=last")
    assert list(Path("runs").iterdir()) == [run]  # continued in place
    assert_same(run, uninterrupted)


class KeepEach(pl.Callback):
    """Keeps a copy of every last.ckpt that a step begins with."""

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, step: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        last = Path(trainer.default_root_dir) / "checkpoints" / "last.ckpt"
        kept = Path("kept")
        kept.mkdir(exist_ok=True)
        shutil.copyfile(last, kept / f"{read_checkpoint(last)['lightning_lab']['completed_steps']}.ckpt")


@pytest.fixture(scope="module")
def kept(tiny_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("each")
    callback = "--trainer.callbacks=tests.acceptance.test_resume.KeepEach"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lab("fit", *tiny_args, *RESUMED, "--checkpoint_every_steps=1", callback)
    return folder


# before step 1, inside an epoch, with a validation, an epoch's last step, the next one's first, the last but one
@pytest.mark.parametrize("step", [0, 4, 13, 25, *(pytest.param(step, marks=pytest.mark.slow) for step in (10, 14))])
def test_continued_from_any_position(
    tiny_args: list[str], uninterrupted: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/embedded")
    shutil.copytree(kept / "runs" / "embedded", run)
    shutil.copyfile(kept / "kept" / f"{step}.ckpt", run / "checkpoints" / "last.ckpt")
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=last")
    assert_same(run, uninterrupted)


def test_a_finished_run_is_left_as_it_is(
    tiny_args: list[str], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(uninterrupted.parents[1])
    before = (uninterrupted / "metrics.csv").read_text()
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=last")
    assert (uninterrupted / "metrics.csv").read_text() == before
    assert read_checkpoint(uninterrupted / "checkpoints" / "last.ckpt")["lightning_lab"]["completed_steps"] == 26


def test_a_second_signal_leaves_at_once(tiny_args: list[str], tmp_path: Path) -> None:
    process = start("fit", *tiny_args, *RESUMED, "--trainer.max_epochs=500", "--val_every_steps=1", cwd=tmp_path)
    rows = tmp_path / "runs" / "embedded" / "metrics.csv"
    while not (rows.exists() and "\n3," in rows.read_text()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    read_checkpoint(tmp_path / "runs" / "embedded" / "checkpoints" / "last.ckpt")


def test_early_stopping_stops_and_stays_stopped(
    tiny_args: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    args = [*tiny_args, "--samples=0", "--model.lr=1.0", "--model.max_grad_norm=null", "--val_every_steps=1"]
    lab("fit", *args, "--early_stopping=2", "--trainer.max_epochs=2")
    run = Path("runs/embedded")
    rows = [r for r in metrics(run) if r["val_loss"]]
    losses = [float(r["val_loss"]) for r in rows]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 26
    lab("fit", *args, "--early_stopping=2", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert len([r for r in metrics(run) if r["val_loss"]]) == len(losses)


def test_another_checkpoint_begins_a_run_of_its_own_that_ends_the_same(
    tiny_args: list[str], uninterrupted: Path, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 14, whose best validation (that at 10 or before) lies in the run it was taken from."""
    monkeypatch.chdir(tmp_path)
    first = Path("runs/embedded")
    shutil.copytree(kept / "runs" / "embedded", first)
    shutil.copyfile(kept / "kept" / "14.ckpt", first / "checkpoints" / "14.ckpt")
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=runs/embedded/checkpoints/14.ckpt")
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    second = Path("runs/embedded-2")
    assert_same(second, uninterrupted)
    environment = json.loads((second / "environment.json").read_text())
    assert environment["continued_from"] == "runs/embedded/checkpoints/14.ckpt"
    assert environment["completed_steps"] == 14


def test_the_record_keeps_the_earlier_parts_of_a_run(
    tiny_args: list[str], kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(kept / "runs" / "embedded", "runs/embedded")
    shutil.copyfile(kept / "kept" / "25.ckpt", "runs/embedded/checkpoints/last.ckpt")
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=last")
    lab("fit", *tiny_args, *RESUMED, "--ckpt_path=last")
    environment = json.loads(Path("runs/embedded/environment.json").read_text())
    parts = [*environment["earlier"], environment]
    assert [part["completed_steps"] for part in parts] == [0, 25, 26]
    assert ["--ckpt_path=last" in part["command"] for part in parts] == [False, True, True]
    assert environment["name"] == "embedded"
