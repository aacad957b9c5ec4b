"""Bad input ends with one line, exit status 2, no traceback, and nothing that was saved is lost."""

import gc
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lab.__main__ import COMMANDS, main
from lightning_lab.cli import _accelerator
from lightning_lab.configs_lookup import DEFAULTS, configs_dir, packaged_configs
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.training import refusals
from tests.acceptance.conftest import lab, metrics, start

GOOD = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello there"}]}


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """Run a command that must fail with one line; return the line."""
    capsys.readouterr()
    assert main(list(args)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def bad_rows(tmp_path: Path, *rows: object) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return f"--data.source={path}"


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def turns(*pairs: tuple[str, object]) -> dict[str, object]:
    return {"conversations": [{"from": role, "value": value} for role, value in pairs]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{not json", "JSON"),
        ({"something": 1}, "something"),
        (turns(), "empty"),
        (turns(("human", "Hi"), ("alien", "Hello")), "alien"),
        (turns(("human", "Hi"), ("gpt", 7)), "must be text"),
        (turns(("human", "Hi"), ("gpt", None)), "missing"),
        (turns(("human", "Hi")), "assistant"),
    ],
)
def test_a_bad_row_is_named_and_can_be_dropped(
    tiny_args: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], row: object, reason: str
) -> None:
    source = bad_rows(tmp_path, *[GOOD] * 6, row, *[GOOD] * 5)
    args = [*tiny_args, source, "--data.split=[0.5,0.25,0.25]"]
    line = fails(capsys, "fit", *args)
    assert "rows.jsonl line 7" in line
    assert reason.lower() in line.lower()
    assert not Path("runs").exists()  # else it would count as the newest run
    lab("fit", *args, "--data.on_bad_row=drop", "--samples=0")
    run = sorted(Path("runs").iterdir())[-1]
    splits = json.loads((run / "environment.json").read_text())["data"]["splits"]
    dropped = {row: why for split in splits.values() for row, why in split["dropped"].items()}
    assert list(dropped) == ["6"]
    assert sum(split["conversations"] for split in splits.values()) == 11


def test_nothing_left_to_learn(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing left to learn" in fails(capsys, "fit", *tiny_args, "--data.max_length=12")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model.lrr=1"], "lrr"),
        (["--model.lr=fast"], "model.lr"),
        (["--model.bits=5"], "model.bits"),
        (["--model.compile=true", "--model.fused_linear=false"], "model.compile needs the fused linear"),
        (["--model.compile=true", "--model.dropout=0.1"], "model.compile needs the fused linear"),
        (["--model.cache_dequantised=true", "--model.bits=16"], "model.cache_dequantised is for the fused linear"),
        (["--model.compile=true", "--model.checkpointing=offload"], "model.checkpointing: offload cannot be compiled"),
        (["--trainer.accelerator=cpu", "--model.checkpointing=offload"], "model.checkpointing: offload moves"),
        (["--model.r=0"], "model.r"),
        (["--model.lr=-1"], "model.lr"),
        (["--data.batch_size=0"], "data.batch_size"),
        (["--data.split=[1,2]"], "data.split"),
        (["--data.split=[500,1,1]"], "data.split"),
        (["--data.source=missing.jsonl"], "missing.jsonl"),
        (["--model.base=./missing"], "missing"),
        (["--model.base=missing.gguf"], "missing.gguf"),
        (["--model.target_modules=[lm_head]"], "lm_head"),
        (["--model.target_modules=[nonsense]"], "nonsense"),
        (["--config=missing.yaml"], "missing.yaml"),
        (["--val_every_steps=0"], "val_every_steps"),
        (["--trainer.max_epochs=null"], "trainer.max_epochs"),
        (["--trainer.precision=bf16-true"], "model.compute_dtype"),
        (["--trainer.accumulate_grad_batches=4"], "data.batch_size"),
        (["--trainer.gradient_clip_val=1.0"], "model.max_grad_norm"),
        (["--trainer.val_check_interval=10"], "val_every_steps"),
        (["--trainer.strategy=fsdp"], "fsdp"),
        (["--trainer.accelerator=cuda"], "cuda"),
        (["--trainer.accelerator=foo"], "trainer.accelerator"),
        (["--trainer.accelerator=tpu"], "trainer.accelerator"),
        (["--trainer.strategy=ddp_spawn"], "trainer.strategy"),
        (["--ckpt_path=base"], "base"),
        (["--ckpt_path=last"], "embedded"),
        (["--ckpt_path=missing.ckpt"], "missing.ckpt"),
    ],
)
def test_a_setting_that_cannot_be_honoured(
    tiny_args: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    assert named.lower() in fails(capsys, "fit", *tiny_args, *arguments).lower()


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_evaluation_needs_a_checkpoint(tiny_args: list[str], capsys: pytest.CaptureFixture[str], command: str) -> None:
    line = fails(capsys, command, *tiny_args)
    assert all(choice in line for choice in ("best", "last", "base", ".ckpt"))


def test_predict_on_several_devices(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    devices = ("--trainer.accelerator=cpu", "--trainer.devices=2")
    assert "trainer.devices" in fails(capsys, "predict", *tiny_args, "--ckpt_path=base", *devices)


@pytest.mark.parametrize(
    ("command", "named"),
    [("fit", "model.checkpointing"), ("test", "micro_batch_tokens"), ("predict", "max_new_tokens")],
)
def test_a_full_gpu(
    tiny_args: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    named: str,
) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(ChatDataModule, "setup", full)
    line = fails(capsys, command, *tiny_args, *([] if command == "fit" else ["--ckpt_path=base"]))
    assert "the GPU is out of memory" in line
    assert named in line


def test_an_unknown_command_and_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit" in fails(capsys, "fitt")
    assert main([]) == 2
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in (*COMMANDS, *packaged_configs()))


def test_broken_yaml(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_text("model: [unclosed\n")
    assert "broken.yaml" in fails(capsys, "fit", "--config=broken.yaml")


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_parses(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["sweep" if name == "lab_grid.yaml" else "fit", "--config", name, "--print_config"])
    assert leaving.value.code == 0
    assert "val_every_steps:" in capsys.readouterr().out


def test_every_packaged_config_says_what_it_is() -> None:
    for path in configs_dir().glob("*.yaml"):
        head = [line for line in path.read_text().splitlines()[:4] if line.startswith("#")]
        assert head, path
        if path.name != DEFAULTS:
            assert any("Needs" in line for line in head), path


class TestCheckpoints:
    def test_a_corrupt_one_is_named_and_the_run_is_left_alone(
        self, tiny_args: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        lab("fit", *tiny_args, "--trainer.max_steps=3", "--samples=0")
        last = Path("runs/embedded/checkpoints/last.ckpt")
        whole, rows = last.read_bytes(), metrics(Path("runs/embedded"))
        last.write_bytes(whole[: len(whole) // 2])
        for command in ("fit", "test"):
            for checkpoint in ("last", str(last)):
                assert "last.ckpt" in fails(capsys, command, *tiny_args, f"--ckpt_path={checkpoint}")
        assert metrics(Path("runs/embedded")) == rows
        last.write_bytes(b"")
        assert "last.ckpt" in fails(capsys, "test", *tiny_args, "--ckpt_path=last")

        last.write_bytes(whole)
        line = fails(capsys, "test", *tiny_args, "--ckpt_path=last", "--model.r=16")
        assert "model.r" in line
        assert "model.alpha" in fails(capsys, "test", *tiny_args, "--ckpt_path=last", "--model.alpha=20")
        line = fails(capsys, "fit", *tiny_args, "--ckpt_path=last", "--data.batch_size=5", "--trainer.max_steps=9")
        assert "data.batch_size" in line
        assert "optimizer steps" in fails(capsys, "fit", *tiny_args, "--ckpt_path=last", "--trainer.max_steps=9")
        assert metrics(Path("runs/embedded")) == rows


class TestWithoutANetwork:
    """The Hub's host does not resolve, or takes connections and never answers: one line within seconds."""

    @pytest.mark.parametrize("offline", ["0", "1"])
    @pytest.mark.parametrize("key", ["model.base=nobody/nothing", "data.source=nobody/nothing"])
    def test_one_line_soon(self, tiny_args: list[str], tmp_path: Path, offline: str, key: str) -> None:
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            silent.listen()
            started = time.monotonic()
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("HF_HUB_OFFLINE", offline)
                patch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
                patch.setenv("HF_HOME", str(tmp_path / "hub"))
                process = start("fit", *tiny_args, f"--{key}", cwd=tmp_path)
                error = process.communicate(timeout=120)[1]
        assert process.returncode == 2, error
        assert "Traceback" not in error
        assert [line for line in error.splitlines() if line.startswith("error: ")], error
        assert "nobody/nothing" in error
        assert time.monotonic() - started < 90


@pytest.mark.parametrize("version", ["NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\n", None])
def test_a_gpu_that_cannot_be_used_is_no_reason_to_take_the_cpu(
    tiny_args: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    version: str | None,
) -> None:
    device, driver = tmp_path / "nvidiactl", tmp_path / "version"
    monkeypatch.setattr(refusals, "NVIDIA_DEVICE", device)
    monkeypatch.setattr(refusals, "NVIDIA_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    steps = ("--trainer.max_steps=1", "--samples=0", f"--run_dir={tmp_path / 'run'}")
    assert "finds no GPU here" in fails(capsys, "fit", *tiny_args, *steps, "--trainer.accelerator=gpu")
    device.touch()
    if version:
        driver.write_text(version)
    for accelerator in ("auto", "gpu"):
        line = fails(capsys, "fit", *tiny_args, *steps, f"--trainer.accelerator={accelerator}")
        assert ("driver 550.54.15" if version else "a driver that does not answer") in line
        assert f"PyTorch ({torch.__version__}" in line
        assert "set trainer.accelerator to cpu" in line
    assert not (tmp_path / "run").exists()
    assert main(["fit", *tiny_args, *steps, "--trainer.accelerator=cpu"]) == 0
    assert capsys.readouterr().err.count("warning: on the CPU, but there is an NVIDIA GPU") == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert refusals.unusable_gpu() is None


def test_only_names_of_gpus_are_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for available in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        for asked in ("cpu", "mps", "cdua", object()):
            assert _accelerator(asked) is asked  # Lightning and `refuse_trainer` judge them
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [_accelerator(asked) for asked in ("auto", "gpu", "cuda")] == ["cuda", "gpu", "cuda"]


def test_preview_needs_no_gpu(tiny_args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *tiny_args, "--trainer.accelerator=gpu", "--trainer.devices=2", "--limit=1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"]
    assert main(["preview", *tiny_args, "--check", "--json"]) == 0
    assert [each["split"] for each in json.loads(capsys.readouterr().out)["found"]][:1] == ["train"]


def test_imports_are_not_searched_for_cycles_and_all_else_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first command of a process imports is set apart, once; a collector that stayed off would leak."""
    frozen, searched = [], []

    class Imported:
        @property
        def run(self) -> Any:
            searched.append(gc.isenabled())
            return lambda command, argv: searched.append(gc.isenabled()) or 0

    monkeypatch.setitem(sys.modules, "lightning_lab.cli", Imported())
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(gc, "get_freeze_count", lambda: len(frozen))
    for _ in range(2):
        assert main(["preview"]) == 0
    assert searched == [False, True] * 2
    assert frozen == [True]
