"""The lab's table of losses, from the rows of ``metrics.csv``; `callbacks.record` writes it to ``losses.md``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lightning_lab.rundir import MetricsRow
from lightning_lab.tables import Table, numbers


class Loss(NamedTuple):
    """A validation: its step, a mean training loss as `losses` takes it (None without steps), and its losses."""

    step: int
    train_loss: float | None
    val_loss: float | None
    val_loss_hf: float | None = None


def losses(rows: Iterable[MetricsRow], window: int | None = None) -> list[Loss]:
    """Each validation among the rows of ``metrics.csv``, which are in its order.

    Args:
        rows: The rows.
        window: The training loss is the mean over this many steps before; None for those since the validation before.

    """
    found: list[Loss] = []
    recent: dict[float, float] = {}  # by step
    for _, row in rows:
        if "train_loss" in row:
            recent[row["step"]] = row["train_loss"]
        else:
            if window:
                recent = {step: loss for step, loss in recent.items() if step > row["step"] - window}
            mean = sum(recent.values()) / len(recent) if recent else None
            found.append(Loss(int(row["step"]), mean, row["val_loss"], row.get("val_loss_hf")))
            recent = recent if window else {}
    return found


def window_note(window: int | None) -> str:
    """What the table's training loss is the mean over, as a sentence."""
    return f"Training loss: mean over the {f'last {window} steps' if window else 'steps since the row before'}."


def lab_table(found: Iterable[Loss], base: float | None = None) -> Table:
    """The lab's table, its lowest validation loss marked.

    Args:
        found: `losses`.
        base: Validation loss of the untouched base, where it has been measured; becomes row 0.

    """
    rows = [*([] if base is None else [Loss(0, None, base)]), *found]
    columns = (
        [str(row.step) if row.step else "0 (base)" for row in rows],
        numbers([row.train_loss for row in rows], ".4f", missing=""),
        numbers([row.val_loss for row in rows], ".6f", min),
    )
    return Table(("Step", "Training Loss", "Validation Loss"), list(zip(*columns, strict=True)), padded=False)
