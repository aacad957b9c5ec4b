"""The model under a module: the quantised base with its adapters, and what lies on the device beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lightning_lab.hub import model_folder, revision_of, weights_fingerprint
from lightning_lab.models.attention import Kernel, attention_kernel, register_document_attention
from lightning_lab.models.base import load_base, resolve_compute_dtype
from lightning_lab.models.qlora import (
    adapter_state,
    add_adapters,
    compile_layers,
    enable_checkpointing,
    load_adapter_state,
    read_adapter,
    say_other_base,
    uses_fused_linear,
)
from lightning_lab.training.flat import FlatWeights
from lightning_lab.training.refusals import refuse_on_device

if TYPE_CHECKING:
    from peft import PeftModel

    from lightning_lab.models.fused_linear import KeptTensors


class AdaptedModel(pl.LightningModule):
    """A module whose model is made when a trainer asks for it, and saved as its adapter alone.

    Attributes:
        checkpointing: The mode in use; what ``auto`` stands for once the trainer has set the module up.
        continues: A checkpoint is to be loaded, so that ``model.adapter``, with which its run began, is not read.
        evaluate_base: Evaluation and prediction leave the adapters out.
        adapter_weights: SHA-256 of the file that ``model.adapter`` was read from, at the run's start; or None.

    """

    checkpointing: str
    compute_dtype: torch.dtype
    attention_kernel: Kernel
    base_weights: str

    def __init__(self) -> None:
        super().__init__()
        self.model: PeftModel | None = None
        self.evaluate_base = False
        self.continues = False
        self.adapter_weights: str | None = None
        self._compiled = False
        self._kept: KeptTensors | None = None  # from the first pass on, until the module is moved
        self._adapters: FlatWeights | None = None  # of the last `fit`

    @property
    def settings(self) -> Any:
        """The constructor's arguments by name, as Lightning keeps them in ``hparams``."""
        return self.hparams

    @property
    def _attached(self) -> pl.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:  # the module stands alone, as after load_from_checkpoint
            return None

    @override
    def configure_model(self) -> None:
        """Load the quantised base and add the adapters; the second time only what `auto` stands for is new."""
        if self.model is not None:
            self._prepare_layers()
            return
        settings = self.settings
        if settings.adapter and not (self.continues or self.evaluate_base):
            state, self.adapter_weights = read_adapter(settings.adapter, settings)
        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        if self._attached:
            device = self._attached.strategy.root_device
        self.compute_dtype = resolve_compute_dtype(settings.compute_dtype, device)
        self.attention_kernel = attention_kernel(device, self.compute_dtype)
        refuse_on_device(self.checkpointing, device)
        folder = model_folder(settings.base, weights=True, revision=settings.revision)
        settings.revision, self.base_weights = revision_of(folder), weights_fingerprint(folder)
        base = load_base(
            settings.base,
            revision=settings.revision,
            bits=settings.bits,
            compute_dtype=self.compute_dtype,
            device=device,
            attn_implementation=register_document_attention(),
        )
        keys = ("r", "alpha", "dropout", "target_modules", "rslora", "dora", "seed")
        self.model = add_adapters(base, **{key: settings[key] for key in keys}, fused=settings.fused_linear)
        if self.adapter_weights:
            load_adapter_state(self.model, state)
            if not self.global_rank:
                say_other_base(settings.adapter, base.name_or_path, self.base_weights)
        self._prepare_layers()
        self.model.train()
        # Under DDP nothing but the adapters is anybody's to send: the base is the same everywhere and frozen, and
        # processes run unequal numbers of micro-batches, so that a broadcast of buffers in each pass would hang.
        frozen = [n for n, w in self.named_parameters() if not w.requires_grad] + [n for n, _ in self.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def _prepare_layers(self) -> None:
        enable_checkpointing(self.peft_model, self.checkpointing)
        if self.settings.compile is True and not self._compiled:  # `auto` without a trainer is none
            compile_layers(self.peft_model)
            self._compiled = True

    @property
    def peft_model(self) -> PeftModel:
        """The model with its adapters, once :meth:`configure_model` has run."""
        assert self.model is not None, "configure_model has not run"
        return self.model

    @property
    def head(self) -> Tensor:
        """The language-model head's weight, ``[vocabulary, hidden_size]``."""
        return self.peft_model.get_base_model().lm_head.weight

    def trainable(self) -> list[nn.Parameter]:
        """The adapters' weights, in a fixed order."""
        return [parameter for parameter in self.peft_model.parameters() if parameter.requires_grad]

    @property
    def flat_weights(self) -> FlatWeights:
        """The adapters' weights as the optimizer has them, during `fit`."""
        assert self._adapters is not None, "configure_optimizers has not run"
        return self._adapters

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The adapter alone, never the base."""
        return adapter_state(self.peft_model)

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> None:
        """Load an adapter; demands exactly its keys and shapes."""
        self.configure_model()
        load_adapter_state(self.peft_model, dict(state_dict))
        if self._kept:
            self._kept.refresh()

    def refresh_adapters(self) -> None:
        """Let the layers see the adapters as they are now, whatever has changed them."""
        if self._kept is None and uses_fused_linear(self.settings):
            from lightning_lab.models.fused_linear import KeptTensors

            self._kept = KeptTensors(self.peft_model, self.compute_dtype, self.settings.cache_dequantised is True)
        elif self._kept:
            self._kept.refresh()

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move the module, and let go of the tensors on its old device that are no part of it.

        Lightning moves it to the CPU after each stage, also after one that failed.
        """
        if self._kept:
            self._kept.close()
            self._kept = None
        moved = super()._apply(fn, recurse)
        if self._adapters:
            self._adapters.release()
            self._adapters = None
        return moved
