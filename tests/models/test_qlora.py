import copy
import hashlib
import json
import math
import re
import warnings
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from lightning_lab.errors import LabError
from lightning_lab.models import base, qlora
from lightning_lab.models.attention import attention_arguments, register_document_attention

from .conftest import CPU, saved_bytes, tiny_config

IDS = torch.tensor([[1, 9, 17, 25, 33, 41, 49, 2]])


def adapt(model, **changes):
    settings = dict(
        r=4, alpha=8, dropout=0.0, target_modules=qlora.DEFAULT_TARGETS, rslora=False, dora=False, seed=3407
    )
    return qlora.add_adapters(model, **(settings | changes))


@pytest.fixture
def tiny():
    """A random Llama of two layers in float32, tied."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config()).requires_grad_(False).train()


def trained(model) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def train_once(model, ids=IDS):
    """One forward and backward with B away from zero, so that A has gradients as well; returns loss and gradients."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.01)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {n: w.grad.clone() for n, w in model.named_parameters() if w.requires_grad}


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "r", "trainable", "total"),
    [
        ("1B", 16, 11_272_192, 1_235_814_400),
        ("1B", 32, 22_544_384, 1_235_814_400),
        ("3B", 16, 24_313_856, 3_212_749_824),
        ("3B", 32, 48_627_712, 3_212_749_824),
    ],
)
def test_llama_3_2_has_the_published_number_of_parameters(llama_on_meta, size, r, trainable, total):
    model = llama_on_meta(size)
    assert sum(weight.numel() for weight in model.parameters()) == total
    assert trained(adapt(model, r=r, alpha=r)) == trainable


# --- values ---


def test_the_adapter_starts_without_an_effect(tiny):
    before = tiny(input_ids=IDS).logits
    assert torch.equal(adapt(tiny)(input_ids=IDS).logits, before)


def test_the_update_is_alpha_over_r_times_b_times_a(tiny):
    plain = copy.deepcopy(tiny)
    model = adapt(tiny, r=4, alpha=6, target_modules=["q_proj"])
    with torch.no_grad():
        for own, adapted in zip(plain.model.layers, tiny.model.layers, strict=True):
            q = adapted.self_attn.q_proj
            q.lora_B["default"].weight.normal_(generator=torch.Generator().manual_seed(1))
            own.self_attn.q_proj.weight += 6 / 4 * q.lora_B["default"].weight @ q.lora_A["default"].weight
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


def test_rslora_scales_by_the_root_of_r(tiny):
    layer = adapt(tiny, r=4, alpha=6, rslora=True).base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 6 / 2


def test_a_is_uniform_and_b_zero(tiny):
    state = qlora.adapter_state(adapt(tiny, r=32))
    for name, weight in state.items():
        if "lora_B" in name:
            assert not weight.any()
        else:
            bound = 1 / math.sqrt(weight.shape[1])  # kaiming_uniform with a = sqrt 5: sqrt(6 / ((1 + 5) * fan_in))
            assert weight.abs().max() <= bound
            assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_values_depend_on_the_seed_alone(tiny):
    first = qlora.adapter_state(adapt(copy.deepcopy(tiny)))
    torch.manual_seed(99)
    torch.rand(7)
    before = torch.random.get_rng_state()
    second = qlora.adapter_state(adapt(copy.deepcopy(tiny)))
    assert torch.equal(torch.random.get_rng_state(), before)
    third = qlora.adapter_state(adapt(copy.deepcopy(tiny), seed=3408))
    assert first.keys() == second.keys() == third.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first if "lora_A" in name)


def test_values_do_not_depend_on_the_device_context_around(tiny):
    """Lightning builds models under its device's context; on the meta device nothing would have a value."""
    expected = qlora.adapter_state(adapt(copy.deepcopy(tiny)))
    with torch.device("meta"):
        state = qlora.adapter_state(adapt(tiny))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_nothing_is_warned_of(tiny):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = adapt(tiny)
        qlora.enable_checkpointing(model, "full")
        qlora.enable_checkpointing(model, "none")


# --- precision and quantised bases ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_float32_and_learn(tiny_folder, bits, dtype, dora):
    loaded = base.load_base(str(tiny_folder), bits=bits, compute_dtype=dtype, device=CPU)
    model = adapt(loaded, dora=dora)
    state = qlora.adapter_state(model)
    assert len(state) == 2 * 7 * (3 if dora else 2)
    assert {weight.dtype for weight in state.values()} == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == dtype
    loss, gradients = train_once(model)
    assert loss.isfinite()
    assert gradients.keys() == state.keys()
    assert all(gradient.any() and gradient.dtype == torch.float32 for gradient in gradients.values())


def test_real_model_in_four_bits_learns(quantised_folder):
    loaded = base.load_base(str(quantised_folder), bits=4, compute_dtype=torch.float32, device=CPU)
    model = adapt(loaded, r=16, alpha=16)
    # 30 layers x 16 x (in + out): q, o 576+576; k, v 576+192; gate, up, down 576+1536
    assert trained(model) == 30 * 16 * (2 * 1152 + 2 * 768 + 3 * 2112)
    before = {name: weight.clone() for name, weight in model.named_parameters() if not weight.requires_grad}
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad], lr=1e-3)
    ids = torch.arange(1000, 1064)[None]
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters() if name in before)


# --- refusals ---


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ([], "none are named; use some of q_proj, k_proj"),
        (["q_proj", "query"], "'query' is no linear layer of a Llama's decoder; use some of q_proj, k_proj"),
        (["lm_head"], "'lm_head' is no linear layer of a Llama's decoder"),  # its weight is read directly
        (["embed_tokens"], "'embed_tokens' is no linear layer of a Llama's decoder"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(tiny, targets, part):
    with pytest.raises(LabError, match=r"model\.target_modules") as caught:
        adapt(tiny, target_modules=targets)
    assert part in str(caught.value)
    assert not any("lora" in name for name, _ in tiny.named_parameters())


def test_the_default_targets_are_all_linears_of_a_llamas_decoder(tiny):
    linears = {name.rpartition(".")[2] for name, m in tiny.model.named_modules() if isinstance(m, nn.Linear)}
    assert set(qlora.DEFAULT_TARGETS) == linears


@pytest.mark.parametrize(
    ("changes", "uses"),
    [
        ({}, True),
        ({"bits": 16}, True),
        ({"bits": 8}, False),
        ({"dora": True}, False),
        ({"dropout": 0.1}, False),
        ({"fused_linear": False}, False),
    ],
)
def test_what_trains_through_the_fused_linear(changes, uses):
    settings = dict(fused_linear=True, bits=4, dora=False, dropout=0.0)
    assert qlora.uses_fused_linear(SimpleNamespace(**(settings | changes))) is uses


# --- state ---


def test_state_is_exactly_what_trains_and_goes_back(tiny):
    model = adapt(copy.deepcopy(tiny))
    train_once(model)
    state = {name: weight.clone() for name, weight in qlora.adapter_state(model).items()}
    assert set(state) == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert all("lora_" in name for name in state)

    fresh = adapt(copy.deepcopy(tiny), seed=1)
    assert not torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)
    qlora.load_adapter_state(fresh, state)
    assert torch.equal(fresh(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("kind", ["lacks", "adds", "shape"])
def test_a_state_that_does_not_fit_changes_nothing(tiny, kind):
    model = adapt(tiny)
    state = {name: torch.ones_like(weight) for name, weight in qlora.adapter_state(model).items()}
    name = sorted(state)[-1]
    here = tuple(state[name].shape)
    if kind == "lacks":
        del state[name]
        said = f"{name} is missing in the checkpoint and {here} in the model"
    elif kind == "adds":
        state["lm_head.weight"] = torch.ones(1)
        said = "lm_head.weight is (1,) in the checkpoint and missing in the model"
    else:
        state[name] = torch.ones(3, 3)
        said = f"{name} is (3, 3) in the checkpoint and {here} in the model"
    with pytest.raises(LabError, match="in 1 tensors") as caught:
        qlora.load_adapter_state(model, state)
    assert said in str(caught.value)
    assert not any((weight == 1).all() for weight in qlora.adapter_state(model).values())


# --- checkpointing ---


def test_checkpointing_recomputes_and_changes_no_gradient(tiny):
    model = adapt(tiny)
    calls = []
    tiny.model.layers[1].self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    plain_loss, plain = train_once(model)
    assert len(calls) == 1
    calls.clear()
    qlora.enable_checkpointing(model, "full")
    loss, gradients = train_once(model)
    assert len(calls) == 2
    assert torch.equal(loss, plain_loss)
    assert all(torch.equal(gradients[name], plain[name]) for name in plain)
    calls.clear()
    qlora.enable_checkpointing(model, "none")
    train_once(model)
    assert len(calls) == 1


@pytest.fixture
def four_layers():
    """A random Llama of four layers in float32, with adapters."""
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return adapt(LlamaForCausalLM(tiny_config(num_hidden_layers=4)).requires_grad_(False).train())


def host_memory(monkeypatch):
    """Let ``offload`` use pageable memory, as there is no other without CUDA; returns the shapes of what it moves."""
    from transformers import modeling_utils

    moved = []

    def save(pin_memory, device_type):
        assert pin_memory
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (moved.append(tuple(tensor.shape)), tensor.clone())[1], lambda tensor: tensor
        )

    monkeypatch.setattr(modeling_utils, "save_on_cpu", save)
    return moved


@pytest.mark.parametrize(
    ("mode", "forward_passes"), [("none", 1111), ("selective", 2222), ("full", 2222), ("offload", 2222)]
)
def test_each_mode_recomputes_its_layers_and_gives_the_same_gradients(four_layers, monkeypatch, mode, forward_passes):
    moved = host_memory(monkeypatch)
    _, expected = train_once(four_layers)
    calls = [0, 0, 0, 0]
    for i, layer in enumerate(four_layers.get_base_model().model.layers):
        layer.self_attn.register_forward_pre_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    qlora.enable_checkpointing(four_layers, mode)
    _, gradients = train_once(four_layers)
    assert calls == [int(digit) for digit in str(forward_passes)]
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=0, atol=1e-5)
    # one hidden state a layer and nothing else: no weight, no rotary table
    assert moved == ([(1, 8, 64)] * 4 if mode == "offload" else [])


def test_checkpointing_keeps_less(four_layers):
    decoder, kept = four_layers.get_base_model().model, {}
    for mode in ("none", "full"):
        qlora.enable_checkpointing(four_layers, mode)
        kept[mode] = saved_bytes(
            four_layers, lambda: decoder(input_ids=IDS.repeat(1, 8), use_cache=False).last_hidden_state
        )
    assert kept["full"] < 0.2 * kept["none"]


@pytest.mark.parametrize(("mode", "attended"), [("none", 4), ("selective", 4), ("full", 8)])
def test_selective_recomputes_all_but_attention(four_layers, mode, attended):
    four_layers.get_base_model().set_attn_implementation(register_document_attention())
    qlora.enable_checkpointing(four_layers, mode)
    arguments = attention_arguments(torch.tensor([0, 8], dtype=torch.int32), [8], kernel="cpu")
    with torch.profiler.profile() as profile:
        four_layers.get_base_model().model(
            input_ids=IDS, use_cache=False, **arguments
        ).last_hidden_state.sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == attended
    assert calls["lightning_lab::cpu_document_attention_backward"] == 4


def test_norms_and_embeddings_stay_as_they_were(tiny):
    """prepare_model_for_kbit_training would have made them float32."""
    model = adapt(tiny.to(torch.bfloat16))
    others = {weight.dtype for weight in model.parameters() if not weight.requires_grad}
    assert others == {torch.bfloat16}
    assert any(isinstance(module, nn.Embedding) for module in model.modules())


def test_evaluation_mode_spares_the_four_bit_layers(smollm_4: Any) -> None:
    from bitsandbytes.nn import Linear4bit

    from lightning_lab.models.qlora import evaluation_mode

    modes = {module: module.training for module in smollm_4.modules()}
    try:
        smollm_4.train()
        evaluation_mode(smollm_4)
        four_bit = [m for m in smollm_4.modules() if isinstance(m, Linear4bit)]
        assert len(four_bit) == 30 * 7
        assert all(m.training for m in four_bit)
        assert not any(m.training for m in smollm_4.modules() if not isinstance(m, Linear4bit))
    finally:
        for module, mode in modes.items():
            module.training = mode


class TestBeginningFromAnAdapter:
    """With folders that PEFT alone has written."""

    SETTINGS: ClassVar[dict[str, Any]] = {
        **dict(r=4, alpha=8, rslora=False, dora=False),
        "target_modules": ["q_proj", "up_proj"],
    }

    @pytest.fixture
    def write(self, tiny, tmp_path):
        """Write an adapter with random weights by PEFT; returns its logits."""
        from peft import LoraConfig, get_peft_model

        def write(**changes) -> torch.Tensor:
            settings = dict(r=4, lora_alpha=8, target_modules=["up_proj", "q_proj"], task_type="CAUSAL_LM")
            model = get_peft_model(copy.deepcopy(tiny), LoraConfig(**settings | changes))
            for name, weight in model.named_parameters():
                if "lora_B" in name or "magnitude" in name:
                    torch.nn.init.uniform_(weight, 0.1, 0.2)
            model.save_pretrained(tmp_path)
            return model(input_ids=IDS).logits

        return write

    @pytest.mark.parametrize("dora", [False, True])
    def test_it_answers_as_in_peft(self, write, tiny, tmp_path, dora):
        expected = write(use_dora=dora)
        settings = self.SETTINGS | {"dora": dora}
        model = adapt(tiny, **settings)
        state, digest = qlora.read_adapter(str(tmp_path), settings)
        qlora.load_adapter_state(model, state)
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-5)
        assert digest == hashlib.sha256((tmp_path / "adapter_model.safetensors").read_bytes()).hexdigest()

    @pytest.mark.parametrize(
        ("changes", "named"),
        [
            ({"r": 8}, "model.r is 4, its own is 8"),
            ({"lora_alpha": 16}, "model.alpha is 8, its own is 16"),
            ({"use_rslora": True}, "model.rslora is False, its own is True"),
            ({"use_dora": True}, "model.dora is False, its own is True"),
            ({"target_modules": ["q_proj"]}, r"model.target_modules is ['q_proj', 'up_proj'], its own is ['q_proj']"),
            ({"alpha_pattern": {"q_proj": 2}}, "it has alpha_pattern {'q_proj': 2}"),
        ],
    )
    def test_one_that_was_made_otherwise_is_refused(self, write, tmp_path, changes, named):
        write(**changes)
        with pytest.raises(LabError, match=rf"^model\.adapter: .* does not fit: .*{re.escape(named)}"):
            qlora.read_adapter(str(tmp_path), self.SETTINGS)

    def test_one_for_fewer_layers_changes_nothing(self, write, tiny, tmp_path):
        write(layers_to_transform=[0])
        state, _ = qlora.read_adapter(str(tmp_path), self.SETTINGS)
        model = adapt(tiny, **self.SETTINGS)
        with pytest.raises(LabError, match=r"does not fit the adapter in 4 tensors"):
            qlora.load_adapter_state(model, state)

    def test_what_is_no_adapter(self, write, tmp_path):
        with pytest.raises(LabError, match=r"^model\.adapter: .* has no adapter_config\.json"):
            qlora.read_adapter(str(tmp_path), self.SETTINGS)
        write()
        (tmp_path / "adapter_model.safetensors").write_bytes(b"no")
        with pytest.raises(LabError, match=r"adapter_model\.safetensors cannot be read"):
            qlora.read_adapter(str(tmp_path), self.SETTINGS)

    def test_one_of_another_base_is_said(self, write, tmp_path, capsys):
        """By the weights that its run records; of a folder that is no run's by the name that PEFT writes."""
        best = tmp_path / "checkpoints" / "best"
        best.mkdir(parents=True)
        (best / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/one"}')
        for name, recorded, said in [
            ("owner/one", None, ""),
            ("owner/two", None, "a base of another name: on owner/one, not owner/two\n"),
            ("owner/two", "abc", ""),
            ("owner/one", "def", "other weights: on owner/one, not owner/one\n"),
        ]:
            (tmp_path / "environment.json").write_text(json.dumps({"base_weights": recorded}))
            qlora.say_other_base(str(best), name, "abc")
            before = f"warning: model.adapter {best} was trained on "
            assert capsys.readouterr().err == (before + said if said else "")
