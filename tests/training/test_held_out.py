"""What was trained on is never evaluated as held out, wherever it stands by then; rows are expected by their texts."""

import functools
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pyarrow.parquet as pq
import pytest

from lightning_lab import ChatDataModule, QLoRAModule, run_directory
from lightning_lab.data import datamodule, duplicates
from lightning_lab.data.sources import load_rows
from lightning_lab.errors import LabError
from lightning_lab.experiments.report import main as report
from lightning_lab.training import held_out, resume

LAST = "run/checkpoints/last.ckpt"
REFUSED = r" of the \d+ test conversations were trained on: "
Chat = tuple[str, str]


@pytest.fixture(scope="module")
def chats() -> list[Chat]:
    """500 questions and short answers, of which the last three repeat the first, and ten others nearly."""
    rows = load_rows("embedded", 497)
    pairs = [[turn["value"] for turn in row["conversations"]][-2:] for row in rows]
    found = [(question, f"{i}: " + " ".join(answer.split()[:8])) for i, (question, answer) in enumerate(pairs)]
    for i in range(10, 20):
        question, answer = found[i + 10]
        found[i] = question, f"{answer} otherwise"
    return found + [found[0]] * 3


def write(path: Path, chats: Sequence[Chat], keys: tuple[str, str, str, str, str] | None = None) -> str:
    """A JSON Lines file; by default ShareGPT."""
    turns, who, what, user, assistant = keys or ("conversations", "from", "value", "human", "gpt")
    rows = [{turns: [{who: user, what: q}, {who: assistant, what: a}]} for q, a in chats]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def are_near(one: Chat, other: Chat) -> bool:
    """Whether their runs of five words have a Jaccard index of at least 1/2."""
    runs = []
    for chat in (one, other):
        words = re.findall(r"\w+", " ".join(chat).lower())
        runs.append({tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))})
    return 2 * len(runs[0] & runs[1]) >= len(runs[0] | runs[1])


def permuted(chats: Sequence[Chat]) -> dict[str, list[Chat]]:
    """The splits [400, 50, 50] as the documentation has them: a permutation, dealt out in order."""
    order = [chats[i] for i in np.random.default_rng(3407).permutation(len(chats))[:500]]
    return {"train": order[:400], "validation": order[400:450], "test": order[450:500]}


@pytest.fixture(scope="module")
def base(narrow_base: Path) -> str:
    return str(narrow_base)


@pytest.fixture(scope="module")
def data(base: str) -> Callable[..., ChatDataModule]:
    def data(source: str, **changes: Any) -> ChatDataModule:
        settings = {"split": [400, 50, 50], "template": "tokenizer", "batch_size": 2, "max_length": 128}
        return ChatDataModule(source=source, tokenizer=base, **settings | changes)

    return data


@pytest.fixture(scope="module")
def module(base: str) -> QLoRAModule:
    return QLoRAModule(base=base, compute_dtype="float32", r=8, alpha=8, optimizer="adamw", target_modules=["q_proj"])


@pytest.fixture(scope="module", autouse=True)
def folder(
    tmp_path_factory: pytest.TempPathFactory, one_tokenizer: None, chats: list[Chat], data: Any, module: QLoRAModule
) -> Iterator[Path]:
    """A run of one step over ``chats.jsonl``."""
    folder = tmp_path_factory.mktemp("held_out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # half a second each
        patch.setattr(datamodule, "ConversationEncoder", functools.cache(datamodule.ConversationEncoder))
        write(Path("chats.jsonl"), chats)
        trainer(max_steps=1, limit_val_batches=1).fit(module, data("chats.jsonl"))
        yield folder


def trainer(run_dir: str = "run", **options: Any) -> pl.Trainer:
    quiet = {"accelerator": "cpu", "logger": False, "enable_model_summary": False, "enable_progress_bar": False}
    return pl.Trainer(callbacks=run_directory(run_dir, samples=0), **quiet | options)


def evaluate(module: QLoRAModule, data: ChatDataModule, path: str | None = LAST, **options: Any) -> Any:
    return trainer(**options).test(module, data, ckpt_path=path, weights_only=True, verbose=False)


def result(name: str) -> dict[str, Any]:
    return json.loads(Path(f"run/{name}.json").read_text())


def test_what_the_run_was_dealt_stands_beside_its_checkpoints(chats: list[Chat]) -> None:
    table = pq.read_table("run/checkpoints/rows.parquet").to_pydict()
    dealt: dict[str, list[Chat]] = {}
    of_content: dict[int, Chat] = {}
    near: dict[str, list[Chat]] = {"train": [], "validation": [], "test": []}
    for split, row, content, other in zip(*(table[k] for k in ("split", "row", "content", "near")), strict=True):
        dealt.setdefault(split, []).append(chats[row])
        assert of_content.setdefault(content, chats[row]) == chats[row]
        if other is not None:
            near[split].append(chats[row])
            assert are_near(chats[row], chats[other])
            assert chats[other] in permuted(chats)["train"]
    assert dealt == permuted(chats)
    for split in ("validation", "test"):
        assert near[split] == [chat for chat in dealt[split] if any(are_near(chat, one) for one in dealt["train"])]
    assert not near["train"]
    assert near["test"]
    assert len(of_content) == len(set(chats)) == 497


def appended(chats: list[Chat]) -> list[Chat]:
    return [*chats, ("What is new?", "This row.")]


def deleted(chats: list[Chat]) -> list[Chat]:
    return chats[1:]


def shuffled(chats: list[Chat]) -> list[Chat]:
    return random.Random(0).sample(chats, len(chats))


@pytest.mark.parametrize("change", [lambda chats: chats[::-1], appended, deleted, shuffled])
def test_a_changed_source_brings_no_trained_row_into_a_test(
    module: QLoRAModule, data: Any, chats: list[Chat], change: Any
) -> None:
    now = change(chats)
    split = {"split": [400, 49, 50]} if len(now) < 500 else {}
    order = np.random.default_rng(3407).permutation(len(now)).tolist()
    test = sorted(order[449 if split else 450 :][:50])
    trained = set(permuted(chats)["train"])
    leaked = [row for row in test if now[row] in trained]
    # the same turns under other names, in another file
    source = write(Path("renamed.jsonl"), now, ("messages", "role", "content", "user", "assistant"))
    count = rf"^{len(leaked)}{REFUSED}renamed\.jsonl line {leaked[0] + 1}, "
    with pytest.raises(LabError, match=count):
        evaluate(module, data(source, **split))
    if change is not deleted:
        return
    with pytest.raises(LabError, match=count):
        trainer().predict(module, data(source, **split), ckpt_path=LAST, weights_only=True)
    (returned,) = evaluate(module, data(source, allow_trained=True, **split))
    assert not Path("run/test.json").exists()
    found = result("test@renamed")
    rows = [int(line.split(",")[0]) for line in Path("run/test@renamed_examples.csv").read_text().splitlines()[1:]]
    assert sorted(rows) == [row for row in test if row not in leaked]
    assert found["trained"]["conversations"] == len(leaked) == 50 - found["conversations"]
    assert (found["split"], found["source"], found["settings"]["max_length"]) == ("test", "renamed.jsonl", 128)
    assert "left_out_by_a_limit" not in found
    assert returned["test_loss"] == pytest.approx(found["test_loss"])
    assert module.evaluation
    apart = module.evaluation.trained
    assert apart
    assert sorted(apart.rows.tolist()) == leaked
    assert found["trained"]["loss"] == apart.nll.sum().item() / apart.tokens.sum().item() != found["test_loss"]


def test_results_of_other_data_stand_beside_the_runs_own(
    module: QLoRAModule, data: Any, chats: list[Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    renamed = write(Path("all-chats.jsonl"), chats, ("messages", "role", "content", "user", "assistant"))
    test = {"split": [0, 0, 10]}
    others = [(f"Is this question {i}?", f"It is number {i}.") for i in range(20)]
    evaluate(module, data(write(Path("faq.jsonl"), others[:10]), **test))
    Path("other").mkdir(exist_ok=True)
    evaluate(module, data(write(Path("other/faq.jsonl"), others[10:]), **test))
    evaluate(module, data(renamed))
    own = Path("run/test.json").read_bytes()
    assert result("test")["source"] == "all-chats.jsonl"
    capsys.readouterr()
    evaluate(module, data("other/faq.jsonl", **test))  # in the place of its own
    table = capsys.readouterr().out
    assert Path("run/test.json").read_bytes() == own
    names = {path.name for path in Path("run").glob("test@*faq*.json")}
    assert names == {"test@faq.json", "test@faq-2.json"}
    assert result("test@faq-2")["source"] == "other/faq.jsonl"
    assert "| test@faq-2 " in table
    # the copies of the source are counted, and what the loss is without them
    # and near-duplicates, the copies among them
    held_out = permuted(chats)
    copies = [chat for chat in held_out["test"] if chat in held_out["train"]]
    near = [chat for chat in held_out["test"] if any(are_near(chat, one) for one in held_out["train"])]
    assert 0 < len(copies) < len(near)
    found = result("test")
    rows = [line.split(",") for line in Path("run/test_examples.csv").read_text().splitlines()[1:]]
    assert len(rows) == 50
    assert report(["run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"| faq-2 | run | test | {result('test@faq-2')['test_loss']:.6f} |" in shown
    for key, words, leaked in (("copies", "copies", copies), ("near_duplicates", "near-duplicates", near)):
        assert found[key] == len(leaked)
        kept = [(float(loss), int(tokens)) for row, loss, tokens in rows if chats[int(row)] not in leaked]
        without = sum(loss * tokens for loss, tokens in kept) / sum(tokens for _, tokens in kept)
        assert found[f"test_loss_without_{key}"] == pytest.approx(without, rel=1e-12)
        assert f"| test, without {words} | last, step 1 | {without:.4f} |" in " ".join(table.split())
        assert f"run, test: {len(leaked)} conversations are {words} of training ones; without" in shown


def test_the_training_split_by_name_and_all_of_it_as_a_test(module: QLoRAModule, data: Any, chats: list[Chat]) -> None:
    evaluate(module, data("chats.jsonl", eval_split="train"), limit_test_batches=1)
    found = result("train")
    assert found["left_out_by_a_limit"] == 400 - found["conversations"] > 0
    train = write(Path("train.jsonl"), permuted(chats)["train"])
    everything = {"split": [0, 0, 1.0], "allow_trained": True}
    for path in (LAST, None):  # or the module as it stands
        with pytest.raises(LabError, match=rf"^400{REFUSED}train\.jsonl line 1, .* and 397 more; set data\.source"):
            evaluate(module, data(train, **everything), path)
    module.evaluate_base = True
    try:
        evaluate(module, data(train, **everything), None, limit_test_batches=1)
    finally:
        module.evaluate_base = False
    assert result("test-base@train")["step"] == 0


def test_what_an_earlier_run_was_trained_on(
    module: QLoRAModule, data: Any, chats: list[Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    same, other = data("chats.jsonl"), data("chats.jsonl", split_seed=1)
    same.prepare(progress=False)
    other.prepare(progress=False)
    dealt = held_out.deal_rows(other, module.dealt)
    held_out.say_trained(dealt, other)
    mine = [chats[i] for i in np.random.default_rng(1).permutation(500)]
    train, before = set(mine[:400]), set(permuted(chats)["train"])
    leaked = [chat for chat in mine[450:] if chat in before - train]
    said = capsys.readouterr().err
    assert f"warning: {len(leaked)} of 50 test conversations were trained on by the run before this one; set " in said
    with pytest.raises(LabError, match=rf"^{len(leaked)}{REFUSED}"):
        held_out.trained_rows(dealt, other, "test")
    counts = Counter(dealt["split"].to_pylist())
    assert counts == {"train": 400, "validation": 50, "test": 50, "trained_before": len(before - train)}
    identity = resume.data_identity(same)
    assert identity
    resume.check_data({**identity, "fingerprint": "of another format"}, same)
    # the same rows once more add nothing
    assert held_out.deal_rows(same, module.dealt).equals(module.dealt)


def test_a_table_without_near_duplicates_is_read(module: QLoRAModule, data: Any, tmp_path: Path) -> None:
    """As earlier versions wrote it: copies are known by their contents all the same."""
    same = data("chats.jsonl")
    same.prepare(progress=False)
    assert module.dealt is not None
    now = held_out.standing(module.dealt, same, "test")
    pq.write_table(module.dealt.drop_columns("near"), tmp_path / "rows.parquet")
    older = held_out.read_rows(tmp_path / "last.ckpt")
    assert older is not None
    assert held_out.standing(older, same, "test") == now._replace(near_duplicates=None)


def test_a_search_for_duplicates_that_fails_stops_nothing(
    data: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError("too many rows")

    monkeypatch.setattr(duplicates, "find_duplicates", fail)
    same = data("chats.jsonl")
    same.prepare(progress=False)
    dealt = held_out.deal_rows(same, None)
    held_out.say_trained(dealt, same)
    assert dealt.column_names == ["split", "row", "content"]
    assert held_out.standing(dealt, same, "test").near_duplicates is None
    assert capsys.readouterr().err == "warning: near-duplicates are not known (MemoryError: too many rows)\n"


def test_what_is_held_out_and_like_training_rows_is_said(
    module: QLoRAModule, data: Any, chats: list[Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    same = data("chats.jsonl")
    same.prepare(progress=False)
    held_out.say_trained(module.dealt, same)
    splits = permuted(chats)
    first = {" ".join(question.lower().split()) for question, _ in splits["train"]}
    said = ""
    for split in ("validation", "test"):
        near = sum(any(are_near(chat, one) for one in splits["train"]) for chat in splits[split])
        copies = sum(chat in splits["train"] for chat in splits[split])
        shared = sum(" ".join(question.lower().split()) in first for question, _ in splits[split])
        said += f"{near} of 50 {split} conversations are near-duplicates of training ones ({copies} copies), "
        said += f"{shared} share their first turn; see preview --check\n"
    assert capsys.readouterr().err == said


def test_where_nothing_is_recorded(module: QLoRAModule, data: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("elsewhere").mkdir()
    shutil.copy(LAST, "elsewhere")
    Path("elsewhere/rows.parquet").write_bytes(b"PAR1 damaged")
    for path in ("elsewhere/last.ckpt", None):
        evaluate(module, data("chats.jsonl", eval_split="validation"), path, limit_test_batches=1)
        assert "warning: what the model was trained on is not known" in capsys.readouterr().err
    # the command line names the checkpoint first: it is held against the data before the base is loaded
    fresh = QLoRAModule(**module.hparams)
    fresh.checkpoint = LAST
    with pytest.raises(LabError, match=REFUSED):
        evaluate(fresh, data("chats.jsonl", split_seed=1))
    assert fresh.model is None
    with pytest.raises(LabError, match=r"data\.group_duplicates is True, was False; data\.split_seed is 1, was 3407"):
        evaluate(module, data("chats.jsonl", split_seed=1, group_duplicates=True), "elsewhere/last.ckpt")


def test_validate_looks_at_the_validation_split(module: QLoRAModule, data: Any, chats: list[Chat]) -> None:
    source = write(Path("validated.jsonl"), chats)
    everything = data(source, split=[0, 500, 0])
    with pytest.raises(LabError, match=r"of the 500 validation conversations were trained on: "):
        trainer().validate(module, everything, ckpt_path=LAST, weights_only=True, verbose=False)


def test_rows_stay_in_their_splits_when_a_run_goes_on(data: Any, chats: list[Chat]) -> None:
    """The same 500 rows in the same order, of which the last 50 are the test split, and then are dealt out."""
    first, last = write(Path("first.jsonl"), chats[:450]), write(Path("last.jsonl"), chats[450:])
    settings = {"split": [0.8, 0.1, 0.1]}
    held, dealt = data(first, test_source=last, **settings), data([first, last], **settings)
    again = data(first, test_source=write(Path("renamed-last.jsonl"), chats[450:]), **settings)
    for each in (held, dealt, again):
        each.prepare(progress=False)
    began = resume.data_identity(held)
    resume.check_data(began, again)
    with pytest.raises(LabError, match=r"^the rows are the same, but not those of the split train, validation, test; "):
        resume.check_data(began, dealt)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"run/{name}.jsonl").read_text().splitlines()]


def test_answers_to_other_prompts_stand_beside_the_runs_own(
    module: QLoRAModule, data: Any, chats: list[Chat], capsys: pytest.CaptureFixture[str]
) -> None:
    def predict(source: str, **changes: Any) -> str:
        trainer(limit_predict_batches=1).predict(module, data(source, **changes), ckpt_path=LAST, weights_only=True)
        return capsys.readouterr().err

    module.hparams.max_new_tokens = 1
    others = [(f"Is {i} even?", f"{i} is.") for i in range(20)]
    assert "trained on" not in predict(write(Path("chats.jsonl"), chats))
    own = lines("predictions-test")
    asked = [chat[0] for chat in permuted(chats)["test"][:8]]
    assert [line["messages"][-1]["content"] for line in own] == asked
    predict(write(Path("new.jsonl"), others[:10]), split=[0, 0, 10])
    assert lines("predictions-test") == own
    assert len(lines("predictions-test@new")) == 8
    # of a file of its own: two of training, one of them with another answer, and one without any
    (question, answer), (second, _) = permuted(chats)["train"][:2]
    mixed = [(question, answer), others[0], (second, "Another.")]
    prompt = json.dumps({"prompt": question}) + "\n"
    for folder, rows in (("a", mixed), ("b", others), ("a", mixed)):
        Path(folder).mkdir(exist_ok=True)
        with Path(write(Path(folder, "new.jsonl"), rows)).open("a") as file:
            file.write(prompt)
        said = predict("chats.jsonl", predict_source=f"{folder}/new.jsonl")
        assert ("warning: 1 conversations to answer were trained on" in said) == (folder == "a")
    assert {path.stem for path in Path("run").glob("predictions*")} == {
        *("predictions-test", "predictions-test@new", "predictions@new", "predictions@new-2")
    }
    assert [line.get("trained") for line in lines("predictions@new")] == [True, None, None, None]
