"""QLoRAModule: one optimizer step of a 4-bit Llama with LoRA adapters."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_lab.data.batching import MicroBatch, StepBatch
from lightning_lab.data.datamodule import ChatDataModule, Prompt
from lightning_lab.errors import LabError
from lightning_lab.models.attention import attention_arguments, has_varlen_kernel, register_document_attention
from lightning_lab.models.base import load_base, resolve_compute_dtype
from lightning_lab.models.generation import generate
from lightning_lab.models.loss import supervised_nll, supervised_nll_sum
from lightning_lab.models.qlora import (
    DEFAULT_TARGETS,
    adapter_state,
    add_adapters,
    compile_layers,
    enable_checkpointing,
    evaluation_mode,
    load_adapter_state,
)
from lightning_lab.training.evaluation import Evaluation, PerConversation

if TYPE_CHECKING:
    from peft import PeftModel

OVERFLOW_LIMIT = 10


class QLoRAModule(pl.LightningModule):
    """A quantised Llama with LoRA adapters, trained one packed step at a time.

    Args:
        base: Hub id, folder or GGUF file of a Llama, or ``embedded`` (SmolLM2-135M-Instruct, needs no network).
        bits: 4 (NF4 with double quantisation), 8 (LLM.int8) or 16 (not quantised).
        compute_dtype: Of the base and the activations. ``auto``: bfloat16 where the device has it, else float16 with
            loss scaling; ``float32`` for exactness. Adapters are always float32.
        lr: Peak learning rate.
        r: Rank of the adapters.
        alpha: Adapters are scaled by alpha / r (alpha / sqrt(r) with rslora).
        dropout: On the adapters' input.
        target_modules: Linear layers that get an adapter.
        rslora: Rank-stabilised scaling (arXiv:2312.03732).
        dora: Weight-decomposed adapters (arXiv:2402.09353).
        optimizer: ``adamw_8bit`` (bitsandbytes, blockwise 8-bit state) or ``adamw`` (float32 state).
        weight_decay: Decoupled, on all adapter weights.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        warmup_steps: Optimizer steps over which the learning rate rises from 0; it then falls linearly to 0.
        max_grad_norm: Gradients are clipped to this norm; null for no clipping.
        checkpointing: ``none`` keeps all activations; ``full`` keeps one hidden state per layer and recomputes the
            rest; ``selective`` keeps attention's result besides; ``offload`` is ``full`` with those hidden states in
            host memory, on CUDA alone. Same results. ``auto`` (on the command line): the first of these that fits.
        fused_linear: Run each linear and its adapter as one autograd function: faster, and less memory in 16 bits. Same
            results to rounding. 8-bit bases, DoRA and training with dropout always take PEFT's own layers.
        cache_dequantised: Keep the 4-bit base dequantised in the compute dtype beside it: the same results without
            dequantising in every pass, for the memory of a 16-bit base.
        compile: Compile each decoder layer with ``torch.compile``, once for all lengths; takes a minute or two at the
            first step and at the first validation. Same results to rounding.
        max_new_tokens: Longest answer that `predict` writes.
        temperature: Of `predict`; 0 takes the most likely token each time, else the base's own top_p and top_k apply.
        seed: Seed of the adapters' initial values. Set from ``seed_everything``.

    """

    def __init__(
        self,
        base: str = "unsloth/Llama-3.2-1B-Instruct",
        bits: Literal[4, 8, 16] = 4,
        compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        lr: float = 2e-4,
        r: int = 16,
        alpha: int = 16,
        dropout: float = 0.0,
        target_modules: list[str] = list(DEFAULT_TARGETS),  # noqa: B006  (read only; shown in --help)
        rslora: bool = False,
        dora: bool = False,
        optimizer: Literal["adamw_8bit", "adamw"] = "adamw_8bit",
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        warmup_steps: int = 5,
        max_grad_norm: float | None = 1.0,
        checkpointing: Literal["none", "selective", "full", "offload", "auto"] = "none",
        fused_linear: bool = True,
        cache_dequantised: bool = False,
        compile: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        seed: int = 3407,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.base = base
        self.bits = bits
        self.compute_dtype_name = compute_dtype
        self.lr = lr
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.target_modules = target_modules
        self.rslora, self.dora = rslora, dora
        self.optimizer_name = optimizer
        self.weight_decay, self.betas, self.eps = weight_decay, betas, eps
        self.warmup_steps = warmup_steps
        self.max_grad_norm = max_grad_norm
        self.checkpointing = checkpointing
        self.fused_linear = fused_linear
        self.cache_dequantised = cache_dequantised
        self.compile_layers = compile
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.seed = seed
        if lr <= 0:
            raise LabError(f"model.lr is {lr}; it must be above 0")
        if warmup_steps < 0:
            raise LabError(f"model.warmup_steps is {warmup_steps}; it must be at least 0")
        if compile and not self.uses_fused_linear:
            raise LabError(
                "model.compile needs the fused linear: set model.fused_linear to true, model.bits to 4 or 16, "
                "model.dropout to 0 and model.dora to false, or model.compile to false"
            )
        if cache_dequantised and not (bits == 4 and self.uses_fused_linear):
            raise LabError(
                "model.cache_dequantised is for the fused linear on a 4-bit base: set model.bits to 4, "
                "model.fused_linear to true, model.dropout to 0 and model.dora to false, or model.cache_dequantised to "
                "false"
            )
        if checkpointing == "auto":
            raise LabError("model.checkpointing: auto is for the command line, which chooses; here, name a mode")
        if compile and checkpointing == "offload":
            raise LabError(
                "model.checkpointing: offload cannot be compiled; set model.compile to false, or use full or selective"
            )
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise LabError(f"model.max_grad_norm is {max_grad_norm}; it must be above 0, or null for no clipping")

        self.model: PeftModel | None = None
        self.evaluate_base = False  # evaluation and prediction leave the adapters out
        self.evaluation: Evaluation | None = None  # of the last evaluation that ended
        self.completed_steps = 0
        self.total_steps = 0
        self.loss_scale = LossScale()
        self._gradient_factor = 1.0
        self._saved_rng: dict[str, Any] | None = None
        self._per_conversation: PerConversation | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Load the quantised base and add the adapters; does nothing the second time."""
        if self.model is not None:
            return
        device = self.trainer.strategy.root_device
        self.compute_dtype = resolve_compute_dtype(self.compute_dtype_name, device)
        self.varlen = has_varlen_kernel(device, self.compute_dtype)
        if self.compile_layers and device.type == "cuda" and not self.varlen:
            raise LabError(
                "model.compile needs variable-length attention, which this GPU or model.compute_dtype does not have "
                "(compute capability 8.0 and 16 bits); set model.compile to false"
            )
        if self.checkpointing == "offload" and device.type != "cuda":
            raise LabError(
                "model.checkpointing: offload moves activations from a GPU to the host; this run is on a CPU, use full"
            )
        base = load_base(
            self.base,
            bits=self.bits,
            compute_dtype=self.compute_dtype,
            device=device,
            attn_implementation=register_document_attention(),
        )
        self.model = add_adapters(
            base,
            r=self.r,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=self.target_modules,
            rslora=self.rslora,
            dora=self.dora,
            seed=self.seed,
            fused=self.fused_linear,
        )
        enable_checkpointing(self.model, self.checkpointing)
        if self.cache_dequantised:
            from lightning_lab.models.fused_linear import keep_dequantised_weights

            keep_dequantised_weights(self.model, self.compute_dtype)
        if self.compile_layers:
            compile_layers(self.model)
        self.model.train()

    @property
    def uses_fused_linear(self) -> bool:
        """Whether training runs through the fused linear; PEFT's own layers take everything else."""
        return self.fused_linear and self.bits != 8 and not self.dora and not self.dropout

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapters, once :meth:`configure_model` has run."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    @property
    def chat_data(self) -> ChatDataModule:
        """The trainer's data module."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, ChatDataModule):
            raise LabError("QLoRAModule needs a ChatDataModule: pass datamodule= to the trainer")
        return data

    def trainable(self) -> list[Tensor]:
        """The adapters' weights, in a fixed order."""
        return [parameter for parameter in self.peft_model.parameters() if parameter.requires_grad]

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """AdamW over the adapters, and a linear schedule with warm-up over the run's steps."""
        self.total_steps = self.chat_data.total_steps(self.trainer.max_epochs, self.trainer.max_steps)
        options: dict[str, Any] = {
            "lr": self.lr,
            "betas": tuple(self.betas),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
        }
        optimizer: Optimizer
        if self.optimizer_name == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            optimizer = AdamW8bit(self.trainable(), **options)
        else:
            optimizer = torch.optim.AdamW(self.trainable(), **options)
        total, warmup = self.total_steps, self.warmup_steps
        return [optimizer], [LambdaLR(optimizer, lambda step: linear_schedule(step, warmup, total))]

    # -- one step ------------------------------------------------------------------------------------------------

    def last_hidden_state(self, batch: MicroBatch) -> Tensor:
        """Run the packed row through the decoder. Returns ``[T, hidden_size]``."""
        decoder = self.peft_model.get_base_model().model
        return decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_arguments(batch.cu_seqlens, batch.document_lengths, self.varlen),
        ).last_hidden_state[0]

    @property
    def head(self) -> Tensor:
        """The language-model head's weight, ``[vocabulary, hidden_size]``."""
        return self.peft_model.get_base_model().lm_head.weight

    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, float]:
        """One optimizer step over all micro-batches of ``batch``.

        The loss of a step is the summed NLL over its supervised tokens, divided by their number on all processes; its
        gradient likewise, whatever the cut. There is one device-to-host read, after the last micro-batch.

        Returns:
            The step's row of ``metrics.csv``, less what needs a clock.

        Raises:
            LabError: Loss or gradient is not finite (outside float16 scaling, which skips the step), or ten float16
                steps in a row overflowed. No weight has been changed by the step.

        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad(set_to_none=True)
        half = self.compute_dtype == torch.float16
        gradient_scale = self.loss_scale.value / batch.supervised_tokens if half else 1.0

        nll = torch.zeros((), device=self.device)
        with self._no_gradient_sync():
            for micro_batch in batch.micro_batches:
                hidden = self.last_hidden_state(micro_batch)[micro_batch.predicting]
                micro_nll = supervised_nll_sum(
                    hidden, self.head, micro_batch.targets, gradient_scale, compiled=self.compile_layers
                )
                self.manual_backward(micro_nll)
                nll += micro_nll.detach()
        weights = self.trainable()
        self._sum_over_processes(nll, weights)
        norm = torch.nn.utils.get_total_norm([w.grad for w in weights if w.grad is not None])
        nll_sum, raw_norm = torch.stack([nll, norm.to(nll.dtype)]).tolist()  # the one read

        loss = nll_sum / batch.supervised_tokens
        unscale = 1.0 / (gradient_scale * batch.supervised_tokens)
        grad_norm = raw_norm * unscale
        learning_rate = optimizer.param_groups[0]["lr"]
        overflow = half and not math.isfinite(grad_norm)
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not half):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
            raise LabError(
                f"step {self.completed_steps + 1}: {what} on rows {', '.join(map(str, batch.rows))} of "
                f"{self.chat_data.source}; stopped before any weight was changed; look at these rows with `preview`, "
                "or lower model.lr"
            )
        if overflow:
            self.loss_scale.overflowed()
            if self.loss_scale.overflows_in_a_row >= OVERFLOW_LIMIT:
                raise LabError(
                    f"step {self.completed_steps + 1}: {OVERFLOW_LIMIT} float16 steps in a row overflowed; lower "
                    "model.lr, or set model.compute_dtype to bfloat16 or float32"
                )
        else:
            clip = 1.0
            if self.max_grad_norm is not None:
                clip = min(1.0, self.max_grad_norm / (grad_norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
            self._gradient_factor = unscale * clip
            optimizer.step()
            scheduler = self.lr_schedulers()
            assert isinstance(scheduler, LRScheduler)
            scheduler.step()
            if half:
                self.loss_scale.succeeded()

        self.completed_steps += 1
        self.chat_data.completed_steps = self.completed_steps
        for logger in self.loggers:  # not self.log: it makes tensors on the device, to be read back one by one
            figures = {"train_loss": loss, "grad_norm": grad_norm, "lr": learning_rate}
            logger.log_metrics(figures, step=self.completed_steps)
        return {
            "step": self.completed_steps,
            "epoch": self.completed_steps / self.chat_data.steps_per_epoch,
            "train_loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "tokens": batch.tokens,
            "supervised_tokens": batch.supervised_tokens,
            "padded_tokens": batch.padded_tokens,
        }

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Normalise by the step's supervised tokens, undo float16 scaling and clip, in one multiplication."""
        torch._foreach_mul_([w.grad for w in self.trainable() if w.grad is not None], self._gradient_factor)

    @contextmanager
    def _no_gradient_sync(self) -> Iterator[None]:
        model = self.trainer.strategy.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            yield

    def _sum_over_processes(self, nll: Tensor, weights: Sequence[Tensor]) -> None:
        """Add up the loss and all gradients over the processes, in one message; a process without documents adds 0."""
        if self.trainer.world_size == 1:
            return
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        message = torch.cat([nll[None], *(g.reshape(-1) for g in gradients)])
        torch.distributed.all_reduce(message)
        nll.copy_(message[0])
        for weight, total in zip(weights, message[1:].split([w.numel() for w in weights]), strict=True):
            weight.grad = total.view_as(weight)

    # -- evaluation ----------------------------------------------------------------------------------------------

    def _start_evaluation(self, stage: str) -> None:
        conversations = len(self.chat_data.splits[self.chat_data.split_for(stage)].rows)
        self._per_conversation = PerConversation(conversations).to(self.device)

    def _evaluate(self, batch: MicroBatch) -> None:
        assert self._per_conversation is not None
        with self._adapters_as_asked():
            hidden = self.last_hidden_state(batch)[batch.predicting]
        nll, correct = supervised_nll(hidden, self.head, batch.targets, compiled=self.compile_layers)
        documents = torch.tensor(batch.documents, device=nll.device)
        self._per_conversation.update(documents[batch.target_documents], nll, correct)

    def _end_evaluation(self) -> Evaluation:
        assert self._per_conversation is not None
        self.evaluation = self._per_conversation.evaluation()
        self._per_conversation = None
        return self.evaluation

    def _adapters_as_asked(self) -> Any:
        return self.peft_model.disable_adapter() if self.evaluate_base else nullcontext()

    def on_validation_model_eval(self) -> None:
        """Evaluation mode before a validation."""
        evaluation_mode(self)

    def on_test_model_eval(self) -> None:
        """Evaluation mode before a test."""
        evaluation_mode(self)

    def on_validation_epoch_start(self) -> None:
        """Begin to collect."""
        self._start_evaluation("fit" if self.trainer.state.fn == "fit" else "validate")

    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Collect one packed micro-batch."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the split's token-weighted metrics."""
        result = self._end_evaluation()
        self.log_dict(
            {
                "val_loss": result.loss,
                "val_loss_hf": result.loss_hf,
                "val_token_accuracy": result.token_accuracy,
                "val_perplexity": result.perplexity,
            },
            rank_zero_only=True,
        )

    def on_test_epoch_start(self) -> None:
        """Begin to collect."""
        self._start_evaluation("test")

    def test_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Collect one packed micro-batch."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Add up."""
        self._end_evaluation()

    def predict_step(self, batch: list[Prompt], batch_idx: int) -> list[tuple[Prompt, str]]:
        """Answer a batch of prompts."""
        with self._adapters_as_asked():
            answers = generate(
                self.peft_model,
                self.chat_data.renderer,
                self.chat_data.tokenizer,
                [prompt.prompt for prompt in batch],
                max_new_tokens=self.max_new_tokens,
                temperature=self.temperature,
            )
        return list(zip(batch, answers, strict=True))

    # -- checkpoints ---------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter's weights and nothing of the base."""
        return adapter_state(self.peft_model)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Load an adapter; demands exactly its keys and shapes."""
        load_adapter_state(self.peft_model, dict(state_dict))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add position, loss scale and RNG, in types that ``weights_only`` loading takes."""
        checkpoint["lightning_lab"] = {
            "completed_steps": self.completed_steps,
            "loss_scale": self.loss_scale.state(),
            "adapter_settings": self._adapter_settings(),
            "split_settings": self._split_settings(),
            "run_settings": self._run_settings(),
            "rng": self._rng_of_processes(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take position, loss scale and RNG back; the RNG is set when training starts.

        Raises:
            LabError: The adapter, or for `fit` the run, was made under other settings.

        """
        state = checkpoint["lightning_lab"]
        _demand_equal(state["adapter_settings"], self._adapter_settings())
        if (
            self.trainer.state.fn in ("validate", "test")
            and self.chat_data.source == state["split_settings"]["data.source"]
        ):
            _demand_equal(state["split_settings"], self._split_settings())  # else trained rows may be held out
        if self.trainer.state.fn == "fit":
            _demand_equal(state["run_settings"], self._run_settings())
        self.completed_steps = state["completed_steps"]
        self.loss_scale = LossScale(**state["loss_scale"])
        if len(state["rng"]) == self.trainer.world_size:
            self._saved_rng = state["rng"][self.trainer.global_rank]
        elif self.trainer.state.fn == "fit" and self.dropout:
            raise LabError(
                f"the checkpoint is of {len(state['rng'])} processes, this run has {self.trainer.world_size}; with "
                "model.dropout a run continues exactly only on as many: set trainer.devices as it was"
            )
        if isinstance(getattr(self.trainer, "datamodule", None), ChatDataModule):
            self.chat_data.completed_steps = self.completed_steps

    def _rng_of_processes(self) -> list[dict[str, Any]]:
        """The RNG of each process, by rank: dropout draws from it."""
        own = {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        if self.trainer.world_size == 1:
            return [own]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, own)
        return states

    def _adapter_settings(self) -> dict[str, Any]:
        """What the adapter's values mean something under; its shapes alone would not tell another alpha."""
        return {
            "model.base": self.base,
            "model.r": self.r,
            "model.alpha": self.alpha,
            "model.rslora": self.rslora,
            "model.dora": self.dora,
            "model.target_modules": sorted(self.target_modules),
        }

    def _split_settings(self) -> dict[str, Any]:
        """What decides which rows are held out."""
        data = self.chat_data
        return {
            "data.source": data.source,
            "data.rows": data.row_limit,
            "data.split": [float(part) for part in data.split],
            "data.split_seed": data.split_seed,
        }

    def _run_settings(self) -> dict[str, Any]:
        """What must stay the same for a resumed run to be the run that was interrupted."""
        data = self.chat_data
        return {
            "model.bits": self.bits,
            "model.compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "model.lr": self.lr,
            "model.dropout": self.dropout,
            "model.optimizer": self.optimizer_name,
            "model.weight_decay": self.weight_decay,
            "model.betas": list(self.betas),
            "model.eps": self.eps,
            "model.warmup_steps": self.warmup_steps,
            "model.max_grad_norm": self.max_grad_norm,
            "model.fused_linear": self.fused_linear,
            "model.compile": self.compile_layers,
            "seed_everything": self.seed,
            "data.batch_size": data.batch_size,
            **self._split_settings(),
            "optimizer steps in all": data.total_steps(self.trainer.max_epochs, self.trainer.max_steps),
            "the tokenised data": data.tokenized.fingerprint,
        }

    def on_train_start(self) -> None:
        """Restore the RNG last, after everything else that might have drawn from it."""
        if self._saved_rng is None:
            return
        random.setstate(self._saved_rng["python"])
        torch.set_rng_state(self._saved_rng["torch"])
        if self._saved_rng["cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(self._saved_rng["cuda"], self.device)
        self._saved_rng = None


def _demand_equal(saved: dict[str, Any], now: dict[str, Any]) -> None:
    different = [f"{key} is {now[key]}, was {saved[key]}" for key in saved if saved[key] != now.get(key)]
    if different:
        raise LabError(f"the checkpoint was made under other settings: {'; '.join(different)}; set them as they were")


def linear_schedule(step: int, warmup: int, total: int) -> float:
    """Factor on the learning rate after ``step`` optimizer steps, as transformers' linear schedule with warm-up.

    Optimizer step k (from 1) uses ``step = k - 1``: with any warm-up, the first step has factor 0.
    """
    if step < warmup:
        return step / warmup
    return max(0.0, (total - step) / max(1, total - warmup))


@dataclass
class LossScale:
    """Dynamic loss scaling for float16, with the constants of ``torch.amp.GradScaler``.

    GradScaler reads from the device for itself; here the step's one read has said already whether it overflowed.
    """

    value: float = 2.0**16
    good_steps: int = 0
    overflows: int = 0
    overflows_in_a_row: int = 0

    def succeeded(self) -> None:
        """Count a finite step; double the scale after 2,000 in a row."""
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == 2_000:
            self.value, self.good_steps = self.value * 2, 0

    def overflowed(self) -> None:
        """Count a skipped step and halve the scale."""
        self.overflows += 1
        self.overflows_in_a_row += 1
        self.value, self.good_steps = self.value / 2, 0

    def state(self) -> dict[str, Any]:
        """Return the fields, for the checkpoint."""
        return dict(vars(self))
