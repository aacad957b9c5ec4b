"""Prompt ids -> answer ids, from base and adapters."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch.nn.utils.rnn import pad_sequence

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
    device = model.get_input_embeddings().weight.device
    input_ids, attention_mask = (
        pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=filler, padding_side="left")
        for rows, filler in ((prompts, pad_id), ([[1] * len(ids) for ids in prompts], 0))
    )
    base = model.get_base_model()
    own = base.generation_config.eos_token_id
    stops = {*stop_ids, *(own if isinstance(own, list) else [own])} - {None}
    # for the time being, evaluation mode and an attention that knows caches and padding
    training = {module: module.training for module in model.modules()}
    attention = base.config._attn_implementation
    evaluation_mode(model)
    base.set_attn_implementation("sdpa")
    try:
        # compiled layers are for packed rows; caches and padding would compile them anew
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            output = model.generate(
                input_ids=input_ids.to(device),
                attention_mask=attention_mask.to(device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
                eos_token_id=sorted(stops) or None,
                use_cache=True,
                do_sample=temperature > 0,
                temperature=temperature or None,
            )
    finally:
        base.set_attn_implementation(attention)
        for module, mode in training.items():
            module.training = mode
    answers = output[:, input_ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in stops, ids)) for ids in answers]
