"""The package from Python, under a plain Trainer: everything that the command line does."""

import itertools
import json
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_lab import ChatDataModule, QLoRAModule, run_directory
from lightning_lab.errors import LabError
from lightning_lab.models import memory
from lightning_lab.training.callbacks import progress
from lightning_lab.training.callbacks.progress import PlainProgress
from lightning_lab.training.refusals import refuse_trainer
from lightning_lab.training.resume import read_checkpoint
from tests.acceptance.conftest import adapter, lab, largest_difference, metrics, validations

pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(autouse=True)
def _in_a_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def module(tiny_base: Path) -> Callable[..., QLoRAModule]:
    def module(**changes: Any) -> QLoRAModule:
        settings = {"compute_dtype": "float32", "r": 8, "alpha": 8, "lr": 3e-3, "optimizer": "adamw"}
        return QLoRAModule(base=str(tiny_base), **settings | changes)

    return module


@pytest.fixture
def data(tiny_base: Path, short_chats: Path) -> Callable[..., ChatDataModule]:
    def data(**changes: Any) -> ChatDataModule:
        settings = {"split": [20, 6, 6], "template": "tokenizer", "batch_size": 4, "micro_batch_tokens": 256}
        return ChatDataModule(source=str(short_chats), tokenizer=str(tiny_base), **settings | changes)

    return data


def trainer(**options: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    if not any(isinstance(c, pl.callbacks.Checkpoint) for c in options.get("callbacks", [])):
        quiet["enable_checkpointing"] = False
    return pl.Trainer(**quiet | options)


class Rows(pl.Callback):
    """Each step's row and source rows, and the steps that were validated."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.visited: list[tuple[int, ...]] = []
        self.validated: list[int] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(outputs)
        self.visited.append(batch.rows)

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        if not trainer.sanity_checking:
            self.validated.append(module.completed_steps)


def test_importing_loads_nothing() -> None:
    code = (
        "import sys, lightning_lab; assert 'torch' not in sys.modules; assert 'QLoRAModule' in lightning_lab.__all__; "
        "print(lightning_lab.__version__); lightning_lab.QLoRAModule; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    with pytest.raises(ImportError):
        from lightning_lab import Nonsense  # type: ignore[attr-defined]  # noqa: F401


class TestFigures:
    def test_fit_validate_test_and_predict(self, module: Any, data: Any) -> None:
        m, d, rows = module(), data(), Rows()
        assert m.evaluation is None
        t = trainer(max_epochs=1, callbacks=[rows])
        t.fit(m, d)
        assert [row["step"] for row in rows.rows] == [1, 2, 3, 4, 5]
        assert rows.validated == [5]
        fitted = {key: value.item() for key, value in t.callback_metrics.items()}
        (validation,), (test,) = t.validate(m, d, verbose=False), t.test(m, d, verbose=False)
        names = ("loss", "loss_hf", "perplexity", "token_accuracy")
        assert set(validation) == {f"val_{name}" for name in names}
        assert set(test) == {f"test_{name}" for name in names}
        assert validation["val_loss"] == fitted["val_loss"] < math.log(49152)
        assert test["test_perplexity"] == pytest.approx(math.exp(test["test_loss"]))
        answers = [pair for batch in t.predict(m, d) for pair in batch]
        assert len(answers) == 6
        assert all(isinstance(answer, str) and prompt.reference for prompt, answer in answers)

    def test_the_last_step_is_always_validated(self, module: Any, data: Any) -> None:
        rows = Rows()
        trainer(max_steps=3, callbacks=[rows]).fit(module(), data())
        assert rows.validated == [3]
        rows = Rows()
        options = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer(max_steps=7, max_epochs=-1, callbacks=[rows], **options).fit(module(), data())
        assert rows.validated == [2, 4, 6, 7]

    def test_a_sanity_check_is_no_validation(self, module: Any, data: Any) -> None:
        t = trainer(max_steps=1, num_sanity_val_steps=2, callbacks=run_directory("run", samples=0))
        t.fit(module(), data())
        assert list(validations(Path("run"))) == [1]

    @pytest.mark.parametrize("monitor", ["train_loss", "val_loss", "val_loss_hf", "grad_norm"])
    def test_lightnings_own_callbacks_monitor_any_figure(self, module: Any, data: Any, monitor: str) -> None:
        stop = EarlyStopping(monitor, patience=1, min_delta=1e9)  # never better
        keep = ModelCheckpoint("kept", monitor=monitor, save_last=True)
        t = trainer(max_epochs=4, callbacks=[stop, keep])
        t.fit(module(), data())
        assert t.current_epoch == 2
        assert keep.best_model_score is not None
        assert read_checkpoint(Path("kept/last.ckpt"))["lightning_lab"]["completed_steps"] in (5, 10)

    def test_limits(self, module: Any, data: Any) -> None:
        """Steps, schedule and order follow ``limit_train_batches``; the second epoch has its own order."""
        d, rows = data(), Rows()
        t = trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=1, callbacks=[rows])
        t.fit(module(warmup_steps=0), d)
        assert [row["lr"] for row in rows.rows] == pytest.approx([3e-3 * left / 4 for left in (4, 3, 2, 1)])
        assert [row["epoch"] for row in rows.rows] == [0.5, 1.0, 1.5, 2.0]
        train = d.splits["train"].rows
        for epoch in (0, 1):
            order = torch.randperm(20, generator=torch.Generator().manual_seed(3407 + epoch))
            expected = [tuple(train[order[i : i + 4].numpy()].tolist()) for i in (0, 4)]
            assert rows.visited[2 * epoch : 2 * epoch + 2] == expected
        (few,) = trainer(limit_test_batches=1).test(t.lightning_module, data(eval_micro_batch_tokens=64), verbose=False)
        assert len(t.lightning_module.evaluation.rows) < 6
        assert math.isfinite(few["test_loss"])

    def test_a_fraction_as_limit(self, module: Any, data: Any) -> None:
        rows = Rows()
        trainer(max_epochs=2, limit_train_batches=0.4, callbacks=[rows]).fit(module(), data())
        assert len(rows.rows) == 4


class _Stop(pl.Callback):
    """Ctrl-C in the middle of an evaluation."""

    def on_validation_batch_end(self, *_: Any) -> None:
        raise KeyboardInterrupt

    on_predict_batch_end = on_validation_batch_end


class TestAgain:
    @pytest.mark.parametrize("command", ["validate", "predict"])
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_fit_after_an_evaluation_that_was_interrupted(
        self, module: Any, data: Any, command: str, dtype: str
    ) -> None:
        m, d = module(compute_dtype=dtype, max_new_tokens=2), data()
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            getattr(trainer(callbacks=[_Stop()]), command)(m, datamodule=d)
        before = [weight.detach().clone() for weight in m.trainable()]
        trainer(max_steps=2).fit(m, d)
        assert any(not torch.equal(a, b) for a, b in zip(m.trainable(), before, strict=True))

    def test_fit_chooses_for_itself_what_an_evaluation_has_chosen(
        self, module: Any, data: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        auto = {"checkpointing": "auto", "cache_dequantised": "auto", "compile": "auto"}
        m, d = module(**auto), data(micro_batch_tokens="auto")
        chosen: list[bool] = []
        choose = memory.choose

        def watched(*args: Any, **options: Any) -> Any:
            chosen.append(options["training"])
            return choose(*args, **options)

        monkeypatch.setattr(memory, "choose", watched)
        trainer().validate(m, d)
        assert (m.hparams.compile, m.checkpointing) == (False, "none")
        trainer(max_steps=1).fit(m, d)
        assert chosen == [False, True]
        assert callable(m.compile)  # nn.Module's own

    def test_a_second_fit_begins_at_step_1(self, module: Any, data: Any) -> None:
        m, d, first, second = module(), data(), Rows(), Rows()
        trainer(max_epochs=1, callbacks=[first]).fit(m, d)
        trainer(max_epochs=1, callbacks=[second]).fit(m, d)
        assert [row["step"] for row in second.rows] == [1, 2, 3, 4, 5]
        assert [row["lr"] for row in second.rows] == [row["lr"] for row in first.rows]
        assert second.visited == first.visited
        assert second.rows[0]["train_loss"] < first.rows[0]["train_loss"]  # on the adapter as it is

    def test_a_plain_checkpoint_continues_in_the_middle_of_an_epoch(self, module: Any, data: Any) -> None:
        whole = Rows()
        keep = ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        options = {"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
        m = module(dropout=0.1, optimizer="adamw_8bit", r=32)
        trainer(callbacks=[whole, keep], **options).fit(m, data())
        end = {name: weight.clone() for name, weight in m.state_dict().items()}
        for step in (2, 3, 7):
            rest, again = Rows(), module(dropout=0.1, optimizer="adamw_8bit", r=32)
            trainer(callbacks=[rest], **options).fit(again, data(), ckpt_path=f"kept/step={step}.ckpt")
            assert rest.visited == whole.visited[step:]
            assert [r["train_loss"] for r in rest.rows] == [r["train_loss"] for r in whole.rows[step:]]
            assert all(torch.equal(weight, end[name]) for name, weight in again.state_dict().items())

    def test_load_from_checkpoint(self, module: Any, data: Any) -> None:
        m, d = module(), data()
        t = trainer(max_epochs=1, callbacks=[ModelCheckpoint("kept", monitor="val_loss", filename="best")])
        t.fit(m, d)
        (expected,) = t.test(m, d, ckpt_path="best", verbose=False)
        loaded = QLoRAModule.load_from_checkpoint("kept/best.ckpt", weights_only=True)
        assert loaded.hparams.r == 8
        assert loaded.completed_steps == 5
        assert largest_difference(loaded.state_dict(), m.state_dict()) == 0.0
        assert trainer().test(loaded, d, verbose=False) == [expected]

    def test_somebody_elses_checkpoint(self, module: Any, data: Any) -> None:
        torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "other.ckpt")
        with pytest.raises(LabError, match="is not a checkpoint of this program"):
            trainer().test(module(), data(), ckpt_path="other.ckpt", weights_only=True)


def test_own_loaders_of_packed_batches(module: Any, data: Any) -> None:
    d = data()
    d.prepare(progress=False)
    steps = DataLoader([d.step_batch(step) for step in range(5)], batch_size=None)
    batches = DataLoader(list(d.val_dataloader()), batch_size=None)
    m, t, own = module(), trainer(max_epochs=1), Rows()
    t.callbacks.append(own)
    t.fit(m, train_dataloaders=steps, val_dataloaders=batches)
    other, chat = module(), Rows()
    trainer(max_epochs=1, callbacks=[chat]).fit(other, d)
    assert [row["train_loss"] for row in own.rows] == [row["train_loss"] for row in chat.rows]
    assert own.validated == [5]
    assert trainer().validate(m, batches, verbose=False) == trainer().validate(other, d, verbose=False)


def test_an_endless_loader_of_own_batches(module: Any, data: Any) -> None:
    d = data()
    d.prepare(progress=False)

    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            return (d.step_batch(step) for step in itertools.count())

    steps = DataLoader(Endless(), batch_size=None)
    trainer(max_steps=3, callbacks=run_directory("run", samples=0)).fit(module(), train_dataloaders=steps)
    assert [row["step"] for row in metrics(Path("run"))] == ["1", "2", "3"]
    assert read_checkpoint(Path("run/checkpoints/last.ckpt"))["lightning_lab"]["completed_steps"] == 3


def test_signal_handlers_are_given_back(module: Any, data: Any) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    trainer(max_steps=1, callbacks=run_directory("run", samples=0)).fit(module(), data())
    assert [signal.getsignal(number) for number in numbers] == before


def test_several_processes_need_their_own_shares(module: Any, data: Any) -> None:
    t = trainer(max_steps=1, strategy="ddp", devices=2)
    with pytest.raises(LabError, match="use_distributed_sampler=False"):
        refuse_trainer(t)
    refuse_trainer(trainer(max_steps=1, strategy="ddp", devices=2, use_distributed_sampler=False))


class TestGuards:
    @pytest.mark.parametrize(
        ("options", "key"),
        [
            ({"precision": "bf16-mixed"}, "precision"),
            ({"precision": "16-mixed"}, "precision"),
            ({"precision": "bf16-true"}, "precision"),
            ({"accumulate_grad_batches": 4}, "accumulate_grad_batches"),
            ({"gradient_clip_val": 1.0}, "gradient_clip_val"),
            ({"overfit_batches": 2}, "overfit_batches"),
            ({"min_steps": 2}, "min_steps"),
        ],
    )
    def test_what_would_be_ignored_is_refused(self, module: Any, data: Any, options: dict[str, Any], key: str) -> None:
        # two of them Lightning refuses itself, before it asks the module
        with pytest.raises(
            (LabError, MisconfigurationException), match=f"{key} is not used here|not supported.*{key}="
        ):
            trainer(max_steps=1, **options).fit(module(), data())

    @pytest.mark.parametrize(
        "changes",
        [
            {"lr": -1.0},
            {"lr": math.nan},
            {"dropout": 1.5},
            {"r": 0},
            {"betas": (0.9, 1.0)},
            {"seed": -1},
            {"eps": -1.0},
        ],
    )
    def test_numbers_out_of_range(self, module: Any, changes: dict[str, Any]) -> None:
        with pytest.raises(LabError, match=rf"^model\.{next(iter(changes))} is .*; it must be "):
            module(**changes)

    def test_another_length_of_epochs_is_another_order(self, module: Any, data: Any) -> None:
        keep = ModelCheckpoint("kept", every_n_train_steps=1, save_top_k=-1, filename="{step}")
        trainer(max_steps=4, max_epochs=-1, limit_train_batches=2, callbacks=[keep]).fit(module(), data())
        with pytest.raises(LabError, match="optimizer steps of an epoch are 5, were 2"):
            trainer(max_steps=4, max_epochs=-1).fit(module(), data(), ckpt_path="kept/step=3.ckpt")

    def test_a_run_without_an_end(self, module: Any, data: Any) -> None:
        with pytest.raises(LabError, match="the run has no end"):
            trainer(max_epochs=-1).fit(module(), data())

    def test_auto(self, module: Any, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_memory", lambda device, processes=1: 2**40)
        m = module(checkpointing="auto")
        d = data(micro_batch_tokens="auto", eval_micro_batch_tokens="auto", max_length=256)
        trainer(max_steps=1).fit(m, d)
        assert (m.checkpointing, d.micro_batch_tokens, d.eval_micro_batch_tokens) == ("none", 1024, 1024)
        monkeypatch.setattr(memory, "available_memory", lambda device, processes=1: 1)
        with pytest.raises(LabError, match="MiB available"):
            trainer(max_steps=1).fit(module(checkpointing="auto"), data())


class TestRunDirectory:
    def test_it_is_the_command_lines(self, module: Any, data: Any) -> None:
        m, d = module(), data()
        t = trainer(max_epochs=1, callbacks=run_directory("runs/mine", samples=1, sample_tokens=2))
        t.fit(m, d)
        t.test(m, d, ckpt_path="runs/mine/checkpoints/best.ckpt", weights_only=True, verbose=False)
        run = Path("runs/mine")
        names = {path.name for path in run.iterdir()}
        assert {"config.yaml", "environment.json", "metrics.csv", "losses.md", "loss_curve.png", "samples.md"} <= names
        assert {"checkpoints", "test.json", "test_examples.csv"} <= names
        assert json.loads((run / "environment.json").read_text())["name"] == "mine"
        assert list(validations(run)) == [5]
        # its config repeats the run from the command line, bit for bit
        options = ("--trainer.logger=false", "--trainer.accelerator=cpu", "--samples=0", "--run_dir=runs/again")
        lab("fit", "--config=runs/mine/config.yaml", *options, "--trainer.max_epochs=1")
        assert metrics(Path("runs/again")) == metrics(run)
        assert largest_difference(adapter(Path("runs/again")), adapter(run)) == 0.0
        lab("test", "--run_dir=runs/mine", "--ckpt_path=best")
        lab("report", "runs")

    def test_it_continues(self, module: Any, data: Any) -> None:
        callbacks = lambda: run_directory("run", samples=0, checkpoint_every_steps=1)  # noqa: E731
        with pytest.raises(ZeroDivisionError):
            trainer(max_epochs=1, callbacks=[*callbacks(), Breaks(3)]).fit(module(), data())
        last = "run/checkpoints/last.ckpt"
        trainer(max_epochs=1, callbacks=callbacks()).fit(module(), data(), ckpt_path=last, weights_only=True)
        assert [row["step"] for row in metrics(Path("run"))] == ["1", "2", "3", "4", "5", "5"]
        with pytest.raises(LabError, match=r"^run: there is a run already"):
            trainer(max_epochs=1, callbacks=callbacks()).fit(module(), data())
        assert [row["step"] for row in metrics(Path("run"))] == ["1", "2", "3", "4", "5", "5"]

    def test_null_settings_are_written(self, module: Any, data: Any) -> None:
        trainer(max_steps=1, callbacks=run_directory("run", samples=0)).fit(module(max_grad_norm=None), data())
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        assert config["model"]["max_grad_norm"] is None
        assert config["data"]["rows"] is None


class Breaks(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, module: Any, *args: Any) -> None:
        if module.completed_steps == self.step:
            raise ZeroDivisionError


def test_plain_progress_alone(module: Any, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(progress(), PlainProgress)  # the tests' stderr is no terminal
    t = trainer(max_steps=2, num_sanity_val_steps=1, callbacks=[PlainProgress()], enable_progress_bar=True)
    m, d = module(), data()
    t.fit(m, d)
    t.validate(m, d, verbose=False)
    t.test(m, d, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/2", "2/2"]
    assert [line.split(":")[0] for line in lines if line.startswith("validation")] == ["validation at step 2"]
    assert [line for line in lines if line.endswith(" batches")] == ["validate: 2 batches", "test: 2 batches"]
