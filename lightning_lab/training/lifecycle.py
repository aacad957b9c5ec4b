"""How a run of a module begins and goes on: its settings checked and chosen, checkpoints, an exact resume."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from typing_extensions import override

from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.files import flatten
from lightning_lab.models.qlora import enable_checkpointing
from lightning_lab.training import held_out, resume
from lightning_lab.training.adapted_model import AdaptedModel
from lightning_lab.training.auto import put, settle_auto
from lightning_lab.training.optim import LossScale
from lightning_lab.training.refusals import refuse_trainer, unusable_gpu


class Lifecycle(AdaptedModel):
    """All of `QLoRAModule` but its step and its evaluation.

    Attributes:
        checkpoint: The file that is to be loaded, if it is known before the trainer knows it.
        completed_steps: Optimizer steps of the run so far; after a checkpoint was loaded, those behind its adapter.
        total_steps: Optimizer steps of the whole run.
        validation_pending: The checkpoint was saved between a step and its validation, which `fit` then begins with.
        loss_scale: Of float16.
        dealt: What the adapter was trained on, and what was held out: see `held_out`; None where that is not known.
        trained_rows: Rows of the split being evaluated that were trained on.

    """

    def __init__(self) -> None:
        super().__init__()
        self.checkpoint: str | None = None
        self.completed_steps = 0
        self.total_steps = 0
        self.validation_pending = False
        self.loss_scale = LossScale()
        self.dealt: pa.Table | None = None
        self.trained_rows: list[int] = []
        self._validated_step = 0
        self._auto: list[str] = []  # keys that were `auto`
        self._resumed: Mapping[str, Any] = {}  # our own part of the checkpoint that `fit` continues from

    @property
    def chat_data(self) -> ChatDataModule | None:
        """The trainer's data module; None for loaders of another kind."""
        data = getattr(self._attached, "datamodule", None)
        return data if isinstance(data, ChatDataModule) else None

    @property
    def chosen(self) -> dict[str, Any]:
        """What is in use where `auto` may stand, by config key."""
        budgets = ("micro_batch_tokens", "eval_micro_batch_tokens")
        return {
            "model.checkpointing": self.checkpointing,
            "model.compile": self.settings.compile is True,
            "model.cache_dequantised": self.settings.cache_dequantised is True,
            **{f"data.{key}": getattr(self.chat_data, key, None) for key in budgets},
        }

    # -- building ------------------------------------------------------------------------------------------------

    @override
    def setup(self, stage: str) -> None:
        training = stage == "fit"
        refuse_trainer(self.trainer, training=training)
        if self.trainer.strategy.root_device.type == "cpu" and self.trainer.is_global_zero and (why := unusable_gpu()):
            print(f"warning: on the CPU, but {why}", file=sys.stderr)
        if training:  # a resumed run's position is loaded after this
            self.completed_steps = self._validated_step = 0
            self.validation_pending, self.loss_scale, self._resumed = False, LossScale(), {}
        adapter = self.settings.adapter if training and self.model is None else None
        self._know_rows(self.checkpoint or adapter, training)
        if self.checkpoint and not training:
            self.on_test_start()  # before the base is loaded
        if training:  # what an evaluation chose is for evaluation
            put(self, self.chat_data, dict.fromkeys(self._auto, "auto"))
        self._auto = settle_auto(self.trainer, self, self.chat_data, training=training)

    def _know_rows(self, origin: str | Path | None, training: bool) -> None:
        """Read what the checkpoint or adapter was trained on; add what this run deals out."""
        if origin:
            self.dealt = held_out.read_rows(Path(origin))
        if training and self.chat_data:
            if origin and self.dealt is None and self.trainer.is_global_zero:
                print(held_out.UNKNOWN, file=sys.stderr)
            self.dealt = held_out.deal_rows(self.chat_data, self.dealt)

    @override
    def on_test_start(self) -> None:
        """Look for conversations that were trained on among those to evaluate or to answer.

        Raises:
            LabError: There are some, and may not be; those of ``predict_source`` may.

        """
        self.trained_rows, data, stage = [], self.chat_data, self.trainer.state.fn
        if stage is None or stage == "fit" or data is None or self.evaluate_base:
            return
        if self.dealt is not None and stage == "predict" and data.predict_source:
            self.trained_rows = held_out.trained_prompts(self.dealt, data.own_prompts)
        elif self.dealt is not None:
            self.trained_rows = held_out.trained_rows(self.dealt, data, data.split_for(stage.value))
        elif self.completed_steps and self.trainer.is_global_zero:
            print(held_out.UNKNOWN, file=sys.stderr)

    on_validation_start = on_predict_start = on_test_start

    # -- checkpoints ---------------------------------------------------------------------------------------------

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add position, loss scale and RNG, in types that ``weights_only`` loading takes."""
        checkpoint[resume.KEY] = {
            "version": resume.VERSION,
            "completed_steps": self.completed_steps,
            "total_steps": self.total_steps,
            "steps_per_epoch": self.trainer.num_training_batches,
            "validation_pending": self.validation_due and self._validated_step != self.completed_steps,
            "loss_scale": vars(self.loss_scale).copy(),
            "chosen": self.chosen,
            "weights": self.base_weights,
            "revision": self.settings.revision,
            "adapter_weights": self.adapter_weights,
            "facts": self._facts,
            "data": resume.data_identity(self.chat_data),
            "rng": resume.rng_states(self),
        }

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take position, loss scale and RNG back; the RNG is set when training starts.

        Raises:
            LabError: The adapter, or for `fit` the run, was made under other settings.

        """
        self.continues = True
        self.configure_model()
        if self._attached and not self.checkpoint:
            self._know_rows(self._attached.ckpt_path, self._attached.state.fn == "fit")
        state, data = resume.own_part(checkpoint), self.chat_data
        command = self._attached.state.fn if self._attached else None
        if command == "fit":  # whatever would fit now: with dropout the cut into micro-batches is a part of the result
            resume.check_version(state)
            # not whether layers are compiled, which they are by now, or not: that is compared
            kept = state["chosen"].keys() & set(self._auto) - {"model.compile"}
            put(self, data, {key: state["chosen"][key] for key in kept})
            enable_checkpointing(self.peft_model, self.checkpointing)
        now = flatten({"model": self.hparams, "data": data.hparams if data else {}}) | self._facts
        # another split of the same source may be asked for where what was trained on is known by its contents
        by_content = command != "fit" and self.dealt is not None and now.get("data.allow_trained")
        resume.check_settings(checkpoint, now, self.base_weights, None if by_content else command)
        self.completed_steps = state["completed_steps"]
        if command == "fit":
            resume.check_data(state["data"], data)
            vars(self.loss_scale).update(state["loss_scale"])
            self.validation_pending, self._resumed = state["validation_pending"], state
            self.adapter_weights = state.get("adapter_weights")  # the first checkpoints of this format have none

    @property
    def _facts(self) -> dict[str, Any]:
        """What a continued run must agree with besides the settings, by its name in messages."""
        return {
            "model.compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "seed_everything": self.settings.seed,
            "the order's seed (data.seed)": self.chat_data.seed if self.chat_data else None,
            resume.PROCESSES: self._attached.world_size if self._attached else 1,
        }

    @property
    def validation_due(self) -> bool:
        """Whether a validation follows the last completed step, as Lightning decides it."""
        trainer, done = self.trainer, self.completed_steps
        if not done or not trainer.enable_validation:
            return False
        every_epochs, every = trainer.check_val_every_n_epoch, trainer.val_check_batch
        epoch, within = divmod(done - 1, trainer.num_training_batches)  # of an endless loader the first, all its steps
        if every_epochs is not None and (epoch + 1) % every_epochs:
            return False
        counted = done if every_epochs is None else within + 1
        return done >= self.total_steps or (every is not None and counted % every == 0)  # None: by the clock

    @override
    def on_fit_start(self) -> None:
        """Say what is held out and yet trained on; let a run begin whose last step is done but not validated.

        Lightning ends at once at ``max_steps``.
        """
        if self.validation_pending and self.completed_steps >= self.total_steps:
            self.trainer.fit_loop.epoch_loop.max_steps += 1 if self.trainer.max_steps >= 0 else 0
        if self.chat_data and self.trainer.is_global_zero:
            held_out.say_trained(self.dealt, self.chat_data)

    @override
    def on_train_start(self) -> None:
        """Restore the RNG after all that might have drawn from it; make up for a validation that was cut short."""
        if len(self._resumed.get("rng", [])) == self.trainer.world_size:
            resume.set_rng_state(self._resumed["rng"][self.trainer.global_rank], self.device)
        if self.validation_pending:
            if self.completed_steps >= self.total_steps and self.trainer.max_steps >= 0:
                self.trainer.fit_loop.epoch_loop.max_steps -= 1  # see on_fit_start
            validation = self.trainer.fit_loop.epoch_loop.val_loop
            validation.restarting = False  # from its first batch, whatever the one before it had counted
            self.trainer.validating = True
            validation.run()
            self.trainer.training = True
            self.validation_pending = False
        stopped = (c.wait_count >= c.patience for c in self.trainer.early_stopping_callbacks)
        if self.completed_steps >= self.total_steps or any(stopped):
            self.trainer.should_stop = True
