"""Weights of labels: the step's loss and gradient against plain PyTorch, pair means against transformers' Trainer."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.nn import functional as F

from lightning_lab import run_directory
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.experiments.compare import compare
from lightning_lab.experiments.runs import Run
from lightning_lab.training.module import QLoRAModule
from tests.training.test_module import fit

LR, R, WARMUP, STEPS = 0.01, 4, 1, 3
TARGETS = ["q_proj", "v_proj", "down_proj"]

pytestmark = pytest.mark.usefixtures("one_tokenizer")


def opened(source: Path, base: Path, **options: Any) -> ChatDataModule:
    settings = {"split": [19, 1, 1], "batch_size": 8, "micro_batch_tokens": 96}  # the last step of an epoch holds 3
    data = ChatDataModule(source=str(source), tokenizer=str(base), template="tokenizer", **settings | options)
    data.prepare(progress=False)
    return data


def fitted(base: Path, data: ChatDataModule) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Each step's loss, and the adapter."""
    module = QLoRAModule(
        base=str(base),
        bits=16,
        compute_dtype="float32",
        optimizer="adamw",
        r=R,
        alpha=R,
        lr=LR,
        target_modules=TARGETS,
        warmup_steps=WARMUP,
    )
    watch = fit(module, data, STEPS)
    adapter = {n: p.detach().clone() for n, p in module.peft_model.named_parameters() if p.requires_grad}
    return watch.column("train_loss"), adapter


def plain_model(base: Path) -> Any:
    """The same base with PEFT's own layers and the initial values that a seed gives."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(3407)
    return get_peft_model(model, LoraConfig(r=R, lora_alpha=R, target_modules=TARGETS, task_type="CAUSAL_LM"))


@pytest.fixture(scope="module")
def source(short_chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "chats.jsonl"
    path.write_text("".join(short_chats.read_text().splitlines(keepends=True)[:21]))
    return path


def padded(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    pads = {"input_ids": 0, "labels": -100}
    batch = {k: torch.tensor([e[k] + [pad] * (longest - len(e[k])) for e in examples]) for k, pad in pads.items()}
    return {**batch, "attention_mask": (torch.arange(longest) < lengths[:, None]).long()}


def test_pair_means_are_those_of_transformers_trainer(narrow_base: Path, source: Path, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    data = opened(source, narrow_base, micro_mean=2)
    losses, adapter = fitted(narrow_base, data)

    rows = data.splits["train"].rows
    visited = [rows[data.step_documents(step)].tolist() for step in range(STEPS)]
    assert [len(step) for step in visited] == [8, 8, 3]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=LR,
        warmup_steps=WARMUP,
        weight_decay=0.01,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    examples = [
        {"input_ids": data.tokenized.input_ids(row).tolist(), "labels": data.tokenized.labels(row).tolist()}
        for step in visited
        for row in step
    ]
    model = plain_model(narrow_base)
    trainer = Trainer(model, arguments, train_dataset=examples, data_collator=padded)
    trainer.model_accepts_loss_kwargs = False
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx(expected, abs=1e-5)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert_close(adapter, trained)

    other, _ = fitted(narrow_base, opened(source, narrow_base))
    assert max(abs(a - b) for a, b in zip(other, losses, strict=True)) > 1e-3  # the mean over the step's tokens


def assert_close(adapter: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    plain = {name.replace(".default", ""): weight for name, weight in expected.items()}
    ours = {name.replace(".default", ""): weight for name, weight in adapter.items()}
    assert ours.keys() == plain.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, plain[name], atol=1e-5, rtol=0)


def write_weighted(source: Path, path: Path) -> list[dict[str, Any]]:
    """The chats with an answer of another weight each, and one that is context only."""
    chats = [
        {
            "messages": [
                {"role": "user", "content": chat["conversations"][0]["value"]},
                {"role": "assistant", "content": chat["conversations"][1]["value"], "weight": (0.25, 1, 2)[i % 3]},
                {"role": "user", "content": "and then?"},
                {"role": "assistant", "content": "so be it", "weight": 0},
            ]
        }
        for i, chat in enumerate(map(json.loads, source.read_text().splitlines()))
    ]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    return chats


@pytest.mark.parametrize("micro_mean", [None, 3])
def test_a_weighted_run_is_a_plain_loops(
    narrow_base: Path, source: Path, tmp_path: Path, micro_mean: int | None
) -> None:
    weighted = tmp_path / "weighted.jsonl"
    chats = write_weighted(source, weighted)
    data = opened(weighted, narrow_base, micro_mean=micro_mean)
    losses, adapter = fitted(narrow_base, data)

    model = plain_model(narrow_base).train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.01)
    expected = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = LR * (step / WARMUP if step < WARMUP else (STEPS - step) / (STEPS - WARMUP))
        rows = data.splits["train"].rows[data.step_documents(step)].tolist()
        found = [_weighted_nll(model, data, row, chats[row]) for row in rows]
        size = micro_mean or len(found)
        groups = [found[i : i + size] for i in range(0, len(found), size)]
        means = [sum(nll for nll, _ in group) / sum(weight for _, weight in group) for group in groups]
        loss = sum(means) / len(means)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        expected.append(loss.item())
    assert losses == pytest.approx(expected, abs=1e-5)
    assert_close(adapter, trained)


def test_a_weighted_evaluation_is_a_plain_loops(narrow_base: Path, source: Path, tmp_path: Path) -> None:
    chats = write_weighted(source, tmp_path / "weighted.jsonl")
    settings: dict[str, Any] = {"bits": 16, "compute_dtype": "float32", "r": R, "hf_eval_batch_size": 3}
    module = QLoRAModule(base=str(narrow_base), target_modules=TARGETS, weighted_eval=True, **settings)
    quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    for name, budget, weighted in (("a", 64, True), ("b", 4096, True), ("c", 4096, False)):
        data = opened(tmp_path / "weighted.jsonl", narrow_base, split=[1, 0, 20], eval_micro_batch_tokens=budget)
        module.hparams.weighted_eval = weighted
        pl.Trainer(callbacks=run_directory(tmp_path / name), **quiet).test(module, data, verbose=False)

    model = plain_model(narrow_base).eval()
    rows = data.splits["test"].rows.tolist()
    with torch.no_grad():
        found = [_weighted_nll(model, data, row, chats[row]) for row in rows]
    nll, weights = [sum_.item() for sum_, _ in found], [weight for _, weight in found]
    means = [sum(nll[i : i + 3]) / sum(weights[i : i + 3]) for i in range(0, 20, 3)]
    runs = {name: Run(tmp_path / name) for name in "abc"}
    for run in (runs["a"], runs["b"]):
        record = run.evaluations["test"]
        assert record["settings"]["weighted_eval"] is True
        assert record["test_loss"] == pytest.approx(sum(nll) / sum(weights), abs=1e-5)
        assert record["test_loss_hf"] == pytest.approx((3 * sum(means[:-1]) + 2 * means[-1]) / 20, abs=1e-5)
        # whole numbers of tokens: of answers of weight 0 none
        counts = {row: weight / (0.25, 1, 2)[row % 3] for row, weight in zip(rows, weights, strict=True)}
        expected = [(r, n / w, counts[r], w) for r, n, w in sorted(zip(rows, nll, weights, strict=True))]
        for example, of_loop in zip(run.examples("test"), expected, strict=True):
            assert example[:4] == pytest.approx(of_loop, abs=1e-5)
        assert record["supervised_tokens"] == sum(counts.values())
    plain = runs["c"].evaluations["test"]
    assert (plain["supervised_tokens"], plain["settings"]["weighted_eval"]) == (sum(counts.values()), False)
    assert abs(plain["test_loss"] - record["test_loss"]) > 1e-3
    # intervals are of the weighted loss, and never of two kinds
    (found_equal,), refused = compare([runs["a"], runs["b"], runs["c"]])
    assert found_equal.loss_a == pytest.approx(record["test_loss"], rel=1e-9)
    assert found_equal.tokens == record["supervised_tokens"]
    assert refused[0].startswith("a and c cannot be compared on test: the loss of one is weighted; ")


def _weighted_nll(model: Any, data: ChatDataModule, row: int, chat: dict[str, Any]) -> tuple[torch.Tensor, float]:
    """A conversation's weighted NLL and the sum of its weights, by the answers' lengths in the template's text."""
    ids = data.tokenized.input_ids(row).tolist()
    weights = torch.zeros(len(ids))
    for i, message in enumerate(chat["messages"]):
        if message["role"] == "assistant":
            turns = [{"role": m["role"], "content": m["content"]} for m in chat["messages"]]
            start = len(_ids(data, turns[:i], True))
            weights[start : len(_ids(data, turns[: i + 1], False)) - 1] = message["weight"]  # less the last newline
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    nll = F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="none")
    return (nll * weights[1:]).sum(), weights[1:].sum().item()


def _ids(data: ChatDataModule, turns: list[dict[str, str]], prompt: bool) -> list[int]:
    text = data.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    return data.tokenizer(text, add_special_tokens=False).input_ids
