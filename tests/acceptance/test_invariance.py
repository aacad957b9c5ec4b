"""How a step is cut into micro-batches changes no loss, no gradient norm and no adapter."""

from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import adapter, arguments, close, lab, largest_difference, train_column, validations

BOUND = 1e-5  # DESIGN, split invariance in float32
STEPS = 20


def runs(folder: Path, cuts: tuple[int, ...], **options: Any) -> list[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for cut in cuts:
            lab(
                "fit",
                *arguments(
                    **{
                        "config": "chitchat.yaml",
                        "run_dir": f"cut-{cut}",
                        "model.compute_dtype": "float32",
                        "model.optimizer": "adamw",
                        "data.micro_batch_tokens": cut,
                        "data.batch_size": 3,
                        "trainer.max_epochs": 1,
                        "val_every_steps": 50,
                        "samples": 0,
                        "trainer.logger": "false",
                    }
                    | options
                ),
            )
    return [folder / f"cut-{cut}" for cut in cuts]


def assert_equal_runs(found: list[Path], steps: int = STEPS) -> None:
    whole, *others = found
    assert len(train_column(whole, "train_loss")) == steps
    for other in others:
        assert close(train_column(other, "train_loss"), train_column(whole, "train_loss"), BOUND)
        assert close(train_column(other, "grad_norm"), train_column(whole, "grad_norm"), BOUND)
        assert largest_difference(adapter(other), adapter(whole)) <= BOUND
        assert abs(validations(other)[steps] - validations(whole)[steps]) <= BOUND
        assert train_column(other, "supervised_tokens") == train_column(whole, "supervised_tokens")


# 59 training conversations in threes: 19 steps of three and a last one of two.
CHITCHAT = {"data.rows": 70, "data.split": "[59,6,5]"}


@pytest.mark.parametrize("cut", [512, pytest.param(2_048, marks=pytest.mark.slow)])
def test_tiny_llama_on_chitchat(tmp_path: Path, tiny_base: Path, cut: int) -> None:
    assert_equal_runs(runs(tmp_path, (16_384, cut), **CHITCHAT, **{"model.base": tiny_base}))


@pytest.mark.parametrize("mode", ["selective", pytest.param("full", marks=pytest.mark.slow)])
def test_checkpointing_changes_nothing(tmp_path: Path, tiny_base: Path, mode: str) -> None:
    options = {**CHITCHAT, "data.max_length": 512, "data.on_bad_row": "drop", "model.base": tiny_base}
    (off,) = runs(tmp_path, (1_024,), **options)
    (tmp_path / "on").mkdir()
    (on,) = runs(tmp_path / "on", (1_024,), **options, **{"model.checkpointing": mode})
    assert_equal_runs([off, on], steps=len(train_column(off, "train_loss")))


@pytest.mark.slow
def test_smollm2_on_chitchat(tmp_path: Path) -> None:
    found = runs(tmp_path, (16_384, 2_048, 512), **CHITCHAT, **{"data.max_length": 640})
    assert_equal_runs(found)
