from pathlib import Path

import pytest

from lightning_lab.errors import LabError
from lightning_lab.training.rundir import newest_run, resolve_run


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make(*names: str) -> None:
    for name in names:
        folder = Path("runs") / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "best.ckpt").touch()


def test_a_new_run_takes_the_first_free_name() -> None:
    assert resolve_run("fit", "a", None, None).run_dir == Path("runs/a")
    make("a", "a-2", "a-4")
    assert resolve_run("fit", "a", None, None).run_dir == Path("runs/a-3")
    assert resolve_run("fit", "a", "runs/a-4", None).run_dir == Path("runs/a-4-2")


def test_the_newest_run_has_the_highest_number_and_that_very_name() -> None:
    make("a", "a-9", "a-10", "a-b", "ab")
    assert newest_run("a") == Path("runs/a-10")
    assert newest_run("b") is None
    paths = resolve_run("test", "a", None, "best")
    assert (paths.run_dir, paths.checkpoint) == (Path("runs/a-10"), Path("runs/a-10/checkpoints/best.ckpt"))


def test_a_checkpoint_file_leads_to_its_run() -> None:
    make("a")
    assert resolve_run("test", "other", None, "runs/a/checkpoints/best.ckpt").run_dir == Path("runs/a")


@pytest.mark.parametrize(
    ("command", "ckpt_path"), [("test", None), ("test", "last"), ("test", "no.ckpt"), ("fit", "base"), ("fit", "last")]
)
def test_what_is_not_there_is_said(command: str, ckpt_path: str | None) -> None:
    make("a")
    with pytest.raises(LabError):
        resolve_run(command, "a", None, ckpt_path)
