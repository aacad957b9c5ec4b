"""The lab's table of losses, by hand."""

from pathlib import Path

from lightning_lab.loss_table import Loss, lab_table, losses, window_note
from lightning_lab.rundir import MetricsRow, read_metrics
from tests.experiments.directories import HEADER, train_row, validation_row


def rows(*values: dict[str, float]) -> list[MetricsRow]:
    return [MetricsRow("", row) for row in values]


def test_the_training_loss_is_the_mean_since_the_validation_before() -> None:
    found = losses(
        rows(
            *({"step": 1, "train_loss": 4.0}, {"step": 2, "train_loss": 2.0}, {"step": 2, "val_loss": 3.5}),
            *({"step": 3, "train_loss": 1.0}, {"step": 3, "val_loss": 2.5, "val_loss_hf": 2.25}),
            {"step": 4, "val_loss": 2.75},
            {"step": 5, "train_loss": 9.0},
        )
    )
    assert found == [Loss(2, 3.0, 3.5), Loss(3, 1.0, 2.5, 2.25), Loss(4, None, 2.75)]


def test_or_the_mean_over_a_window_whatever_the_validations() -> None:
    trained = [{"step": step, "train_loss": float(loss)} for step, loss in enumerate([8, 4, 2, 1, 3], start=1)]
    validated = [{"step": step, "val_loss": 0.5} for step in (2, 4, 5)]
    found = losses(rows(*trained[:2], validated[0], *trained[2:4], validated[1], trained[4], validated[2]), window=3)
    assert [loss.train_loss for loss in found] == [(8 + 4) / 2, (4 + 2 + 1) / 3, (2 + 1 + 3) / 3]
    assert window_note(3) == "Training loss: mean over the last 3 steps."


def test_the_table_to_the_letter(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    path.write_text(HEADER + "\n" + train_row(1, 1.0) + train_row(2, 0.9296) + validation_row(2, 0.8799194))
    metrics, _ = read_metrics(path)
    head = "| Step | Training Loss | Validation Loss |\n|---:|---:|---:|"
    found = losses(metrics)
    assert lab_table(found).markdown() == f"{head}\n| 2 | 0.9648 | 0.879919 |"
    assert lab_table(found, 2.5).markdown() == f"{head}\n| 0 (base) | | 2.500000 |\n| 2 | 0.9648 | 0.879919 |"
    assert lab_table([]).markdown() == head


def test_a_validation_without_steps_before_it_has_no_training_loss() -> None:
    assert lab_table(losses(rows({"step": 1, "val_loss": 0.5}))).markdown().endswith("\n| 1 | | 0.500000 |")
