"""Answers in ids against a plain loop over whole prompts, without a cache, without padding."""

from typing import Any

import pytest
import torch

from lightning_lab.models import qlora
from lightning_lab.models.attention import register_document_attention
from lightning_lab.models.generation import generate
from tests.models.conftest import tiny_config

PROMPTS = [[1, 9, 17], [1, 4, 4, 8, 30, 12, 5], [1, 60]]
NO_STOP = 63  # the random model below never says it


@pytest.fixture
def model() -> Any:
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = LlamaForCausalLM(tiny_config(num_hidden_layers=3, eos_token_id=None, initializer_range=0.2))
        base.set_attn_implementation(register_document_attention())
        adapted = qlora.add_adapters(
            base.requires_grad_(False), r=4, alpha=8, dropout=0.0, target_modules=qlora.DEFAULT_TARGETS, rslora=False,
            dora=False, seed=1,
        )  # fmt: skip
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
    return adapted.train()


def answer(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Greedily, from the whole text each time."""
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    base.set_attn_implementation(register_document_attention())
    return ids[len(prompt) :]


def test_answers_are_those_of_each_prompt_alone(model: Any) -> None:
    expected = [answer(model, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == 3
    assert generate(model, PROMPTS, pad_id=0, stop_ids=[NO_STOP], max_new_tokens=12) == expected
    assert generate(model, PROMPTS, pad_id=44, stop_ids=[], max_new_tokens=12) == expected  # no stop at all


def test_an_answer_ends_before_the_token_that_stops_it(model: Any) -> None:
    whole = [answer(model, prompt, 12) for prompt in PROMPTS]
    given, own = whole[0][4], whole[1][2]
    model.get_base_model().generation_config.eos_token_id = [own, NO_STOP]

    def cut(ids: list[int]) -> list[int]:
        return ids[: next((i for i, token in enumerate(ids) if token in (given, own)), None)]

    # padding with a token that answers contain must take none of them away
    found = generate(model, PROMPTS, pad_id=whole[0][0], stop_ids=[given], max_new_tokens=12)
    assert found == [cut(ids) for ids in whole]
    assert any(len(ids) < 12 for ids in found)
    model.get_base_model().generation_config.eos_token_id = own
    assert generate(model, PROMPTS, pad_id=0, stop_ids=[given], max_new_tokens=12) == found


def test_everything_is_as_it_was_afterwards(model: Any) -> None:
    model.get_base_model().model.layers[1].eval()
    before = {module: module.training for module in model.modules()}
    state = torch.random.get_rng_state()
    generate(model, PROMPTS, pad_id=0, stop_ids=[], max_new_tokens=2)
    assert {module: module.training for module in model.modules()} == before
    assert model.get_base_model().config._attn_implementation == register_document_attention()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_sampling_follows_the_seed(model: Any) -> None:
    answers = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        answers.append(generate(model, PROMPTS, pad_id=0, stop_ids=[], max_new_tokens=8, temperature=2.0))
    assert answers[0] == answers[1] != answers[2]
