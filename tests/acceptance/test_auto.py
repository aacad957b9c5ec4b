"""`auto` for checkpointing and micro-batches: resolved once, recorded, and kept when a run is continued."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_lab import cli
from lightning_lab.experiments import plan
from tests.acceptance.conftest import lab, start
from tests.acceptance.test_errors import fails

AUTO = ("--model.checkpointing=auto", "--data.micro_batch_tokens=auto", "--data.eval_micro_batch_tokens=auto")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(cli.CHOSEN, "{}")  # so that what a run writes there is undone


def recorded(run: str) -> tuple[str, int, int]:
    config = yaml.safe_load(Path(run, "config.yaml").read_text())
    values = (
        config["model"]["checkpointing"],
        *(config["data"][key] for key in ("micro_batch_tokens", "eval_micro_batch_tokens")),
    )
    environment = json.loads(Path(run, "environment.json").read_text())
    keys = ("checkpointing", "micro_batch_tokens", "eval_micro_batch_tokens")
    assert tuple(environment[key] for key in keys) == values
    return values


def memory_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(plan, "available_memory", lambda device, processes: size)


def test_a_run_records_what_was_chosen_and_keeps_it(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--trainer.max_steps=2", "--samples=0", "--run_dir=run")
    memory_of(monkeypatch, 2**40)
    lab("fit", *tiny_args, *AUTO, *steps)
    # 4 conversations of at most 1,024 tokens
    assert recorded("run") == ("none", 4096, 4096)
    assert "auto: model.checkpointing none, data.micro_batch_tokens 4096" in capsys.readouterr().err

    memory_of(monkeypatch, 1)  # nothing would fit now
    lab("fit", *tiny_args, *AUTO, *steps, "--ckpt_path=last")
    assert recorded("run") == ("none", 4096, 4096)
    lab("test", "--run_dir=run", "--ckpt_path=last")
    assert "MiB available" in fails(capsys, "fit", *tiny_args, *AUTO)
    assert "MiB available" in fails(capsys, "test", *tiny_args, *AUTO, "--ckpt_path=base")


def test_evaluation_chooses_for_itself(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory_of(monkeypatch, 2**40)
    lab("validate", *tiny_args, *AUTO, "--ckpt_path=base", "--run_dir=base")
    assert "data.eval_micro_batch_tokens 4096" in capsys.readouterr().err


def test_plan_shows_the_choice(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    memory_of(monkeypatch, 2**40)
    lab("plan", *tiny_args, *AUTO)
    shown = capsys.readouterr()
    assert "auto: model.checkpointing none" in shown.err
    assert "by model.checkpointing, in MiB: none" in shown.out


def test_two_processes_choose_the_same(tiny_args: list[str], tmp_path: Path) -> None:
    process = start(
        "fit", *tiny_args, *AUTO, "--trainer.max_steps=1", "--samples=0", "--run_dir=two",
        "--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", cwd=tmp_path, threads=1,
    )  # fmt: skip
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert error.count("auto: ") == 1  # the second process was told
    assert recorded("two") == ("none", 4096, 4096)


def test_processes_started_elsewhere_are_refused(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "cannot be agreed on" in fails(capsys, "fit", *tiny_args, *AUTO)


def test_auto_is_resolved_by_the_command_line() -> None:
    from lightning_lab.data.datamodule import ChatDataModule
    from lightning_lab.errors import LabError
    from lightning_lab.training.module import QLoRAModule

    with pytest.raises(LabError, match="auto is for the command line"):
        QLoRAModule(checkpointing="auto")
    with pytest.raises(LabError, match="auto is for the command line"):
        ChatDataModule(micro_batch_tokens="auto")
