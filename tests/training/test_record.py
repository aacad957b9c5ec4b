"""``metrics.csv`` after a kill at any byte, the loss table and the curve."""

import fcntl
import math
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from lightning_lab.errors import LabError
from lightning_lab.training.callbacks.record import (
    COLUMNS,
    MetricsFile,
    base_loss,
    draw_curve,
    lock_run,
    loss_table,
    write_text,
)

HEADER = (
    "step,epoch,train_loss,grad_norm,lr,tokens,supervised_tokens,padded_tokens,tokens_per_second,peak_memory_mib,"
    "val_loss,val_loss_hf,val_token_accuracy,val_perplexity"
)
TRAIN_12 = {
    "step": 12,
    "epoch": 0.96,
    "train_loss": 1.25,
    "grad_norm": 0.5,
    "lr": 0.0002,
    "tokens": 100,
    "supervised_tokens": 40,
    "padded_tokens": 100,
    "tokens_per_second": 321.5,
    "peak_memory_mib": 7.0,
}
LINE_12 = "12,0.96,1.25,0.5,0.0002,100,40,100,321.5,7.0,,,,"
VALIDATION_12 = {
    "step": 12,
    "val_loss": 2.5,
    "val_loss_hf": 2.25,
    "val_token_accuracy": 0.125,
    "val_perplexity": 12.5,
}


@pytest.fixture
def file(tmp_path: Path) -> MetricsFile:
    return MetricsFile(tmp_path / "metrics.csv")


class TestMetricsFile:
    def test_the_text_by_hand(self, file: MetricsFile) -> None:
        assert file.read() == []
        file.append(TRAIN_12)
        file.append(VALIDATION_12)
        assert file.path.read_text().split("\n") == [HEADER, LINE_12, "12,,,,,,,,,,2.5,2.25,0.125,12.5", ""]
        train, validation = file.read()
        assert tuple(train) == tuple(validation) == COLUMNS
        assert {k: v for k, v in train.items() if v} == {k: str(v) for k, v in TRAIN_12.items()}
        assert {k: v for k, v in validation.items() if v} == {k: str(v) for k, v in VALIDATION_12.items()}

    @pytest.mark.parametrize(
        "value", [1 / 3, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 2.0**-40, -0.0, math.inf, 123456789.123456789]
    )
    def test_floats_come_back_exactly(self, file: MetricsFile, value: float) -> None:
        file.append({"step": 1, "train_loss": value})
        file.keep_until(1)
        (row,) = file.read()
        assert float(row["train_loss"]).hex() == value.hex()

    def test_not_a_number_comes_back(self, file: MetricsFile) -> None:
        file.append({"step": 1, "train_loss": 2.0, "grad_norm": math.nan})
        assert math.isnan(float(file.read()[0]["grad_norm"]))

    @pytest.mark.parametrize("length", range(1, len(LINE_12) + 1))
    def test_a_row_cut_short_is_never_read(self, file: MetricsFile, length: int) -> None:
        """Cut `12,...` anywhere: as `1` it looks like a step, and without its newline alone nobody knows it ended."""
        file.append({"step": 1, "train_loss": 3.0})
        whole = file.path.read_text()
        file.path.write_text(whole + LINE_12[:length])
        assert [row["step"] for row in file.read()] == ["1"]
        file.keep_until(12)
        assert file.path.read_text() == whole
        file.append(TRAIN_12)
        assert file.path.read_text() == whole + LINE_12 + "\n"

    @pytest.mark.parametrize("length", [0, 3, len(HEADER)])
    def test_a_header_cut_short_is_written_again(self, file: MetricsFile, length: int) -> None:
        file.path.write_text(HEADER[:length])
        assert file.read() == []
        file.keep_until(0)
        file.append(TRAIN_12)
        assert file.path.read_text() == f"{HEADER}\n{LINE_12}\n"

    def test_rows_up_to_a_step(self, file: MetricsFile) -> None:
        file.keep_until(3)
        assert not file.path.exists()  # a new run: nothing to forget
        for step in range(1, 13):
            file.append({"step": step, "train_loss": float(step)})
            if step % 5 == 0:
                file.append({"step": step, "val_loss": step / 2})
        before = file.path.read_text().splitlines()
        file.keep_until(12)
        assert file.path.read_text().splitlines() == before
        file.keep_until(10)  # 10 and not, as text, 1 and 10; with the validation of step 10
        assert [row["step"] for row in file.read()] == ["1", "2", "3", "4", "5", "5", "6", "7", "8", "9", "10", "10"]
        assert file.path.read_text().splitlines() == before[:13]
        file.keep_until(0)
        assert file.path.read_text() == HEADER + "\n"
        assert [path.name for path in file.path.parent.iterdir()] == ["metrics.csv"]


def train(step: int, loss: float) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {"step": str(step), "train_loss": repr(loss)}


def validation(step: int, loss: float) -> dict[str, str]:
    return dict.fromkeys(COLUMNS, "") | {"step": str(step), "val_loss": repr(loss)}


class TestLossTable:
    HEAD = "| Step | Training Loss | Validation Loss |\n|---:|---:|---:|\n"

    def test_means_since_the_row_before(self) -> None:
        rows = [train(1, 4.0), train(2, 2.0), validation(2, 2.5), train(3, 1.0), validation(3, 2.25)]
        assert loss_table(rows) == self.HEAD + "| 2 | 3.0000 | 2.500000 |\n| 3 | 1.0000 | 2.250000 |\n"

    def test_steps_since_the_last_validation_make_no_row(self) -> None:
        assert loss_table([train(1, 4.0), validation(1, 0.0), train(2, 9.0)]) == (
            self.HEAD + "| 1 | 4.0000 | 0.000000 |\n"  # a validation loss of 0 is a loss
        )

    def test_a_validation_without_steps_before_it(self) -> None:
        rows = [validation(5, 2.0), validation(5, 1.0)]
        assert loss_table(rows) == self.HEAD + "| 5 |  | 2.000000 |\n| 5 |  | 1.000000 |\n"

    def test_nothing(self) -> None:
        assert loss_table([]) == self.HEAD

    def test_the_base_is_row_0(self) -> None:
        rows = [train(1, 4.0), validation(1, 2.0)]
        assert loss_table(rows, 0.5).splitlines()[2:] == ["| 0 (base) | | 0.500000 |", "| 1 | 4.0000 | 2.000000 |"]
        assert loss_table([], 0.0).splitlines()[2:] == ["| 0 (base) | | 0.000000 |"]

    def test_the_base_is_read_from_its_evaluation(self, tmp_path: Path) -> None:
        assert base_loss(tmp_path) is None
        (tmp_path / "validation-base.json").write_text('{"validation_loss": 2.75, "validation_loss_hf": 1.0}')
        assert base_loss(tmp_path) == 2.75


STEPS_COLOUR, MEAN_COLOUR, VALIDATION_COLOUR = (0x9E, 0xC5, 0xE8), (0x1F, 0x6F, 0xB2), (0xD1, 0x49, 0x5B)


def drawn(rows: list[dict[str, str]], folder: Path) -> dict[tuple[int, int, int], int]:
    """Draw, and count the pixels of each line's colour."""
    path = folder / "loss_curve.png"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "No artists with labels")
        draw_curve(rows, path, "a run")
    assert [file.name for file in folder.iterdir()] == ["loss_curve.png"]
    image: Any = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    assert image.shape == (540, 960, 3)  # 8 by 4.5 inches at 120 dots an inch
    colours = (STEPS_COLOUR, MEAN_COLOUR, VALIDATION_COLOUR)
    return {colour: int(np.all(image == colour, axis=-1).sum()) for colour in colours}


class TestCurve:
    def test_no_rows(self, tmp_path: Path) -> None:
        assert set(drawn([], tmp_path).values()) == {0}

    def test_one_row(self, tmp_path: Path) -> None:
        pixels = drawn([train(1, 2.0)], tmp_path)
        assert pixels[MEAN_COLOUR] > 0
        assert pixels[VALIDATION_COLOUR] == 0
        assert drawn([validation(1, 2.0)], tmp_path)[VALIDATION_COLOUR] > 50  # its point, not only its legend

    def test_one_training_step_can_be_seen(self, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        (tmp_path / "nan").mkdir()
        nothing = drawn([train(1, math.nan)], tmp_path / "nan")  # the legend alone
        assert drawn([train(1, 2.0)], tmp_path / "one")[MEAN_COLOUR] > nothing[MEAN_COLOUR]

    def test_many_rows(self, tmp_path: Path) -> None:
        rows = [train(step, 3.0 + math.sin(step)) for step in range(1, 201)]
        rows += [validation(step, 3.0) for step in (100, 200)]
        pixels = drawn(rows, tmp_path)
        assert all(count > 300 for count in pixels.values()), pixels
        before = (tmp_path / "loss_curve.png").read_bytes()
        rows[50] = train(51, 9.0)
        drawn(rows, tmp_path)  # replaced
        assert (tmp_path / "loss_curve.png").read_bytes() != before


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "losses.md"
    write_text(path, "first")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_text(path, "second")
    assert path.read_text() == "first"


class TestLock:
    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        holder = (
            "import fcntl, sys, time; f = open(sys.argv[1] + '/.lock', 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
            "print('held', flush=True); time.sleep(60)"
        )
        process = subprocess.Popen([sys.executable, "-c", holder, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(LabError, match="another process is training this run"):
            lock_run(tmp_path)
        process.kill()  # however its holder ends, the lock goes with it
        process.communicate()
        lock_run(tmp_path).close()
        lock_run(tmp_path).close()

    def test_a_report_that_looks_is_waited_for(self, tmp_path: Path) -> None:
        with (tmp_path / ".lock").open("w") as look:
            fcntl.flock(look, fcntl.LOCK_SH)
            threading.Timer(0.2, fcntl.flock, (look, fcntl.LOCK_UN)).start()
            lock_run(tmp_path).close()
