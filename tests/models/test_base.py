import json

import pytest
import torch

from lightning_lab.models import base, cpu
from lightning_lab.models.qlora import add_adapters

from .conftest import CPU, package_gguf, refusal


def load(source, bits=16, dtype=torch.float32, **settings):
    return base.load_base(str(source), bits=bits, compute_dtype=dtype, device=CPU, **settings)


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the embedded model ---


def test_embedded_equals_transformers_own_load_of_the_file(embedded, smollm_16):
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = package_gguf()
    own = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2]])
    with torch.no_grad():
        assert torch.equal(smollm_16(input_ids=ids).logits, own(input_ids=ids).logits)


def test_embedded_answers_a_question(smollm_16, embedded_tokenizer):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = embedded_tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    smollm_16.eval()
    try:
        answer = smollm_16.generate(**prompt, max_new_tokens=16, do_sample=False, use_cache=True)[0]
    finally:
        smollm_16.train()
    assert "Paris" in embedded_tokenizer.decode(answer[prompt["input_ids"].shape[1] :])


def test_the_base_is_frozen_training_and_without_a_cache(smollm_16, embedded):
    assert all(module.training for module in smollm_16.modules())
    assert not any(weight.requires_grad for weight in smollm_16.parameters())
    assert smollm_16.config.use_cache is False
    assert smollm_16.name_or_path == embedded
    assert sum(weight.numel() for weight in smollm_16.parameters()) == 134_515_008


def check_nf4(model, dtype, layers):
    from bitsandbytes.nn import Linear4bit

    quantised = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == layers * 7
    for module in quantised:
        state = module.weight.quant_state
        assert (state.quant_type, state.blocksize, state.nested) == ("nf4", 64, True)
        assert module.weight.dtype == torch.uint8
        assert module.compute_dtype == dtype
    assert {w.dtype for n, w in model.named_parameters() if not n.endswith("proj.weight")} == {dtype}
    assert all(module.training for module in model.modules())
    assert not any(weight.requires_grad for weight in model.parameters())


def test_four_bits_are_nf4_with_double_quantisation(smollm_4):
    check_nf4(smollm_4, torch.float32, 30)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_bits_compute_in_the_dtype_asked_for(tiny_folder, dtype):
    check_nf4(load(tiny_folder, bits=4, dtype=dtype), dtype, 2)


def test_four_and_eight_bits_stay_near_sixteen(embedded, smollm_16, smollm_4, embedded_tokenizer):
    text = "The capital of France is Paris. Water boils at one hundred degrees at sea level."
    ids = embedded_tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        exact = smollm_16(input_ids=ids, labels=ids).loss
        # Measured: 0.23 for 4 bits and 0.03 for 8; wrong codes or scales give a loss near log(49152) = 10.8.
        for model, distance in ((smollm_4, 0.4), (load(embedded, bits=8), 0.1)):
            loss = model(input_ids=ids, labels=ids).loss
            assert 0 < abs(loss - exact) < distance


def test_eight_bits_train_on_a_cpu(tiny_folder):
    model = load(tiny_folder, bits=8)
    embedded = model.get_input_embeddings()(torch.tensor([[3, 4, 3, 4]])).requires_grad_()
    model(inputs_embeds=embedded, labels=torch.tensor([[3, 4, 3, 4]])).loss.backward()
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.int8
    assert embedded.grad.abs().sum() > 0


# --- quantised folders ---


def test_a_quantised_folder_gives_the_same_logits(quantised_folder, smollm_4):
    again = load(quantised_folder, bits=4)
    ids = torch.arange(100, 164)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, smollm_4(input_ids=ids).logits)


def test_a_quantised_folder_may_keep_some_layers_in_sixteen_bits(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    mixed = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "model.layers.0.mlp.down_proj"],
    )
    stored = AutoModelForCausalLM.from_pretrained(tiny_folder, quantization_config=mixed, dtype=torch.float32).train()
    stored.save_pretrained(tmp_path / "mixed")
    again = load(tmp_path / "mixed", bits=4)
    kinds = [type(layer.mlp.down_proj).__name__ for layer in again.model.layers]
    assert kinds == ["Linear", "Linear4bit"]
    ids = torch.arange(8)[None]
    settings = dict(dropout=0.0, rslora=False, dora=False, seed=1)
    adapted = add_adapters(again, r=2, alpha=2, target_modules=["down_proj"], **settings)
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, stored(input_ids=ids).logits)  # an adapter adds 0


@pytest.mark.parametrize(
    ("bits", "dtype", "key"),
    [
        (8, torch.float32, "set model.bits: 4"),
        (16, torch.float32, "set model.bits: 4"),
        (4, torch.bfloat16, "set model.compute_dtype: float32"),
    ],
)
def test_a_quantised_folder_that_conflicts_is_refused(quantised_folder, bits, dtype, key):
    assert key in refusal(load, quantised_folder, bits=bits, dtype=dtype)


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "fp4"),
    ],
)
def test_a_foreign_quantisation_is_refused(tiny_folder, stored, reason):
    edit_config(tiny_folder, quantization_config=stored)
    assert reason in refusal(load, tiny_folder, bits=4)


# --- what cannot be used ---


def test_other_models_are_refused_by_name(tiny_folder):
    edit_config(tiny_folder, model_type="mistral")
    assert "'mistral'" in refusal(base.load_config, str(tiny_folder))
    (tiny_folder / "config.json").write_text("{")
    assert "config.json" in refusal(base.load_config, str(tiny_folder))


def test_only_whole_safetensors_are_read(tiny_folder):
    weights = tiny_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in refusal(load, tiny_folder)
    weights.rename(tiny_folder / "pytorch_model.bin")
    assert "no .safetensors" in refusal(load, tiny_folder)


def test_a_missing_weight_is_not_made_up(tiny_folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tiny_folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refusal(load, tiny_folder)


def test_a_missing_shard_is_one_line(tiny_folder):
    model = load(tiny_folder)
    (tiny_folder / "model.safetensors").unlink()
    model.save_pretrained(tiny_folder, max_shard_size="50KB")
    next(iter(tiny_folder.glob("model-00002*"))).unlink()
    assert "cannot be read" in refusal(load, tiny_folder)


# --- dtypes ---


@pytest.mark.parametrize(
    ("name", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("auto", "cuda:0", True, torch.bfloat16),
        ("auto", "cuda:1", True, torch.float16),
        ("auto", "cuda:1", False, torch.float16),
        ("bfloat16", "cuda:0", True, torch.bfloat16),
        ("float16", "cuda:0", True, torch.float16),
        ("float32", "cuda:1", False, torch.float32),
    ],
)
def test_compute_dtype(two_gpus, monkeypatch, name, device, bf16, expected):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: bf16)
    assert base.resolve_compute_dtype(name, torch.device(device)) == expected


@pytest.fixture
def two_gpus(monkeypatch):
    """An A100 and a T4."""
    capabilities = {0: (8, 0), 1: (7, 5)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capabilities[device.index])


def test_a_compute_dtype_that_cannot_be_honoured_is_refused(two_gpus):
    assert "float16" in refusal(base.resolve_compute_dtype, "bfloat16", torch.device("cuda:1"))
