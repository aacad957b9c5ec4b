"""LoRA adapters on a frozen, quantised Llama: made, counted, saved and restored."""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lightning_lab.errors import LabError
from lightning_lab.files import check_sums, read_json, sha256
from lightning_lab.models.attention import attention_operators
from lightning_lab.rundir import ENVIRONMENT

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# From the most memory to the least, and from the least recomputed to the most. On a GPU that waits for its host,
# `selective` is faster than `full` only where layers are compiled: eager, it watches every operator from Python.
CHECKPOINTING = ("none", "selective", "full", "offload")


_LORA_KEYS = {"r": "r", "alpha": "lora_alpha", "rslora": "use_rslora", "dora": "use_dora"}
# What changes a plain adapter's meaning without changing its shapes, and the values that do not.
_UNUSUAL = ("alpha_pattern", "layer_replication", "alora_invocation_tokens", "init_lora_weights")
_USUAL_VALUES: tuple[Any, ...] = (None, {}, [], True, False, "gaussian")


def uses_fused_linear(settings: Any) -> bool:
    """Whether training runs through the fused linear; PEFT's own layers take everything else.

    Args:
        settings: `QLoRAModule`'s ``hparams``.

    """
    return bool(settings.fused_linear and settings.bits != 8 and not settings.dora and not settings.dropout)


def check_targets(target_modules: Sequence[str]) -> None:
    """Refuse ``model.target_modules`` that are no linear layers of a Llama's decoder, as head and embeddings are not.

    Raises:
        LabError: Names the first that is none, or says that there are none.

    """
    wrong = [name for name in target_modules if name not in DEFAULT_TARGETS]
    if wrong or not target_modules:
        what = f"{wrong[0]!r} is no linear layer of a Llama's decoder" if wrong else "none are named"
        raise LabError(f"model.target_modules: {what}; use some of {', '.join(DEFAULT_TARGETS)}")


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
        model: A frozen base model, on any device (also ``meta``).
        r: Rank, at least 1.
        alpha: Scale is alpha / r, or alpha / sqrt(r) with ``rslora`` (arXiv:2312.03732).
        dropout: Probability of dropping an element of the adapter's input, in [0, 1).
        target_modules: Last part of the names of the linear layers.
        rslora: See ``alpha``.
        dora: Learn the norm of each output's weights apart from their direction (arXiv:2402.09353).
        seed: Of the initial values.
        fused: Run each linear and its adapter as one autograd function (`fused_linear`); same results to rounding.

    Raises:
        LabError: As `check_targets`.

    """
    check_targets(target_modules)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(target_modules),
        use_rslora=rslora,
        use_dora=dora,
    )
    if fused and not dora:
        from bitsandbytes.nn import Linear4bit

        from lightning_lab.models.fused_linear import FusedLinear, FusedLinear4bit

        # One of the two: PEFT asks with isinstance, and bitsandbytes' layers are linears. 8-bit ones stay PEFT's own.
        quantised = hasattr(model.config, "quantization_config")
        config._register_custom_module({Linear4bit: FusedLinear4bit} if quantised else {nn.Linear: FusedLinear})
    # Lightning's configure_model runs under the GPU's device context; drawn on the CPU, values are the same everywhere.
    with warnings.catch_warnings(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
        # peft 0.21 asks transformers 5.23 for it by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.random.default_generator.manual_seed(seed)  # torch.manual_seed would reseed GPUs as well
        return get_peft_model(model, config, autocast_adapter_dtype=True)


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Return exactly the trainable tensors, named as in ``model.named_parameters()``; they share the model's memory."""
    return {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}


def read_adapter(source: str, settings: Any) -> tuple[dict[str, Tensor], str]:
    """Read a folder with a LoRA adapter as PEFT saves it.

    Args:
        source: The folder.
        settings: `QLoRAModule`'s ``hparams``, with which it must agree.

    Returns:
        Its tensors, for `load_adapter_state`, and the SHA-256 of their file.

    Raises:
        LabError: There is none in safetensors, it is damaged, or it was made under other settings; names them.

    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(source).expanduser()
    config, weights = read_json(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if not config or not weights.is_file():
        raise LabError(f"model.adapter: {source} has no adapter_config.json and {weights.name}; name a PEFT folder")
    check_sums(folder)
    try:
        state = load_file(weights)
    except (SafetensorError, OSError) as error:
        raise LabError(f"model.adapter: {weights} cannot be read ({error})") from None
    targets = {name.split(".")[-3] for name in state if ".lora_A." in name}
    made = {"target_modules": sorted(targets), **{key: config.get(name) or False for key, name in _LORA_KEYS.items()}}
    wanted = {**settings, "target_modules": sorted(settings["target_modules"])}
    different = [f"model.{key} is {wanted[key]}, its own is {was}" for key, was in made.items() if was != wanted[key]]
    different += [f"it has {key} {config[key]}" for key in _UNUSUAL if config.get(key) not in _USUAL_VALUES]
    if different:
        raise LabError(f"model.adapter: {source} does not fit: {'; '.join(different)}; set the keys as they were")
    # the file's names lack the adapter's, and those of DoRA's norms a last part
    names = {name: re.sub(r"(lora_[^.]*)(\.weight)?$", r"\1.default.weight", name) for name in state}
    return {names[name]: weight for name, weight in state.items()}, sha256(weights)


def say_other_base(source: str, name: str, weights: str) -> None:
    """Warn on stderr where an adapter comes from another base, which its shapes alone do not tell.

    Args:
        source: The adapter's folder. In a run's directory it is known by the base's weights in ``environment.json``.
        name: Of the base now, as PEFT writes it into ``adapter_config.json``.
        weights: Their fingerprint (`hub.weights_fingerprint`).

    """
    folder = Path(source).expanduser().resolve()
    its_name = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    its_weights = read_json(folder.parent.parent / ENVIRONMENT).get("base_weights")
    if (its_weights or weights) != weights or (not its_weights and its_name not in (None, name)):
        what = "other weights" if its_weights else "a base of another name"
        print(f"warning: model.adapter {source} was trained on {what}: on {its_name}, not {name}", file=sys.stderr)


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an `adapter_state` into a model with the same adapter, all of it or nothing.

    Raises:
        LabError: Names or shapes differ in any way from the model's trainable tensors.

    """
    own = adapter_state(model)
    here, there = ({name: tuple(weight.shape) for name, weight in each.items()} for each in (own, state))
    different = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if different:
        name = different[0]
        raise LabError(
            f"the checkpoint does not fit the adapter in {len(different)} tensors: the shape of {name} is "
            f"{there.get(name, 'missing')} in the checkpoint and {here.get(name, 'missing')} in the model; "
            "use the model.base, model.r, model.target_modules and model.dora it was trained with"
        )
    for name, weight in own.items():
        weight.copy_(state[name])


def enable_checkpointing(model: LlamaForCausalLM | PeftModel, mode: str) -> None:
    """Choose what decoder layers keep for the backward pass.

    Only acts on a model in training mode. The non-reentrant form needs no inputs with gradients and works under DDP.

    Args:
        model: With or without adapters.
        mode: ``none``: all activations. ``full``: each layer's input, ``[1, T, hidden_size]``, and the rest is
            recomputed. ``selective``: attention's result is kept too, ``[1, T, heads * head_dim]`` in each layer, so
            that all is recomputed but attention, whose work grows with the square of a document. ``offload``: as
            ``full``, and the inputs wait in pinned host memory, which only CUDA has.

    """
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
    own in training, since its input needs no gradient. 4-bit layers need `fused_linear.KeptTensors`.
    """
    for layer in model.get_base_model().model.layers:
        layer.compile(fullgraph=True, dynamic=True, backend=backend)


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
