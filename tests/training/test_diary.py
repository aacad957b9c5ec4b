"""The losses of an evaluation's tokens beside their text, and the base's beside an adapter's."""

import csv
import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lightning_lab import ChatDataModule, QLoRAModule, run_directory
from lightning_lab.training.callbacks import diary
from lightning_lab.training.evaluation import Evaluation

REWRITES = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{%- else %}{{ m.content }}
{%- endif %}{{ '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
CHATS = [
    *([("What is it?", f"Number {i} 👩‍👧 is\x1b[31m naïve.")] for i in range(6)),
    [("One?", "<think>hm</think>日本"), ("Two?", "<think>so</think>Yes."), ("Three?", "No")],
    [("Say 語", "<script>`x|y`</script>")],
]


@pytest.fixture(scope="module")
def module(narrow_base: Path) -> QLoRAModule:
    """Adapters that are no zeros, as after training."""
    options: Any = {"base": str(narrow_base), "bits": 16, "compute_dtype": "float32", "target_modules": ["q_proj"]}
    module = QLoRAModule(**options, r=8, alpha=8)
    module.configure_model()
    torch.manual_seed(0)
    for weight in module.trainable():
        torch.nn.init.normal_(weight.data, std=0.5)
    return module


@pytest.fixture(scope="module")
def data(narrow_base: Path, folder: Path, one_tokenizer: None) -> ChatDataModule:
    lines = []
    for turns in CHATS:
        said = [{"role": r, "content": c} for q, a in turns for r, c in (("user", q), ("assistant", a))]
        lines.append(json.dumps({"messages": said}) + "\n")
    Path("chats.jsonl").write_text("".join(lines))
    Path("rewrites.jinja").write_text(REWRITES)
    options: Any = {"source": "chats.jsonl", "split": [0, 0, 8], "template": "rewrites.jinja"}
    data = ChatDataModule(**options, tokenizer=str(narrow_base), micro_batch_tokens=64)
    data.prepare(progress=False)
    return data


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("diary")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def evaluated(module: QLoRAModule, data: ChatDataModule) -> Evaluation:
    """A run's directory whose adapter was tested, and then its base; what the latter found."""
    for module.evaluate_base in (False, True):
        quiet: Any = {"logger": False, "enable_model_summary": False, "enable_progress_bar": False}
        trainer = pl.Trainer(accelerator="cpu", callbacks=run_directory("run", samples=0), **quiet)
        trainer.test(module, data, verbose=False)
        if not module.evaluate_base:
            Path("alone.csv").write_bytes(Path("run/test_examples.csv").read_bytes())
    assert module.evaluation
    return module.evaluation


def examples(name: str = "run/test_examples.csv") -> list[dict[str, str]]:
    with Path(name).open(newline="") as file:
        return list(csv.DictReader(file))


def tokens(name: str) -> dict[int, dict[str, Any]]:
    return {row["row"]: row for row in pq.read_table(f"run/{name}_tokens.parquet").to_pylist()}


@torch.no_grad()
def plain_losses(model: Any, data: ChatDataModule, row: int) -> list[float]:
    """Of each supervised token, document by document, by transformers alone."""
    ids, labels = data.tokenized.input_ids(row).tolist(), data.tokenized.labels(row).tolist()
    edges = [0, *data.tokenized.example(row).starts, len(ids)]
    found = []
    for start, end in pairwise(edges):
        logits = model(input_ids=torch.tensor([ids[start:end]])).logits[0, :-1]
        targets = torch.tensor(labels[start + 1 : end])
        losses = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
        found += losses[targets != -100].tolist()
    return found


@pytest.mark.parametrize("name", ["test", "test-base"])
@pytest.mark.usefixtures("evaluated")
def test_every_token_has_the_loss_that_plain_transformers_gives(
    name: str, narrow_base: Path, module: QLoRAModule, data: ChatDataModule
) -> None:
    from peft import PeftModel
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(narrow_base, dtype=torch.float32)
    if name == "test":
        Path("adapter").mkdir()
        save_file(module.state_dict(), "adapter/adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
        Path("adapter/adapter_config.json").write_text(json.dumps(config))
        model = PeftModel.from_pretrained(model, "adapter")
    stored = tokens(name)
    assert list(stored) == data.splits["test"].rows.tolist() == [int(row["row"]) for row in examples()]
    for row, found in stored.items():
        expected = plain_losses(model, data, row)
        text, nll = "".join(found["text"]), [value for value in found["nll"] if value is not None]
        assert found["where"] == f"chats.jsonl line {row + 1}"
        assert text == data.tokenizer.decode(data.tokenized.input_ids(row), clean_up_tokenization_spaces=False)
        assert "�" not in text
        assert sum(nll) == pytest.approx(sum(expected), rel=1e-5)
        supervised = "".join(t for t, value in zip(found["text"], found["nll"], strict=True) if value is not None)
        assert supervised == "".join(f"{answer}<|im_end|>" for _, answer in CHATS[row])
        if text.isascii():  # a piece is a token
            assert nll == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len(data.tokenized.example(6).starts) == 2  # a document for each of its answers


@pytest.mark.usefixtures("evaluated")
def test_whichever_is_evaluated_second_makes_the_join() -> None:
    assert list(examples("alone.csv")[0]) == ["row", "loss", "supervised_tokens"]
    base = {row["row"]: float(row["loss"]) for row in examples("run/test-base_examples.csv")}
    joined = examples()
    assert [{key: row[key] for key in ("row", "loss", "supervised_tokens")} for row in joined] == examples("alone.csv")
    assert {row["row"]: float(row["base_loss"]) for row in joined} == base
    for row in joined:
        assert float(row["loss_minus_base"]) == float(row["loss"]) - base[row["row"]] != 0
    assert list(examples("run/test-base_examples.csv")[0]) == ["row", "loss", "supervised_tokens"]


HEADER = "row,loss,supervised_tokens"


def test_the_join_by_hand(tmp_path: Path) -> None:
    own = {"split": "test", "contents": "c", "data_fingerprint": "f", "settings": {"max_length": 5}}
    written = {
        "test@faq": (own, ["1,2.5,10", "2,3.0,4", "3,1.0,7"]),
        "test-base@faq-2": (own, ["2,2.0,4", "1,4.0,10", "3,9.0,8"]),  # of row 3 other tokens
        "test": ({**own, "contents": "d"}, ["1,2.5,10"]),
        "test-base": ({**own, "data_fingerprint": "g"}, ["1,7.5,10"]),
        "test-base@faq": ({**own, "settings": {"max_length": 6}}, ["1,8.5,10"]),
        "validation-base": ({**own, "split": "validation"}, ["1,9.5,10"]),
    }
    for name, (record, lines) in written.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
        (tmp_path / f"{name}_examples.csv").write_text("\r\n".join([HEADER, *lines, ""]), newline="")
    changed = tmp_path / "test@faq_examples.csv"
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path != changed}
    for _ in range(2):  # again changes nothing
        diary.join_base(tmp_path, own)
        lines = changed.read_bytes().decode().split("\r\n")
        assert lines == [f"{HEADER},base_loss,loss_minus_base", "1,2.5,10,4.0,-1.5", "2,3.0,4,2.0,1.0", "3,1.0,7,,", ""]
        assert {path: path.read_bytes() for path in before} == before
    diary.join_base(tmp_path, {**own, "contents": "of nobody"})


def test_what_cannot_be_written_is_a_warning(
    evaluated: Evaluation,
    data: ChatDataModule,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*arguments: Any) -> Any:
        raise RuntimeError("no such text")

    monkeypatch.setattr(diary, "pieces", fails)
    (tmp_path / "test_tokens.parquet").write_bytes(b"of the evaluation before")
    record = json.loads(Path("run/test.json").read_text())
    assert not diary.write_diary(tmp_path, "test", record, evaluated, data)
    where = f"warning: {tmp_path / 'test'}: conversations cannot be reported"
    assert capsys.readouterr().err == f"{where} with their tokens (no such text)\n"
    assert not list(tmp_path.iterdir())
    # and a base's damaged losses keep no tokens back
    monkeypatch.undo()
    for name in ("test", "test-base"):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    (tmp_path / "test-base_examples.csv").write_text("row\r\n1\r\n")
    assert diary.write_diary(tmp_path, "test", record, evaluated, data)
    assert pq.read_table(tmp_path / "test_tokens.parquet")["row"].to_pylist() == evaluated.rows.tolist()
    assert capsys.readouterr().err == f"{where} beside the base ('supervised_tokens')\n"


@pytest.fixture(scope="module")
def tokenizer(narrow_base: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(narrow_base / "tokenizer.json"))


def test_pieces_by_hand(tokenizer: Any) -> None:
    assert [tokenizer.id_to_token(i) for i in tokenizer.encode("ab ï").ids] == ["ab", "ĠÃ", "¯"]
    ids = [tokenizer.token_to_id(token) for token in ("ab", "ĠÃ", "¯", "ab", "ab", "ab", "Ã")]
    assert diary.pieces(tokenizer, ids, [None, 1.0, 0.5, 2.0, None, None, 4.0]) == (
        ["ab", " ï", "ab", "abab", "�"],
        [None, 1.5, 2.0, None, 4.0],
    )


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=30), st.lists(st.booleans(), min_size=1))
@example("�", [True])
@example("a�b👩‍👧", [True, False])
def test_pieces_are_the_whole_text_and_lose_nothing(tokenizer: Any, text: str, mask: list[bool]) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    nll = [float(i) if mask[i % len(mask)] else None for i in range(len(ids))]
    texts, sums = diary.pieces(tokenizer, ids, nll)
    assert "".join(texts) == tokenizer.decode(ids, skip_special_tokens=False)
    assert sum(value or 0 for value in sums) == sum(value or 0 for value in nll)
    assert len(texts) == len(sums)
    assert all(a is not None or b is not None for a, b in pairwise(sums))
    if "�" not in tokenizer.decode(ids):  # SmolLM2 has no token for some bytes
        assert not any("�" in piece for piece in texts)
