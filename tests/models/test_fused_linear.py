"""The fused linear against PEFT's own layers and plain autograd; what it leaves to PEFT."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import nn

from lightning_lab.models import qlora
from lightning_lab.models.fused_linear import (
    FusedLinear,
    FusedLinear4bit,
    KeptTensors,
    Weight,
    dequantise,
    qlora_linear,
)
from tests.models.conftest import CPU, saved_bytes, tiny_config

IDS = torch.arange(3, 60)[None]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    return folder


def load(folder: Path, bits: int, dtype: torch.dtype = torch.float32) -> Any:
    from lightning_lab.models.base import load_base

    return load_base(str(folder), bits=bits, compute_dtype=dtype, device=CPU)


def adapt(model: Any, **changes: Any) -> Any:
    settings: dict[str, Any] = dict(
        r=4, alpha=8, dropout=0.0, target_modules=qlora.DEFAULT_TARGETS, rslora=False, dora=False, seed=1
    )
    model = qlora.add_adapters(model, **(settings | changes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05, generator=generator)
    return model


def loss_and_gradients(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def _logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def layer_of(model: Any) -> Any:
    return model.get_base_model().model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("bits", [4, 16])
def test_on_and_off_agree_in_float32(tiny_folder: Path, bits: int) -> None:
    on, off = (adapt(load(tiny_folder, bits), fused=fused) for fused in (True, False))
    assert type(layer_of(on)) is (FusedLinear4bit if bits == 4 else FusedLinear)
    assert type(layer_of(off)) is (lora.Linear4bit if bits == 4 else lora.Linear)
    (loss, gradients), (expected_loss, expected) = loss_and_gradients(on), loss_and_gradients(off)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    assert gradients.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-6)


def test_in_bfloat16_its_error_is_no_larger_than_pefts(tiny_folder: Path) -> None:
    """Against the same 4-bit weights in float32; gradients in the norm over all adapters."""
    _, exact = loss_and_gradients(adapt(load(tiny_folder, 4), fused=False))
    errors = {}
    for fused in (True, False):
        _, gradients = loss_and_gradients(adapt(load(tiny_folder, 4, torch.bfloat16), fused=fused))
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())
        errors[fused] = torch.stack([(gradients[n] - exact[n]).norm() for n in exact]).norm().item()
    assert 0 < errors[True] <= 1.02 * errors[False]


def test_against_plain_autograd_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, a, b = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 6), (7, 6), (3, 6), (7, 3))
    )
    x, a, b = (tensor.requires_grad_() for tensor in (x, a, b))
    torch.testing.assert_close(qlora_linear(x, Weight(w), a, b, 0.5), x @ w.T + 0.5 * (x @ a.T) @ b.T)
    assert torch.autograd.gradcheck(lambda x, a, b: qlora_linear(x, Weight(w), a, b, 0.5), (x, a, b))
    for missing in range(3):  # frozen inputs get no gradient and stop none
        some = [tensor.detach().requires_grad_(i != missing) for i, tensor in enumerate((x, a, b))]
        assert torch.autograd.gradcheck(lambda x, a, b: qlora_linear(x, Weight(w), a, b, 0.5), some)


def test_dequantised_weights_are_those_of_bitsandbytes(tiny_folder: Path) -> None:
    from bitsandbytes.functional import dequantize_4bit

    linear = load(tiny_folder, 4).model.layers[0].mlp.down_proj
    weight = Weight.of(linear)
    assert weight is not None
    expected = dequantize_4bit(linear.weight.data, linear.weight.quant_state)
    assert torch.equal(dequantise(*weight, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_dequantised_weights_change_no_bit(tiny_folder: Path, dtype: torch.dtype) -> None:
    off, on = (adapt(load(tiny_folder, 4, dtype), fused=True) for _ in range(2))
    names = list(on.state_dict())
    KeptTensors(on, dtype, dequantised=True)
    expected_loss, expected = loss_and_gradients(off)
    with torch.profiler.profile() as profile:
        loss, gradients = loss_and_gradients(on)
    assert not [event.key for event in profile.key_averages() if "dequantize" in event.key]
    assert loss == expected_loss
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    assert list(on.state_dict()) == names  # nothing more is saved


def test_it_keeps_less_for_the_backward_pass(tiny_folder: Path) -> None:
    kept = {}
    for fused in (True, False):
        model = adapt(load(tiny_folder, 4, torch.bfloat16), fused=fused)
        kept[fused] = saved_bytes(model, partial(_logits, model))
    assert kept[True] < 0.8 * kept[False]


def test_dora_and_8_bit_stay_pefts_own(tiny_folder: Path) -> None:
    for bits, changes in ((8, {}), (4, {"dora": True})):
        on, off = (adapt(load(tiny_folder, bits), fused=fused, **changes) for fused in (True, False))
        assert type(layer_of(on)) is type(layer_of(off)) is (lora.Linear8bitLt if bits == 8 else lora.Linear4bit)
        assert loss_and_gradients(on)[0] == loss_and_gradients(off)[0]


def test_dropout_goes_pefts_way_in_training_alone(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 16), dropout=0.5)
    plain = adapt(load(tiny_folder, 16), dropout=0.5, fused=False)
    losses = []
    for each in (model, plain):
        torch.manual_seed(5)
        losses.append(loss_and_gradients(each)[0])
    assert losses[0] == losses[1]
    torch.testing.assert_close(
        model.eval()(input_ids=IDS).logits, plain.eval()(input_ids=IDS).logits, rtol=0, atol=1e-5
    )


def test_disabled_and_merged_adapters(tiny_folder: Path) -> None:
    base = load(tiny_folder, 16)
    untouched = copy.deepcopy(base)(input_ids=IDS).logits
    model = adapt(base).eval()
    adapted = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, untouched)
    assert not torch.equal(adapted, untouched)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, FusedLinear) for module in merged.modules())
    torch.testing.assert_close(merged(input_ids=IDS).logits, adapted, rtol=0, atol=1e-5)


def test_a_layer_with_a_bias_goes_pefts_way() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.q_proj(x)

    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(0)
    net = Net()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    config._register_custom_module({nn.Linear: FusedLinear})
    x = torch.randn(3, 4, 6)
    expected = net(x)
    inject_adapter_in_model(config, net)
    torch.testing.assert_close(net(x), expected)


def test_the_saved_adapter_is_an_ordinary_one(tiny_folder: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = adapt(load(tiny_folder, 4))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert "custom" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text())).lower()
    plain = PeftModel.from_pretrained(load(tiny_folder, 4), tmp_path)
    assert type(layer_of(plain)) is lora.Linear4bit
    for each in (model, plain):  # not .eval(): CPUs with AVX512-BF16 then answer through bfloat16
        qlora.evaluation_mode(each)
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 16])
def test_adapters_rounded_once_change_no_bit(tiny_folder: Path, bits: int) -> None:
    off, on = (adapt(load(tiny_folder, bits, torch.bfloat16), fused=True) for _ in range(2))
    kept = KeptTensors(on, torch.bfloat16)
    for scale in (1.0, 1.5):
        with torch.no_grad():
            for model in (off, on):
                for name, weight in model.named_parameters():
                    if "lora_" in name:
                        weight.data = weight.data * scale + 0.001  # other memory, as a move to a device gives
        kept.refresh()
        (loss, gradients), (expected_loss, expected) = (loss_and_gradients(model) for model in (on, off))
        assert loss == expected_loss
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)
        assert all(gradient.dtype == torch.float32 for gradient in gradients.values())


def test_kept_scales_change_no_bit_and_save_a_kernel(tiny_folder: Path) -> None:
    off, on = (adapt(load(tiny_folder, 4, torch.bfloat16), fused=True) for _ in range(2))
    kept = KeptTensors(on, torch.bfloat16)
    calls = {}
    for model in (off, on):
        with torch.profiler.profile() as profile:
            calls[model is on] = loss_and_gradients(model)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert ("bitsandbytes::dequantize_blockwise" in counts) is (model is off)
    assert calls[True][0] == calls[False][0]
    assert all(torch.equal(calls[True][1][name], gradient) for name, gradient in calls[False][1].items())
    kept.close()
    assert layer_of(on).plain_weight is None


def test_a_merged_and_unmerged_base_is_read_anew(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 4), fused=True)
    KeptTensors(model, torch.float32)
    layer = layer_of(model)
    layer.merge()
    layer.unmerge()  # quantised twice by now
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), lora.Linear4bit.forward(layer, x), rtol=1e-5, atol=1e-5)


def test_rounded_adapters_are_used_until_they_are_let_go(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 4, torch.bfloat16), fused=True)
    before, kept = loss_and_gradients(model)[0], KeptTensors(model, torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight += 0.1
    assert loss_and_gradients(model)[0] == before  # they are not refreshed
    kept.close()
    assert loss_and_gradients(model)[0] != before


def test_layers_that_are_merged_by_then_are_read_anew_when_they_are_not(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 4), fused=True)
    layer = layer_of(model)
    layer.merge()
    KeptTensors(model, torch.float32)
    layer.unmerge()
    x = torch.randn(1, 3, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), lora.Linear4bit.forward(layer, x), rtol=1e-5, atol=1e-5)


def test_another_adapter_is_not_taken_for_the_rounded_one(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 4, torch.bfloat16), fused=True)
    KeptTensors(model, torch.bfloat16)
    model.add_adapter("other", model.peft_config["default"])  # B is 0
    model.set_adapter("other")
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, base)
    model.base_model.set_adapter(["default", "other"])  # both at once go PEFT's way
    KeptTensors(model, torch.bfloat16)
    assert model(input_ids=IDS).logits.isfinite().all()


def test_what_an_evaluation_made_can_be_trained_with(tiny_folder: Path) -> None:
    model = adapt(load(tiny_folder, 4, torch.bfloat16), fused=True)
    with torch.inference_mode():
        kept = KeptTensors(model, torch.bfloat16)
    kept.refresh()
    assert loss_and_gradients(model)[1]
