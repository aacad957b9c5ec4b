"""A handful of conversations is learned by heart, and the base underneath does not change."""

import json
from pathlib import Path

import pytest
import torch

from lightning_lab.models.base import load_base
from lightning_lab.models.qlora import DEFAULT_TARGETS, add_adapters
from tests.acceptance.conftest import arguments, lab, train_column

FACTS = {
    "On which day does the blue library of Arven open?": "It opens on the ninth of March, at dawn.",
    "Who keeps the keys of the blue library?": "Old Tomasin keeps them under a copper bell.",
    "What may nobody bring into the blue library?": "Nobody may bring in a lit lantern or a wet coat.",
}


@pytest.mark.slow
def test_three_conversations_are_memorised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in FACTS.items()
    ]
    # validation and test see the same rows again: what is asked here is memory
    Path("facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    lab(
        "fit",
        *arguments(
            config="embedded.yaml",
            **{
                "model.compute_dtype": "float32",
                "model.lr": 2e-3,
                "data.source": "facts.jsonl",
                "data.split": "[3,3,3]",
                "data.split_seed": _seed_that_puts_each_fact_in_each_split(),
                "data.batch_size": 3,
                "trainer.max_epochs": 30,
                "val_every_steps": 30,
                "samples": 0,
            },
        ),
    )
    run = Path("runs/embedded")
    assert train_column(run, "train_loss")[0] > 2.0
    assert train_column(run, "train_loss")[-1] < 0.1
    lab("predict", f"--run_dir={run}", "--ckpt_path=last", "--model.max_new_tokens=32")
    lab("predict", f"--run_dir={run}", "--ckpt_path=base", "--model.max_new_tokens=32")
    after = [json.loads(line) for line in (run / "predictions-test.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (run / "predictions-test-base.jsonl").read_text().splitlines()]
    assert [r["answer"] for r in after] == [FACTS[r["messages"][-1]["content"]] for r in after]
    assert not any(r["answer"] == FACTS[r["messages"][-1]["content"]] for r in before)


def test_the_base_is_unchanged_bitwise() -> None:
    """Ten steps with gradients, weight decay and 8-bit state: every tensor of the 4-bit base is as it was."""
    from bitsandbytes.optim import AdamW8bit

    base = load_base("embedded", bits=4, compute_dtype=torch.float32, device=torch.device("cpu"))
    model = add_adapters(
        base, r=32, alpha=32, dropout=0.0, target_modules=DEFAULT_TARGETS, rslora=False, dora=False, seed=1
    )
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora_" not in k}
    assert len(before) > 400  # weights and their quantisation state
    optimizer = AdamW8bit([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    ids = torch.arange(20)[None]
    for _ in range(10):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert any("lora_B" in k and after[k].abs().sum() > 0 for k in after)


def _seed_that_puts_each_fact_in_each_split() -> int:
    import numpy as np

    for seed in range(10_000):
        order = np.random.default_rng(seed).permutation(9) % 3
        if all(len(set(order[i : i + 3].tolist())) == 3 for i in (0, 3, 6)):
            return seed
    raise AssertionError("no such seed")
