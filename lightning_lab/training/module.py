"""QLoRAModule: one optimizer step of a 4-bit Llama with LoRA adapters, and its evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

from lightning_lab.data.batching import MicroBatch, PromptBatch, StepBatch
from lightning_lab.data.conversation import Prompt
from lightning_lab.errors import LabError, check_arguments
from lightning_lab.models.attention import attention_arguments
from lightning_lab.models.generation import generate
from lightning_lab.models.loss import supervised_nll, supervised_nll_sum
from lightning_lab.models.memory import peak_so_far
from lightning_lab.models.qlora import DEFAULT_TARGETS, evaluation_mode
from lightning_lab.training import resume
from lightning_lab.training.evaluation import Evaluation, EvaluationSums
from lightning_lab.training.flat import FlatWeights
from lightning_lab.training.lifecycle import Lifecycle
from lightning_lab.training.refusals import RANGES, refuse_combinations, total_steps

OVERFLOW_LIMIT = 10


class QLoRAModule(Lifecycle):
    """A quantised Llama with LoRA adapters, trained one packed step at a time.

    Args:
        base: Hub id, folder or GGUF file of a Llama, or ``embedded`` (SmolLM2-135M-Instruct, needs no network).
        revision: Commit of a Hub base; null for the newest. A run's config.yaml has the one it was trained on.
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
        checkpointing: ``none`` keeps all activations; ``selective`` keeps one hidden state and attention's result per
            layer and recomputes the rest; ``full`` keeps the hidden states alone; ``offload`` keeps them in host
            memory, on CUDA alone. Same results. ``auto``: the fastest that fits.
        fused_linear: Run each linear and its adapter as one autograd function: faster, and less memory in 16 bits. Same
            results to rounding. 8-bit bases, DoRA and training with dropout always take PEFT's own layers.
        cache_dequantised: Keep the 4-bit base dequantised in the compute dtype beside it: the same results without
            dequantising in every pass, for the memory of a 16-bit base. ``auto``: on a GPU that has room for it.
        compile: Compile each decoder layer with ``torch.compile``, once for all lengths, in a minute or two. Same
            results to rounding. ``auto``: on a GPU, in runs of 50 steps and more.
        hf_eval_batch_size: Conversations in the batches whose means ``val_loss_hf`` and ``test_loss_hf`` average.
        weighted_eval: Weigh tokens of ``val_loss`` and ``test_loss`` by their answer's ``weight``, as training does.
        max_new_tokens: Longest answer that `predict` writes.
        temperature: Of `predict`; 0 takes the most likely token each time, else the base's own top_p and top_k apply.
        adapter: Folder of a PEFT LoRA adapter, such as ``checkpoints/best`` of a run, whose weights a new run begins
            with; r, alpha and the like must be its own.
        seed: Seed of the adapters' initial values. Set from ``seed_everything``.

    Raises:
        LabError: A number outside its range, or settings that exclude each other.

    """

    def __init__(
        self,
        base: str = "unsloth/Llama-3.2-1B-Instruct",
        revision: str | None = None,
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
        cache_dequantised: bool | Literal["auto"] = False,
        compile: bool | Literal["auto"] = False,
        hf_eval_batch_size: int = 8,
        weighted_eval: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        adapter: str | None = None,
        seed: int = 3407,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_arguments("model", QLoRAModule.__init__, self.hparams, RANGES)
        refuse_combinations(self.hparams)
        self.automatic_optimization = False
        self.checkpointing: str = checkpointing  # what `auto` stands for, once it is chosen
        self.evaluation: Evaluation | None = None  # of the last validation or test that ended
        self._sums = EvaluationSums()
        self._gradient_factor = 1.0
        self._step_began = 0.0

    # -- one step ------------------------------------------------------------------------------------------------

    @override
    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        """AdamW over the adapters, and a linear schedule with warm-up over the run's steps."""
        from transformers import get_linear_schedule_with_warmup

        trainer, settings = self.trainer, self.settings
        trainer.fit_loop.setup_data()  # without it some limits leave the length of an epoch unknown
        self.total_steps = total_steps(trainer)
        resume.check_lengths(self._resumed, total_steps=self.total_steps, steps_per_epoch=trainer.num_training_batches)
        kind: Any = partial(torch.optim.AdamW, fused=self.device.type == "cuda")
        if settings.optimizer == "adamw_8bit":
            from lightning_lab.training.adamw_8bit import AdamW8bitAsync

            kind = AdamW8bitAsync
        keys = ("lr", "betas", "eps", "weight_decay")
        self._adapters = FlatWeights(self.trainable())
        optimizer = kind(self.flat_weights.parameters, **{key: settings[key] for key in keys})
        return [optimizer], [get_linear_schedule_with_warmup(optimizer, settings.warmup_steps, self.total_steps)]

    @override
    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, float]:
        """One optimizer step over all micro-batches of ``batch``.

        The loss of a step is the weighted sum of NLL over its supervised tokens, divided by the sum of their weights
        (1 each, unless the data says otherwise) on all processes; its gradient likewise, whatever the cut. There is one
        device-to-host read, after the last micro-batch.

        Returns:
            The step's row of ``metrics.csv``.

        Raises:
            LabError: The loss is not finite, or the gradient is not (which float16 scaling skips and counts), or ten
                float16 steps in a row overflowed. No weight has been changed by the step.

        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)
        self.flat_weights.begin_step()
        self.refresh_adapters()
        learning_rate = float(scheduler.get_last_lr()[0])

        half = self.compute_dtype == torch.float16
        weight = batch.supervised_tokens if batch.weight is None else batch.weight
        gradient_scale = self.loss_scale.value / weight if half else 1.0
        nll, raw_norm = self._sum_over_processes(self._backward(batch, gradient_scale))

        loss = nll / weight
        unscale = 1.0 / (gradient_scale * weight)
        grad_norm = raw_norm * unscale
        if self._may_step(loss, grad_norm, batch, half):
            limit = self.settings.max_grad_norm
            clip = 1.0 if limit is None else min(1.0, limit / (grad_norm + 1e-6))  # as clip_grad_norm_
            self._gradient_factor = unscale * clip  # for on_before_optimizer_step, which the next line calls
            optimizer.step()  # type: ignore[union-attr]
            scheduler.step()

        self.completed_steps += 1
        return self._log_step(batch, loss, grad_norm, learning_rate)

    def _backward(self, batch: StepBatch, gradient_scale: float) -> Tensor:
        """Run this process's micro-batches forward and backward; return their weighted NLL, a scalar on the device."""
        total = torch.zeros((), device=self.device)
        model = self.trainer.strategy.model
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            for micro_batch in batch.micro_batches:
                hidden = self.last_hidden_state(micro_batch)[micro_batch.predicting]
                targets, weights = micro_batch.targets, micro_batch.weights
                nll = supervised_nll_sum(hidden, self.head, targets, gradient_scale, self.settings.compile, weights)
                self.manual_backward(nll)
                total += nll.detach()
                del hidden, nll  # the graph: its 8-bit layers hold their inputs
        return total

    def last_hidden_state(self, batch: MicroBatch) -> Tensor:
        """Run the packed row through the decoder, whose linears PEFT has replaced. Returns ``[T, hidden_size]``."""
        decoder = self.peft_model.get_base_model().model
        return decoder(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_arguments(batch.cu_seqlens, batch.document_lengths, self.attention_kernel),
        ).last_hidden_state[0]

    def _sum_over_processes(self, nll: Tensor) -> tuple[float, float]:
        """Add up loss and gradients over the processes, in one message; a process without documents adds 0.

        Returns:
            The summed NLL, and the norm of the summed gradients: the step's one read from the device.

        """
        message = self.flat_weights.gather_gradients(nll)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(message)
        norm = torch.nn.utils.get_total_norm([w.grad for w in self.flat_weights.weights if w.grad is not None])
        summed, raw_norm = torch.stack([message[-1], norm]).tolist()
        return summed, raw_norm

    def _may_step(self, loss: float, grad_norm: float, batch: StepBatch, half: bool) -> bool:
        """Whether the step's numbers are finite; an overflow of float16 is counted, anything else stops the run."""
        step = self.completed_steps + 1
        if not math.isfinite(loss) or (not math.isfinite(grad_norm) and not half):
            what = f"loss is {loss}" if not math.isfinite(loss) else f"gradient norm is {grad_norm}"
            source = self.chat_data.rows.name if self.chat_data else "the loader"
            raise LabError(
                f"step {step}: {what} on rows {', '.join(map(str, batch.rows))} of {source}; stopped before "
                "any weight was changed; look at these rows with `preview`, or lower model.lr"
            )
        if math.isfinite(grad_norm):
            if half:
                self.loss_scale.succeeded()
            return True
        self.loss_scale.overflowed()
        if self.loss_scale.overflows_in_a_row >= OVERFLOW_LIMIT:
            raise LabError(
                f"step {step}: {OVERFLOW_LIMIT} float16 steps in a row overflowed; lower model.lr, or set "
                "model.compute_dtype to bfloat16 or float32"
            )
        return False

    @override
    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Normalise by the step's summed weights, undo float16 scaling and clip, in one multiplication."""
        self.flat_weights.scale_gradients(self._gradient_factor)

    def _log_step(self, batch: StepBatch, loss: float, grad_norm: float, learning_rate: float) -> dict[str, float]:
        row = {
            "step": self.completed_steps,
            "epoch": self.completed_steps / self.trainer.num_training_batches,
            "train_loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate,
            "tokens": batch.tokens,
            "supervised_tokens": batch.supervised_tokens,
            "padded_tokens": batch.tokens,  # documents are laid end to end: nothing is padded
            "tokens_per_second": batch.tokens / (time.perf_counter() - self._step_began),
            "peak_memory_mib": peak_so_far(self.device) / 2**20,
        }
        self._log({key: row[key] for key in ("step", "grad_norm", "lr", "tokens_per_second")})
        self._log({"train_loss": loss}, prog_bar=True)
        return row

    def _log(self, figures: Mapping[str, float], prog_bar: bool = False) -> None:
        """Log as float64 on the host: nothing is sent to the device to be read back, and nothing is rounded."""
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}
        self.log_dict(tensors, batch_size=1, prog_bar=prog_bar)

    @override
    def on_train_batch_end(self, outputs: Any, batch: StepBatch, batch_idx: int) -> None:
        """End the run with its last step; callbacks come before this, so that their time counts as no step's."""
        if self.completed_steps >= self.total_steps:
            self.trainer.should_stop = True  # makes Lightning validate once more, unless a validation is due anyway
        self._step_began = time.perf_counter()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._step_began = time.perf_counter()

    @override
    def on_validation_end(self) -> None:
        self._step_began = time.perf_counter()

    on_train_epoch_start = on_validation_end  # a step begins after whatever came before it

    # -- evaluation ----------------------------------------------------------------------------------------------

    @override
    def on_validation_model_eval(self) -> None:
        evaluation_mode(self)

    on_test_model_eval = on_validation_model_eval

    @override
    def on_validation_epoch_start(self) -> None:
        self.refresh_adapters()
        keep, weighted = self.trainer.state.fn != "fit", self.settings.weighted_eval
        self._sums = EvaluationSums(self.trained_rows, weighted=weighted, keep_tokens=keep)

    on_test_epoch_start = on_validation_epoch_start

    @override
    def validation_step(self, batch: MicroBatch, batch_idx: int) -> None:
        """Add one packed micro-batch to the split's sums."""
        with self._adapters_as_asked():
            hidden = self.last_hidden_state(batch)[batch.predicting]
        self._sums.add(batch, *supervised_nll(hidden, self.head, batch.targets, compiled=self.settings.compile))

    test_step = validation_step

    @override
    def on_validation_epoch_end(self) -> None:
        """Log the split's token-weighted figures."""
        self.evaluation = self._sums.evaluation(self.trainer.world_size, self.settings.hf_eval_batch_size)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking:
            self._log({"step": self.completed_steps})
            self._validated_step = self.completed_steps
        figures = self.evaluation.figures("val")
        self._log({"val_loss": figures.pop("val_loss")}, prog_bar=True)
        self._log(figures)

    @override
    def on_test_epoch_end(self) -> None:
        """Log the split's token-weighted figures."""
        self.evaluation = self._sums.evaluation(self.trainer.world_size, self.settings.hf_eval_batch_size)
        self._log(self.evaluation.figures("test"))

    @override
    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[tuple[Prompt, str]]:
        """Answer a batch of prompts."""
        answers = self.answer(batch, self.settings.max_new_tokens, self.settings.temperature)
        return list(zip(batch.prompts, answers, strict=True))

    def answer(self, batch: PromptBatch, max_new_tokens: int, temperature: float = 0.0) -> list[str]:
        """Answer prompts; greedily at temperature 0, which draws no random number."""
        self.refresh_adapters()
        with self._adapters_as_asked():
            answers = generate(
                self.peft_model,
                batch.input_ids,
                pad_id=batch.pad_id,
                stop_ids=batch.stop_ids,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            )
        return batch.texts(answers)

    def _adapters_as_asked(self) -> Any:
        return self.peft_model.disable_adapter() if self.evaluate_base else nullcontext()
