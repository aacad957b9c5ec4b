"""Answers from base and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from lightning_lab.data.conversation import Conversation
from lightning_lab.data.rendering import Renderer
from lightning_lab.models.qlora import evaluation_mode

if TYPE_CHECKING:
    from peft import PeftModel


def generate(
    model: PeftModel,
    renderer: Renderer,
    tokenizer: Any,
    prompts: Sequence[Conversation],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """Answer each prompt; prompts run as one left-padded batch.

    The prompt's ids are those of training (the renderer makes both). Greedy at temperature 0, which draws no random
    numbers.

    Args:
        model: Base with adapters; its modes and attention are as before afterwards.
        renderer: Encodes the prompts.
        tokenizer: Decodes the answers.
        prompts: Conversations that end before the answer.
        max_new_tokens: Longest answer.
        temperature: 0, or the sampling temperature.

    Returns:
        The answers' text, without control tokens.

    """
    encoded = [renderer.encode_prompt(prompt) for prompt in prompts]
    longest = max(map(len, encoded))
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in encoded])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in encoded])
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    # compiled layers are for packed rows; caches and padding would compile them anew
    with _ready_to_generate(model), torch.compiler.set_stance("force_eager"), torch.no_grad():
        device = model.get_input_embeddings().weight.device
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            eos_token_id=_stop_tokens(model, renderer, tokenizer),
            use_cache=True,
            **sampling,
        )
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


@contextmanager
def _ready_to_generate(model: PeftModel) -> Iterator[None]:
    """Evaluation mode and an attention that knows caches and padding; then everything as it was."""
    base = model.get_base_model()
    training = {module: module.training for module in model.modules()}
    attention = base.config._attn_implementation
    evaluation_mode(model)
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(attention)
        for module, mode in training.items():
            module.training = mode


def _stop_tokens(model: PeftModel, renderer: Renderer, tokenizer: Any) -> list[int]:
    configured = model.get_base_model().generation_config.eos_token_id
    ids = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    if renderer.end_of_turn:
        ids.add(tokenizer.convert_tokens_to_ids(renderer.end_of_turn.strip()))
    return sorted(i for i in ids if i is not None)
