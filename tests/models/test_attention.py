import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lab.models.attention import attention_kernel, document_attention, register_document_attention

LENGTHS = (5, 1, 9, 3)


def _tiny(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,  # keys are shared by three heads each
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def _packed(ids: torch.Tensor) -> dict[str, object]:
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS])[None],
        "use_cache": False,
        "document_borders": torch.tensor([0, 5, 6, 15, 18]),
    }


@pytest.mark.parametrize("training", [False, True])
def test_packed_logits_and_gradients_equal_each_document_alone(training: bool) -> None:
    packed, alone = _tiny(register_document_attention()).train(training), _tiny("eager").train(training)
    if training:
        packed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    logits = packed(**_packed(ids)).logits
    expected = torch.cat([alone(input_ids=piece, use_cache=False).logits for piece in ids.split(LENGTHS, 1)], dim=1)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    logits.square().sum().backward()
    expected.square().sum().backward()
    for ours, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)


def test_changing_one_document_leaves_the_others_bit_equal() -> None:
    model = _tiny(register_document_attention())
    ids = torch.randint(61, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    other = ids.clone()
    other[0, :5] = (other[0, :5] + 1) % 61
    with torch.no_grad():
        first, second = model(**_packed(ids)).logits, model(**_packed(other)).logits
    assert torch.equal(first[:, 5:], second[:, 5:])
    assert not torch.equal(first[:, :5], second[:, :5])


def test_no_mask_is_ever_built() -> None:
    tokens = sum(LENGTHS)
    square: list[torch.Size] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.shape[-2:] == (tokens, tokens):
                square.append(out.shape)
            return out

    ids = torch.zeros((1, tokens), dtype=torch.int64)
    with Watch(), torch.no_grad():
        _tiny(register_document_attention())(**_packed(ids))
    assert square == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"document_borders": None},
        {"document_borders": None, "longest_document": 4},
        {"attention_mask": torch.ones(1)},
        {"dropout": 0.1},
        {"query": torch.zeros(2, 2, 4, 8)},
    ],
)
def test_what_it_cannot_honour_is_refused(wrong: dict[str, object]) -> None:
    q = torch.zeros(1, 2, 4, 8)
    good = {"query": q, "key": q, "value": q, "attention_mask": None, "scaling": 0.5}
    good["document_borders"] = torch.tensor([0, 4])
    document_attention(torch.nn.Identity(), **good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="document attention"):
        document_attention(torch.nn.Identity(), **(good | wrong))  # type: ignore[arg-type]


def test_kernel_choice_without_a_gpu() -> None:
    assert attention_kernel(torch.device("cpu"), torch.bfloat16) == "cpu"
