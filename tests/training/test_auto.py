"""Whether `auto` compiles, asked without a GPU: of the trainer's device, the run's length and the tools at hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.data import AttributeDict

from lightning_lab.training import auto


def pays(
    device: str = "cuda", max_steps: int = -1, max_epochs: int | None = 1, steps_per_epoch: int = 1500, **changes: Any
) -> bool:
    trainer: Any = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)), max_steps=max_steps, max_epochs=max_epochs
    )
    model = AttributeDict({"fused_linear": True, "bits": 4, "dora": False, "dropout": 0.0, **changes})
    data: Any = SimpleNamespace(steps_per_epoch=steps_per_epoch)
    return auto._compiling_pays(trainer, model, data)


@pytest.fixture(autouse=True)
def _tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(auto, "find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/cc" if name == "cc" else None)


def test_on_a_gpu_in_runs_that_are_long_enough() -> None:
    assert pays()
    assert pays(max_steps=50)
    assert not pays(max_steps=49)
    assert not pays(steps_per_epoch=49)
    assert pays(steps_per_epoch=49, max_epochs=2)
    assert pays(steps_per_epoch=49, max_epochs=-1, max_steps=1000)
    assert not pays(device="cpu")


@pytest.mark.parametrize("changes", [{"dora": True}, {"bits": 8}, {"dropout": 0.1}, {"fused_linear": False}])
def test_not_what_cannot_be_compiled(changes: dict[str, Any]) -> None:
    assert not pays(**changes)


def test_without_a_compiler_it_says_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert not pays()
    assert "model.compile false, as there is no C compiler" in capsys.readouterr().err
    monkeypatch.setenv("CC", "/opt/cc")
    assert pays()
    monkeypatch.setattr(auto, "find_spec", lambda name: None)
    assert not pays()
    assert "Triton is not installed" in capsys.readouterr().err
