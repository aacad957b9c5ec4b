"""`auto` for checkpointing and micro-batches: resolved once, recorded, and kept when a run is continued."""

import json
from pathlib import Path

import pytest
import yaml

from lightning_lab.models import memory
from lightning_lab.training import auto
from tests.acceptance.conftest import lab, start
from tests.acceptance.test_errors import fails

AUTO = ("--model.checkpointing=auto", "--data.micro_batch_tokens=auto", "--data.eval_micro_batch_tokens=auto")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


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
    monkeypatch.setattr(memory, "available_memory", lambda device, processes=1: size)


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
    lab("fit", "--config=run/config.yaml", "--ckpt_path=last", "--run_dir=run")
    assert recorded("run") == ("none", 4096, 4096)
    lab("test", "--run_dir=run", "--ckpt_path=last")
    assert "MiB available" in fails(capsys, "fit", *tiny_args, *AUTO)
    assert "MiB available" in fails(capsys, "test", *tiny_args, *AUTO, "--ckpt_path=base")


def test_a_continued_run_keeps_the_choice_though_it_is_asked_again(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("--trainer.max_steps=2", "--samples=0", "--run_dir=run", "--model.dropout=0.1")
    memory_of(monkeypatch, 2**40)
    lab("fit", *tiny_args, *AUTO, *steps)
    memory_of(monkeypatch, 1)  # nothing would fit now
    lab("fit", *tiny_args, *AUTO, *steps, "--ckpt_path=last")
    assert recorded("run") == ("none", 4096, 4096)


def test_a_continued_run_is_compiled_or_not_as_it_was(tiny_args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = (*AUTO, "--model.compile=auto", "--model.cache_dequantised=auto", "--samples=0", "--run_dir=run")
    lab("fit", *tiny_args, *asked, "--trainer.max_steps=2")
    environment = json.loads(Path("run/environment.json").read_text())
    assert (environment["compile"], environment["cache_dequantised"]) == (False, False)
    monkeypatch.setattr(auto, "_compiling_pays", lambda *_: True)  # a compiler has been installed since
    lab("fit", *tiny_args, *asked, "--trainer.max_steps=2", "--ckpt_path=last")
    assert yaml.safe_load(Path("run/config.yaml").read_text())["model"]["compile"] is False


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
    assert "peak memory by checkpointing:\n" in shown.out


def test_two_processes_choose_the_same(tiny_args: list[str], tmp_path: Path) -> None:
    """Rank 0 chooses and tells the other, however they were started."""
    process = start(
        "fit", *tiny_args, *AUTO, "--trainer.max_steps=1", "--samples=0", "--run_dir=two",
        "--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2", cwd=tmp_path, threads=1,
    )  # fmt: skip
    error = process.communicate(timeout=240)[1]
    assert process.returncode == 0, error
    assert error.count("auto: ") == 1
    assert recorded("two") == ("none", 4096, 4096)


def test_a_list_of_devices_is_counted_as_lightning_counts_it(
    tiny_args: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(memory, "available_memory", lambda device, processes=1: asked.append(processes) or 2**40)
    options = ("--trainer.max_steps=1", "--samples=0", "--trainer.accelerator=cpu")
    lab("fit", *tiny_args, *AUTO, *options, "--trainer.devices=1")
    assert asked == [1]
