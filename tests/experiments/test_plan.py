"""The plan: a run's work counted from its conversations, and what is shown."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_lab.__main__ import main
from lightning_lab.configs_lookup import DEFAULTS, configs_dir, find_config
from lightning_lab.experiments.plan import plan, show, work_of
from lightning_lab.experiments.reference import lab_peak_gib
from lightning_lab.files import flatten, read_yaml
from lightning_lab.models.memory import peak_parts
from lightning_lab.rundir import MetricsRow
from tests.models.conftest import llama_3_2
from tests.models.test_memory import settings

WORK = {
    "optimizer steps": 10,
    "tokens": 1000,
    "supervised tokens": 500,
    "tokens of the largest micro-batch": 100,
    "most supervised tokens of a micro-batch": 50,
}
SPEEDS = [("tokens_per_second", 3.0), ("tokens_per_second", 20.0), ("tokens_per_second", 900.0)]


def test_work_is_counted_over_all_steps(tiny_base: Path, short_chats: Path, one_tokenizer: None) -> None:
    from lightning_lab.data.datamodule import ChatDataModule

    data = ChatDataModule(
        source=str(short_chats),
        split=[18, 2, 0],
        tokenizer=str(tiny_base),
        template="tokenizer",
        batch_size=4,
        micro_batch_tokens=150,
    )
    data.prepare(progress=False)
    lengths = data.tokenized.lengths[data.splits["train"].rows]
    work = work_of(data, 2, -1)
    supervised = data.tokenized.supervised[data.splits["train"].rows]
    assert work["optimizer steps"] == 10
    assert work["tokens"] == 2 * lengths.sum()
    assert work["supervised tokens"] == 2 * supervised.sum()
    micro_batches = [m for step in range(5) for m in data.step_batch(step).micro_batches]
    assert work["tokens of the largest micro-batch"] == max(m.input_ids.numel() for m in micro_batches)
    assert work["most supervised tokens of a micro-batch"] == max(len(m.targets) for m in micro_batches)
    assert work_of(data, None, 1)["tokens"] == work_of(data, 3, 1)["tokens"] == np.sum(lengths[data.step_documents(0)])
    assert work_of(data, 1, 99)["optimizer steps"] == 5
    assert work_of(data, -1, 2)["optimizer steps"] == 2


def test_what_is_shown(
    tiny_base: Path, short_chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    args = ["plan", "--config=embedded.yaml", f"--model.base={tiny_base}", f"--data.source={short_chats}"]
    args += ["--data.split=[18,2,0]", "--trainer.max_steps=2"]
    assert main([*args, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert list(planned["peak memory by checkpointing"]) == ["none", "selective", "full"]
    assert planned["peak memory by checkpointing"]["none"] == pytest.approx(planned["peak memory in all"], rel=0.02)
    assert planned["optimizer steps"] == 2
    assert planned["peak memory in all"] == sum(planned["peak memory"].values())
    assert planned["seconds of training"] is None
    assert planned["peak memory"]["program"] > planned["peak memory"]["adapters"] > 0
    run = Path("runs/embedded")
    run.mkdir(parents=True)
    row = "{},2.0,{},\n"
    rows = [row.format(step, speed) for step, speed in ((1, 50.0), (2, 200.0), (3, 100.0))]
    (run / "metrics.csv").write_text("step,train_loss,tokens_per_second,val_loss\n" + "".join(rows))
    assert main(args) == 0
    shown = capsys.readouterr().out
    assert "optimizer steps: 2" in shown
    assert "MiB  heap holes\n" in shown
    assert "tokens per second, measured before: 100\n" in shown
    assert main([*args, "--model.target_modules=[nonsense]"]) == 2


def test_the_labs_own_peak_stands_beside_its_settings_alone() -> None:
    settings = flatten(read_yaml(configs_dir() / DEFAULTS)) | flatten(read_yaml(find_config("lr3e-4_r32.yaml")))
    assert lab_peak_gib(settings) == 3.018
    for key, value in (("model.r", 16), ("model.bits", 16), ("data.max_length", 1024), ("model.base", "embedded")):
        assert lab_peak_gib(settings | {key: value}) is None
    assert lab_peak_gib(settings | {"model.lr": 2e-4, "model.r": 16, "model.alpha": 16}) is None  # not published


def test_known_speed_and_time() -> None:
    evaluated, *trained = (MetricsRow("", {key: v}) for key, v in (("val_loss", 1.0), *SPEEDS))
    shapes = llama_3_2("1B"), settings(), WORK, torch.device("cuda")
    assert plan(*shapes, [evaluated])["seconds of training"] is None
    planned = plan(*shapes, [evaluated, *trained])
    assert (planned["tokens per second, measured before"], planned["seconds of training"]) == (20.0, 50.0)
    assert "seconds of training: 50 (0:00:50)" in show(planned)
    assert "seconds of training: not known" in show(plan(*shapes))


def test_nothing_is_shown_for_nothing() -> None:
    planned = plan(llama_3_2("1B"), settings(bits=16), WORK, torch.device("cuda"))
    peak = peak_parts(llama_3_2("1B"), settings(bits=16), torch.device("cuda"), 100, 50)
    assert planned["peak memory"] == {name: size for name, size in peak.items() if size}
    # a GPU's memory holds no program, and a base that is not quantised no scales
    assert not {"program", "quantisation_state", "heap_holes"} & planned["peak memory"].keys()
    assert list(planned["peak memory by checkpointing"]) == ["none", "full", "offload"]
