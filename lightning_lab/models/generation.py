"""Prompt ids -> answer ids, from base and adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch

from lightning_lab.models.qlora import evaluation_mode

if TYPE_CHECKING:
    from peft import PeftModel


def generate(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Answer each prompt; prompts run as one left-padded batch.

    Greedy at temperature 0, which draws no random numbers.

    Args:
        model: Base with adapters; its modes and attention are as before afterwards.
        prompts: Token ids of at least one prompt, each up to where its answer begins.
        pad_id: Fills shorter prompts; masked, so any id will do.
        stop_ids: Tokens that end an answer, besides those of the model's own generation config.
        max_new_tokens: Longest answer.
        temperature: 0, or the sampling temperature; the base's own top_p and top_k then apply as well.

    Returns:
        Each answer's ids, without the token that ended it.

    """
    longest = max(map(len, prompts))
    input_ids = torch.tensor([[pad_id] * (longest - len(ids)) + list(ids) for ids in prompts])
    attention_mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    sampling: dict[str, Any] = (
        {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    )
    own = model.get_base_model().generation_config.eos_token_id
    stops = {*stop_ids, *(own if isinstance(own, list) else [own])} - {None}
    # compiled layers are for packed rows; caches and padding would compile them anew
    with _ready_to_generate(model), torch.compiler.set_stance("force_eager"), torch.no_grad():
        device = model.get_input_embeddings().weight.device
        output = model.generate(
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_id,
            eos_token_id=sorted(stops) or None,
            use_cache=True,
            **sampling,
        )
    return [list(takewhile(lambda token: token not in stops, ids)) for ids in output[:, longest:].tolist()]


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
