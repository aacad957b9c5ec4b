"""QLoRAModule's step on the tiny base: scaling, clipping, guards, reads from the device, modes and state."""

import copy
import itertools
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError
from lightning_lab.training.module import QLoRAModule
from lightning_lab.training.optim import LossScale

TARGETS = ("q_proj", "v_proj", "down_proj")  # rank 4 on three of seven: fast, and k_proj has none
SPLIT_SEED, SEED = 3, 9


pytestmark = pytest.mark.usefixtures("one_tokenizer")


@pytest.fixture(scope="module")
def prepared(narrow_base: Path, short_chats: Path) -> ChatDataModule:
    data = ChatDataModule(
        source=str(short_chats),
        tokenizer=str(narrow_base),
        template="tokenizer",
        rows=30,
        split=[24, 4, 2],
        split_seed=SPLIT_SEED,
        batch_size=2,
        micro_batch_tokens=64,
        seed=SEED,
    )
    data.prepare(progress=False)
    return data


class Watch(pl.Callback):
    """Keeps each step's row.

    Args:
        before: Called with module and step (from 1) before each step.
        after: Called with the same after each step.

    """

    def __init__(
        self,
        before: Callable[[QLoRAModule, int], Any] | None = None,
        after: Callable[[QLoRAModule, int], Any] | None = None,
    ) -> None:
        self.before, self.after = before, after
        self.rows: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.before:
            self.before(pl_module, pl_module.completed_steps + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append(dict(outputs))
        if self.after:
            self.after(pl_module, pl_module.completed_steps)

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows]


@pytest.fixture
def data(prepared: ChatDataModule) -> ChatDataModule:
    return copy.copy(prepared)


@pytest.fixture
def build(narrow_base: Path) -> Callable[..., QLoRAModule]:
    def build(**changes: Any) -> QLoRAModule:
        settings: dict[str, Any] = dict(
            bits=16,
            compute_dtype="float32",
            lr=1e-3,
            r=4,
            alpha=8,
            optimizer="adamw",
            warmup_steps=0,
            target_modules=list(TARGETS),
        )
        return QLoRAModule(base=str(narrow_base), **settings | changes)

    return build


def trainer(steps: int, *callbacks: pl.Callback, val_every: int = 1000) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=val_every,
        check_val_every_n_epoch=None,
        use_distributed_sampler=False,
    )


def fit(module: QLoRAModule, data: ChatDataModule, steps: int, watch: Watch | None = None) -> Watch:
    watch = watch or Watch()
    trainer(steps, watch).fit(module, datamodule=data)
    return watch


def weights(module: QLoRAModule) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, NaN being NaN."""
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


def rows_of(step: int) -> list[int]:
    """Source rows of a step (from 1) of the first epoch, from the definitions alone."""
    train = np.random.default_rng(SPLIT_SEED).permutation(30)[:24]
    order = torch.randperm(24, generator=torch.Generator().manual_seed(SEED))
    return train[order[2 * step - 2 : 2 * step].numpy()].tolist()


class TestSchedule:
    def test_a_run_follows_it(self, build: Any, data: ChatDataModule) -> None:
        watch = fit(build(warmup_steps=2, lr=8e-4), data, 4)
        assert watch.column("lr") == pytest.approx([0.0, 4e-4, 8e-4, 4e-4], abs=1e-18)


class TestNotFinite:
    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_a_loss_names_step_and_rows_and_changes_no_weight(
        self, build: Any, data: ChatDataModule, dtype: str
    ) -> None:
        module, before = build(compute_dtype=dtype), {}

        def poison(module: QLoRAModule, step: int) -> None:
            if step == 3:
                with torch.no_grad():
                    module.head[7] = math.nan  # a logit of every position
                before.update(weights(module))

        watch = Watch(poison)
        with pytest.raises(LabError) as error:
            fit(module, data, 6, watch)
        rows = ", ".join(map(str, rows_of(3)))
        assert str(error.value).startswith(f"step 3: loss is nan on rows {rows} of {data.hparams.source}; ")
        assert len(watch.rows) == module.completed_steps == 2
        assert same(weights(module), before)

    def test_an_adapter_weight(self, build: Any, data: ChatDataModule) -> None:
        module, before = build(), {}

        def poison(module: QLoRAModule, step: int) -> None:
            if step == 2:
                with torch.no_grad():
                    module.trainable()[0][0, 0] = math.inf
                before.update(weights(module))

        with pytest.raises(LabError, match=rf"^step 2: loss is nan on rows {rows_of(2)[0]}, {rows_of(2)[1]} of "):
            fit(module, data, 6, Watch(poison))
        assert same(weights(module), before)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_gradient(self, build: Any, data: ChatDataModule, value: float) -> None:
        module, before = build(), {}

        def poison(module: QLoRAModule, step: int) -> None:
            if step == 2:
                module.trainable()[3].register_hook(lambda gradient: torch.full_like(gradient, value))
                before.update(weights(module))

        with pytest.raises(LabError, match=rf"^step 2: gradient norm is {value} on rows {rows_of(2)[0]}, "):
            fit(module, data, 6, Watch(poison))
        assert module.completed_steps == 1
        assert same(weights(module), before)


class TestFloat16:
    def test_an_overflowing_step_is_skipped_and_counted(self, build: Any, data: ChatDataModule) -> None:
        module, kept, moments = build(compute_dtype="float16"), [], []

        def before(module: QLoRAModule, step: int) -> None:
            kept.append(weights(module))
            if step == 3:
                module.loss_scale.value = 2.0**60

        def after(module: QLoRAModule, step: int) -> None:
            moments.append([state["step"].item() for state in module.optimizers().optimizer.state.values()])
            if step == 3:
                assert module.loss_scale.value == 2.0**59  # halved
                assert module.loss_scale.overflows_in_a_row == 1
                module.loss_scale.value = 2.0**16

        watch = fit(module, data, 6, Watch(before, after))
        assert watch.column("step") == [1, 2, 3, 4, 5, 6]
        assert [math.isfinite(norm) for norm in watch.column("grad_norm")] == [True, True, False, True, True, True]
        assert all(math.isfinite(loss) for loss in watch.column("train_loss"))
        # a linear schedule over 6 steps, which step 3 does not advance
        assert watch.column("lr") == pytest.approx([1e-3 * left / 6 for left in (6, 5, 4, 4, 3, 2)], abs=1e-18)
        assert [set(steps) for steps in moments] == [{1.0}, {2.0}, {2.0}, {3.0}, {4.0}, {5.0}]
        assert [same(a, b) for a, b in itertools.pairwise(kept)] == [False, False, True, False, False]
        assert module.loss_scale.overflows_in_a_row == 0

    def test_ten_in_a_row_stop_the_run(self, build: Any, data: ChatDataModule) -> None:
        module, start = build(compute_dtype="float16"), {}

        def before(module: QLoRAModule, step: int) -> None:
            if step == 1:
                module.loss_scale.value = 2.0**60
                start.update(weights(module))

        watch = Watch(before)
        with pytest.raises(LabError, match="^step 10: 10 float16 steps in a row overflowed; lower model.lr, or set"):
            fit(module, data, 12, watch)
        assert len(watch.rows) == 9
        assert watch.column("lr") == [1e-3] * 9
        assert same(weights(module), start)

    def test_a_step_without_overflow_starts_the_count_again(self, build: Any, data: ChatDataModule) -> None:
        module, counts = build(compute_dtype="float16"), []

        def before(module: QLoRAModule, step: int) -> None:
            if step == 1:
                module.loss_scale = LossScale(overflows_in_a_row=8)
            module.loss_scale.value = 2.0**16 if step == 2 else 2.0**60

        def after(module: QLoRAModule, step: int) -> None:
            counts.append(module.loss_scale.overflows_in_a_row)

        fit(module, data, 4, Watch(before, after))
        assert counts == [9, 0, 1, 2]

    def test_it_tracks_float32(self, build: Any, data: ChatDataModule) -> None:
        """Measured: losses differ by at most 1.2e-5 of 10.8, gradient norms by 0.021 %; asserted at 2e-4 and 0.5 %."""
        wide = fit(build(lr=0.05), data, 6)
        half = fit(build(lr=0.05, compute_dtype="float16"), data, 6)
        losses = wide.column("train_loss")
        assert half.column("train_loss") == pytest.approx(losses, abs=2e-4)
        assert half.column("train_loss") != losses
        assert half.column("grad_norm") == pytest.approx(wide.column("grad_norm"), rel=0.005)
        still = fit(build(lr=1e-30), data, 6).column("train_loss")
        assert max(abs(a - b) for a, b in zip(losses, still, strict=True)) > 0.05  # training moves them by far more


class TestGradients:
    @pytest.mark.parametrize("max_grad_norm", [None, 0.01, 1000.0])
    def test_norm_and_clipping_are_those_of_a_plain_loop(
        self, build: Any, data: ChatDataModule, narrow_base: Path, max_grad_norm: float | None
    ) -> None:
        from transformers import AutoModelForCausalLM

        module, gradients, start = build(max_grad_norm=max_grad_norm), [], {}

        def before(module: QLoRAModule, step: int) -> None:
            if step == 1:
                start.update(weights(module))

        def after(module: QLoRAModule, step: int) -> None:
            gradients.append([weight.grad.clone() for weight in module.trainable()])

        watch = fit(module, data, 3, Watch(before, after))
        names = list(start)

        # Plain: one conversation after another through transformers' own forward and torch's cross-entropy.
        plain = AutoModelForCausalLM.from_pretrained(narrow_base, dtype=torch.float32, attn_implementation="eager")
        adapter = [start[name].clone().requires_grad_() for name in names]
        _add_lora(plain, dict(zip(names, adapter, strict=True)), scale=8 / 4)
        optimizer = torch.optim.AdamW(adapter, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        for step in (1, 2, 3):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * (4 - step) / 3
            total, tokens = torch.zeros(()), 0
            for row in rows_of(step):
                ids, labels = (
                    torch.from_numpy(f(row)).long() for f in (data.tokenized.input_ids, data.tokenized.labels)
                )
                logits = plain(input_ids=ids[None]).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
                tokens += int((labels[1:] != -100).sum())
            (total / tokens).backward()
            limit = math.inf if max_grad_norm is None else max_grad_norm
            norm = torch.nn.utils.clip_grad_norm_(adapter, limit)
            optimizer.step()
            row_ = watch.rows[step - 1]
            assert row_["train_loss"] == pytest.approx((total / tokens).item(), abs=1e-5)
            assert row_["supervised_tokens"] == tokens
            assert row_["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)  # before clipping
            clips = max_grad_norm == 0.01
            assert (norm > limit) == clips
            ours = torch.nn.utils.get_total_norm(gradients[step - 1]).item()
            assert ours == pytest.approx(0.01 if clips else norm.item(), rel=1e-4)
            for a, b in zip(gradients[step - 1], adapter, strict=True):
                torch.testing.assert_close(a, b.grad, rtol=1e-3, atol=1e-6)
        for name, weight in zip(names, adapter, strict=True):
            torch.testing.assert_close(module.state_dict()[name], weight.detach(), rtol=0, atol=2e-5)

    def test_the_cut_into_micro_batches_changes_nothing(self, build: Any, data: ChatDataModule) -> None:
        one = data
        two = copy.copy(data)
        two.micro_batch_tokens = 4096
        assert len(one.step_batch(0).micro_batches) > len(two.step_batch(0).micro_batches) == 1
        a, b = build(), build()
        first, second = fit(a, one, 3), fit(b, two, 3)
        for name in ("train_loss", "grad_norm"):
            assert first.column(name) == pytest.approx(second.column(name), abs=1e-5)
        assert all((a.state_dict()[k] - b.state_dict()[k]).abs().max() <= 1e-5 for k in a.state_dict())


def _add_lora(model: torch.nn.Module, adapter: dict[str, torch.Tensor], scale: float) -> None:
    """LoRA in two lines: y += scale * B A x, by a forward hook."""
    modules = dict(model.named_modules())
    for name, a in adapter.items():
        if ".lora_A." in name:
            b = adapter[name.replace(".lora_A.", ".lora_B.")]
            layer = modules[
                name.removeprefix("base_model.model.").partition(".lora_A.")[0].removeprefix("model.model.")
            ]
            layer.register_forward_hook(
                lambda module, inputs, output, a=a, b=b: output + scale * (inputs[0] @ a.T @ b.T)
            )


READS = ("tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__contains__")
# Operators whose result has a size that only the device knows, so that a GPU makes the host wait.
SIZED_BY_DATA = ("nonzero", "masked_select", "unique", "unique_dim", "_unique2", "unique_consecutive", "is_nonzero")


class Reads(TorchFunctionMode):
    """Names each call of a Tensor method that copies values to the host.

    On a CPU ``tolist`` reaches no operator, so methods are counted where Python calls them; what an operator reads
    inside (``_local_scalar_dense``), or would wait for, is counted by the dispatch mode below.
    """

    def __init__(self, on_the_host: Collection[int] = ()) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.inside_a_read = False
        self.on_the_host = on_the_host  # ids of tensors that may be read
        self.operators = _Operators(self)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        reads = name in READS and id(args[0]) not in self.on_the_host
        if reads:
            self.seen.append(name)
        outer, self.inside_a_read = self.inside_a_read, name in READS  # its operators are not further reads
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.inside_a_read = outer


class _Operators(TorchDispatchMode):
    def __init__(self, reads: Reads) -> None:
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        waits = name == "_local_scalar_dense" or name in SIZED_BY_DATA
        if name in ("index", "index_put", "index_put_"):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if waits and not self.reads.inside_a_read and id(args[0]) not in self.reads.on_the_host:
            self.reads.seen.append(name)
        return function(*args, **(kwargs or {}))


class TestReads:
    """What a GPU would have to wait for, counted on a CPU during ``training_step`` (see `Reads`)."""

    def counted(self, module: QLoRAModule, data: ChatDataModule, **planted: Any) -> list[list[str]]:
        steps: list[list[str]] = []
        original = module.training_step

        def counting(batch: Any, batch_idx: int) -> Any:
            optimizer = module.optimizers().optimizer
            # AdamW counts its steps in tensors that live on the host whatever the device, and reads them
            host = {id(state["step"]) for state in optimizer.state.values() if torch.is_tensor(state.get("step"))}
            first = not optimizer.state
            mode = Reads(host)
            with mode, mode.operators:
                result = original(batch, batch_idx)
            if not first:
                steps.append(mode.seen)
            return result

        module.training_step = counting  # type: ignore[method-assign]
        fit(module, data, 4)
        return steps

    @pytest.mark.parametrize("dtype", ["float32", "float16"])
    def test_one_a_step(self, build: Any, data: ChatDataModule, dtype: str) -> None:
        assert max(len(data.step_batch(step).micro_batches) for step in range(4)) > 1
        assert self.counted(build(compute_dtype=dtype), data) == [["tolist"]] * 3

    @pytest.mark.parametrize(
        ("plant", "seen"),
        [
            (lambda t: t.sum().item(), "item"),
            (lambda t: float(t.sum()), "__float__"),
            (lambda t: bool(t.any()), "__bool__"),
            (lambda t: t.tolist(), "tolist"),
            (lambda t: t.cpu(), "cpu"),
            (lambda t: t[t > 0], "index"),
            (lambda t: t.nonzero(), "nonzero"),
            (lambda t: int(t.max()), "__int__"),
        ],
    )
    def test_a_planted_read_is_seen(self, plant: Callable[[torch.Tensor], Any], seen: str) -> None:
        mode = Reads()
        tensor = torch.arange(4)
        with mode, mode.operators:
            plant(tensor)
        assert mode.seen == [seen]


class Recorder(pl.loggers.Logger):
    name, version = "recorder", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, Any]]] = []
        self.hyper_parameters: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, params: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        self.hyper_parameters.append(dict(params))


def test_loggers_get_host_numbers_at_the_right_steps(build: Any, data: ChatDataModule) -> None:
    runner, recorder = trainer(5, val_every=2), Recorder()
    runner.loggers, runner.log_every_n_steps = [recorder], 1
    runner.fit(build(), datamodule=data)
    rows = [(step, row) for step, row in recorder.rows if "train_loss" in row]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5]
    assert [step for step, row in recorder.rows if "val_loss" in row] == [2, 4, 5]
    assert all(type(value) is float for _, row in rows for value in row.values())
    assert [set(row) for _, row in rows] == [{"train_loss", "grad_norm", "lr", "tokens_per_second"}] * 5
    metrics = runner.callback_metrics
    assert {"train_loss", "val_loss", "val_loss_hf", "val_perplexity", "val_token_accuracy"} <= set(metrics)
    assert all(value.device.type == "cpu" and value.dtype == torch.float64 for value in metrics.values())


def test_hyper_parameters_reach_the_logger(build: Any, data: ChatDataModule) -> None:
    runner, recorder = trainer(1), Recorder()
    runner.loggers = [recorder]
    runner.fit(build(lr=7e-4), datamodule=data)
    (hyper_parameters,) = recorder.hyper_parameters
    assert hyper_parameters["lr"] == 7e-4
    assert hyper_parameters["batch_size"] == 2


class TestState:
    def test_it_is_the_adapter(self, build: Any, data: ChatDataModule, tmp_path: Path) -> None:
        module = build()
        runner = trainer(1, Watch())
        runner.fit(module, datamodule=data)
        shapes = {
            "self_attn.q_proj": (32, 32),
            "self_attn.v_proj": (32, 16),
            "mlp.down_proj": (64, 32),
        }  # in and out features
        expected = {}
        for layer in (0, 1):
            for name, (inputs, outputs) in shapes.items():
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                expected[f"{prefix}.lora_A.default.weight"] = (4, inputs)
                expected[f"{prefix}.lora_B.default.weight"] = (outputs, 4)
        assert {name: tuple(weight.shape) for name, weight in module.state_dict().items()} == expected
        runner.save_checkpoint(tmp_path / "x.ckpt")
        saved = torch.load(tmp_path / "x.ckpt", weights_only=True)["state_dict"]
        assert same(saved, weights(module))
        assert all(weight.dtype == torch.float32 for weight in saved.values())

    def test_loading_demands_exactly_its_keys(self, build: Any, data: ChatDataModule) -> None:
        module = build()
        fit(module, data, 2)
        state = weights(module)
        name = next(iter(state))
        fewer = {k: v for k, v in state.items() if k != name}
        for wrong in (fewer, state | {"extra": torch.zeros(1)}, state | {name: torch.zeros(2, 2)}):
            with pytest.raises(LabError, match="^the checkpoint does not fit the adapter"):
                module.load_state_dict({k: v + 1 for k, v in wrong.items()})
            assert same(weights(module), state)  # all of it or nothing
        with torch.no_grad():
            for weight in module.trainable():
                weight.zero_()
        module.load_state_dict(state)
        assert same(weights(module), state)

    def test_a_module_of_its_own_refuses_nonsense(self) -> None:
        for changes, key in [
            ({"lr": 0.0}, "lr"),
            ({"warmup_steps": -1}, "warmup_steps"),
            ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ]:
            with pytest.raises(LabError, match=rf"^model\.{key} is .*; it must be "):
                QLoRAModule(**changes)


class Modes(Watch):
    """Every module's mode in training and in validation.

    Not that of bitsandbytes' layers, which keep theirs.
    """

    def __init__(self) -> None:
        super().__init__(before=lambda module, step: self.training.append(self.modes(module)))
        self.training: list[dict[str, bool]] = []
        self.validating: list[dict[str, bool]] = []

    @staticmethod
    def modes(module: Any) -> dict[str, bool]:
        return {name: m.training for name, m in module.named_modules() if type(m).__name__ != "Linear4bit"}

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.validating.append(self.modes(pl_module))


class TestEvaluationMode:
    @pytest.mark.parametrize("bits", [16, 4])
    def test_it_is_on_in_validation_and_off_again_after(self, build: Any, data: ChatDataModule, bits: int) -> None:
        module, modes = build(bits=bits, dropout=0.5), Modes()
        trainer(3, modes, val_every=1).fit(module, datamodule=data)
        assert sum("lora_dropout" in name for name in modes.training[0]) >= 6
        assert len(modes.training) == 3
        assert all(all(training.values()) for training in modes.training)
        assert len(modes.validating) >= 3
        assert not any(any(validating.values()) for validating in modes.validating)

    def test_validation_has_no_dropout_and_draws_nothing(self, build: Any, data: ChatDataModule) -> None:
        wet = build(dropout=0.5, lr=1e-2)
        runner = trainer(3, Watch())
        runner.fit(wet, datamodule=data)
        torch.manual_seed(0)
        before = torch.get_rng_state()
        runner.validate(wet, datamodule=data, verbose=False)
        assert torch.equal(torch.get_rng_state(), before)
        loss = wet.evaluation.loss
        # the same adapter without any dropout layer
        dry = build(dropout=0.0, lr=1e-30)
        runner = trainer(1, Watch(before=lambda module, step: module.load_state_dict(wet.state_dict())), val_every=1)
        runner.limit_train_batches = 1
        runner.fit(dry, datamodule=data)
        assert dry.evaluation.loss == pytest.approx(loss, abs=1e-6)
        assert wet.evaluation.tokens.tolist() == dry.evaluation.tokens.tolist()
        assert len(wet.evaluation.token_nll) == sum(wet.evaluation.tokens)
        assert dry.evaluation.token_nll is None  # the validations of a fit keep none
