"""A whole run on the tiny base: what it writes, and that its numbers are those of an independent computation."""

import json
from pathlib import Path

import pytest
import torch

from lightning_lab.__main__ import main
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.data.encoding import load_tokenizer
from tests.acceptance.conftest import adapter, lab, largest_difference, metrics, train_column, validations


@pytest.fixture(scope="module")
def folder(tiny_args: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        lab("fit", *tiny_args, "--trainer.max_epochs=2", "--val_every_steps=10")
    return folder


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return Path("runs/embedded")


def test_the_run_directory(run: Path, tiny_args: list[str]) -> None:
    steps = 26  # two epochs of 13 steps: 50 conversations in fours
    rows = metrics(run)
    assert [int(r["step"]) for r in rows if r["train_loss"]] == list(range(1, steps + 1))
    assert list(validations(run)) == [10, 20, 26]
    order = [(int(r["step"]), bool(r["val_loss"])) for r in rows]
    assert order == sorted(order)  # a step's train row comes before its validation row
    lr = train_column(run, "lr")
    expected = [3e-3 * (s / 5 if s < 5 else (steps - s) / (steps - 5)) for s in range(steps)]
    assert lr == pytest.approx(expected, abs=1e-12)
    assert lr[0] == 0.0
    assert train_column(run, "epoch")[-1] == 2.0
    table = (run / "losses.md").read_text().splitlines()
    losses = train_column(run, "train_loss")
    table = [line for line in table if "(base)" not in line]
    assert table[2].startswith(f"| 10 | {sum(losses[:10]) / 10:.4f} |")
    assert table[4].startswith(f"| 26 | {sum(losses[20:]) / 6:.4f} |")
    assert table[5:] == ["", "Training loss: mean over the steps since the row before."]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 3407
    assert environment["data"]["splits"]["train"]["conversations"] == 50
    assert environment["data"]["splits"]["train"]["dropped"] == {}
    assert environment["packages"]["torch"] == torch.__version__
    assert "ckpt_path" not in (run / "config.yaml").read_text()
    assert (run / "loss_curve.png").stat().st_size > 10_000
    samples = (run / "samples.md").read_text()
    assert [h for h in samples.splitlines() if h.startswith("# ")] == [
        "# Before training",
        "# Step 10",
        "# Step 20",
        "# Step 26",
    ]


def test_a_run_can_be_repeated_from_its_config(run: Path) -> None:
    lab("fit", f"--config={run}/config.yaml", "--trainer.max_steps=6")
    again = Path("runs/embedded-2")
    first = [r for r in metrics(run) if r["train_loss"]][:1]
    assert metrics(again)[0] == first[0]


def test_a_checkpoint_holds_the_adapter_alone_and_plain_peft_loads_it(run: Path, tiny_base: Path) -> None:
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("lora_" in key for key in checkpoint["state_dict"])
    parameters = sum(t.numel() for t in checkpoint["state_dict"].values())
    assert parameters == 2 * 32 * ((128 + 128) * 2 + (128 + 64) * 2 + (128 + 256) * 3)
    assert (run / "checkpoints" / "last.ckpt").stat().st_size < 10 * parameters

    model = _plain_peft(run, tiny_base).eval()
    stored = {k.replace(".default", ""): v for k, v in adapter(run, "best").items()}
    loaded = {k.replace(".default", ""): v for k, v in model.named_parameters() if "lora_" in k}
    assert largest_difference(stored, loaded) == 0.0
    # the best validation loss again, with nothing of ours but the token ids
    assert _validation_loss(model, run, tiny_base) == pytest.approx(min(validations(run).values()), abs=1e-5)


def test_hugging_faces_trainer_agrees_on_its_validation_loss(run: Path, tiny_base: Path, tmp_path: Path) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = _plain_peft(run, tiny_base)

    def evaluate(batch: int) -> float:
        options = TrainingArguments(tmp_path / "hf", per_device_eval_batch_size=batch, report_to="none", use_cpu=True)
        collator = DataCollatorForSeq2Seq(load_tokenizer(str(tiny_base)))
        loss: float = Trainer(model, options, data_collator=collator).evaluate(examples)["eval_loss"]
        return loss

    pairs = _validation_examples(run, tiny_base)
    examples = [{"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)} for ids, labels in pairs]
    assert len(examples) == 17  # two batches of eight and one of one
    ours = {float(r["val_loss"]): float(r["val_loss_hf"]) for r in metrics(run) if r["val_loss"]}
    best = ours[min(ours)]
    assert evaluate(8) == pytest.approx(best, abs=1e-5)
    lab("validate", f"--run_dir={run}", "--ckpt_path=best", "--model.hf_eval_batch_size=2")
    in_pairs = json.loads((run / "validation.json").read_text())["validation_loss_hf"]
    assert evaluate(2) == pytest.approx(in_pairs, abs=1e-5)
    assert min(abs(min(ours) - best), abs(best - in_pairs)) > 1e-4  # the three definitions differ on these rows


@pytest.mark.parametrize("micro_batch_tokens", [64, 4096])
@pytest.mark.parametrize("batch_size", [1, 7])
def test_validation_loss_does_not_depend_on_the_packing(
    run: Path, capsys: pytest.CaptureFixture[str], micro_batch_tokens: int, batch_size: int
) -> None:
    lab(
        "test",
        f"--run_dir={run}",
        "--ckpt_path=best",
        "--data.eval_split=validation",
        f"--data.micro_batch_tokens={micro_batch_tokens}",
        f"--data.batch_size={batch_size}",
    )
    record = json.loads((run / "validation.json").read_text())
    best_step, best = min(validations(run).items(), key=lambda item: item[1])
    assert record["validation_loss"] == pytest.approx(best, abs=1e-6)
    assert record["step"] == best_step
    assert record["conversations"] == 17
    lines = (run / "validation_examples.csv").read_text().splitlines()
    assert lines[0] == "row,loss,supervised_tokens"
    losses = [(float(loss), int(n)) for _, loss, n in (line.split(",") for line in lines[1:])]
    assert sum(loss * n for loss, n in losses) / sum(n for _, n in losses) == pytest.approx(best, abs=1e-6)
    assert "| validation | best" in capsys.readouterr().out


def test_the_base_is_evaluated_without_the_adapter(run: Path, tiny_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    lab("validate", f"--run_dir={run}", "--ckpt_path=base", "--model.bits=16")
    record = json.loads((run / "validation-base.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32).eval()
    assert record["validation_loss"] == pytest.approx(_validation_loss(plain, run, tiny_base), abs=1e-5)
    assert record["checkpoint"] == "base"
    assert (run / "losses.md").read_text().splitlines()[2] == f"| 0 (base) | | {record['validation_loss']:.6f} |"


def test_predict_writes_an_answer_for_each_conversation(run: Path) -> None:
    lab("predict", f"--run_dir={run}", "--ckpt_path=last", "--model.max_new_tokens=3")
    lines = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text().splitlines()]
    assert len(lines) == 13
    assert all(line["messages"][-1]["role"] == "user" and isinstance(line["answer"], str) for line in lines)
    assert all(line["reference"] for line in lines)


def _plain_peft(run: Path, tiny_base: Path) -> torch.nn.Module:
    """The run's best adapter on a fresh 4-bit base, by PEFT and transformers alone."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_base, quantization_config=quantised, dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / "checkpoints" / "best")


def _validation_examples(run: Path, tiny_base: Path) -> list[tuple[list[int], list[int]]]:
    import yaml

    settings = yaml.safe_load((run / "config.yaml").read_text())["data"]
    data = ChatDataModule(**settings, tokenizer=str(tiny_base))
    data.prepare(progress=False)
    rows = data.splits["validation"].rows
    return [(data.tokenized.input_ids(r).tolist(), data.tokenized.labels(r).tolist()) for r in rows]


def _validation_loss(model: torch.nn.Module, run: Path, tiny_base: Path) -> float:
    total, tokens = 0.0, 0
    with torch.no_grad():
        for ids, labels in _validation_examples(run, tiny_base):
            logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            total += torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="sum").item()
            tokens += int((targets != -100).sum())
    return total / tokens


def test_a_null_setting_is_read_back_as_null(run: Path) -> None:
    import yaml

    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["rows"] is None  # the default is 15,000


@pytest.mark.parametrize(
    "change",
    ["data.split_seed=1", "data.split=[40,20,20]", "data.split_method=lab", "model.alpha=5", "model.base=embedded"],
)
def test_held_out_rows_are_those_of_the_run(run: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    capsys.readouterr()
    assert main(["test", f"--run_dir={run}", "--ckpt_path=best", f"--{change}"]) == 2
    assert change.split("=")[0] in capsys.readouterr().err
