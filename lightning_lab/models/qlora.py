"""LoRA adapters on a frozen, quantised Llama: made, counted, saved and restored."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lightning_lab.errors import LabError
from lightning_lab.models.attention import attention_operators

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CHECKPOINTING = ("none", "selective", "full", "offload")  # from the fastest to the least memory


def add_adapters(
    model: LlamaForCausalLM,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    rslora: bool,
    dora: bool,
    seed: int,
    fused: bool = True,
) -> PeftModel:
    """Put LoRA adapters (arXiv:2106.09685) next to the named linear layers: y = W x + scale * B A x.

    ``A`` (r, in_features) starts as kaiming_uniform(a=sqrt 5), ``B`` (out_features, r) as zeros: the model's answers do
    not change. Both are float32 whatever the base computes in; next to an unquantised 16-bit base, PEFT rounds the
    initial ``A`` to the base's dtype. Values depend on ``seed`` alone, not on the device, and the state of no random
    generator changes.

    PEFT's ``prepare_model_for_kbit_training`` is not called: it upcasts embeddings, norms and head to float32
    (2.1 GB for each matrix of 128,256 x 4,096). What else it does is done elsewhere: `load_base` freezes the base,
    `enable_checkpointing` checkpoints.

    Args:
        model: a frozen base model, on any device (also ``meta``).
        r: rank.
        alpha: scale is alpha / r, or alpha / sqrt(r) with ``rslora`` (arXiv:2312.03732).
        dropout: probability of dropping an element of the adapter's input, in [0, 1).
        target_modules: last part of the names of the linear layers.
        rslora: see ``alpha``.
        dora: learn the norm of each output's weights apart from their direction (arXiv:2402.09353).
        seed: of the initial values.
        fused: run each linear and its adapter as one autograd function (`fused_linear`); same results to rounding.

    Raises:
        LabError: naming the ``model.*`` key with a value that cannot be honoured.

    """
    if r <= 0:
        raise LabError(f"model.r: {r} must be at least 1")
    if alpha <= 0:
        raise LabError(f"model.alpha: {alpha} must be above 0; the adapter would change nothing")
    if not 0 <= dropout < 1:
        raise LabError(f"model.dropout: {dropout} must be at least 0 and below 1")
    _check_targets(model, target_modules)

    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_rslora=rslora,
        use_dora=dora,
        bias="none",
    )
    if fused and not dora:
        from lightning_lab.models.fused_linear import fused_layers

        targets = [m for name, m in model.named_modules() if name.rpartition(".")[2] in target_modules]
        config._register_custom_module(fused_layers(targets))
    # Lightning's configure_model runs under the GPU's device context; drawn on the CPU, values are the same everywhere.
    with warnings.catch_warnings(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # peft 0.21 asks transformers 5.23 for it by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs as well
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return exactly the trainable tensors, named as in ``model.named_parameters()``; they share the model's memory."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an `adapter_state` into a model with the same adapter, all of it or nothing.

    Raises:
        LabError: if names or shapes differ in any way from the model's trainable tensors.

    """
    own = adapter_state(model)
    problems = [
        f"{what} {len(names)} tensors (e.g. {names[0]})"
        for what, names in (("lacks", sorted(own.keys() - state.keys())), ("adds", sorted(state.keys() - own.keys())))
        if names
    ]
    problems += [
        f"has {name} of shape {tuple(state[name].shape)}, the model {tuple(weight.shape)}"
        for name, weight in own.items()
        if name in state and state[name].shape != weight.shape
    ][:1]
    if problems:
        raise LabError(
            f"the checkpoint does not fit the adapter: it {', and '.join(problems)}; "
            "use the model.base, model.r, model.target_modules and model.dora it was trained with"
        )
    for name, weight in own.items():
        weight.copy_(state[name])


def count_trainable(model: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def enable_checkpointing(model: LlamaForCausalLM | PeftModel, mode: str) -> None:
    """Choose what decoder layers keep for the backward pass.

    Only acts on a model in training mode. The non-reentrant form needs no inputs with gradients and works under DDP.

    Args:
        model: With or without adapters.
        mode: ``none``: all activations. ``full``: each layer's input, ``[1, T, hidden_size]``, and the rest is
            recomputed. ``selective``: attention's result is kept too, ``[1, T, heads * head_dim]`` in each layer, so
            that all is recomputed but attention, whose work grows with the square of a document. ``offload``: as
            ``full``, and the inputs wait in pinned host memory, which only CUDA has.

    Raises:
        LabError: if the mode is unknown.

    """
    if mode not in CHECKPOINTING:
        raise LabError(f"model.checkpointing: {mode!r} is unknown; use {', '.join(CHECKPOINTING)}")
    if mode == "none":
        model.activation_checkpointing_disable()
        return
    arguments: dict[str, Any] = {"use_reentrant": False}
    if mode == "selective":
        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, attention_operators())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments, offload=mode == "offload")


def compile_layers(model: PeftModel, backend: str = "inductor") -> None:
    """Compile each decoder layer, without graph breaks and for any number of tokens at once.

    All layers share one compiled graph a mode (training, evaluation, without adapters); the first layer has one of its
    own in training, since its input needs no gradient.
    """
    from lightning_lab.models.fused_linear import keep_plain_weights

    keep_plain_weights(model)
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)


def _check_targets(model: LlamaForCausalLM, target_modules: Sequence[str]) -> None:
    head = {"lm_head", "embed_tokens"}
    # The quantised classes of bitsandbytes derive from nn.Linear.
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)} - head
    valid = f"use some of {', '.join(sorted(linear))}"
    if not target_modules:
        raise LabError(f"model.target_modules is empty; {valid}")
    for name in target_modules:
        if name in head:
            tied = ", and embeddings and head are one tied matrix" if model.config.tie_word_embeddings else ""
            raise LabError(
                f"model.target_modules: {name} cannot be adapted, its weight is read directly{tied}; {valid}"
            )
        if name not in linear:
            raise LabError(f"model.target_modules: the model has no linear layer {name!r}; {valid}")


def evaluation_mode(model: nn.Module) -> None:
    """Put a model in evaluation mode, all but bitsandbytes' 4-bit layers.

    Those have no dropout, so their mode changes no result. But on CPUs with AVX512-BF16 one of them in evaluation mode
    repacks its weight in place at the first input without gradient, for inference only, and the training steps after
    a validation would dequantise the repacked bytes (bitsandbytes 0.50, ``Linear4bit.forward``).
    """
    from bitsandbytes.nn import Linear4bit

    model.eval()
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.training = True
