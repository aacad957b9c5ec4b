"""The lab's table of losses, from the rows of ``metrics.csv``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_lab.rundir import MetricsRow
from lightning_lab.tables import Table, numbers

Loss = tuple[int, float | None, float]


def losses(rows: Iterable[MetricsRow]) -> list[Loss]:
    """Step, training loss and validation loss of each validation.

    Args:
        rows: Of ``metrics.csv``, in its order.

    Returns:
        The training loss is the mean over the steps since the validation before, None where there are none.

    """
    found: list[Loss] = []
    since: list[float] = []
    for _, row in rows:
        if "train_loss" in row:
            since.append(row["train_loss"])
        else:
            found.append((int(row["step"]), sum(since) / len(since) if since else None, row["val_loss"]))
            since = []
    return found


def lab_table(found: Sequence[Loss], base: float | None = None) -> Table:
    """The lab's table, its lowest validation loss marked.

    Args:
        found: `losses`.
        base: Validation loss of the untouched base, where it has been measured; becomes row 0.

    """
    first = [] if base is None else [("0 (base)", None, base)]
    columns = (
        [str(step) for step, _, _ in (*first, *found)],
        numbers([train for _, train, _ in (*first, *found)], ".4f", missing=""),
        numbers([loss for _, _, loss in (*first, *found)], ".6f", min),
    )
    return Table(("Step", "Training Loss", "Validation Loss"), list(zip(*columns, strict=True)), padded=False)


def loss_table(rows: Iterable[MetricsRow], base: float | None = None) -> str:
    """``losses.md``: `lab_table` of the rows of ``metrics.csv`` as Markdown."""
    return lab_table(losses(rows), base).markdown() + "\n"
