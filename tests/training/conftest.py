"""A narrow base, and two short runs on it."""

import shutil
from pathlib import Path

import pytest
import torch

from lightning_lab.training.resume import read_checkpoint
from tests.acceptance.conftest import arguments, lab


@pytest.fixture(scope="session")
def narrow_base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base at a quarter of its width: a CPU multiplies float16 slowly."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("narrow") / "base"
    shutil.copytree(tiny_base, folder)
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(
        tiny_base, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=16
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def finished(args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `half` ended after step 2, `whole` after step 4 (their schedules differ, which does not matter)."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lab("fit", *args, "--run_dir=half", "--trainer.max_steps=2")
        lab("fit", *args, "--run_dir=whole", "--trainer.max_steps=4")
    for name, step in (("half", 2), ("whole", 4)):
        for checkpoint in ("last", "best"):
            assert (
                read_checkpoint(checkpoint_file(folder / name, checkpoint))["lightning_lab"]["completed_steps"] == step
            )
    return folder


def checkpoint_file(run: Path, name: str) -> Path:
    return run / "checkpoints" / f"{name}.ckpt"


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(finished, tmp_path / "runs_")
    monkeypatch.chdir(tmp_path / "runs_")
    return Path()
