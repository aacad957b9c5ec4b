"""The lab's published numbers, and how to lay others beside them, like with like."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_lab.experiments.runs import Run
from lightning_lab.files import read_yaml
from lightning_lab.loss_table import Loss, losses


def published() -> dict[str, Any]:
    """``published.yaml``, which says what its keys mean."""
    return read_yaml(Path(__file__).with_name("published.yaml"))


def lab_run(config: Mapping[str, Any], lab: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Find the lab's run of the same base (by name, whoever keeps it), learning rate, rank and alpha.

    Args:
        config: Settings by dotted key.
        lab: See `published`.

    Returns:
        Its entry, empty without such a run, and the keys of the lab's other settings that the config has otherwise.

    """
    base = str(config.get("model.base")).rstrip("/").rpartition("/")[-1]
    named = {**config, "model.base": base.removesuffix("-bnb-4bit").removesuffix("-unsloth")}
    like = [run for run in lab["runs"] if run["settings"].items() <= named.items()]
    return (like or [{}])[0], [key for key, value in lab["settings"].items() if config.get(key) != value]


def lab_peak_gib(config: Mapping[str, Any]) -> float | None:
    """What the lab's run reserved at its peak, in GiB, where the config (by dotted key) is exactly that run's."""
    run, unlike = lab_run(config, published())
    return None if unlike else run.get("peak_memory_gib")


def as_published(run: Run, split: str, window: int) -> list[Loss]:
    """A run's losses as the lab took its own: training over its window, and Hugging Face's loss on the split."""
    taken = losses(run.metrics, window)
    if split == "validation":
        return [loss._replace(val_loss=loss.val_loss_hf) for loss in taken]
    test = run.evaluations.get("test", {})
    step, loss = test.get("step"), test.get("test_loss_hf")
    train = {loss.step: loss.train_loss for loss in taken}
    return [Loss(step, train.get(step), loss)] if isinstance(step, int) and isinstance(loss, float) else []


def less_published(own: list[Loss], split: str, entry: Mapping[str, Any], steps: list[int]) -> list[Loss]:
    """What is left of losses after those of a lab's run, at the steps that both have and where nothing is missing."""
    if split not in entry:
        return []
    theirs = {step: figures for step, *figures in zip(steps, entry["train"], entry[split], strict=True)}
    return [
        Loss(loss.step, loss.train_loss - theirs[loss.step][0], loss.val_loss - theirs[loss.step][1])
        for loss in own
        if loss.step in theirs and loss.train_loss is not None and loss.val_loss is not None
    ]
