"""Best checkpoints: written before the last one, so that a kill in between is made up for on resume."""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from lightning_lab.errors import LabError
from lightning_lab.files import check_sums
from lightning_lab.training.callbacks.checkpoints import Checkpoints
from lightning_lab.training.resume import KEY, read_checkpoint
from tests.acceptance.conftest import lab


def peft_weights(best: Path) -> dict[str, torch.Tensor]:
    return load_file(best / "adapter_model.safetensors")


def test_best_is_that_of_the_last_validation_here(runs: Path) -> None:
    checkpoints = runs / "whole" / "checkpoints"
    assert (checkpoints / "last.ckpt").read_bytes() == (checkpoints / "best.ckpt").read_bytes()
    check_sums(checkpoints / "best")
    state = read_checkpoint(checkpoints / "best.ckpt")["state_dict"]
    exported = peft_weights(checkpoints / "best")
    assert {name.replace(".default", "") for name in state} == exported.keys()
    assert all(torch.equal(exported[name.replace(".default", "")], state[name]) for name in state)


def test_an_earlier_best_stays(runs: Path, args: list[str]) -> None:
    """With a last step that is not the best, resuming leaves the best alone."""
    lab("fit", *args, "--run_dir=worse", "--trainer.max_steps=3", "--val_every_steps=1", "--model.lr=30")
    checkpoints = Path("worse/checkpoints")
    best, adapter = (checkpoints / "best.ckpt").read_bytes(), peft_weights(checkpoints / "best")
    state = read_checkpoint(checkpoints / "last.ckpt")
    assert state[KEY]["completed_steps"] == 3
    assert read_checkpoint(checkpoints / "best.ckpt")[KEY]["completed_steps"] < 3
    options = ("--trainer.max_steps=3", "--val_every_steps=1", "--model.lr=30")
    lab("fit", *args, "--run_dir=worse", "--ckpt_path=last", *options)
    assert (checkpoints / "best.ckpt").read_bytes() == best
    assert all(torch.equal(value, adapter[name]) for name, value in peft_weights(checkpoints / "best").items())


def test_it_goes_to_other_processes(tmp_path: Path) -> None:
    assert pickle.loads(pickle.dumps(Checkpoints(tmp_path, 5))).every_steps == 5


def test_a_full_disk_while_the_best_is_exported_names_the_place(tmp_path: Path) -> None:
    """safetensors has a word of its own for it, which is no OSError."""

    def full(*args: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    module: Any = SimpleNamespace(peft_model=SimpleNamespace(save_pretrained=full))
    with pytest.raises(LabError, match=r"checkpoints/\.best\.tmp: cannot be written \(.*No space left"):
        Checkpoints(tmp_path)._export_best(module)
