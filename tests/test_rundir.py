"""Which run a command takes; the lock; ``metrics.csv`` after a kill at any byte."""

import fcntl
import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from lightning_lab.errors import LabError
from lightning_lab.rundir import (
    append_metrics,
    base_loss,
    is_locked,
    keep_metrics,
    lock_run,
    newest_run,
    read_metrics,
    resolve_run,
    stopped_early,
    unused_directory,
)

EVALUATIONS = ("validate", "test", "predict")


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str, checkpoints: tuple[str, ...] = ("best", "last")) -> None:
    for name in names:
        folder = Path(name) / "checkpoints"
        folder.mkdir(parents=True)
        for checkpoint in checkpoints:
            (folder / f"{checkpoint}.ckpt").touch()


def resolved(command: str, name: str, run_dir: str | None, ckpt_path: str | None) -> tuple[str, str | None]:
    """Run directory and checkpoint as text; creates nothing."""
    before = sorted(Path().rglob("*"))
    paths = resolve_run(command, name, run_dir, ckpt_path)
    assert sorted(Path().rglob("*")) == before
    return str(paths.run_dir), None if paths.checkpoint is None else str(paths.checkpoint)


class TestFit:
    def test_a_new_run_has_the_first_configs_name(self) -> None:
        assert resolved("fit", "a", None, None) == ("runs/a", None)

    def test_a_free_run_dir_is_taken_whatever_stands_beside_it(self) -> None:
        make("trials/x-2")
        assert resolved("fit", "a", "trials/x", None) == ("trials/x", None)
        make("trials/x")
        assert resolved("fit", "a", "trials/x", None) == ("trials/x-3", None)

    def test_suffixes(self) -> None:
        make("runs/a")
        assert resolved("fit", "a", None, None) == ("runs/a-2", None)
        make("runs/a-2")
        assert resolved("fit", "a", None, None) == ("runs/a-3", None)
        assert resolved("fit", "b", None, None) == ("runs/b", None)

    def test_a_file_of_the_name_is_in_the_way_too(self) -> None:
        Path("runs").mkdir()
        Path("runs/a").touch()
        assert resolved("fit", "a", None, None) == ("runs/a-2", None)

    def test_run_dir_gets_a_suffix_where_it_stands(self) -> None:
        assert resolved("fit", "a", "some/where", None) == ("some/where", None)
        make("some/where", "some/where-2")
        assert resolved("fit", "a", "some/where", None) == ("some/where-3", None)
        assert resolved("fit", "a", "some/where-2", None) == ("some/where-2-2", None)
        assert unused_directory(Path("some/where/")) == Path("some/where-3")

    def test_last_continues_in_place(self) -> None:
        make("runs/a", "runs/a-2", "elsewhere")
        assert resolved("fit", "a", None, "last") == ("runs/a-2", "runs/a-2/checkpoints/last.ckpt")
        assert resolved("fit", "a", "elsewhere", "last") == ("elsewhere", "elsewhere/checkpoints/last.ckpt")

    def test_any_other_checkpoint_begins_a_run_of_its_own(self) -> None:
        make("runs/a", "runs/a-2", "elsewhere")
        assert resolved("fit", "a", None, "best") == ("runs/a-3", "runs/a-2/checkpoints/best.ckpt")
        assert resolved("fit", "a", "elsewhere", "best") == ("elsewhere-2", "elsewhere/checkpoints/best.ckpt")
        for path in ("runs/a/checkpoints/last.ckpt", "runs/a/checkpoints/best.ckpt"):
            assert resolved("fit", "a", None, path) == ("runs/a-3", path)
            assert resolved("fit", "a", "fresh", path) == ("fresh", path)

    def test_the_base_is_refused(self) -> None:
        make("runs/a")
        for run_dir in (None, "runs/a"):
            with pytest.raises(LabError, match="^fit starts from the base anyway"):
                resolve_run("fit", "a", run_dir, "base")


@pytest.mark.parametrize("command", EVALUATIONS)
class TestEvaluations:
    def test_without_a_checkpoint_the_choices_are_named(self, command: str) -> None:
        make("runs/a")
        for run_dir in (None, "runs/a"):
            with pytest.raises(LabError, match=rf"^{command} needs --ckpt_path: best or last .* \.ckpt file, or base"):
                resolve_run(command, "a", run_dir, None)

    def test_the_base_needs_no_run(self, command: str) -> None:
        assert resolved(command, "a", None, "base") == ("runs/a", None)
        assert resolved(command, "a", "some/where", "base") == ("some/where", None)
        make("runs/a", "runs/a-2")
        assert resolved(command, "a", None, "base") == ("runs/a-2", None)

    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_best_and_last(self, command: str, checkpoint: str) -> None:
        make("runs/a", "runs/a-2", "some/where")
        path = f"runs/a-2/checkpoints/{checkpoint}.ckpt"
        assert resolved(command, "a", None, checkpoint) == ("runs/a-2", path)
        path = f"some/where/checkpoints/{checkpoint}.ckpt"
        assert resolved(command, "a", "some/where", checkpoint) == ("some/where", path)


class TestFile:
    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_in_a_run_leads_to_that_run(self, command: str) -> None:
        make("runs/a", "elsewhere/b")
        path = "elsewhere/b/checkpoints/best.ckpt"
        assert resolved(command, "a", None, path) == ("elsewhere/b", path)
        assert resolved(command, "a", "some/where", path) == ("some/where", path)

    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_named_from_inside_its_folder(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        make("elsewhere/b")
        monkeypatch.chdir("elsewhere/b/checkpoints")
        run_dir, checkpoint = resolved(command, "a", None, "best.ckpt")
        assert Path(run_dir) == Path.cwd().parent
        assert checkpoint == "best.ckpt"

    @pytest.mark.parametrize("command", EVALUATIONS)
    def test_anywhere_else(self, command: str) -> None:
        Path("kept").mkdir()
        Path("kept/good.ckpt").touch()
        assert resolved(command, "a", None, "kept/good.ckpt") == ("runs/a", "kept/good.ckpt")
        make("runs/a", "runs/a-2")
        assert resolved(command, "a", None, "kept/good.ckpt") == ("runs/a-2", "kept/good.ckpt")
        assert resolved(command, "a", "runs/a", "kept/good.ckpt") == ("runs/a", "kept/good.ckpt")


@pytest.mark.parametrize("command", ["fit", *EVALUATIONS])
class TestAnyCommand:
    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_no_run_of_the_name(self, command: str, checkpoint: str) -> None:
        make("runs/a-b")
        with pytest.raises(LabError, match=r"^there is no run of the name a with a \w+\.ckpt under runs/; train one"):
            resolve_run(command, "a", None, checkpoint)

    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_a_run_without_that_checkpoint(self, command: str, checkpoint: str) -> None:
        make("runs/a", checkpoints=({"best": "last", "last": "best"}[checkpoint],))
        for run_dir in ("runs/a", "nowhere"):
            path = f"{run_dir}/checkpoints/{checkpoint}.ckpt: no such checkpoint"
            with pytest.raises(LabError, match=f"^{path}"):
                resolve_run(command, "a", run_dir, checkpoint)
        with pytest.raises(LabError, match=f"^there is no run of the name a with a {checkpoint}.ckpt"):
            resolve_run(command, "a", None, checkpoint)

    @pytest.mark.parametrize("checkpoint", ["best", "last"])
    def test_a_run_that_failed_before_it_saved_is_passed_over(self, command: str, checkpoint: str) -> None:
        make("runs/a")
        Path("runs/a-2/tensorboard").mkdir(parents=True)
        assert resolve_run(command, "a", None, checkpoint).checkpoint == Path(f"runs/a/checkpoints/{checkpoint}.ckpt")

    def test_a_folder_is_told_which_file_to_name(self, command: str) -> None:
        make("runs/a")
        with pytest.raises(LabError, match=r"^runs/a/checkpoints: is a folder; name a \.ckpt file"):
            resolve_run(command, "a", None, "runs/a/checkpoints")

    @pytest.mark.parametrize("path", ["runs/a/checkpoints/best", "runs/a/checkpoints/best/"])
    def test_an_adapters_folder_stands_for_the_file_beside_it(self, command: str, path: str) -> None:
        make("runs/a")
        Path(path).mkdir()
        found = resolve_run(command, "a", None, path)
        assert found.checkpoint == Path("runs/a/checkpoints/best.ckpt").resolve()
        Path("runs/a/checkpoints/best.ckpt").unlink()
        with pytest.raises(LabError, match=r"best.*: is a folder; .*begin from an adapter with model\.adapter"):
            resolve_run(command, "a", None, path)

    def test_best_of_a_run_without_validation(self, command: str) -> None:
        make("runs/a")
        make("runs/a-2", checkpoints=("last",))
        splits = {"validation": {"conversations": 0}}
        Path("runs/a-2/environment.json").write_text(json.dumps({"name": "a", "data": {"splits": splits}}))
        for run_dir in ("runs/a-2", None):  # the older run's is not meant
            with pytest.raises(
                LabError, match=r"^runs/a-2 has no best\.ckpt, as it has no validation split; pass last"
            ):
                resolve_run(command, "a", run_dir, "best")
        assert resolve_run(command, "a", None, "last").run_dir == Path("runs/a-2")

    def test_a_run_dir_that_is_a_file(self, command: str) -> None:
        Path("notes").touch()
        for checkpoint in (None, "last", "base"):
            with pytest.raises(LabError, match=r"^run_dir: notes is a file"):
                resolve_run(command, "a", "notes", checkpoint)

    def test_the_home_directory(self, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(Path.cwd()))
        make("mine")
        assert resolve_run(command, "a", "~/mine", "last").run_dir == Path.cwd() / "mine"

    @pytest.mark.parametrize("path", ["no.ckpt", "Best", ""])
    def test_no_such_file(self, command: str, path: str) -> None:
        make("runs/a")
        with pytest.raises(LabError, match=f"^{path}: no such checkpoint; pass best, last, base or a .ckpt file"):
            resolve_run(command, "a", None, path)


class TestNewestRun:
    def test_none(self) -> None:
        assert newest_run("a") is None  # there is no runs/ at all
        make("runs/a-b")
        assert newest_run("a") is None

    @pytest.mark.parametrize(
        ("name", "newest"),
        [
            ("a", "a-10"),
            ("a-b", "a-b-2"),
            ("a-b-2", "a-b-2"),
            ("lr3e-4_r16", "lr3e-4_r16"),
            ("1.5", "1.5"),
            ("a+b", "a+b"),
            ("x", None),
        ],
    )
    def test_the_highest_number_of_exactly_that_name(self, name: str, newest: str | None) -> None:
        make("runs/a", "runs/a-2", "runs/a-9", "runs/a-10", "runs/a-b", "runs/a-b-2", "runs/ab", "runs/a-11x")
        make("runs/lr3e-4_r16", "runs/lr3e-4_r160", "runs/1.5", "runs/1x5-2", "runs/a+b")
        assert newest_run(name) == (Path("runs") / newest if newest else None)

    def test_the_first_run_of_another_name_is_not_the_second_of_this(self) -> None:
        make("runs/a", "runs/a-2", "runs/a-3")
        for run, name in (("a", "a"), ("a-2", "a"), ("a-3", "a-3")):
            (Path("runs") / run / "environment.json").write_text(json.dumps({"name": name}))
        assert newest_run("a") == Path("runs/a-2")
        assert newest_run("a-3") == Path("runs/a-3")
        assert newest_run("a-2") is None
        (Path("runs/a-3/environment.json")).write_text("{")  # nothing is known of it
        assert newest_run("a") == Path("runs/a-3")

    def test_a_file_is_no_run(self) -> None:
        make("runs/a")
        Path("runs/a-2").touch()
        assert newest_run("a") == Path("runs/a")

    def test_a_new_run_is_the_newest_after_an_old_one_was_deleted(self) -> None:
        make("runs/a-2")  # runs/a has been deleted
        new = resolve_run("fit", "a", None, None).run_dir
        new.mkdir()
        assert newest_run("a") == new

    def test_a_name_with_brackets(self) -> None:
        make("runs/a[1]")
        assert newest_run("a[1]") == Path("runs/a[1]")


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


def rows_of(path: Path) -> list[dict[str, float]]:
    return [row.values for row in read_metrics(path)[0]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


class TestMetrics:
    def test_the_text_by_hand(self, file: Path) -> None:
        assert read_metrics(file) == ([], [])
        append_metrics(file, TRAIN_12)
        append_metrics(file, VALIDATION_12)
        assert file.read_text().split("\n") == [HEADER, LINE_12, "12,,,,,,,,,,2.5,2.25,0.125,12.5", ""]
        assert rows_of(file) == [TRAIN_12, VALIDATION_12]

    @pytest.mark.parametrize(
        "value", [1 / 3, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 2.0**-40, -0.0, math.inf, 123456789.123456789]
    )
    def test_floats_come_back_exactly(self, file: Path, value: float) -> None:
        append_metrics(file, {"step": 1, "train_loss": value})
        keep_metrics(file, 1, validated=True)
        (row,) = rows_of(file)
        assert row["train_loss"].hex() == value.hex()

    def test_not_a_number_comes_back(self, file: Path) -> None:
        append_metrics(file, {"step": 1, "train_loss": 2.0, "grad_norm": math.nan})
        assert math.isnan(rows_of(file)[0]["grad_norm"])

    @pytest.mark.parametrize("length", range(1, len(LINE_12) + 1))
    def test_a_row_cut_short_is_never_read(self, file: Path, length: int) -> None:
        """Cut `12,...` anywhere: as `1` it looks like a step, and without its newline alone nobody knows it ended."""
        append_metrics(file, {"step": 1, "train_loss": 3.0})
        whole = file.read_text()
        file.write_text(whole + LINE_12[:length])
        assert [row["step"] for row in rows_of(file)] == [1]
        assert read_metrics(file)[1] == []
        keep_metrics(file, 12, validated=True)
        assert file.read_text() == whole
        append_metrics(file, TRAIN_12)
        assert file.read_text() == whole + LINE_12 + "\n"

    @pytest.mark.parametrize("length", [0, 3, len(HEADER)])
    def test_a_header_cut_short_is_written_again(self, file: Path, length: int) -> None:
        file.write_text(HEADER[:length])
        assert rows_of(file) == []
        keep_metrics(file, 0, validated=True)
        append_metrics(file, TRAIN_12)
        assert file.read_text() == f"{HEADER}\n{LINE_12}\n"

    def test_rows_up_to_a_step(self, file: Path) -> None:
        keep_metrics(file, 3, validated=True)
        assert not file.exists()  # a new run: nothing to forget
        for step in range(1, 13):
            append_metrics(file, {"step": step, "train_loss": float(step)})
            if step % 5 == 0:
                append_metrics(file, {"step": step, "val_loss": step / 2})
        before = file.read_text().splitlines()
        keep_metrics(file, 12, validated=True)
        assert file.read_text().splitlines() == before
        keep_metrics(file, 10, validated=True)  # 10 and not, as text, 1 and 10; with the validation of step 10
        assert [row["step"] for row in rows_of(file)] == [1, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 10]
        assert file.read_text().splitlines() == before[:13]
        keep_metrics(file, 10, validated=False)  # its validation is to be repeated
        assert file.read_text().splitlines() == before[:12]
        keep_metrics(file, 0, validated=True)
        assert file.read_text() == HEADER + "\n"
        assert [path.name for path in file.parent.iterdir()] == ["metrics.csv"]

    @pytest.mark.parametrize(
        "line", ["garbage", "3,x,1.0", "2,,1.0,,,,,,,,,,,", "3,,,,,,,,,,,,,", "\x00\xff,,", "3,,1.0,,,,,,,,,,,,,,"]
    )
    def test_a_damaged_line_is_set_aside_and_the_others_stay(
        self, file: Path, line: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for step in (1, 2):
            append_metrics(file, {"step": step, "train_loss": float(step)})
        with file.open("ab") as f:
            f.write(line.encode("latin-1") + b"\n")
        append_metrics(file, {"step": 4, "train_loss": 4.0})
        assert [row["step"] for row in rows_of(file)] == [1, 2, 4]
        assert read_metrics(file)[1] == [4]
        damaged = file.read_bytes()
        keep_metrics(file, 4, validated=True)
        assert file.with_name("metrics.csv.damaged").read_bytes() == damaged
        assert read_metrics(file)[1] == []
        assert [row["step"] for row in rows_of(file)] == [1, 2, 4]
        assert "line 4 is damaged; kept as metrics.csv.damaged" in capsys.readouterr().err


def test_the_base_is_read_from_its_evaluation(tmp_path: Path) -> None:
    assert base_loss(tmp_path) is None
    path = tmp_path / "validation-base.json"
    path.write_text('{"validation_loss": 2.75, "validation_loss_hf": 1.0}')
    assert base_loss(tmp_path) == 2.75
    (tmp_path / "environment.json").write_text('{"weighted_eval": true}')
    assert base_loss(tmp_path) is None  # not of the same kind as the run's own losses
    path.write_text('{"validation_loss": 2.5, "settings": {"weighted_eval": true}}')
    assert base_loss(tmp_path) == 2.5
    for damaged in ("", "{", '{"validation_loss": "x"}', "[1]"):
        path.write_text(damaged)
        assert base_loss(tmp_path) is None


@pytest.mark.parametrize(
    ("losses", "patience", "stopped"),
    [
        ([], 2, False), ([3, 2, 1], 2, False), ([1, 2], 2, False), ([1, 2, 3], 2, True), ([1, 2, 3], None, False),
        ([2, 1, 1, 1], 2, True), ([math.nan, math.nan, math.nan], 2, True), ([3, math.nan, 1], 2, False),
    ],
)  # fmt: skip
def test_stopped_early(losses: list[float], patience: int | None, stopped: bool) -> None:
    assert stopped_early(losses, patience) is stopped


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

    def test_a_forked_child_does_not_keep_it(self, tmp_path: Path) -> None:
        """A data loader's worker outlives a killed run by seconds, in which nothing could continue it."""
        file = lock_run(tmp_path)
        (wait, done), (begun, begin) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.close(done)
            os.write(begin, b"x")
            os.read(wait, 1)  # until the parent closes its end
            os._exit(0)
        os.read(begun, 1)
        assert is_locked(tmp_path)
        file.close()
        assert not is_locked(tmp_path)
        lock_run(tmp_path).close()
        os.close(done)
        os.waitpid(child, 0)
