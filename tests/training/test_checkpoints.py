"""A best checkpoint that a kill interrupted is put right on resume; a file that is not ours is refused."""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_lab.errors import LabError
from lightning_lab.training.callbacks.checkpoints import read_checkpoint
from tests.acceptance.conftest import arguments, lab


@pytest.fixture(scope="module")
def args(narrow_base: Path, short_chats: Path) -> list[str]:
    """Four steps, validations at 2 and 4; each of them the best so far."""
    return arguments(
        **{
            "config": "embedded.yaml",
            "model.base": narrow_base,
            "model.compute_dtype": "float32",
            "model.optimizer": "adamw",
            "model.target_modules": "[q_proj,v_proj]",
            "model.lr": 0.05,
            "model.warmup_steps": 0,
            "data.source": short_chats,
            "data.split": "[16,6,2]",
            "data.batch_size": 4,
            "val_every_steps": 2,
            "samples": 0,
            "trainer.logger": "false",
        }
    )


@pytest.fixture(scope="module")
def finished(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `half` ended after step 2, `whole` after step 4 (their schedules differ, which does not matter)."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lab("fit", *args, "--run_dir=half", "--trainer.max_steps=2")
        lab("fit", *args, "--run_dir=whole", "--trainer.max_steps=4")
    for name, step in (("half", 2), ("whole", 4)):
        for checkpoint in ("last", "best"):
            assert read_checkpoint(_file(folder / name, checkpoint))["lightning_lab"]["completed_steps"] == step
    return folder


def _file(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.ckpt"


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "runs_")
    monkeypatch.chdir(tmp_path / "runs_")
    return Path()


def peft_weights(best: Path) -> dict[str, torch.Tensor]:
    return load_file(best / "adapter_model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def replace(path: Path, other: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(other, path) if other.is_dir() else shutil.copyfile(other, path)


class TestBestAfterAKill:
    """``last.ckpt`` of step 4 says that step 4 was the best, and the files of the best are what a kill left."""

    @pytest.mark.parametrize(
        "leave",
        [
            pytest.param(lambda c, o: ((c / "best.ckpt").unlink(), shutil.rmtree(c / "best")), id="neither file"),
            pytest.param(lambda c, o: replace(c / "best.ckpt", o / "best.ckpt"), id="the best of an earlier step"),
            pytest.param(lambda c, o: cut(c / "best.ckpt"), id="best.ckpt cut short"),
            pytest.param(lambda c, o: shutil.rmtree(c / "best"), id="best.ckpt without its adapter"),
            pytest.param(lambda c, o: (c / "best").rename(c / ".best.old"), id="between the two renames"),
            pytest.param(
                lambda c, o: (replace(c / "best", o / "best"), replace(c / "best.ckpt", o / "best.ckpt")),
                id="both of an earlier step",
            ),
        ],
    )
    def test_is_put_right(self, runs: Path, args: list[str], leave: Callable[[Path, Path], Any]) -> None:
        checkpoints = runs / "whole" / "checkpoints"
        last, adapter = (checkpoints / "last.ckpt").read_bytes(), peft_weights(checkpoints / "best")
        rows = (runs / "whole" / "metrics.csv").read_text()
        leave(checkpoints, runs / "half" / "checkpoints")
        lab("fit", *args, "--run_dir=whole", "--ckpt_path=last", "--trainer.max_steps=4")
        assert (checkpoints / "last.ckpt").read_bytes() == (checkpoints / "best.ckpt").read_bytes() == last
        restored = peft_weights(checkpoints / "best")
        assert restored.keys() == adapter.keys()
        assert all(torch.equal(restored[name], adapter[name]) for name in adapter)
        assert (checkpoints / "best" / "adapter_config.json").is_file()
        assert sorted(path.name for path in checkpoints.iterdir()) == ["best", "best.ckpt", "last.ckpt"]
        assert (runs / "whole" / "metrics.csv").read_text() == rows
        assert peft_weights(runs / "half" / "checkpoints" / "best").keys() == adapter.keys()  # what was compared with
        assert not torch.equal(
            *(next(iter(peft_weights(runs / n / "checkpoints/best").values())) for n in ("half", "whole"))
        )

    def test_an_earlier_best_stays(self, runs: Path, args: list[str]) -> None:
        """With a last step that is not the best, resuming leaves the best alone."""
        lab("fit", *args, "--run_dir=worse", "--trainer.max_steps=3", "--val_every_steps=1", "--model.lr=30")
        checkpoints = Path("worse/checkpoints")
        best, adapter = (checkpoints / "best.ckpt").read_bytes(), peft_weights(checkpoints / "best")
        state = read_checkpoint(checkpoints / "last.ckpt")
        assert state["lightning_lab"]["completed_steps"] == 3
        assert read_checkpoint(checkpoints / "best.ckpt")["lightning_lab"]["completed_steps"] < 3
        options = ("--trainer.max_steps=3", "--val_every_steps=1", "--model.lr=30")
        lab("fit", *args, "--run_dir=worse", "--ckpt_path=last", *options)
        assert (checkpoints / "best.ckpt").read_bytes() == best
        assert all(torch.equal(value, adapter[name]) for name, value in peft_weights(checkpoints / "best").items())


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestReading:
    def test_our_own(self, finished: Path) -> None:
        checkpoint = read_checkpoint(_file(finished / "whole", "last"))
        assert checkpoint["lightning_lab"]["completed_steps"] == 4
        assert all("lora_" in name for name in checkpoint["state_dict"])

    @pytest.mark.parametrize("how", ["torch", "pickle"])
    def test_a_pickle_that_would_run_code(self, tmp_path: Path, how: str) -> None:
        path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
        content = {"lightning_lab": {"completed_steps": 1}, "state_dict": RunsCode(ran)}
        if how == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(LabError, match=r"x\.ckpt: cannot be read as a checkpoint \("):
            read_checkpoint(path)
        assert not ran.exists()
        if how == "torch":  # the trap is a real one
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert ran.exists()

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02"])
    def test_a_file_of_something_else(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(LabError, match=r"x\.ckpt: cannot be read as a checkpoint \(.+\); use another one"):
            read_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
    def test_one_of_ours_cut_short(self, finished: Path, tmp_path: Path, share: float) -> None:
        whole = _file(finished / "whole", "last").read_bytes()
        (tmp_path / "x.ckpt").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(LabError, match=r"x\.ckpt: cannot be read as a checkpoint"):
            read_checkpoint(tmp_path / "x.ckpt")

    def test_a_folder_and_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=r": cannot be read as a checkpoint \(.*directory"):
            read_checkpoint(tmp_path)
        with pytest.raises(LabError, match=r"x\.ckpt: no such checkpoint"):
            read_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize(
        "content",
        [{"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, [1, 2], {}, "lightning_lab", torch.ones(2)],
    )
    def test_somebody_elses(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(LabError, match=r"x\.ckpt: is not a checkpoint of this program$"):
            read_checkpoint(tmp_path / "x.ckpt")

    def test_the_command_line_says_it_in_one_line(
        self, runs: Path, args: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        from lightning_lab.__main__ import main

        torch.save({"state_dict": {}}, "x.ckpt")
        assert main(["test", *args, "--ckpt_path=x.ckpt"]) == 2
        assert "error: x.ckpt: is not a checkpoint of this program\n" in capsys.readouterr().err
        assert not Path("runs").exists()  # nothing was made for it
